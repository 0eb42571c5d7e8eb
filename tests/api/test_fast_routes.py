"""The fast path for routes gives the same answers as FastAPI's router.

It rejects routes with features of FastAPI that it would ignore.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Header, Query, Request
from fastapi import Path as PathParameter
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from support.images import image_bytes
from support.networks import SECOND_NETWORKS, TINY, publish_tiny
from support.service import TEST, serving

from app.api.middleware.fast_routes import FastRoutes
from app.settings import Settings

SERIES = np.sin(np.arange(30) / 3).round(3).tolist()
PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["cab"]}
LIMIT = 400_000  # largest body in bytes
VALID: dict[str, list[dict[str, Any]]] = {
    "/v1/images/classify": [
        {"content": image_bytes()},
        {"content": image_bytes(), "params": {"top_k": 3, "explain": "true"}},
        {"files": {"file": ("a b.png", image_bytes())}},
    ],
    "/v1/text/continue": [
        {"json": {"prompt": "cab", "max_characters": 5, "seed": 1, "n": 2}},
        {"json": {"prompt": "cab", "max_characters": 1, "seed": 1, "stream": True}},
    ],
    "/v1/series/forecast": [{"json": {"values": SERIES, "horizon": 7, "levels": [80, 95]}}],
    "/v1/images/sample": [
        {"json": {"count": 2, "seed": 4}},
        {"json": {"seed": 4}, "headers": {"accept": "image/png"}},
    ],
    "/v1/completions": [
        {"json": {"model": "tiny-rnn", "prompt": "cab", "max_tokens": 5, "seed": 2, "logprobs": 2}},
        {"json": {"model": "tiny-rnn", "prompt": "cab", "max_tokens": 1, "seed": 2, "stream": True}},
    ],
    "/v1/images/generations": [{"json": {"prompt": "three ys", "seed": 8, "model": "tiny-cgan"}}],
    "/v1/timeseries/models": [{"method": "GET"}],
    "/v1/timeseries/forecast": [
        {
            "json": {
                "inputs": [{"type": "univariate_time_series", "series": SERIES, "frequency": "H"}],
                "options": {"horizon": 3},
            }
        }
    ],
    "/v2/models/{name}/infer": [
        {"json": {"inputs": [PROMPT], "parameters": {"max_characters": 5, "seed": 1}}},
        {"json": {"inputs": [PROMPT], "id": "x"}},
    ],
    "/v2/models/{name}/generate": [{"json": {"text_input": "cab", "max_characters": 5, "seed": 1}}],
    "/v2/models/{name}/generate_stream": [{"json": {"text_input": "cab", "max_characters": 1, "seed": 1}}],
}
INVALID: list[dict[str, Any]] = [
    {},
    {"content": b"{"},
    {"content": b"[1]"},
    {"content": b"\xff\xfe"},
    {"content": b'{"a": 1, "a": 2}'},
    {"json": {"unknown": 1}},
    {"json": {"model": "nobody", "prompt": 1, "values": "x", "inputs": 3, "count": "many", "text_input": []}},
    {"json": {}, "params": {"unknown": "1"}},
    {"json": {}, "params": {"top_k": "many"}},
    {"content": b"x" * (LIMIT + 1)},
    {"content": b"{}", "headers": {"content-encoding": "br"}},
    {"content": b"--b\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}},
    {"content": b"--b\r\n", "headers": {"content-type": "multipart/form-data"}},
    {"content": b"{}", "headers": {"x-request-timeout": "soon"}},
    {"content": b"{}", "headers": {"accept": "nothing/atall", "content-type": ""}},
    {"method": "GET"},
    {"method": "HEAD"},
    {"method": "PUT", "json": {}},
    {"method": "OPTIONS"},
]
NAMES = ("tiny-rnn", "tiny-rnn@1", "tiny%2Drnn", "tiny-rnn@7", "nobody", "", "a%2Fb", "%FF", "tiny-cnn", "{name}")
VERSIONS = ("1", "7", "one", "", "%31")


class SwitchedRoutes(FastRoutes):
    """A fast path that passes all requests to FastAPI's router while ``bypassed`` is true."""

    bypassed = False
    latest: SwitchedRoutes

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        type(self).latest = self
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.bypassed:
            await (self._as_get if scope.get("method") == "HEAD" else self.router)(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("fast") / "store"
    for name in (*TINY, *SECOND_NETWORKS):
        publish_tiny(folder, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.main.FastRoutes", SwitchedRoutes)
        patch.setattr("secrets.randbelow", lambda limit: 7)  # the seed of requests that state no seed
        with serving(Settings(store=folder, **{**TEST, "max_body_bytes": LIMIT})) as client:
            yield client


def requests() -> list[tuple[str, dict[str, Any]]]:
    """Return valid and invalid requests to every fast route, each as a pair of path and request."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for path, valid in VALID.items():
        if "{name}" not in path:
            rows += [(path, request) for request in (*valid, *INVALID)]
            continue
        rows += [(path.replace("{name}", "tiny-rnn"), request) for request in (*valid, *INVALID)]
        rows += [(path.replace("{name}", name), request) for name in NAMES for request in valid]
        versioned = path.replace("{name}", "tiny-rnn/versions/{version}")
        rows += [(versioned.replace("{version}", version), request) for version in VERSIONS for request in valid]
    return rows


def answer(client: httpx.Client, path: str, request: dict[str, Any]) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return status, headers and body of an answer, without values that differ between equal requests."""
    headers = {"x-request-id": "parity", **request.get("headers", {})}
    response = client.request(**{"method": "POST", "url": path, **request, "headers": headers})
    body = re.sub(rb'"(id|created|created_at)":\s*("[^"]*"|\d+)', b"", response.content)
    ignored = ("date", "x-request-id")
    return response.status_code, [row for row in response.headers.multi_items() if row[0] not in ignored], body


def test_both_paths_give_the_same_answers(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    differences, successes = [], 0
    for path, request in requests():
        answers = []
        for bypassed in (False, True):
            monkeypatch.setattr(SwitchedRoutes, "bypassed", bypassed)
            answers.append(answer(client, path, request))
        successes += answers[0][0] == 200
        if answers[0] != answers[1]:
            differences.append((path, request, *answers))
    assert not differences, differences[:3]
    assert successes > 30


def test_the_requests_cover_every_fast_route(client: httpx.Client) -> None:
    fast = SwitchedRoutes.latest
    paths = {route.path.replace("/versions/{version}", "") for route in (*fast.routes.values(), *fast.named.values())}
    assert paths == set(VALID)


async def plain(request: Request) -> Response:
    return Response("plain")


async def with_query(request: Request, count: int = 1) -> Response:
    return Response(str(count))


async def with_model_query(request: Request, query: Annotated[str, Query()] = "") -> Response:
    return Response(query)


async def with_header(request: Request, x_key: Annotated[str, Header()] = "") -> Response:
    return Response(x_key)


async def with_body(request: Request, body: dict[str, int]) -> Response:
    return Response(str(body))


async def with_response(request: Request, response: Response) -> Response:
    return response


async def with_tasks(request: Request, tasks: BackgroundTasks) -> Response:
    return Response()


async def with_name(request: Request, name: str) -> Response:
    return Response(name)


async def with_short_name(request: Request, name: Annotated[str, PathParameter(max_length=3)]) -> Response:
    return Response(name)


def in_a_thread(request: Request) -> Response:
    return Response()


async def dependency() -> None:
    pass


class OwnRoute(APIRoute):
    pass


@pytest.mark.parametrize(
    ("endpoint", "options", "path", "reason"),
    [
        (with_query, {}, "/fast", "the fast path would ignore its query parameters"),
        (with_model_query, {}, "/fast", "the fast path would ignore its query parameters"),
        (with_header, {}, "/fast", "the fast path would ignore its header parameters"),
        (with_body, {}, "/fast", "the fast path would ignore its body parameters"),
        (with_response, {}, "/fast", "the fast path would ignore its Response parameter"),
        (with_tasks, {}, "/fast", "the fast path would ignore its BackgroundTasks parameter"),
        (plain, {"dependencies": [Depends(dependency)]}, "/fast", "the fast path would ignore its dependencies"),
        (in_a_thread, {}, "/fast", "its endpoint is not a coroutine function"),
        (plain, {"route_class_override": OwnRoute}, "/fast", "the fast path would ignore its class OwnRoute"),
        (with_name, {}, "/fast/{name}", "the fast path does not know the parameters of its path"),
    ],
)
def test_a_route_that_relies_on_the_router_is_rejected(
    endpoint: Any, options: dict[str, Any], path: str, reason: str
) -> None:
    app, router = FastAPI(), APIRouter(prefix="/v1")
    router.add_api_route(path, endpoint, methods=["POST"], **options)
    app.include_router(router)
    with pytest.raises(ValueError, match=re.escape(f"POST /v1{path} cannot be a fast route: {reason}")):
        FastRoutes(app, router.routes)


@pytest.mark.parametrize("at", ["router", "include", "app"])
def test_dependencies_of_the_router_or_the_application_are_rejected(at: str) -> None:
    dependencies = {"dependencies": [Depends(dependency)]}
    app = FastAPI(**dependencies if at == "app" else {})
    router = APIRouter(**dependencies if at == "router" else {})
    router.add_api_route("/fast", plain, methods=["POST"])
    app.include_router(router, **dependencies if at == "include" else {})
    with pytest.raises(ValueError, match="POST /fast cannot be a fast route: the fast path would ignore its depend"):
        FastRoutes(app, router.routes)


def test_a_route_that_the_application_does_not_include_is_rejected() -> None:
    router = APIRouter()
    router.add_api_route("/fast", plain, methods=["POST"])
    with pytest.raises(ValueError, match="POST /fast cannot be a fast route: the application does not include it"):
        FastRoutes(FastAPI(), router.routes)


@pytest.mark.parametrize(
    ("path", "endpoint", "reason"),
    [
        ("/v2/models/{name}/infer", with_short_name, "the fast path would not check its path parameter name"),
        ("/v2/models/{model}/infer", with_name, "the fast path does not know the parameters of its path"),
        ("/v2/{name}/infer", with_name, "the fast path does not know the parameters of its path"),
    ],
)
def test_a_named_route_with_other_parameters_is_rejected(path: str, endpoint: Any, reason: str) -> None:
    app, router = FastAPI(), APIRouter()
    router.add_api_route(path, endpoint, methods=["POST"])
    app.include_router(router)
    with pytest.raises(ValueError, match=re.escape(f"POST {path} cannot be a fast route: {reason}")):
        FastRoutes(app, [], named=router.routes)


def test_plain_routes_are_accepted(tmp_path: Path) -> None:
    app, router = FastAPI(), APIRouter()
    router.add_api_route("/fast", plain, methods=["POST"])
    router.add_api_route("/v2/models/{name}/infer", with_name, methods=["POST"])
    app.include_router(router)
    assert FastRoutes(app, router.routes[:1], named=router.routes[1:]).routes
