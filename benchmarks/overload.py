"""What is left of the service when ten times as much is asked of it as it can do.

    python -m benchmarks.overload
    python -m benchmarks.overload --seconds 3 --times 10

First as many texts a second as callers get who wait for their answers (1x), then so many times as many, sent whether
or not answers come; then the first again. With the queue full the surplus is refused at once. Prints a table and a
JSON line: answers a second, how many were refused, how long a refusal and an answer took, and what else went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import mix, servers
from benchmarks.load import Answer, Connection, Request, call, percentile
from benchmarks.servers import ROOT

CALLERS = 32  # that ask again when they are answered: enough to keep the service busy
QUEUE = 64  # rows, so that it fills
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


def figures(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Of one load."""
    good = [answer.seconds for answer in answers if answer.status == 200]
    refused = [answer.seconds for answer in answers if answer.status == 429]
    return {
        "offered": round(len(answers) / seconds, 1),
        "goodput": round(len(good) / seconds, 1),
        "refused": len(refused),
        "else": len(answers) - len(good) - len(refused),
        "refusal_p99_ms": round(1000 * percentile(refused, 0.99), 2) if refused else 0.0,
        "answer_p99_ms": round(1000 * percentile(good, 0.99), 2),
    }


async def measure(port: int, seconds: float, times: float) -> dict[str, dict[str, float]]:
    """The three loads, one after the other."""

    async def closed() -> dict[str, float]:
        begun = time.perf_counter()
        answers, _ = await call(port, [ASKED], CALLERS, seconds)
        return figures(answers, time.perf_counter() - begun)

    await call(port, [ASKED], CALLERS, 1.0)  # warm
    first = await closed()
    begun = time.perf_counter()
    answers = await paced(port, times * first["goodput"], seconds)
    flood = figures(answers, time.perf_counter() - begun)
    return {"1x": first, f"{times:g}x": flood, "1x again": await closed()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--times", type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = servers.ours(Path(folder), ROOT / "models_store")
        server.environment = {**server.environment, "QUARTET_QUEUE_ROWS": str(QUEUE), "QUARTET_TEXT_ROWS": str(QUEUE)}
        server.start()
        try:
            found = asyncio.run(measure(server.port, options.seconds, options.times))
        finally:
            server.stop()
    names = list(next(iter(found.values())))
    print(f"| load | {' | '.join(names)} |\n|---|{'--:|' * len(names)}")
    for load, row in found.items():
        print(f"| {load} | {' | '.join(str(row[name]) for name in names)} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
