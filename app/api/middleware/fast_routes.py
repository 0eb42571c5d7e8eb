"""Call the busiest endpoints without FastAPI's router, because the router takes more time than most endpoints."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import fastapi.routing
from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import Message, Receive, Scope, Send

from app.api.errors import error_response
from app.errors import QuartetError

PARAMETER_POSITIONS = {3: "name", 5: "version"}  # their places in /v2/models/NAME/versions/NUMBER/infer
IGNORED_INPUTS = {  # inputs that FastAPI's router passes to an endpoint, but the fast path does not
    "query_params": "query parameters",
    "header_params": "header parameters",
    "cookie_params": "cookie parameters",
    "body_params": "body parameters",
    "dependencies": "dependencies",
    "response_param_name": "Response parameter",
    "background_tasks_param_name": "BackgroundTasks parameter",
}


class FastRoutes:
    """ASGI middleware that calls the endpoints of some routes directly. All other requests go to FastAPI's router.

    The paths of ``routes`` have no parameters, and their endpoints take only the request. The paths of ``named``
    contain the name of a model, and perhaps a version, at ``PARAMETER_POSITIONS``. Their endpoints take the request and
    the name.

    Raises:
        ValueError: a route relies on something that the fast path ignores, such as a dependency.
    """

    def __init__(self, app: FastAPI, routes: Sequence[BaseRoute], named: Sequence[BaseRoute] = ()) -> None:
        self.router = app.build_middleware_stack()
        self.routes = {(method, route.path): route for method, route in _by_method(routes)}
        self.named = {(method, _pattern(route.path.split("/"))): route for method, route in _by_method(named)}
        included = _included_routes(app)
        for route in self.routes.values():
            _check_route(route, included, {})
        for route in self.named.values():
            _check_route(route, included, PARAMETER_POSITIONS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.router(scope, receive, send)
            return
        arguments: dict[str, str] = {}
        route = self.routes.get((scope["method"], scope["path"]))
        if route is None:
            route, arguments = self._match_named(scope)
        if route is None:
            await (self._as_get if scope["method"] == "HEAD" else self.router)(scope, receive, send)
            return
        scope["route"] = route
        try:
            response = await route.endpoint(Request(scope, receive, send), **arguments)
        except QuartetError as error:
            response = error_response(error)
        await response(scope, receive, send)

    def _match_named(self, scope: Scope) -> tuple[APIRoute | None, dict[str, str]]:
        """Return two values: the route in ``named`` that matches the path, or None, and the arguments of its endpoint.

        Also set ``path_params`` in the scope.
        """
        parts = scope["path"].split("/", 8)
        route = self.named.get((scope["method"], _pattern(parts)))
        if route is None:
            return None, {}
        parameters = {PARAMETER_POSITIONS[i]: part for i, part in enumerate(parts) if i in PARAMETER_POSITIONS}
        if not all(parameters.values()):  # the router does not match an empty parameter either
            return None, {}
        scope["path_params"] = parameters
        return route, {"name": parameters["name"]}

    async def _as_get(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a HEAD request like a GET request. The server omits the body (RFC 9110, 9.3.2)."""
        get_scope = {**scope, "method": "GET"}

        async def send_with_route(message: Message) -> None:
            scope["route"] = get_scope.get("route")  # set before ``send``, because ``send`` may count the request
            await send(message)

        try:
            await self.router(get_scope, receive, send_with_route)
        finally:
            scope["route"] = get_scope.get("route")  # also after an error


def _by_method(routes: Sequence[BaseRoute]) -> list[tuple[str, APIRoute]]:
    return [(method, route) for route in routes if isinstance(route, APIRoute) for method in route.methods or ()]


def _pattern(parts: Sequence[str]) -> tuple[str, ...]:
    """Return the parts of a path, with an empty string in the place of each parameter."""
    return tuple("" if i in PARAMETER_POSITIONS else part for i, part in enumerate(parts))


def _included_routes(app: FastAPI) -> dict[tuple[str, str], Any]:
    """Return all routes of the application by method and path, including the dependencies that routers add to them."""
    with_context = getattr(fastapi.routing, "iter_route_contexts", list)  # older versions of FastAPI copy the routes
    routes = list(with_context(app.routes))
    return {(method, route.path): route for route in routes for method in getattr(route, "methods", None) or ()}


def _check_route(route: APIRoute, included: dict[tuple[str, str], Any], positions: dict[int, str]) -> None:
    """Reject a route if the fast path could answer it differently from FastAPI's router.

    Raises:
        ValueError: the message has the methods and the path of the route, and the reason.
    """
    methods = sorted(route.methods or ())
    served = included.get((methods[0], route.path))
    if served is None:
        raise _refusal(route, "the application does not include it")
    parameters = {i: part[1:-1] for i, part in enumerate(route.path.split("/")) if part.startswith("{")}
    if any(positions.get(i) != name for i, name in parameters.items()):
        raise _refusal(route, "the fast path does not know the parameters of its path")
    dependant = served.dependant
    for attribute, name in IGNORED_INPUTS.items():
        if getattr(dependant, attribute):
            raise _refusal(route, f"the fast path would ignore its {name}")
    if getattr(served, "max_body_size", None) is not None:
        raise _refusal(route, "the fast path would ignore its max_body_size")
    if not inspect.iscoroutinefunction(route.endpoint):
        raise _refusal(route, "its endpoint is not a coroutine function")
    if type(route) is not APIRoute:
        raise _refusal(route, f"the fast path would ignore its class {type(route).__name__}")
    for field in dependant.path_params:
        if field.name != "name" or field.field_info.metadata or field.field_info.annotation is not str:
            raise _refusal(route, f"the fast path would not check its path parameter {field.name}")


def _refusal(route: APIRoute, reason: str) -> ValueError:
    return ValueError(f"{', '.join(sorted(route.methods or ()))} {route.path} cannot be a fast route: {reason}")
