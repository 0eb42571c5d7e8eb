"""What goes around every request: its id, its account, its figures, its line in the log, its span."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.engine.observer import RequestTrace, current_trace
from app.errors import CallerGone, NotReady, QuartetError
from app.observability.access_log import AccessLog
from app.observability.metrics import Metrics

log = logging.getLogger("quartet")
REQUEST_ID = "quartet.request_id"  # in the scope of a request
SECURITY_HEADERS = (  # what browsers are told not to do with any answer
    (b"x-content-type-options", b"nosniff"),  # take it for another type than it says
    (b"x-frame-options", b"DENY"),  # show it in another page's frame
    (b"referrer-policy", b"no-referrer"),  # tell others where they came from
)


class RequestTelemetry:
    """Gives each request its id and account, counts and times it, logs one line, and traces it where that is wanted."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, log: AccessLog, failure: Callable[[QuartetError], ASGIApp]
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.failure = failure
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        scope[REQUEST_ID] = request_id = _request_id(scope)
        account = RequestTrace(request_id)
        current_trace.set(account)
        added = [(b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
        if tracer := self.metrics.tracer:
            account.span, parent = tracer.begin(scope["method"], scope["headers"])
            added += [(b"traceparent", parent)] if parent else []
        self.metrics.running_requests += 1
        status = 499  # the caller left before there was an answer

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:  # at shutdown, when a request has had the time that it may take
            if status == 499:  # nothing was sent yet
                error: QuartetError = NotReady("the service stopped before it could answer")
                await self.failure(error)(scope, receive, sending)
        except CallerGone:  # in the middle of an answer
            status = CallerGone.status
        except Exception:
            log.exception("request %s failed", request_id)
            if status == 499:
                error = QuartetError(f"the service failed; its log tells more of request {request_id}")
                await self.failure(error)(scope, receive, sending)
        finally:
            self._ended(scope, status, time.perf_counter() - begun, account)

    def on_refused(self, path: str, error: QuartetError, request_id: str) -> None:
        """What was no HTTP, or too long a head of it, was answered before it was a request."""
        self.metrics.on_response("unknown", "OTHER", error.status, 0.0, error.code)
        self.log("-", path or "-", "unknown", error.status, 0.0, RequestTrace(request_id, error_code=error.code))

    def _ended(self, scope: Scope, status: int, seconds: float, account: RequestTrace) -> None:
        self.metrics.running_requests -= 1
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        route = _route(scope)
        self.metrics.on_response(route, method, status, seconds, account.error_code)
        self.log(method, scope["path"], route, status, seconds, account)
        if tracer := self.metrics.tracer:
            names = {"quartet.model": account.model, "quartet.version": account.version, "quartet.rows": account.rows}
            tracer.end(account.span, method, route, status, names | {"error.type": account.error_code})


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def _route(scope: MutableMapping[str, Any]) -> str:
    """The route's pattern, so that callers' own paths do not become labels."""
    return getattr(scope.get("route"), "path", None) or "unknown"


def _request_id(scope: Scope) -> str:
    """The caller's own id where it is fit for a header and a log, else a new one."""
    for key, value in scope["headers"]:
        if key == b"x-request-id":
            text = value.decode("latin-1")
            return text if re.fullmatch(r"[A-Za-z0-9._:/+=-]{1,128}", text) else secrets.token_hex(16)
    return secrets.token_hex(16)
