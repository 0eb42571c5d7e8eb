"""The busy endpoints without the way through the router, which costs more than most of their answers."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import error_response
from app.errors import QuartetError

PARAMETER_POSITIONS = {3: "name", 5: "version"}  # of parameters in paths such as /v2/models/NAME/versions/NUMBER/infer


class FastRoutes:
    """Calls the endpoint of a route whose path has no parameters with the request as its only argument.

    ``named`` are routes whose paths name a model at one of ``PLACES``; their endpoints take that name. All else goes
    on to ``app``, where the same routes stand for the documentation and for what is wrong with a request.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], named: Sequence[BaseRoute] = ()) -> None:
        self.app = app
        self.routes = {(method, route.path): route for method, route in _by_method(routes)}
        self.named = {(method, _pattern(route.path.split("/"))): route for method, route in _by_method(named)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        named: dict[str, str] = {}
        route = self.routes.get((scope["method"], scope["path"]))
        if route is None:
            route, named = self._of_a_model(scope)
        if route is None:
            await (self._as_get if scope["method"] == "HEAD" else self.app)(scope, receive, send)
            return
        scope["route"] = route
        try:
            answer = await route.endpoint(Request(scope, receive, send), **named)
        except QuartetError as error:
            answer = error_response(error)
        await answer(scope, receive, send)

    def _of_a_model(self, scope: Scope) -> tuple[APIRoute | None, dict[str, str]]:
        """The route of a path that names a model, whose parameters then stand in the scope, and that name."""
        parts = scope["path"].split("/", 8)
        route = self.named.get((scope["method"], _pattern(parts)))
        if route is None:
            return None, {}
        found = {PARAMETER_POSITIONS[i]: part for i, part in enumerate(parts) if i in PARAMETER_POSITIONS}
        if not all(found.values()):  # what is empty is no parameter
            return None, {}
        scope["path_params"] = found
        return route, {"name": found["name"]}

    async def _as_get(self, scope: Scope, receive: Receive, send: Send) -> None:
        """HEAD is what GET would say, without its body, which the server leaves out (RFC 9110, 9.3.2)."""
        inner = {**scope, "method": "GET"}
        try:
            await self.app(inner, receive, send)
        finally:
            scope["route"] = inner.get("route")


def _by_method(routes: Sequence[BaseRoute]) -> list[tuple[str, APIRoute]]:
    return [(method, route) for route in routes if isinstance(route, APIRoute) for method in route.methods or ()]


def _pattern(parts: Sequence[str]) -> tuple[str, ...]:
    """A path without what stands at ``PLACES``."""
    return tuple("" if i in PARAMETER_POSITIONS else part for i, part in enumerate(parts))
