"""The service under mixed load for long: whether every answer stays right, and nothing grows.

    python -m benchmarks.reliability.soak                          # 30 minutes
    python -m benchmarks.reliability.soak --minutes 1 --callers 8
    python -m benchmarks.reliability.soak --minutes 6 --swap 0     # no versions come and go

Callers ask for everything there is, in proportion (``mix.KINDS``), beside others who hang up in the middle of an
answer, and a version that is published again and again while the oldest is taken away. Each answer is held against
the one that the same request had alone. Ends with 1 when one was wrong, or when something grew.

The table: memory is of all processes (PSS, MiB), as each fifth of the time begins and at the end, and its slope
over the requests after the first fifth; descriptors and threads at a fifth and at the end; latency of a
classification in the second fifth and in the last.
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

LOOK = 2.0  # seconds between two looks at the processes
SWAPPED = "sine-lstm"
DIFFERENT = 400  # requests that are asked again and again
SLOPE = 1.0  # MiB that memory may grow by in 10,000 requests
SLOWER = 1.5  # times as long as at the beginning: others use this machine too
LONG = Request("/v1/text/continue", b'{"prompt": "a", "max_characters": 4000, "n": 4, "stream": true}')


@dataclass
class Seen:
    """What was found: of the answers, and of the processes at each look."""

    asked: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[tuple[float, float]] = field(default_factory=list)  # when, and seconds
    looks: list[tuple[float, int, float, int, int]] = field(default_factory=list)  # when, requests, MiB, files, threads


async def call(port: int, wanted: Sequence[mix.Ask], right: Sequence[Any], seen: Seen, until: float, seed: int) -> None:
    """A caller, until the time is up."""
    chance = random.Random(seed)
    connection: Connection | None = None
    while time.monotonic() < until:
        at = chance.randrange(len(wanted))
        ask = wanted[at]
        connection = await mix.kept(connection, port)
        answer = await connection.ask(ask.request.bytes())
        seen.asked[ask.kind] += 1
        found = mix.read(ask, answer)
        if not mix.same(ask.kind, found, right[at]):
            seen.wrong.append(f"{ask.kind}: {str(found)[:200]} instead of {str(right[at])[:200]}")
        if ask.kind == "classify":
            seen.latencies.append((time.monotonic(), answer.seconds))
    if connection and connection.transport:
        connection.transport.close()


async def hang_up(port: int, seen: Seen, until: float) -> None:
    """A caller who leaves in the middle of each answer."""
    while time.monotonic() < until:
        connection: Connection = await connect(port)
        asking = asyncio.create_task(connection.ask(LONG.bytes()))
        await asyncio.sleep(0.1)
        if connection.transport:
            connection.transport.abort()
        await asking
        seen.asked["cancelled"] += 1


async def swap(folder: Path, seen: Seen, until: float, every: float) -> None:
    """Publish the same weights as a new version, every so many seconds, and take the oldest away; never for 0."""
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
        seen.asked["swaps"] += 1


async def look(server: Server, seen: Seen, until: float) -> None:
    """Look at the processes every few moments."""
    while time.monotonic() < until:
        await asyncio.sleep(LOOK)
        folders = [Path(f"/proc/{pid}") for pid in server.pids()]
        files = sum(len(list((folder / "fd").iterdir())) for folder in folders)
        threads = sum(len(list((folder / "task").iterdir())) for folder in folders)
        memory = server.memory()["pss"]
        seen.looks.append((time.monotonic(), seen.asked.total(), memory, files, threads))


async def soak(server: Server, folder: Path, seconds: float, callers: int, every: float) -> Seen:
    """Everything at once, for so long; a new version ``every`` so many seconds."""
    wanted = mix.asks(DIFFERENT, 0)
    right = await mix.answers(server.port, wanted, 1)
    seen, until = Seen(), time.monotonic() + seconds
    calls = [call(server.port, wanted, right, seen, until, seed) for seed in range(callers)]
    others = hang_up(server.port, seen, until), swap(folder, seen, until, every), look(server, seen, until)
    await asyncio.gather(*calls, *others)
    return seen


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through the points, by least squares."""
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / spread if spread else 0.0


def figures(seen: Seen, begun: float, seconds: float) -> dict[str, Any]:
    """What the table shows."""
    after = [one for one in seen.looks if one[0] >= begun + seconds / 5] or seen.looks
    first, last = after[0], after[-1]
    looks = [next(one for one in seen.looks if one[0] >= begun + part * seconds / 5) for part in range(5)] + [last]
    parts = [
        [took for when, took in seen.latencies if begun + part * seconds <= when < begun + (part + 0.2) * seconds]
        for part in (0.2, 0.8)
    ]
    return {
        "seconds": round(seconds), "requests": seen.asked.total(), "wrong": len(seen.wrong), **seen.asked,
        "mib": [round(one[2], 1) for one in looks],
        "mib_per_10000": round(10_000 * slope([(float(one[1]), one[2]) for one in after]), 3),
        "descriptors": [first[3], last[3]], "threads": [first[4], last[4]],
        "p50_ms": [round(1000 * percentile(part, 0.5), 2) for part in parts],
        "p99_ms": [round(1000 * percentile(part, 0.99), 2) for part in parts],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--swap", type=float, default=10, metavar="SECONDS", help="between two versions; 0: none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        shutil.copytree(ROOT / "models_store", folder)
        server = servers.ours(Path(name), folder)
        server.start()
        try:
            seconds = 60 * options.minutes
            seen = asyncio.run(soak(server, folder, seconds, options.callers, options.swap))
        finally:
            server.stop()
    begun = seen.looks[0][0] - LOOK
    found = figures(seen, begun, seconds)
    print("| figure | value |\n|---|--:|")
    for key, value in found.items():
        print(f"| {key} | {' to '.join(map(str, value)) if isinstance(value, list) else value} |")
    for wrong in seen.wrong[:5]:
        print(wrong, file=sys.stderr)
    print(json.dumps(found))
    grew = grown(seen, found)
    for what in grew:
        print(what, file=sys.stderr)
    sys.exit(bool(seen.wrong or grew))


def grown(seen: Seen, found: dict[str, Any]) -> list[str]:
    """What is more at the end than it was: memory, threads, descriptors, the time of a picture."""
    half = seen.looks[: len(seen.looks) // 2 + 1]  # pools begin threads, and callers connections, when they need them
    files, threads = (max(one[at] for one in half) for at in (3, 4))
    first, last = found["p50_ms"]
    told = [
        (found["mib_per_10000"] > SLOPE, f"memory grew by {found['mib_per_10000']} MiB in 10,000 requests"),
        (seen.looks[-1][3] > files, f"descriptors grew from {files} to {seen.looks[-1][3]}"),
        (seen.looks[-1][4] > threads, f"threads grew from {threads} to {seen.looks[-1][4]}"),
        (last > SLOWER * first, f"a picture took {first} ms and then {last} ms"),
    ]
    return [sentence for holds, sentence in told if holds]


if __name__ == "__main__":
    main()
