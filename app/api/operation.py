"""The rows of the HTTP API, and the application that answers requests with them.

A row is an ``Operation``. The routes and the OpenAPI document are made from the rows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fastapi
from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.admin_key import require_admin_key
from app.api.deadline import set_deadline
from app.api.errors import error_response
from app.api.middleware.api_keys import ApiKeys
from app.api.middleware.trusted_host import HostCheck
from app.api.request_head import reject_query
from app.api.shadow import ShadowTraffic
from app.errors import MethodNotAllowed, NotFound, QuartetError, quote_value
from app.limits import Limits
from app.observability.metrics import Metrics
from app.records.batches import Batches
from app.records.capture import Capture
from app.serving.models import Models
from app.settings import Settings


@dataclass(frozen=True)
class Service:
    """What endpoints need to answer requests. Without ``admin_key``, there are no administration endpoints."""

    models: Models
    metrics: Metrics
    admin_key: str | None = None
    capture: Capture | None = None
    shadows: ShadowTraffic | None = None
    batches: Batches | None = None
    version: str = ""
    document: Callable[[str], bytes] = str.encode  # returns the OpenAPI document, given the path of a proxy


class Request(fastapi.Request):
    """A request, with what its endpoint needs to answer it."""

    service: Service

    @property
    def models(self) -> Models:
        return self.service.models

    @property
    def settings(self) -> Settings:
        return self.models.settings

    @property
    def limits(self) -> Limits:
        return self.settings.limits


Endpoint = Callable[[Request], Awaitable[Response]]
Contents = Mapping[str, Any]  # a schema by media type


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Attributes:
        endpoint: answers requests. Its name is the id of the operation, and its docstring is the description.
        tag: the section of the document; empty for an operation that is not documented.
        response: the type of the JSON response.
        answer: description of the response.
        other_answers: schemas of the response in other media types.
        body, example: the Pydantic class of the JSON body, and a body with which a request succeeds.
        other_bodies: schemas of the body in other media types. A form that comes first is listed before JSON.
        query: the Pydantic class of the query parameters. Without it, requests with query parameters are rejected.
        parameters: descriptions and examples of the parameters in the path.
        errors: the error responses.
        waits_for_model: whether a GET request may wait until a version is loaded.
        is_admin: whether requests need the admin key.
        versioned: whether there is the same path with ``/versions/{version}`` after the name of the model.
        spools_body: whether the endpoint writes the body to disk as it arrives, so that it is not held in memory.
        any_query: whether query parameters are ignored, because programs add their own to health checks.
    """

    method: str
    path: str
    endpoint: Endpoint
    tag: str = ""
    summary: str = ""
    response: Any = None
    answer: str = ""
    other_answers: Contents = field(default_factory=dict)
    body: type[BaseModel] | None = None
    example: Any = None
    other_bodies: Contents = field(default_factory=dict)
    query: type[BaseModel] | None = None
    parameters: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    errors: Mapping[Any, Any] = field(default_factory=dict)
    waits_for_model: bool = False
    is_admin: bool = False
    versioned: bool = False
    spools_body: bool = False
    any_query: bool = False

    @property
    def has_deadline(self) -> bool:
        """Whether a request has a deadline, which ``x-request-timeout`` can set. Spooled bodies may take longer."""
        return (self.method == "POST" or self.waits_for_model) and not self.spools_body

    @property
    def paths(self) -> list[str]:
        return [self.path, self.path.replace("{name}", "{name}/versions/{version}")][: 1 + self.versioned]


class OperationRoute(Route):
    """The route of an operation. Query parameters that the operation does not know are rejected."""

    def __init__(self, path: str, operation: Operation) -> None:
        super().__init__(path, _unused, methods=[operation.method])
        self.operation = operation

    async def answer(self, request: Request) -> Response:
        """Return the response to a request. Raises QuartetError."""
        operation = self.operation
        if operation.is_admin:
            require_admin_key(request, request.service.admin_key or "")
        if request.scope["query_string"] and operation.query is None and operation.tag and not operation.any_query:
            reject_query(request, in_body=operation.body is not None)
        if operation.has_deadline:
            set_deadline(request, request.settings.request_seconds)
        return await operation.endpoint(request)


async def _unused(request: fastapi.Request) -> Response:
    raise NotImplementedError  # ``Router`` calls ``OperationRoute.answer``


class Router:
    """ASGI application that answers each request with its operation.

    Errors get the format of the request's protocol. ``others`` answers requests to the paths of ``other_routes``, and
    runs the start and the end of the service. ``check_host`` and ``keys`` reject requests.
    """

    def __init__(
        self,
        service: Service,
        operations: Iterable[Operation],
        other_routes: Sequence[BaseRoute],
        others: ASGIApp,
        check_host: HostCheck,
        keys: ApiKeys | None,
    ) -> None:
        self.service = service
        self.others = others
        self.check_host, self.keys = check_host, keys
        rows = [OperationRoute(path, operation) for operation in operations for path in operation.paths]
        for route in other_routes:
            if isinstance(route, Route) and route.methods and "GET" in route.methods:
                route.methods.add("HEAD")  # routes of FastAPI lack HEAD, unlike routes of Starlette
        self.routes: list[BaseRoute] = [*rows, *other_routes]
        self.exact = {(method, row.path): row for row in rows if "{" not in row.path for method in row.methods or ()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.others(scope, receive, send)
            return
        try:
            self.check_host(scope)
            if self.keys:
                await self.keys.check(scope)
            route = self.exact.get((scope["method"], scope["path"])) or self._find(scope)
            scope["route"] = route
            if not isinstance(route, OperationRoute):
                await self.others(scope, receive, send)
                return
            request = Request(scope, receive, send)
            request.service = self.service
            response = await route.answer(request)
        except QuartetError as error:
            response = error_response(error, scope["path"])
        await response(scope, receive, send)

    def _find(self, scope: Scope) -> BaseRoute:
        """Return the route of a request, and set its parameters in the scope. Raises NotFound and MethodNotAllowed."""
        allowed: set[str] = set()
        for route in self.routes:
            match, child_scope = route.matches(scope)
            if match is Match.FULL:
                if isinstance(route, OperationRoute):
                    scope.update(child_scope)
                return route
            if match is Match.PARTIAL:
                scope["route"] = route
                allowed |= getattr(route, "methods", None) or set()
        if not allowed:
            raise unknown_path(scope)
        names = ", ".join(sorted(allowed))
        problem = f"{quote_value(scope['path'])} does not take {scope['method']}"
        raise MethodNotAllowed(f"{problem}; allowed: {names}", names)


OTHER_PATHS = {"/v1/chat/completions": "the networks do not chat; /v1/completions continues a prompt"}


def unknown_path(scope: Scope) -> NotFound:
    advice = OTHER_PATHS.get(scope["path"], "/docs lists all paths")
    return NotFound(f"the path {quote_value(scope['path'])} does not exist; {advice}")
