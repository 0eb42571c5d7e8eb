"""The model that predicts the speed on more cores, the measurement that checks it, and the documented memory."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from support.service import ROOT

from app.server.process import Machine, plan_workers
from app.serving.preload import worker_bytes
from app.settings import Settings
from benchmarks.speed.scaling import contention, efficiency, latencies, mean_latency
from benchmarks.support.load import Request


def test_the_contention_fits_the_measured_numbers_of_cores() -> None:
    per_core = {cores: 100 * efficiency(cores, 0.04) for cores in (1, 2, 4)}
    assert contention(per_core) == pytest.approx(0.04)
    assert contention({1: 100.0}) == 0
    assert contention({1: 100.0, 2: 110.0}) == 0  # more than twice as fast must be an error of the measurement


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.9])
def test_the_modelled_latency_is_that_of_known_queues(utilisation: float) -> None:
    """The queues have one server (M/M/1), two servers (M/M/2), and as many servers as requests."""
    assert mean_latency(utilisation, {1: 1.0}) == pytest.approx(1 / (1 - utilisation))
    assert mean_latency(2 * utilisation, {1: 1.0, 2: 2.0}) == pytest.approx(1 / (1 - utilisation**2))
    assert mean_latency(utilisation, {1: 1.0, 10_000: 10_000.0}) == pytest.approx(1.0)


def test_requests_at_random_times_are_all_answered(tiny: httpx.Client) -> None:
    request = Request("/v1/images/sample", b'{"count": 1}')
    seconds = asyncio.run(latencies(tiny.base_url.port or 0, [request], 200.0, 0.5))
    assert 50 < len(seconds) < 150
    assert min(seconds) > 0


def test_the_documented_memory_is_enough_for_one_worker_for_each_core() -> None:
    needed = worker_bytes(ROOT / "models_store")

    def workers(cores: int, gibibytes: float) -> int:
        return plan_workers(Settings(), Machine(cores, int(gibibytes * 2**30), needed))[0]

    files = ("docker-compose.yml", "docs/how-to/production.md", "docs/how-to/sizing.md")
    compose, page, sizing = (" ".join((ROOT / file).read_text().replace("# ", "").split()) for file in files)
    memory, _ = re.findall(r"mem_limit: \$\{MEMORY:-(\d+)g\}", compose)  # of the services without and with a GPU
    default = workers(16, int(memory))
    assert f"With `{memory}g` and the included networks, these are {default} workers." in page
    ((cores, gibibytes),) = re.findall(r"CPUS=(\d+) MEMORY=(\d+)g", page)
    assert workers(int(cores), int(gibibytes)) == int(cores)
    for text in (compose, page, sizing):
        assert re.search(rf"(more than|enough for) {default} cores", text)
        (each,) = re.findall(r"at least ([\d.]+) GiB for each core", text)
        assert [workers(number, number * float(each)) for number in range(1, 17)] == [*range(1, 17)]
