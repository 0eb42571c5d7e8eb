"""The metrics that Prometheus reads, and the engine observers that record them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, Summary, generate_latest, values
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics import MetricWrapperBase

from app.engine.observer import BatchMember, RequestTrace, VersionKey
from app.observability.shared_metrics import SharedMetrics
from app.observability.tracing import Tracer
from app.records.capture import Capture

log = logging.getLogger("quartet")

# Upper bounds of histogram buckets.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
INTER_TOKEN_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

SUCCESS = "success"  # the label ``result`` of requests without an error
M = TypeVar("M", bound=MetricWrapperBase)
Totals = dict[tuple[str, str, str, str], float]  # sums of metrics by metric, model, version and result


@cache
def labelled(metric: M, *labels: str) -> M:
    """Return a metric with these values of its labels. The search in prometheus_client takes ten times as long."""
    return metric.labels(*labels)


class Metrics:
    """The metrics of one process, in seconds, rows and bytes. Most gauges are summed over all workers.

    ``workers`` is the number of workers that the service should have. ``shared`` has the metrics of all of them; it is
    None if there is only this process. The metrics of removed versions are hidden.
    """

    def __init__(self, tracer: Tracer | None = None, workers: int = 1, shared: SharedMetrics | None = None) -> None:
        if shared is None:  # even if the environment has a folder of another program
            values.ValueClass = values.MutexValue
        self.tracer, self._shared = tracer, shared
        self._known: frozenset[VersionKey] | None = None  # versions that are shown; None means all
        self.registry = CollectorRegistry()
        self.capture: Capture | None = None  # has what feedback says about the answers, and the drift
        options: dict[str, Any] = {"namespace": "quartet", "registry": self.registry}
        counter: Callable[..., Counter] = partial(Counter, **options)
        gauge: Callable[..., Gauge] = partial(Gauge, multiprocess_mode="livesum", **options)
        histogram: Callable[..., Histogram] = partial(Histogram, buckets=SECONDS, **options)
        route = ("route", "method", "status")
        self.requests = counter("requests", "Requests answered, or cancelled by the client (status 499)", route)
        self.request_seconds = histogram(
            "request_seconds", "Duration of a request, until the last part of its response is sent", route
        )
        self.errors = counter("errors", "Requests that failed, by error code", ("route", "reason"))
        self.requests_running = gauge("requests_running", "Requests in progress")
        self.captured = counter(
            "captured_requests",
            "Captured requests that were stored or dropped, and compared with the answer of a shadow or skipped",
            ("model", "result"),
        )
        self.rate_limited = counter("rate_limited", "Requests over the rate limit of their API key", ("key",))
        self.states = gauge(
            "versions",
            "Versions in memory (state ready), and versions or files that cannot be used (state failed)",
            ("state",),
            multiprocess_mode="livemax",
        )
        self.scan_age = gauge(
            "store_scan_age_seconds",
            "Seconds since the last complete scan of the store",
            multiprocess_mode="livemax",
        )
        self.workers = gauge("workers", "Worker processes that have loaded their models")
        self.planned_workers = gauge(
            "planned_workers", "Worker processes that the service should have", multiprocess_mode="livemax"
        )
        self.planned_workers.set(workers if shared else 1)
        self._add_metrics_of_versions(options, counter, gauge, histogram)

    def _add_metrics_of_versions(
        self,
        options: dict[str, Any],
        counter: Callable[..., Counter],
        gauge: Callable[..., Gauge],
        histogram: Callable[..., Histogram],
    ) -> None:
        version = ("model", "version")
        self.version_request_seconds = Summary(
            "version_request_seconds",
            "Duration of the requests for a version. The result is success, or the error code of the failure",
            (*version, "result"),
            **options,
        )
        self.last_batch = gauge(
            "last_batch_timestamp_seconds", "Unix time at which the last batch ended", version, multiprocess_mode="max"
        )
        self.queue_seconds = histogram("queue_seconds", "Time from queueing to the start of a batch", version)
        self.compute_seconds = histogram(
            "compute_seconds", "Duration of one batch, or of one round of text steps", version
        )
        self.batch_rows = histogram("batch_rows", "Rows in one batch", version, buckets=ROWS)
        self.first_token_seconds = histogram(
            "time_to_first_token_seconds", "Time from queueing to the first character of a text", version
        )
        self.inter_token_seconds = histogram(
            "inter_token_seconds", "Mean time between two characters of a text", version, buckets=INTER_TOKEN_SECONDS
        )
        self.queued = gauge(
            "queued_rows",
            "Rows waiting for a batch, without the rest of large requests of which a part is being computed",
            version,
        )
        self.running = gauge("running_rows", "Rows being computed", version)
        self.rejected = counter(
            "rejected_requests", "Requests rejected by the queue of a version", (*version, "reason")
        )
        self.failures = counter("failures", "Failures of a network on a valid input", version)
        self.loaded = gauge("loaded_bytes", "Bytes of loaded weights in all workers", version)

    def for_version(self, model: str, version: int) -> VersionMetrics:
        """Return the metrics of a version. Those of the same version are equal."""
        # Prometheus must read 0 before the first batch and failure. Otherwise increase() does not see them.
        for metric in (self.queue_seconds, self.compute_seconds, self.batch_rows, self.last_batch, self.failures):
            labelled(metric, model, str(version))
        return VersionMetrics(self, model, version)

    def on_response(self, route: str, method: str, status: int, seconds: float, trace: RequestTrace) -> None:
        """Count a request that was answered or cancelled. ``seconds`` is its duration."""
        reason = trace.error_code or (str(status) if status >= 400 else "")
        labels = (route, method, str(status))
        labelled(self.requests, *labels).inc()
        labelled(self.request_seconds, *labels).observe(seconds)
        if reason:
            self.errors.labels(route, reason).inc()
        if trace.model:
            own = trace.model, str(trace.version), reason or SUCCESS
            labelled(self.version_request_seconds, *own).observe(seconds)

    def on_rate_limited(self, key: str) -> None:
        """Count a request that exceeded a rate limit. ``key`` is the name of its API key."""
        self.rate_limited.labels(key).inc()

    def on_captured(self, model: str, result: str) -> None:
        """Count requests that were ``stored`` or ``dropped``."""
        labelled(self.captured, model, result).inc()

    def on_versions(self, ready: int, failed: int, known: frozenset[VersionKey], scan_age: float) -> None:
        self.workers.set(1)  # the first report comes after the models were loaded
        self.states.labels("ready").set(ready)
        self.states.labels("failed").set(failed)
        self.scan_age.set(scan_age)
        self._known = known

    def _is_current(self, labels: Mapping[str, str]) -> bool:
        """Return whether a metric with these labels is shown. Metrics of removed versions are hidden."""
        return (
            self._known is None or "version" not in labels or (labels["model"], int(labels["version"])) in self._known
        )

    async def render(self) -> bytes:
        """Return all metrics of all workers in Prometheus' text format."""
        return await asyncio.to_thread(generate_latest, self)

    async def totals(self) -> Totals:
        """Return the sum over all workers of each metric of a version.

        The result in a key is empty for metrics without this label. Histograms have values for their count and sum, but
        not for their buckets.
        """
        return await asyncio.to_thread(self._totals)

    def _totals(self) -> Totals:
        totals: Totals = defaultdict(float)
        for family in self.collect():
            for sample in family.samples:
                labels = sample.labels
                if "version" in labels and not sample.name.endswith("_bucket"):
                    totals[sample.name, labels["model"], labels["version"], labels.get("result", "")] += sample.value
        return totals

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all workers, except those of removed versions. prometheus_client calls this method."""
        for family in (*(self._shared or self.registry).collect(), *self._of_captured()):
            family.samples = [sample for sample in family.samples if self._is_current(sample.labels)]
            yield family

    def _of_captured(self) -> list[Metric]:
        """Return the metrics of captured requests, except those without a value."""
        if self.capture is None:
            return []
        names = ("model", "version", "figure")
        mean = GaugeMetricFamily("quartet_feedback_mean", "Mean of a figure over all feedback", labels=names)
        count = GaugeMetricFamily("quartet_feedback_count", "Number of measurements of a figure", labels=names)
        for figure in self.capture.figures:
            key = (figure["model"], str(figure["version"]), figure["name"])
            mean.add_metric(key, figure["mean"])
            count.add_metric(key, figure["count"])
        text = "Population stability index divided by its threshold"
        drift = GaugeMetricFamily("quartet_drift", text, labels=("model", "version", "feature"))
        for *labels, value in self.capture.drift:
            drift.add_metric(labels, value)
        return [metric for metric in (mean, count, drift) if metric.samples]


@dataclass(frozen=True)
class VersionMetrics:
    """Observes the engine of one version. It records metrics, and stores times in the traces of requests."""

    _metrics: Metrics
    model: str
    version: int

    @property
    def key(self) -> VersionKey:
        return self.model, self.version

    def _own(self, metric: M, *labels: str) -> M:
        """Return a metric of this version."""
        return labelled(metric, self.model, str(self.version), *labels)

    def on_dequeued(self, members: Sequence[BatchMember]) -> None:
        observe = self._own(self._metrics.queue_seconds).observe
        for member in members:
            observe(member.started_at - member.queued_at)
            if trace := member.trace:
                if not trace.started_at:
                    trace.queued_at, trace.started_at = member.queued_at, member.started_at
                trace.rows += member.rows

    def on_batch(self, rows: int, seconds: float) -> None:
        self._own(self._metrics.compute_seconds).observe(seconds)
        self._own(self._metrics.batch_rows).observe(rows)
        self._own(self._metrics.last_batch).set_to_current_time()

    def on_completed(self, members: Sequence[BatchMember]) -> None:
        for member in members:
            if trace := member.trace:
                trace.ended_at = max(trace.ended_at, member.ended_at)
        if self._metrics.tracer:
            self._metrics.tracer.computed(self.model, self.version, members)

    def on_first_token(self, member: BatchMember, seconds: float) -> None:
        self._own(self._metrics.first_token_seconds).observe(seconds)
        if member.trace and not member.trace.time_to_first_token:
            member.trace.time_to_first_token = seconds

    def on_inter_token(self, seconds: float) -> None:
        self._own(self._metrics.inter_token_seconds).observe(seconds)

    def on_rejected(self, reason: str) -> None:
        self._own(self._metrics.rejected, reason).inc()

    def on_failure(self, error: Exception) -> None:
        self._own(self._metrics.failures).inc()
        log.error("%s@%s failed", self.model, self.version, exc_info=error)

    def on_memory(self, size: int) -> None:
        self._own(self._metrics.loaded).set(size)

    def on_queue(self, queued: int, running: int) -> None:
        self._own(self._metrics.queued).set(queued)
        self._own(self._metrics.running).set(running)
