"""Metrics, the access log, and the id that every request has."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, ParamSpec
from urllib.parse import quote

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, multiprocess, values
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import CallerGone, NotReady, QuartetError

P = ParamSpec("P")
log = logging.getLogger("quartet")
access = logging.getLogger("quartet.access")

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
GATHER = 0.2  # seconds ...
TOGETHER = 3500  # ... or characters of log lines: what is shorter than a page is not torn by another process's lines
SHARED = "PROMETHEUS_MULTIPROC_DIR"
GUARDS = (  # what browsers are told not to do with any answer
    (b"x-content-type-options", b"nosniff"),  # take it for another type than it says
    (b"x-frame-options", b"DENY"),  # show it in another page's frame
    (b"referrer-policy", b"no-referrer"),  # tell others where they came from
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def harmless(report: Callable[P, None]) -> Callable[P, None]:
    """A report that fails, for want of file descriptors say, is logged: what it tells of goes on."""

    @functools.wraps(report)
    def reported(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            report(*args, **kwargs)
        except Exception:
            log.exception("a figure is lost")

    return reported


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
        self.limits = counter("limited_total", "Requests over the limit of their key", "key")
        self.failures = counter("failures_total", "Inputs that a network failed on", "model")
        self._models: dict[str, Any] = {}
        self._answered: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}  # looking labels up is not free

    @harmless
    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered, or given up."""
        key = (route, method, status)
        if key not in self._answered:
            labels = (route, method, str(status))
            self._answered[key] = self.requests.labels(*labels), self.request_seconds.labels(*labels)
        count, duration = self._answered[key]
        count.inc()
        duration.observe(seconds)

    @harmless
    def waited(self, model: str, seconds: Sequence[float]) -> None:
        observe = self._of(model)[0].observe
        for waited in seconds:
            observe(waited)

    @harmless
    def computed(self, model: str, rows: int, seconds: float) -> None:
        _, duration, size = self._of(model)
        duration.observe(seconds)
        size.observe(rows)

    def _of(self, model: str) -> tuple[Histogram, Histogram, Histogram]:
        """The histograms of a model: queue, compute, rows."""
        if model not in self._models:
            all_models = self.queue_seconds, self.compute_seconds, self.batch_rows
            self._models[model] = tuple(histogram.labels(model) for histogram in all_models)
        return self._models[model]

    @harmless
    def refused(self, model: str) -> None:
        self.refusals.labels(model).inc()

    @harmless
    def limited(self, key: str) -> None:
        """A request was more than its key may send."""
        self.limits.labels(key).inc()

    @harmless
    def failed(self, model: str, error: Exception) -> None:
        self.failures.labels(model).inc()
        log.error("%s failed", model, exc_info=error)

    def page(self) -> bytes:
        """All figures of all workers in Prometheus' text format."""
        if SHARED not in os.environ:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


def shared_metrics() -> AbstractContextManager[Callable[[int], None]]:
    """Have all processes that are forked from now on count together. Entered, it gives what forgets one that has died.

    They count in files, in memory where there is such a folder: it can be written even in a read-only container.
    Raises OSError where no folder can be.
    """
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else gettempdir()
    for left in Path(parent).glob("quartet-*-*"):  # by a service that was killed
        if not Path("/proc", left.name.split("-")[1]).exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = TemporaryDirectory(prefix=f"quartet-{os.getpid()}-", dir=parent)
    os.environ[SHARED] = folder.name
    values.ValueClass = values.get_value_class()  # chosen when it was imported, before this was known

    @contextmanager
    def shared() -> Iterator[Callable[[int], None]]:
        with folder:
            yield multiprocess.mark_process_dead

    return shared()


class AccessLog:
    """One line a request, written a few times a second: a write for each would cost more than most answers."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._size = 0
        self._second, self._stamp = 0, ""

    def __call__(self, method: str, path: str, status: int, seconds: float, request_id: str) -> None:
        if not access.isEnabledFor(logging.INFO):
            return
        now = time.time()
        if int(now) != self._second:
            self._second, self._stamp = int(now), time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        if not self._lines:
            asyncio.get_running_loop().call_later(GATHER, self.write)
        plain = path if path.isascii() and path.isprintable() and " " not in path else quote(path)
        line = (
            f"{self._stamp},{int(now % 1 * 1000):03d} INFO quartet.access "
            f"{method} {plain} {status} {seconds * 1000:.1f} ms {request_id}\n"
        )
        self._lines.append(line)
        self._size += len(line)
        if self._size > TOGETHER:
            self.write()

    def write(self) -> None:
        """Write what was gathered."""
        lines, self._lines, self._size = self._lines, [], 0
        sys.stderr.write("".join(lines))
        sys.stderr.flush()


class Telemetry:
    """Gives each request its id, counts and times it, and logs one line."""

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
        request_id = _request_id(scope)
        status = 499  # the caller left before there was an answer

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode()), *GUARDS]
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
            seconds = time.perf_counter() - begun
            method = scope["method"] if scope["method"] in METHODS else "OTHER"
            self.metrics.answered(_route(scope), method, status, seconds)
            self.log(method, scope["path"], status, seconds, request_id)


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
