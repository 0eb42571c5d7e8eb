"""What is left of the service when ten times as much is asked of it as it can do.

    python -m benchmarks.reliability.overload
    python -m benchmarks.reliability.overload --seconds 3 --times 10 --rounds 1

As many texts a second as callers get who wait for their answers (1x), then so many times as many, sent whether or not
answers come, in turns; then the first again. With the queue full the surplus is refused at once. Prints a table of the
medians and a JSON line of all turns: answers a second, how many were refused, how long a refusal and an answer took,
and what else went wrong. Goodput is what was answered while a load lasted, its first seconds left out: there the rows
fill, and what is answered after its end was asked by nobody any more. Ends with 1 when goodput falls below nine tenths
of what it was before, or refusals take 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.support import mix, servers
from benchmarks.support.load import Answer, Connection, Request, call, percentile
from benchmarks.support.servers import ROOT

CALLERS = 32  # that ask again when they are answered: enough to keep the service busy
QUEUE = 64  # rows, so that it fills
LEAST = 0.9  # of what was answered before: while it lasts, and afterwards
REFUSED = 20.0  # milliseconds of the slowest hundredth of the refusals
FILLS = 2.0  # seconds in which it does
ASKED = Request("/v1/text/continue", b'{"prompt": "ROMEO:", "max_characters": 400, "n": 4, "seed": 1}')


async def paced(port: int, rate: float, seconds: float) -> list[Answer]:
    """Requests at a rate, each on a connection that is free, or a new one. Gives the answers, in the order sent."""
    free: list[Connection] = []
    answers: list[Answer] = []

    async def one() -> None:
        connection = await mix.kept(free.pop() if free else None, port)
        answers.append(await connection.ask(ASKED.bytes()))
        free.append(connection)

    begun = time.perf_counter()
    under_way: set[asyncio.Task[None]] = set()
    for i in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begun + i / rate - time.perf_counter()))
        task = asyncio.create_task(one())
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    for connection in free:
        if connection.transport:
            connection.transport.close()
    return answers


def figures(answers: Sequence[Answer], begun: float, until: float) -> dict[str, float]:
    """Of one load, from its begin to its end."""
    good = [answer.seconds for answer in answers if answer.status == 200]
    steady = [answer for answer in answers if answer.status == 200 and begun + FILLS < answer.ended <= until]
    refused = [answer.seconds for answer in answers if answer.status == 429]
    return {
        "offered": round(len(answers) / (until - begun), 1),
        "goodput": round(len(steady) / (until - begun - FILLS), 1),
        "refused": len(refused),
        "else": len(answers) - len(good) - len(refused),
        "refusal_p99_ms": round(1000 * percentile(refused, 0.99), 2) if refused else 0.0,
        "answer_p99_ms": round(1000 * percentile(good, 0.99), 2),
    }


async def measure(port: int, seconds: float, times: float, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Both loads in turns, and the first once more."""

    async def closed() -> dict[str, float]:
        begun = time.perf_counter()
        answers, until = await call(port, [ASKED], CALLERS, seconds)
        return figures(answers, begun, until)

    await call(port, [ASKED], CALLERS, 1.0)  # warm
    found: dict[str, list[dict[str, float]]] = {"1x": [], f"{times:g}x": [], "1x again": []}
    for _ in range(rounds):
        found["1x"].append(await closed())
        begun = time.perf_counter()
        answers = await paced(port, times * found["1x"][-1]["goodput"], seconds)
        found[f"{times:g}x"].append(figures(answers, begun, begun + seconds))
    found["1x again"].append(await closed())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = servers.ours(Path(folder), ROOT / "models_store")
        server.environment = {
            **server.environment,
            "QUARTET_QUEUE_ROWS": str(QUEUE),
            "QUARTET_MAX_RUNNING_TEXTS": str(QUEUE),
        }
        server.start()
        try:
            found = asyncio.run(measure(server.port, options.seconds, options.times, options.rounds))
        finally:
            server.stop()
    names = list(found["1x"][0])
    print(f"| load | {' | '.join(names)} |\n|---|{'--:|' * len(names)}")
    for load, rows in found.items():
        print(f"| {load} | {' | '.join(f'{median(row[name] for row in rows):g}' for name in names)} |")
    print(json.dumps(found))
    before, flooded, after = (median(row["goodput"] for row in rows) for rows in found.values())
    slowest = median(row["refusal_p99_ms"] for row in found[f"{options.times:g}x"])
    well = flooded >= LEAST * before and after >= LEAST * before and slowest < REFUSED
    sys.exit(not well)


if __name__ == "__main__":
    main()
