"""Soak test: send mixed load for a long time. All answers must stay correct, and the use of resources may not grow.

    python -m benchmarks soak                          # 30 minutes
    python -m benchmarks soak --minutes 1

Callers send requests of all kinds (``mix.KINDS``). One more caller closes its connection during each answer. After each
2,000 requests, the test publishes a new version of a model and removes the oldest one. Each answer is compared with the
answer to the same request without load. The test fails if an answer was wrong, or if the memory, the threads, the file
descriptors or the latency grew.

The growth of the memory is measured in the last two fifths of the time. Earlier, caches still fill: on a slow machine,
the memory reaches its final level only after about 100,000 requests. The metrics of each version, which
prometheus_client cannot remove, take 0.1 MiB in two workers.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.store import Store
from benchmarks.support import mix, report, servers
from benchmarks.support.load import Answer, Client, Request, percentile
from benchmarks.support.servers import ROOT, Server

CALLERS = 16
SAMPLE_SECONDS = 2.0  # time between two samples of the processes' resources
SWAP_REQUESTS = 2000  # between two new versions
DISCONNECT_SECONDS = 0.1  # time after which a caller closes its connection during an answer
SWAPPED_MODEL = "sine-lstm"
DIFFERENT_REQUESTS = 400  # number of different requests, sent repeatedly
MAX_GROWTH = 1.0  # limit of the growth of the memory in MiB per 10,000 requests
MAX_SLOWDOWN = 1.5  # largest allowed ratio of the latency at the end to the latency at the start
LONG = Request("/v1/text/continue", b'{"prompt": "a", "max_characters": 4000, "n": 4, "stream": true}')


class Sample(NamedTuple):
    """The resources of all processes at one moment. ``share`` is the elapsed part of the test, from 0 to 1."""

    share: float
    requests: int
    mebibytes: float
    descriptors: float
    threads: float


@dataclass
class Observations:
    """Counts of the answers, and samples of the processes' resources."""

    sent: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[tuple[float, float]] = field(default_factory=list)  # (elapsed part of the test, milliseconds)
    samples: list[Sample] = field(default_factory=list)


async def disconnect(port: int, observations: Observations, stop: asyncio.Event) -> None:
    """Send long requests, and disconnect during each answer. A shorter answer is wrong."""
    while not stop.is_set():
        client = Client(port)
        task = asyncio.create_task(client.send(LONG))
        ended, _ = await asyncio.wait([task], timeout=DISCONNECT_SECONDS)
        client.abort()
        answer = await task
        if ended:
            observations.wrong.append(f"cancelled: status {answer.status}, {answer.body[:200]!r}")
        observations.sent["cancelled"] += 1


async def swap(store: Store, observations: Observations, stop: asyncio.Event) -> None:
    """Publish the same weights as a new version again and again, and remove the oldest version."""
    for number in count(1):
        while observations.sent.total() < number * SWAP_REQUESTS:
            await asyncio.sleep(0.1)
            if stop.is_set():
                return
        version = store.read(SWAPPED_MODEL, number)
        card = version.card.model_dump(exclude={"version", "weights_sha256"})
        store.publish(card, version.tensors)
        if number > 1:
            shutil.rmtree(store.folder / SWAPPED_MODEL / str(number - 1))
        observations.sent["swaps"] += 1


async def soak(server: Server, store: Store, seconds: float) -> Observations:
    """Run all callers for ``seconds``. Return what they observed."""
    requests = mix.requests(DIFFERENT_REQUESTS, 0)
    expected = await mix.expected_answers(server.port, requests)
    observations, stop, started = Observations(), asyncio.Event(), time.monotonic()

    def report_answer(index: int, answer: Answer) -> None:
        kind, result = requests[index].kind, mix.read(requests[index], answer)
        observations.sent[kind] += 1
        if not mix.same(kind, result, expected[index]):
            observations.wrong.append(f"{kind}: {str(result)[:200]} instead of {str(expected[index])[:200]}")
        if kind == "classify":
            observations.latencies.append(((time.monotonic() - started) / seconds, 1000 * answer.seconds))

    async def sample() -> None:
        while (share := (time.monotonic() - started) / seconds) < 1:
            memory, files = server.memory(), server.measured(lambda process: process.num_fds())
            threads = server.measured(lambda process: process.num_threads())
            observations.samples.append(Sample(share, observations.sent.total(), memory, files, threads))
            await asyncio.sleep(SAMPLE_SECONDS)
        stop.set()

    callers = [mix.repeat(server.port, requests, seed, stop, report_answer) for seed in range(CALLERS)]
    others = (disconnect(server.port, observations, stop), swap(store, observations, stop), sample())
    await asyncio.gather(*callers, *others)
    return observations


def results(observations: Observations) -> tuple[report.Table, list[str]]:
    samples = observations.samples
    steady = [sample for sample in samples if sample.share >= 0.6]
    thousands = [sample.requests / 10_000 for sample in steady]
    growth = round(float(np.polyfit(thousands, [sample.mebibytes for sample in steady], 1)[0]), 2)
    early, late = (
        [latency for share, latency in observations.latencies if low <= share < low + 0.2] for low in (0.2, 0.8)
    )

    def at(share: float) -> Sample:
        return next(sample for sample in samples if sample.share >= share)

    def milliseconds(latencies: Sequence[float], part: float) -> float:
        return round(percentile(latencies, part), 1)

    sent, last = observations.sent, samples[-1]
    rows: list[tuple[str, Any, str]] = [
        (f"requests of {CALLERS} callers", sent.total() - sent["cancelled"] - sent["swaps"], "requests"),
        ("wrong answers", len(observations.wrong), "answers"),
        ("texts cancelled by their callers", sent["cancelled"], "texts"),
        (f"versions published (one for each {SWAP_REQUESTS:,} requests)", sent["swaps"], "versions"),
        *(
            (f"memory after {share:.0%} of the test", round(at(share).mebibytes), "MiB")
            for share in (0.2, 0.4, 0.6, 0.8)
        ),
        ("memory at the end of the test", round(last.mebibytes), "MiB"),
        ("memory growth per 10,000 requests in the last two fifths", growth, "MiB"),
        ("growth of the file descriptors since one fifth", round(last.descriptors - at(0.2).descriptors), ""),
        ("growth of the threads since one fifth", round(last.threads - at(0.2).threads), ""),
        ("latency of an image, p50, in the second fifth", milliseconds(early, 0.5), "ms"),
        ("latency of an image, p50, in the last fifth", milliseconds(late, 0.5), "ms"),
        ("latency of an image, p99, in the second fifth", milliseconds(early, 0.99), "ms"),
        ("latency of an image, p99, in the last fifth", milliseconds(late, 0.99), "ms"),
    ]
    half = [sample for sample in samples if sample.share <= 0.5]  # at first, thread pools and connections grow
    failures = observations.wrong[:5]
    failures += [f"memory grew by {growth} MiB in 10,000 requests"] * (growth > MAX_GROWTH)
    failures += ["the number of threads grew"] * (last.threads > max(sample.threads for sample in half))
    failures += ["the number of descriptors grew"] * (last.descriptors > max(sample.descriptors for sample in half))
    failures += ["the latency grew"] * (milliseconds(late, 0.5) > MAX_SLOWDOWN * milliseconds(early, 0.5))
    return report.figures(*rows), failures


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=30, help="duration of the test (default: %(default)s)")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    shutil.copytree(ROOT / "models_store", folder / "store")
    with servers.ours(folder, folder / "store").running() as server:
        table, failures = results(asyncio.run(soak(server, Store(folder / "store"), 60 * options.minutes)))
    return [table], failures
