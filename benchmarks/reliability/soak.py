"""Soak test: mixed load for a long time. All answers must stay correct, and no resource may grow.

    python -m benchmarks.reliability.soak                          # 30 minutes
    python -m benchmarks.reliability.soak --minutes 1 --callers 8
    python -m benchmarks.reliability.soak --minutes 6 --swap 0     # without version changes

Callers send requests of all kinds (``mix.KINDS`` has the proportions). Other callers hang up during answers, and new
versions are published while the oldest are removed. Each answer is compared with the answer to the same request without
load. The exit status is 1 if an answer was wrong or a resource grew.

The table shows the memory of all processes (PSS, MiB) at the start of each fifth and at the end, and its slope over
the requests after the first fifth; file descriptors and threads after a fifth and at the end; the latency of
classification in the second and the last fifth.
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

from app import store
from benchmarks.support import mix, servers
from benchmarks.support.load import Connection, Request, connect, percentile
from benchmarks.support.servers import ROOT, Server

SAMPLE_SECONDS = 2.0  # between two samples of the processes
SWAPPED = "sine-lstm"
DIFFERENT_REQUESTS = 400  # number of different requests, sent repeatedly
MAX_GROWTH = 1.0  # MiB per 10,000 requests
MAX_SLOWDOWN = 1.5  # latency at the end over latency at the start; other programs use the machine too
LONG = Request("/v1/text/continue", b'{"prompt": "a", "max_characters": 4000, "n": 4, "stream": true}')


@dataclass
class Observations:
    """Counts of the answers, and samples of the processes."""

    sent: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[tuple[float, float]] = field(default_factory=list)  # (time, seconds)
    looks: list[tuple[float, int, float, int, int]] = field(
        default_factory=list
    )  # (time, requests, MiB, descriptors, threads)


async def call(
    port: int, wanted: Sequence[mix.Ask], right: Sequence[Any], observations: Observations, until: float, seed: int
) -> None:
    """Send random requests of the mix until ``until``."""
    chance = random.Random(seed)
    connection: Connection | None = None
    while time.monotonic() < until:
        at = chance.randrange(len(wanted))
        ask = wanted[at]
        connection = await mix.kept(connection, port)
        answer = await connection.ask(ask.request.bytes())
        observations.sent[ask.kind] += 1
        result = mix.read(ask, answer)
        if not mix.same(ask.kind, result, right[at]):
            observations.wrong.append(f"{ask.kind}: {str(result)[:200]} instead of {str(right[at])[:200]}")
        if ask.kind == "classify":
            observations.latencies.append((time.monotonic(), answer.seconds))
    if connection and connection.transport:
        connection.transport.close()


async def hang_up(port: int, observations: Observations, until: float) -> None:
    """Hang up during each answer until ``until``."""
    while time.monotonic() < until:
        connection: Connection = await connect(port)
        asking = asyncio.create_task(connection.ask(LONG.bytes()))
        await asyncio.sleep(0.1)
        if connection.transport:
            connection.transport.abort()
        await asking
        observations.sent["cancelled"] += 1


async def swap(folder: Path, observations: Observations, until: float, every: float) -> None:
    """Every ``every`` seconds publish the same weights as a new version and remove the oldest; 0 means never."""
    for number in count(1) if every else ():
        await asyncio.sleep(min(every, max(0.0, until - time.monotonic())))
        if time.monotonic() >= until:
            return
        version = store.read_version(folder, SWAPPED, number)
        card = {
            key: value for key, value in version.card.model_dump().items() if key not in ("version", "weights_sha256")
        }
        store.publish(folder, card, version.tensors)
        if number > 1:
            shutil.rmtree(folder / SWAPPED / str(number - 1))
        observations.sent["swaps"] += 1


async def look(server: Server, observations: Observations, until: float) -> None:
    """Sample the processes regularly."""
    while time.monotonic() < until:
        await asyncio.sleep(SAMPLE_SECONDS)
        folders = [Path(f"/proc/{pid}") for pid in server.pids()]
        files = sum(len(list((folder / "fd").iterdir())) for folder in folders)
        threads = sum(len(list((folder / "task").iterdir())) for folder in folders)
        memory = server.memory()["pss"]
        observations.looks.append((time.monotonic(), observations.sent.total(), memory, files, threads))


async def soak(server: Server, folder: Path, seconds: float, callers: int, every: float) -> Observations:
    """Run the whole load for ``seconds``, with a new version ``every`` so many seconds."""
    wanted = mix.asks(DIFFERENT_REQUESTS, 0)
    right = await mix.answers(server.port, wanted, 1)
    observations, until = Observations(), time.monotonic() + seconds
    calls = [call(server.port, wanted, right, observations, until, seed) for seed in range(callers)]
    others = (
        hang_up(server.port, observations, until),
        swap(folder, observations, until, every),
        look(server, observations, until),
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
    after = [one for one in observations.looks if one[0] >= started + seconds / 5] or observations.looks
    first, last = after[0], after[-1]
    looks = [next(one for one in observations.looks if one[0] >= started + part * seconds / 5) for part in range(5)] + [
        last
    ]
    parts = [
        [
            took
            for when, took in observations.latencies
            if started + part * seconds <= when < started + (part + 0.2) * seconds
        ]
        for part in (0.2, 0.8)
    ]
    return {
        "seconds": round(seconds),
        "requests": observations.sent.total(),
        "wrong": len(observations.wrong),
        **observations.sent,
        "mib": [round(one[2], 1) for one in looks],
        "mib_per_10000": round(10_000 * slope([(float(one[1]), one[2]) for one in after]), 3),
        "descriptors": [first[3], last[3]],
        "threads": [first[4], last[4]],
        "p50_ms": [round(1000 * percentile(part, 0.5), 2) for part in parts],
        "p99_ms": [round(1000 * percentile(part, 0.99), 2) for part in parts],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--callers", type=int, default=16)
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
        server.start()
        try:
            seconds = 60 * options.minutes
            observations = asyncio.run(soak(server, folder, seconds, options.callers, options.swap))
        finally:
            server.stop()
    started = observations.looks[0][0] - SAMPLE_SECONDS
    result = figures(observations, started, seconds)
    print("| figure | value |\n|---|--:|")
    for key, value in result.items():
        print(f"| {key} | {' to '.join(map(str, value)) if isinstance(value, list) else value} |")
    for wrong in observations.wrong[:5]:
        print(wrong, file=sys.stderr)
    print(json.dumps(result))
    grew = grown(observations, result)
    for what in grew:
        print(what, file=sys.stderr)
    sys.exit(bool(observations.wrong or grew))


def grown(observations: Observations, result: dict[str, Any]) -> list[str]:
    """Return one sentence per resource that grew: memory, threads, descriptors, latency."""
    half = observations.looks[: len(observations.looks) // 2 + 1]  # thread pools and connections grow at first
    files, threads = (max(one[at] for one in half) for at in (3, 4))
    first, last = result["p50_ms"]
    checks = [
        (result["mib_per_10000"] > MAX_GROWTH, f"memory grew by {result['mib_per_10000']} MiB in 10,000 requests"),
        (observations.looks[-1][3] > files, f"descriptors grew from {files} to {observations.looks[-1][3]}"),
        (observations.looks[-1][4] > threads, f"threads grew from {threads} to {observations.looks[-1][4]}"),
        (last > MAX_SLOWDOWN * first, f"the latency of classification grew from {first} to {last} ms"),
    ]
    return [sentence for holds, sentence in checks if holds]


if __name__ == "__main__":
    main()
