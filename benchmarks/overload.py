"""Overload test: send ten times the load that the service can handle.

    python -m benchmarks overload
    python -m benchmarks overload --seconds 5 --rounds 1

At first, each caller waits for its answer before it sends the next request. Then requests are sent at ten times the
measured rate, without waiting, so the service must reject most of them. Then the first load is repeated. The first
seconds, until all slots of the service are in use, do not count.

The callers use the same cores as the service, so the goodput (answers per second) is compared for each core that the
service used. The test fails if it falls below 90 %, if the 99th percentile of the time to a rejection reaches 20 ms, or
if a request got neither an answer nor a rejection (429).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.support import report, servers
from benchmarks.support.load import Answer, Client, Request, call, percentile
from benchmarks.support.servers import Server

CALLERS = 32  # number of callers that wait for answers; enough to keep the service busy
QUEUE = 64  # capacity of the queue in rows; small, so that it fills
TIMES = 10
MIN_GOODPUT = 0.9
MAX_REJECTION_MS = 20.0
FILL_SECONDS = 2.0  # time until all slots of the service are in use
REQUEST = Request("/v1/text/continue", b'{"prompt": "ROMEO:", "max_characters": 400, "n": 4, "seed": 1}')

Figures = dict[str, float]


async def paced(port: int, rate: float, seconds: float) -> list[Answer]:
    """Send requests at a constant rate, and return the answers.

    Each request uses the connection that has been free longest, or a new one. The connection that became free last
    often leads to the worker that has just rejected a request, and the other worker gets too few requests.
    """
    free, answers, tasks = deque[Client](), list[Answer](), list[asyncio.Task[None]]()

    async def send() -> None:
        client = free.popleft() if free else Client(port)
        answers.append(await client.send(REQUEST))
        free.append(client)

    started = time.perf_counter()
    for i in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, started + i / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(send()))
    await asyncio.gather(*tasks)
    for client in free:
        client.close()
    return answers


def figures(answers: Sequence[Answer], begin: float, end: float, cores: float) -> Figures:
    """Return the figures of one load between ``begin`` and ``end``. ``cores`` is the number of cores of the service."""
    completed = sum(answer.status == 200 and begin < answer.ended <= end for answer in answers)
    rejections = [answer.seconds for answer in answers if answer.status == 429]
    return {
        "goodput": completed / (end - begin),
        "per core": completed / (end - begin) / max(cores, 0.01),
        "rejected": len(rejections),
        "other": sum(answer.status not in (200, 429) for answer in answers),
        "rejection ms": 1000 * percentile(rejections, 0.99) if rejections else 0.0,
    }


async def measure(server: Server, seconds: float, rounds: int) -> tuple[list[Figures], list[Figures], Figures]:
    """Return the figures before, during and after the overload."""

    async def load(rate: float | None = None) -> Figures:
        started, used = time.perf_counter(), server.cpu_seconds()
        if rate:
            answers, begin = await paced(server.port, rate, seconds), started + FILL_SECONDS
            end = started + seconds
        else:
            closed = await call(server.port, [REQUEST], CALLERS, seconds - FILL_SECONDS)
            answers, begin, end = list(closed.answers), closed.begin, closed.end
        cores = (server.cpu_seconds() - used) / (time.perf_counter() - started)
        return figures(answers, begin, end, cores)

    await call(server.port, [REQUEST], CALLERS, 1.0)  # warm up
    before, during = list[Figures](), list[Figures]()
    for _ in range(rounds):
        before.append(await load())
        during.append(await load(TIMES * before[-1]["goodput"]))
    return before, during, await load()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=20, help="duration of each load (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: %(default)s)")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    with servers.ours(folder, queue_rows=QUEUE, limits=json.dumps({"max_running_texts": QUEUE})).running() as server:
        before, during, after = asyncio.run(measure(server, options.seconds, options.rounds))

    def middle(loads: Sequence[Figures], name: str) -> float:
        return round(median(figures[name] for figures in loads), 2)

    if not middle(before, "goodput"):
        raise SystemExit("the normal load had no answer in time: use a longer --seconds on this machine")
    kept = round(middle(during, "per core") / middle(before, "per core"), 2)
    recovered = round(after["per core"] / middle(before, "per core"), 2)
    rejection = middle(during, "rejection ms")
    other = int(sum(figures["other"] for figures in (*before, *during, after)))
    table = report.figures(
        ("answered requests before the overload (4 x 400 characters each)", middle(before, "goodput"), "requests/s"),
        ("answered requests during the overload", middle(during, "goodput"), "requests/s"),
        ("goodput during / before, for each core that the service used", kept, "x"),
        ("goodput after / before, for each core that the service used", recovered, "x"),
        ("rejected requests (429)", int(sum(figures["rejected"] for figures in during)), "requests"),
        ("time to a rejection, p99", rejection, "ms"),
        ("other errors", other, "requests"),
    )
    failures = [f"the goodput is {share} of that before" for share in (kept, recovered) if share < MIN_GOODPUT]
    failures += [f"a rejection takes {rejection} ms"] * (rejection >= MAX_REJECTION_MS)
    return [table], failures + [f"{other} requests got neither an answer nor a rejection"] * bool(other)
