"""OpenTelemetry traces of requests and batches.

A request has one span for its whole duration. For each batch with rows of the request, the request also has two spans:
one for the time in the queue, and one for the computation. A batch has one span. Texts that are reported together count
as a batch. OpenTelemetry is imported only if ``QUARTET_OTLP_ENDPOINT`` is set.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from app.engine.observer import BatchMember, RequestTrace
from app.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

CONTEXT_HEADERS = (b"traceparent", b"tracestate")  # W3C Trace Context
EXPORT_SECONDS = 3  # timeout of the collector, also at shutdown
MAX_LINKS = 128  # per span: OpenTelemetry's default limit


class Tracer:
    """Creates OpenTelemetry spans and exports them with ``provider``.

    OpenTelemetry's own environment variables set the service name, its attributes and the share of traced requests
    (``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_TRACES_SAMPLER``).
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import context, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("quartet")
        self._propagator = TraceContextTextMapPropagator()
        self._trace, self._no_context = trace, context.Context()

    def begin(self, method: str, headers: Sequence[tuple[bytes, bytes]]) -> tuple[Span, bytes]:
        """Start the span of a request, as a child of the client's ``traceparent`` if there is one.

        Returns the span and its ``traceparent``, which is empty if OpenTelemetry is disabled.
        """
        incoming = {name.decode(): value.decode("latin-1") for name, value in headers if name in CONTEXT_HEADERS}
        parent = self._propagator.extract(incoming, self._no_context)
        span = self._tracer.start_span(method, parent, self._trace.SpanKind.SERVER)
        outgoing: dict[str, str] = {}
        self._propagator.inject(outgoing, self._trace.set_span_in_context(span, self._no_context))
        return span, outgoing.get("traceparent", "").encode()

    def end(self, span: Span, method: str, route: str, status: int, attributes: Mapping[str, Any]) -> None:
        """End the span of a request. Statuses from 500 on mark the span as an error."""
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
        span.set_attributes({name: value for name, value in attributes.items() if value})
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR, attributes.get("error.type"))
        span.end()

    def computed(self, model: str, version: int, members: Sequence[BatchMember]) -> None:
        """Record a finished batch. The batch gets a span with links to its requests.

        Each request in the batch gets a span for its time in the queue and a span for its computation.
        """
        traced: dict[RequestTrace, list[BatchMember]] = {}
        for member in members:
            if (trace := member.trace) and trace.span and trace.span.get_span_context().trace_flags.sampled:
                traced.setdefault(trace, []).append(member)
        if not traced:
            return
        offset = time.time_ns() - time.monotonic_ns()
        rows = sum(member.rows for member in members)
        names: dict[str, str | int] = {"quartet.model": model, "quartet.version": version, "quartet.rows": rows}
        requests = [trace.span.get_span_context() for trace in traced]
        batch = self._tracer.start_span(
            "batch",
            self._no_context,
            attributes=names,
            links=[self._trace.Link(request) for request in requests[:MAX_LINKS]],
            start_time=_nanoseconds(min(member.started_at for member in members), offset),
        )
        link = [self._trace.Link(batch.get_span_context())]
        for trace, own in traced.items():
            parent = self._trace.set_span_in_context(trace.span, self._no_context)
            started = _nanoseconds(own[0].started_at, offset)
            waiting = self._tracer.start_span("queue", parent, start_time=_nanoseconds(own[0].queued_at, offset))
            waiting.end(started)
            attributes = {**names, "quartet.rows": sum(member.rows for member in own)}
            computing = self._tracer.start_span(
                "compute", parent, attributes=attributes, links=link, start_time=started
            )
            computing.end(_nanoseconds(max(member.ended_at for member in own), offset))
        batch.end(_nanoseconds(max(member.ended_at for member in members), offset))

    def close(self) -> None:
        """Export the remaining spans."""
        self._provider.shutdown()


def create_tracer(address: str) -> Tracer | None:
    """Return a tracer for the OTLP collector at ``address``, such as ``http://localhost:4318``.

    If ``address`` is empty, return None.

    Raises:
        SettingsError: OpenTelemetry is not installed.
    """
    if not address:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(f"QUARTET_OTLP_ENDPOINT needs the extra [tracing] ({error.name} is missing)") from None
    logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)  # its warnings quote invalid headers of clients
    resource = Resource.create()  # reads OpenTelemetry's environment variables
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "quartet"}))
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(f"{address.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider)


def _nanoseconds(monotonic: float, offset: int) -> int:
    """Convert ``time.monotonic`` seconds to nanoseconds since the epoch. ``offset`` is the difference of the clocks."""
    return int(monotonic * 1e9) + offset
