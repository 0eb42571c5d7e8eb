"""Responses do not depend on concurrent requests. ``make determinism`` tests the same with 2,000 requests."""

from __future__ import annotations

import asyncio

import httpx
import pytest

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


@pytest.mark.parametrize(
    ("kind", "request_of_kind", "status"),
    [("sample", mix.INVALID[3], 404), ("bad", Request("/v1/images/sample", b'{"count": 1}'), 200)],
)
def test_a_service_that_rejects_valid_or_accepts_invalid_requests_does_not_pass(
    shipped: httpx.Client, kind: str, request_of_kind: Request, status: int
) -> None:
    with pytest.raises(RuntimeError, match=rf"^/v1/images/sample failed: \[{status}, "):
        asyncio.run(mix.expected_answers(shipped.base_url.port or 0, [mix.MixRequest(kind, request_of_kind)]))


def test_the_comparison_detects_a_wrong_answer() -> None:
    assert mix.same("classify", [200, {"p": 0.5}], [200, {"p": 0.500001}])
    assert not mix.same("classify", [200, {"p": 0.5}], [200, {"p": 0.501}])
    assert not mix.same("continue", [200, {"p": 0.5}], [200, {"p": 0.500001}])
    assert not mix.same("forecast", [200, [1.0]], [200, [1.0, 2.0]])
