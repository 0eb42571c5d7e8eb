"""Soak test: send mixed load for a long time. All answers must stay correct, and the use of resources may not grow.

    python -m benchmarks.reliability.soak                          # 30 minutes
    python -m benchmarks.reliability.soak --minutes 1 --callers 8
    python -m benchmarks.reliability.soak --minutes 6 --swap 0     # without version changes

Callers send requests of all kinds (``mix.KINDS`` contains the proportions). One more caller closes its connection
during each answer. At intervals, the test publishes a new version of a model and removes the oldest version. It
compares each answer with the answer to the same request without load. The exit status is 1 if an answer was wrong, or
if the memory, the threads, the file descriptors or the latency grew.

The test divides its time into five parts of equal length (fifths). The table shows

- the memory of all processes (PSS, MiB) at the start of each fifth and at the end,
- the growth of the memory per 10,000 requests in the last two fifths,
- the file descriptors and threads after the first fifth and at the end,
- the latency of classification in the second and the last fifth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from app.store import Store
from benchmarks.support import mix, servers
from benchmarks.support.load import Connection, Request, connect, percentile
from benchmarks.support.servers import ROOT, Server

SAMPLE_SECONDS = 2.0  # time between two samples of the processes' resources
DISCONNECT_SECONDS = 0.1  # time after which a caller closes its connection during an answer
SWAPPED_MODEL = "sine-lstm"
DIFFERENT_REQUESTS = 400  # number of different requests, sent repeatedly
# Limit of the growth of the memory in the last two fifths, in MiB per 10,000 requests. Earlier, caches still fill: on a
# slow machine, the memory reaches its final level only after about 100,000 requests.
MAX_GROWTH = 1.0
MAX_SLOWDOWN = 1.5  # largest allowed ratio of the latency at the end to the latency at the start
LONG = Request("/v1/text/continue", b'{"prompt": "a", "max_characters": 4000, "n": 4, "stream": true}')


@dataclass
class Observations:
    """Counts of the answers, and samples of the processes' resources."""

    sent: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[tuple[float, float]] = field(default_factory=list)  # (time, seconds)
    # (time, requests so far, MiB, descriptors, threads)
    samples: list[tuple[float, int, float, int, int]] = field(default_factory=list)


async def call(
    port: int,
    requests: Sequence[mix.MixRequest],
    expected: Sequence[Any],
    observations: Observations,
    deadline: float,
    seed: int,
) -> None:
    """Send random requests of the mix until ``deadline``."""
    generator = random.Random(seed)
    connection: Connection | None = None
    while time.monotonic() < deadline:
        index = generator.randrange(len(requests))
        request = requests[index]
        connection = await mix.usable_connection(connection, port)
        answer = await connection.send(request.request.bytes())
        observations.sent[request.kind] += 1
        result = mix.read(request, answer)
        if not mix.same(request.kind, result, expected[index]):
            observations.wrong.append(f"{request.kind}: {str(result)[:200]} instead of {str(expected[index])[:200]}")
        if request.kind == "classify":
            observations.latencies.append((time.monotonic(), answer.seconds))
    if connection and connection.transport:
        connection.transport.close()


async def disconnect(port: int, observations: Observations, deadline: float) -> None:
    """Send long requests until ``deadline``, and disconnect during each answer. A shorter answer is wrong."""
    while time.monotonic() < deadline:
        connection: Connection = await connect(port)
        task = asyncio.create_task(connection.send(LONG.bytes()))
        ended, _ = await asyncio.wait([task], timeout=DISCONNECT_SECONDS)
        if connection.transport:
            connection.transport.abort()
        answer = await task
        if ended:
            observations.wrong.append(
                f"cancelled: status {answer.status}, {answer.body[:200]!r} instead of a long text"
            )
        observations.sent["cancelled"] += 1


async def swap(folder: Path, observations: Observations, deadline: float, every: float) -> None:
    """Every ``every`` seconds (0: never), publish the same weights as a new version, and remove the oldest version."""
    for number in count(1) if every else ():
        await asyncio.sleep(min(every, max(0.0, deadline - time.monotonic())))
        if time.monotonic() >= deadline:
            return
        version = Store(folder).read(SWAPPED_MODEL, number)
        card = {
            key: value for key, value in version.card.model_dump().items() if key not in ("version", "weights_sha256")
        }
        Store(folder).publish(card, version.tensors)
        if number > 1:
            shutil.rmtree(folder / SWAPPED_MODEL / str(number - 1))
        observations.sent["swaps"] += 1


