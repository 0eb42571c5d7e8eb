"""Overload test: send ten times the load that the service can handle.

    python -m benchmarks.reliability.overload
    python -m benchmarks.reliability.overload --seconds 15 --times 10 --rounds 1

The test has three loads. In the first load (1x), each caller waits for the answer before it sends its next request. In
the second load, the callers send requests at a multiple of the rate that was measured at 1x, and do not wait for
answers. The service must immediately reject the requests that exceed its capacity. The third load is the same as the
first.

The program prints a table of medians and a JSON line with all rounds. The table and the line contain the goodput
(answers per second), rejections, other failures, and the latency of answers and of rejections. The first seconds of
each load, until all slots of the service are in use, do not count for the goodput. The callers use the same cores as
the service, so the table also shows how many cores the service used. The exit status is 1 if the goodput per used core
falls below 90 % of its value before the overload, if the 99th percentile of the rejections' latency reaches 20 ms, or
if a request got neither an answer nor a rejection (429).
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
from benchmarks.support.servers import ROOT, Server

CALLERS = 32  # number of callers that wait for answers; enough to keep the service busy
QUEUE = 64  # capacity of the queue in rows; small, so that it fills
MIN_GOODPUT = 0.9  # smallest goodput during and after the overload, as a share of the goodput before it
MAX_REJECTION_MS = 20.0  # limit of the 99th percentile of the time until a rejection
FILL_SECONDS = 2.0  # time until all slots of the service are in use
REQUEST = Request("/v1/text/continue", b'{"prompt": "ROMEO:", "max_characters": 400, "n": 4, "seed": 1}')


async def paced(port: int, rate: float, seconds: float) -> list[Answer]:
    """Send requests at a constant rate, and return the answers. Each request uses a free or a new connection."""
    idle: list[Connection] = []
    answers: list[Answer] = []

    async def send_request() -> None:
        begun = time.perf_counter()
        try:
            connection = await mix.usable_connection(idle.pop() if idle else None, port)
        except OSError:  # counts as a request without an answer
            answers.append(Answer(begun, time.perf_counter()))
            return
        answers.append(await connection.send(REQUEST.bytes()))
        idle.append(connection)

    started = time.perf_counter()
    running: set[asyncio.Task[None]] = set()
    for i in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, started + i / rate - time.perf_counter()))
        task = asyncio.create_task(send_request())
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    for connection in idle:
        if connection.transport:
            connection.transport.close()
    return answers


def figures(answers: Sequence[Answer], begin: float, end: float, cores: float) -> dict[str, float]:
    """Return the figures of one load. Its rates count from ``begin`` to ``end``.

    ``cores`` is the number of cores that the service used.
    """
    latencies = [answer.seconds for answer in answers if answer.status == 200]
    completed = [answer for answer in answers if answer.status == 200 and begin < answer.ended <= end]
    rejections = [answer.seconds for answer in answers if answer.status == 429]
    return {
        "offered": round(sum(begin < answer.started <= end for answer in answers) / (end - begin), 1),
        "goodput": round(len(completed) / (end - begin), 1),
        "cores": round(cores, 2),
        "rejected": len(rejections),
        "other": len(answers) - len(latencies) - len(rejections),
        "rejection_p99_ms": round(1000 * percentile(rejections, 0.99), 2) if rejections else 0.0,
        "answer_p99_ms": round(1000 * percentile(latencies, 0.99), 2),
    }


async def measure(server: Server, seconds: float, times: float, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Alternate the normal load and the overload, then repeat the normal load. Return the figures of each load."""

    async def closed() -> dict[str, float]:
        started, used = time.perf_counter(), server.cpu_seconds()
        load = await call(server.port, [REQUEST], CALLERS, seconds - FILL_SECONDS)
        cores = (server.cpu_seconds() - used) / (time.perf_counter() - started)
        return figures(load.answers, load.begin, load.end, cores)

    async def open_loop(rate: float) -> dict[str, float]:
        started, used = time.perf_counter(), server.cpu_seconds()
        answers = await paced(server.port, rate, seconds)
        cores = (server.cpu_seconds() - used) / (time.perf_counter() - started)
        return figures(answers, started + FILL_SECONDS, started + seconds, cores)

    await call(server.port, [REQUEST], CALLERS, 1.0)  # warm up
    results: dict[str, list[dict[str, float]]] = {"1x": [], f"{times:g}x": [], "1x again": []}
    for _ in range(rounds):
        results["1x"].append(await closed())
        results[f"{times:g}x"].append(await open_loop(times * results["1x"][-1]["goodput"]))
    results["1x again"].append(await closed())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="duration of each load (default: %(default)s)")
    parser.add_argument("--times", type=float, default=10, help="overload, as a multiple of 1x (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: %(default)s)")
    options = parser.parse_args()
    if options.seconds <= FILL_SECONDS:
        parser.error(f"--seconds is {options.seconds:g}; it should be more than {FILL_SECONDS:g}")
    with tempfile.TemporaryDirectory() as folder:
        server = servers.ours(Path(folder), ROOT / "models_store")
        server.environment = {
            **server.environment,
            "QUARTET_QUEUE_ROWS": str(QUEUE),
            "QUARTET_MAX_RUNNING_TEXTS": str(QUEUE),
        }
        with server.running():
            results = asyncio.run(measure(server, options.seconds, options.times, options.rounds))
    if not all(row["goodput"] for row in results["1x"]):
        sys.exit("the normal load had no answer in time: use a longer --seconds on this machine")
    names = list(results["1x"][0])
    print(f"| load | {' | '.join(names)} |\n|---|{'--:|' * len(names)}")
    for load, rows in results.items():
        print(f"| {load} | {' | '.join(f'{median(row[name] for row in rows):g}' for name in names)} |")
    print(json.dumps(results))
    before, during, after = (
        median(row["goodput"] / max(row["cores"], 0.01) for row in rows) for rows in results.values()
    )
    print(f"goodput per core, relative to 1x: {during / before:.2f} during the overload, {after / before:.2f} after")
    rejection_ms = median(row["rejection_p99_ms"] for row in results[f"{options.times:g}x"])
    failures = sum(row["other"] for rows in results.values() for row in rows)
    has_goodput = during >= MIN_GOODPUT * before and after >= MIN_GOODPUT * before
    sys.exit(not (has_goodput and rejection_ms < MAX_REJECTION_MS and not failures))


if __name__ == "__main__":
    main()
