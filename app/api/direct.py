"""The busy endpoints without the way through the router, which costs more than most of their answers."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.failures import response
from app.errors import QuartetError


class Direct:
    """Calls the endpoint of a route whose path has no parameters; its only argument is the request.

    All else goes on to ``app``, where the same routes stand for the documentation and for what is wrong with a request.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self.app = app
        self.routes = {
            (method, route.path): route
            for route in routes
            if isinstance(route, APIRoute)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self.routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await (self._as_get if scope.get("method") == "HEAD" else self.app)(scope, receive, send)
            return
        scope["route"] = route
        try:
            answer = await route.endpoint(Request(scope, receive, send))
        except QuartetError as error:
            answer = response(error)
        await answer(scope, receive, send)

    async def _as_get(self, scope: Scope, receive: Receive, send: Send) -> None:
        """HEAD is what GET would say, without its body, which the server leaves out (RFC 9110, 9.3.2)."""
        inner = {**scope, "method": "GET"}
        try:
            await self.app(inner, receive, send)
        finally:
            scope["route"] = inner.get("route")
