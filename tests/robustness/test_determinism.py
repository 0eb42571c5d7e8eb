"""Responses do not depend on concurrent requests. ``make determinism`` tests the same with 2,000 requests."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from itertools import pairwise

import httpx
import pytest

from benchmarks.reliability import soak
from benchmarks.support import mix
from benchmarks.support.load import Request


def test_a_request_gets_the_same_answer_alone_and_among_64(shipped: httpx.Client) -> None:
    requests = [request for request in mix.requests(120, seed=7) if b"whitened" not in request.request.path.encode()]
    assert {request.kind for request in requests} == set(mix.KINDS)
    port = shipped.base_url.port or 0
    alone = asyncio.run(mix.expected_answers(port, requests))
    concurrent = asyncio.run(mix.answers(port, requests, 64))
    statuses = {
        (request.kind, answer[0]) for request, answer in zip(requests, alone, strict=True) if request.kind != "stream"
    }
    assert {kind for kind, status in statuses if status != 200} == {"bad"}
    different = [
        (request.kind, single, other)
        for request, single, other in zip(requests, alone, concurrent, strict=True)
        if not mix.same(request.kind, other, single)
    ]
    assert not different


def test_a_service_that_rejects_valid_requests_does_not_pass(shipped: httpx.Client) -> None:
    wrong = [mix.MixRequest("sample", mix.INVALID[3])]
    with pytest.raises(RuntimeError, match=r"^/v1/images/sample failed: \[404, "):
        asyncio.run(mix.expected_answers(shipped.base_url.port or 0, wrong))


def test_a_service_that_accepts_invalid_requests_does_not_pass(shipped: httpx.Client) -> None:
    accepted = [mix.MixRequest("bad", Request("/v1/images/sample", b'{"count": 1}'))]
    with pytest.raises(RuntimeError, match=r"^/v1/images/sample failed: \[200, "):
        asyncio.run(mix.expected_answers(shipped.base_url.port or 0, accepted))


def test_the_soak_test_reports_an_answer_that_ends_before_its_caller_disconnects(
    shipped: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "DISCONNECT_SECONDS", 60.0)
    monkeypatch.setattr(soak, "LONG", mix.INVALID[0])
    observations = soak.Observations()
    asyncio.run(soak.disconnect(shipped.base_url.port or 0, observations, time.monotonic() + 0.5))
    assert observations.wrong
    assert all(wrong.startswith("cancelled: status 400, ") for wrong in observations.wrong)


def test_the_soak_test_disconnects_during_an_answer() -> None:
    observations = soak.Observations()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await soak.disconnect(port, observations, time.monotonic() + 0.5)

    asyncio.run(run())
    assert observations.sent["cancelled"]
    assert not observations.wrong


def test_the_comparison_detects_a_wrong_answer() -> None:
    assert mix.same("classify", [200, {"p": 0.5}], [200, {"p": 0.500001}])
    assert not mix.same("classify", [200, {"p": 0.5}], [200, {"p": 0.501}])
    assert not mix.same("continue", [200, {"p": 0.5}], [200, {"p": 0.500001}])
    assert not mix.same("forecast", [200, [1.0]], [200, [1.0, 2.0]])


def test_the_soak_test_reports_growing_resources() -> None:
    observations = soak.Observations(samples=[(float(i), 100 * i, 600.0, 80 - i % 3, 12) for i in range(9)])
    figures = {"mib_per_10000": 0.9, "p50_ms": [10.0, 12.0]}
    assert soak.growth(observations, figures) == []
    observations.samples.append((9.0, 900, 600.0, 81, 13))
    assert soak.growth(observations, {"mib_per_10000": 1.1, "p50_ms": [10.0, 16.0]}) == [
        "memory grew by 1.1 MiB in 10,000 requests",
        "descriptors grew from 80 to 81",
        "threads grew from 12 to 13",
        "the latency of classification grew from 10.0 to 16.0 ms",
    ]


@pytest.mark.parametrize(("growth", "expected"), [([0, 60, 90, 90, 90], 0.0), ([0, 2, 4, 6, 8], 1.0)])
def test_the_growth_of_the_memory_is_measured_after_the_caches_are_full(growth: list[int], expected: float) -> None:
    """``growth`` is the growth of the memory in MiB until the start of each fifth of 20,000 requests."""
    memory = [500 + a + (b - a) * i / 10 for a, b in pairwise([*growth, 2 * growth[4] - growth[3]]) for i in range(10)]
    samples = [(float(i), 2_000 * i, mib, 80, 12) for i, mib in enumerate(memory)]
    observations = soak.Observations(samples=samples, latencies=[(float(i), 0.01) for i in range(50)])
    assert soak.figures(observations, 0.0, 50.0)["mib_per_10000"] == pytest.approx(expected)
