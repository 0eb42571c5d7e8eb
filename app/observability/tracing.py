"""OpenTelemetry traces: a span for each request, its wait and its computing, and one for each batch.

No request pays for it, and none of it is imported from here, unless ``QUARTET_OTLP_ENDPOINT`` names a collector.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from app.engine.observer import BatchMember, RequestTrace
from app.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

CARRIED = (b"traceparent", b"tracestate")  # W3C Trace Context
SEND_SECONDS = 3  # that a collector may take, also at a stop
LINKS = 128  # of one span: the most that OpenTelemetry keeps by default


class Tracer:
    """Makes the spans and sends them to ``address``, a collector of OTLP over HTTP; see ``tracer``.

    The names of the service and of its host, and what share of the requests is traced, come from OpenTelemetry's own
    variables (``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_TRACES_SAMPLER``).
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import context, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("quartet")
        self._propagator = TraceContextTextMapPropagator()
        self._trace, self._nowhere = trace, context.Context()

    def begin(self, method: str, headers: Sequence[tuple[bytes, bytes]]) -> tuple[Span, bytes]:
        """The span of a request, the child of the caller's where it sent a ``traceparent``; gives also its own one,
        empty where OpenTelemetry is switched off.
        """
        sent = {name.decode(): value.decode("latin-1") for name, value in headers if name in CARRIED}
        parent = self._propagator.extract(sent, self._nowhere)
        span = self._tracer.start_span(method, parent, self._trace.SpanKind.SERVER)
        told: dict[str, str] = {}
        self._propagator.inject(told, self._trace.set_span_in_context(span, self._nowhere))
        return span, told.get("traceparent", "").encode()

    def end(self, span: Span, method: str, route: str, status: int, attributes: Mapping[str, Any]) -> None:
        """The request is over. What is the service's fault makes the span an error."""
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
        span.set_attributes({name: value for name, value in attributes.items() if value})
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR, attributes.get("error.type"))
        span.end()

    def computed(self, model: str, version: int, members: Sequence[BatchMember]) -> None:
        """One batch: a span of its own that links to its members, and in each request its wait and its computing."""
        traced: dict[RequestTrace, list[BatchMember]] = {}
        for member in members:
            if (account := member.trace) and account.span and account.span.get_span_context().trace_flags.sampled:
                traced.setdefault(account, []).append(member)
        if not traced:
            return
        offset = time.time_ns() - time.monotonic_ns()
        rows = sum(member.rows for member in members)
        names: dict[str, str | int] = {"quartet.model": model, "quartet.version": version, "quartet.rows": rows}
        requests = [account.span.get_span_context() for account in traced]
        batch = self._tracer.start_span(
            "batch",
            self._nowhere,
            attributes=names,
            links=[self._trace.Link(request) for request in requests[:LINKS]],
            start_time=_nanoseconds(min(member.started_at for member in members), offset),
        )
        link = [self._trace.Link(batch.get_span_context())]
        for account, own in traced.items():
            parent = self._trace.set_span_in_context(account.span, self._nowhere)
            begun = _nanoseconds(own[0].started_at, offset)
            waiting = self._tracer.start_span("queue", parent, start_time=_nanoseconds(own[0].queued_at, offset))
            waiting.end(begun)
            told = {**names, "quartet.rows": sum(member.rows for member in own)}
            computing = self._tracer.start_span("compute", parent, attributes=told, links=link, start_time=begun)
            computing.end(_nanoseconds(max(member.ended_at for member in own), offset))
        batch.end(_nanoseconds(max(member.ended_at for member in members), offset))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def create_tracer(address: str) -> Tracer | None:
    """One that sends to the collector at ``address``, such as ``http://localhost:4318``; none for an empty one.

    Raises SettingsError when OpenTelemetry is not installed.
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
    resource = Resource.create()  # with what OpenTelemetry's variables say
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "quartet"}))
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(f"{address.rstrip('/')}/v1/traces", timeout=SEND_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider)


def _nanoseconds(monotonic: float, offset: int) -> int:
    """A time of ``time.monotonic`` as one of the wall clock."""
    return int(monotonic * 1e9) + offset
