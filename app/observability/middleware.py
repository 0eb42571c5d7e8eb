"""ASGI middleware that gives every request an id, a trace, metrics, a line in the access log, and optionally a span."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.engine.observer import RequestTrace, current_trace
from app.errors import CallerGone, NotReady, QuartetError
from app.observability.access_log import AccessLog
from app.observability.metrics import Metrics

log = logging.getLogger("quartet")
REQUEST_ID = "quartet.request_id"  # key in the ASGI scope
REJECTION = "quartet.rejection"  # key in the ASGI scope: the error that the HTTP server sent to a running request
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")  # ids that clients may choose
SECURITY_HEADERS = (  # added to every response, for browsers
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)


class RequestTelemetry:
    """Gives each request an id and a trace, measures and logs it, and creates a span if tracing is on.

    The ``root_path`` of a proxy is removed from the path, because all other code depends on the rest of the path.
    ``failure`` creates the response to an error that no other code has handled, given the path.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, log: AccessLog, failure: Callable[[QuartetError, str], ASGIApp]
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.failure = failure
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        if (root := scope.get("root_path")) and scope["path"].startswith(f"{root}/"):
            scope = {**scope, "path": scope["path"].removeprefix(root)}
        request_id = assign_request_id(scope)
        trace = RequestTrace(request_id)
        current_trace.set(trace)
        headers = [(b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
        if tracer := self.metrics.tracer:
            trace.span, parent = tracer.begin(scope["method"], scope["headers"])
            headers += [(b"traceparent", parent)] if parent else []
        self.metrics.requests_running.inc()
        status = 499  # unchanged if the client disconnects before the response starts
        ended = False

        def end() -> None:
            nonlocal ended, status
            if not ended:
                ended = True
                if rejection := scope.get(REJECTION):  # the application has only noticed a disconnect
                    status, trace.error_code = rejection.status, rejection.code
                self._record(scope, status, time.perf_counter() - started, trace)

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *headers]
            elif not message.get("more_body"):
                end()  # before the last part is sent, because the process may end as soon as the client has it
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # at shutdown, after the grace period
            if status == 499:  # nothing was sent yet
                error: QuartetError = NotReady("the service stopped before it could answer")
                await self.failure(error, scope["path"])(scope, receive, send_with_headers)
        except CallerGone as gone:  # during a streamed response
            status, trace.error_code = gone.status, gone.code
        except Exception:
            log.exception("request %s failed", request_id)
            if status == 499:
                error = QuartetError(
                    f"internal error; the log of the service has the traceback of request {request_id}"
                )
                await self.failure(error, scope["path"])(scope, receive, send_with_headers)
        finally:
            self.metrics.requests_running.dec()
            end()  # only if no complete response was sent

    def on_rejected(self, path: str, error: QuartetError, request_id: str) -> None:
        """Record a request that the HTTP server rejected, for example because it was not valid HTTP."""
        trace = RequestTrace(request_id, error_code=error.code)
        self.metrics.on_response("unknown", "OTHER", error.status, 0.0, trace)
        self.log("-", path or "-", "unknown", error.status, 0.0, trace)

    def _record(self, scope: Scope, status: int, seconds: float, trace: RequestTrace) -> None:
        """Record a request in the metrics, the access log and its span."""
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        # The path pattern of the route is a label. The actual paths would give too many labels.
        route = getattr(scope.get("route"), "path", None) or "unknown"
        self.metrics.on_response(route, method, status, seconds, trace)
        self.log(method, scope["path"], route, status, seconds, trace)
        if tracer := self.metrics.tracer:
            names = {"quartet.model": trace.model, "quartet.version": trace.version, "quartet.rows": trace.rows}
            tracer.end(trace.span, method, route, status, names | {"error.type": trace.error_code})


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def new_request_id() -> str:
    """Return 12 hexadecimal digits of the time in milliseconds and 20 random ones.

    Databases store rows with increasing keys several times faster than rows with random ones.
    """
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


def assign_request_id(scope: MutableMapping[str, Any]) -> str:
    """Return the id of a request: the client's ``x-request-id`` if it is allowed, otherwise a new id.

    Further calls for the same request return the same id.
    """
    if REQUEST_ID not in scope:
        sent = dict(reversed(scope["headers"])).get(b"x-request-id", b"").decode("latin-1")
        scope[REQUEST_ID] = sent if REQUEST_ID_PATTERN.fullmatch(sent) else new_request_id()
    return str(scope[REQUEST_ID])