async def sample(server: Server, observations: Observations, deadline: float) -> None:
    """Until ``deadline``, regularly record the memory, file descriptors and threads of the server's processes."""
    while time.monotonic() < deadline:
        await asyncio.sleep(SAMPLE_SECONDS)
        if time.monotonic() >= deadline:  # the callers have closed their connections
            return
        folders = [Path(f"/proc/{pid}") for pid in server.pids()]
        files = sum(len(list((folder / "fd").iterdir())) for folder in folders)
        threads = sum(len(list((folder / "task").iterdir())) for folder in folders)
        memory = server.memory()["pss"]
        observations.samples.append((time.monotonic(), observations.sent.total(), memory, files, threads))


async def soak(server: Server, folder: Path, seconds: float, callers: int, every: float) -> Observations:
    """Run all callers for ``seconds``, and publish a new version every ``every`` seconds. Return what they observed."""
    requests = mix.requests(DIFFERENT_REQUESTS, 0)
    expected = await mix.expected_answers(server.port, requests)
    observations, deadline = Observations(), time.monotonic() + seconds
    calls = [call(server.port, requests, expected, observations, deadline, seed) for seed in range(callers)]
    others = (
        disconnect(server.port, observations, deadline),
        swap(folder, observations, deadline, every),
        sample(server, observations, deadline),
    )
    await asyncio.gather(*calls, *others)
    return observations


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line through the points."""
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / spread if spread else 0.0


def figures(observations: Observations, started: float, seconds: float) -> dict[str, Any]:
    """Return the rows of the table."""
    after = [row for row in observations.samples if row[0] >= started + seconds / 5] or observations.samples
    first, last = after[0], after[-1]
    fifths = [next(row for row in observations.samples if row[0] >= started + part * seconds / 5) for part in range(5)]
    steady = observations.samples[observations.samples.index(fifths[3]) :]
    fifths.append(last)
    parts = [
        [
            latency
            for moment, latency in observations.latencies
            if started + part * seconds <= moment < started + (part + 0.2) * seconds
        ]
        for part in (0.2, 0.8)
    ]
    return {
        "seconds": round(seconds),
        "requests": observations.sent.total(),
        "wrong": len(observations.wrong),
        **observations.sent,
        "mib": [round(row[2], 1) for row in fifths],
        "mib_per_10000": round(10_000 * slope([(float(row[1]), row[2]) for row in steady]), 3),
        "descriptors": [first[3], last[3]],
        "threads": [first[4], last[4]],
        "p50_ms": [round(1000 * percentile(part, 0.5), 2) for part in parts],
        "p99_ms": [round(1000 * percentile(part, 0.99), 2) for part in parts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="duration of the test (default: %(default)s)")
    parser.add_argument("--callers", type=int, default=16, help="number of callers (default: %(default)s)")
    parser.add_argument(
        "--swap",
        type=float,
        default=10,
        metavar="SECONDS",
        help="seconds between two versions; 0: no version changes (default: %(default)s)",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        shutil.copytree(ROOT / "models_store", folder)
        server = servers.ours(Path(name), folder)
        with server.running():
            seconds = 60 * options.minutes
            observations = asyncio.run(soak(server, folder, seconds, options.callers, options.swap))
    started = observations.samples[0][0] - SAMPLE_SECONDS
    result = figures(observations, started, seconds)
    print("| figure | value |\n|---|--:|")
    for key, value in result.items():
        print(f"| {key} | {' to '.join(map(str, value)) if isinstance(value, list) else value} |")
    for wrong in observations.wrong[:5]:
        print(wrong, file=sys.stderr)
    print(json.dumps(result))
    messages = growth(observations, result)
    for message in messages:
        print(message, file=sys.stderr)
    sys.exit(bool(observations.wrong or messages))


def growth(observations: Observations, result: dict[str, Any]) -> list[str]:
    """Return a message for each resource that grew: memory, threads, descriptors, latency."""
    half = observations.samples[: len(observations.samples) // 2 + 1]  # at first, thread pools and connections grow
    files, threads = (max(row[column] for row in half) for column in (3, 4))
    first, last = result["p50_ms"]
    checks = [
        (result["mib_per_10000"] > MAX_GROWTH, f"memory grew by {result['mib_per_10000']} MiB in 10,000 requests"),
        (observations.samples[-1][3] > files, f"descriptors grew from {files} to {observations.samples[-1][3]}"),
        (observations.samples[-1][4] > threads, f"threads grew from {threads} to {observations.samples[-1][4]}"),
        (last > MAX_SLOWDOWN * first, f"the latency of classification grew from {first} to {last} ms"),
    ]
    return [message for exceeded, message in checks if exceeded]


if __name__ == "__main__":
    main()
