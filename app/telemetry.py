"""Metrics, the access log, and the id that every request has."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, MutableMapping
from typing import Any
from urllib.parse import quote

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import NotReady, QuartetError

log = logging.getLogger("quartet")
access = logging.getLogger("quartet.access")

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The figures of one process, in base units: seconds and rows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"quartet_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"quartet_{name}", text, labels, registry=self.registry, buckets=buckets)

        self.requests = counter("requests_total", "Requests answered", "route", "method", "status")
        self.request_seconds = histogram(
            "request_seconds", "From the first byte to the last", "route", "method", "status"
        )
        self.queue_seconds = histogram("queue_seconds", "Waiting for a batch", "model")
        self.compute_seconds = histogram("compute_seconds", "One forward of a batch", "model")
        self.batch_rows = histogram("batch_rows", "Rows in one forward", "model", buckets=ROWS)
        self.refusals = counter("refusals_total", "Requests refused by a full queue", "model")
        self.failures = counter("failures_total", "Inputs that a network failed on", "model")

    def waited(self, model: str, seconds: float) -> None:
        self.queue_seconds.labels(model).observe(seconds)

    def computed(self, model: str, rows: int, seconds: float) -> None:
        self.compute_seconds.labels(model).observe(seconds)
        self.batch_rows.labels(model).observe(rows)

    def refused(self, model: str) -> None:
        self.refusals.labels(model).inc()

    def failed(self, model: str, error: Exception) -> None:
        self.failures.labels(model).inc()
        log.error("%s failed", model, exc_info=error)

    def page(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class Telemetry:
    """Gives each request its id, counts and times it, and logs one line."""

    def __init__(self, app: ASGIApp, metrics: Metrics, failure: Callable[[QuartetError], ASGIApp]) -> None:
        self.app = app
        self.metrics = metrics
        self.failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        request_id = _request_id(scope)
        status = 499  # the caller left before there was an answer

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:  # at shutdown, when a request has had the time that it may take
            if status == 499:  # nothing was sent yet
                error: QuartetError = NotReady("the service stopped before it could answer")
                await self.failure(error)(scope, receive, sending)
        except Exception:
            log.exception("request %s failed", request_id)
            if status == 499:
                error = QuartetError(f"the service failed; its log tells more of request {request_id}")
                await self.failure(error)(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - begun
            route, method = _route(scope), scope["method"] if scope["method"] in METHODS else "OTHER"
            self.metrics.requests.labels(route, method, str(status)).inc()
            self.metrics.request_seconds.labels(route, method, str(status)).observe(seconds)
            access.info("%s %s %s %.1f ms %s", method, quote(scope["path"]), status, seconds * 1000, request_id)


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def _route(scope: MutableMapping[str, Any]) -> str:
    """The route's pattern, so that callers' own paths do not become labels."""
    return getattr(scope.get("route"), "path", None) or "unknown"


def _request_id(scope: Scope) -> str:
    """The caller's own id where it is fit for a header and a log, else a new one."""
    given = next((value for key, value in scope["headers"] if key == b"x-request-id"), b"")
    text = given.decode("latin-1")
    return text if re.fullmatch(r"[A-Za-z0-9._:/+=-]{1,128}", text) else uuid.uuid4().hex
