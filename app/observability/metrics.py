"""The figures that Prometheus asks for, of one process or of all workers together."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import ParamSpec

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
    multiprocess,
    values,
)
from prometheus_client.mmap_dict import MmapedDict

from app.engine.observer import BatchMember, VersionKey
from app.observability.tracing import Tracer
from app.store.files import file_lock

P = ParamSpec("P")
log = logging.getLogger("quartet")

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
GAPS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)  # seconds
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHARED = "PROMETHEUS_MULTIPROC_DIR"
ALIVE = "alive"  # a file in that folder: who counts there holds its lock
VERSION = ("model", "version")
REFUSALS = ("queue_full", "stopping")
DEAD = 0  # stands for all processes that have died, in the names of files
STALE_VERSIONS_PER_SWEEP = (
    8  # versions whose figures are forgotten at once: all others are counted anew from a file then
)


def log_errors(report: Callable[P, None]) -> Callable[P, None]:
    """A report that fails, for want of file descriptors say, is logged: what it tells of goes on."""

    @functools.wraps(report)
    def reported(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            report(*args, **kwargs)
        except Exception:
            log.exception("a figure is lost")

    return reported


class Metrics:
    """The figures of one process, in base units: seconds, rows and bytes. Gauges of several workers are added up.

    Figures of versions that are gone are told no longer. They take some 70 KiB in each worker, and are forgotten a few
    versions at a time.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.tracer = tracer
        self.under_way = 0  # requests; told when it is asked for
        self._figures: dict[VersionKey, VersionMetrics] = {}
        self._there: frozenset[VersionKey] | None = None  # versions, once they are known
        self._lock = threading.Lock()  # versions are loaded on a thread
        self._begin()

    def _begin(self) -> None:
        """All figures, where they are counted together from what this process has counted so far."""
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"quartet_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str, mode: str = "livesum") -> Gauge:
            return Gauge(f"quartet_{name}", text, labels, registry=self.registry, multiprocess_mode=mode)  # type: ignore[arg-type]

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"quartet_{name}", text, labels, registry=self.registry, buckets=buckets)

        route = ("route", "method", "status")
        self.requests = counter("requests_total", "Requests answered", *route)
        self.request_seconds = histogram("request_seconds", "From the first byte to the last", *route)
        self.errors = counter("errors_total", "Requests that failed, by the code they were told", "route", "reason")
        self.requests_running = gauge("requests_running", "Requests under way")
        self.queue_seconds = histogram("queue_seconds", "Waiting for a batch", *VERSION)
        self.compute_seconds = histogram("compute_seconds", "One forward of a batch", *VERSION)
        self.batch_rows = histogram("batch_rows", "Rows in one forward", *VERSION, buckets=ROWS)
        self.first_token_seconds = histogram(
            "time_to_first_token_seconds", "From queueing to a text's first character", *VERSION
        )
        self.inter_token_seconds = histogram(
            "inter_token_seconds", "Between two characters of a text, mean of each text", *VERSION, buckets=GAPS
        )
        self.queued = gauge("queued_rows", "Rows that wait for a batch", *VERSION)
        self.running = gauge("running_rows", "Rows that are computed", *VERSION)
        self.rejected = counter("rejected_requests_total", "Requests that a queue did not take", *VERSION, "reason")
        self.rate_limited = counter("rate_limited_total", "Requests over the limit of their key", "key")
        self.failures = counter("failures_total", "Inputs that a network failed on", *VERSION)
        self.loaded = gauge("loaded_bytes", "Bytes of the weights that are loaded, in all workers", *VERSION)
        self.states = gauge("versions", "Versions in the store", "state", mode="livemax")
        self.workers = gauge("workers", "Processes that serve")
        self.workers.set(1)
        self._answered: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}  # looking labels up is not free
        for figures in self._figures.values():
            figures.bind()

    def for_version(self, model: str, version: int) -> VersionMetrics:
        """The figures of a version, the same ones each time."""
        with self._lock:
            if (model, version) not in self._figures:
                self._figures[model, version] = VersionMetrics(self, model, version)
            return self._figures[model, version]

    @log_errors
    def on_response(self, route: str, method: str, status: int, seconds: float, reason: str) -> None:
        """A request was answered, or given up; ``reason`` is the code of its failure."""
        key = (route, method, status)
        if key not in self._answered:
            labels = (route, method, str(status))
            self._answered[key] = self.requests.labels(*labels), self.request_seconds.labels(*labels)
        count, duration = self._answered[key]
        count.inc()
        duration.observe(seconds)
        if reason or status >= 400:
            self.errors.labels(route, reason or str(status)).inc()

    @log_errors
    def on_rate_limited(self, key: str) -> None:
        """A request was more than its key may send."""
        self.rate_limited.labels(key).inc()

    @log_errors
    def on_versions(self, live: int, broken: int, there: frozenset[VersionKey]) -> None:
        self.states.labels("live").set(live)
        self.states.labels("broken").set(broken)
        self.requests_running.set(self.under_way)
        self._there = there
        with self._lock:
            gone = self._figures.keys() - there
            if len(gone) >= STALE_VERSIONS_PER_SWEEP:
                self._forget(gone)

    def _forget(self, gone: set[VersionKey]) -> None:
        """Take figures of versions out of memory: those of several workers out of this one's files, written anew."""
        for key in gone:
            del self._figures[key]
        if SHARED in os.environ:
            files = list(Path(os.environ[SHARED]).glob(f"*_{os.getpid()}.db"))
            written = [(self._without_gone(file), file) for file in files]
            values.close_all_multiprocess_files()
            for fresh, file in written:
                fresh.replace(file)  # at once, for others read it
            values.ValueClass = values.get_value_class()
            self._begin()
            return
        for model, version in gone:
            for metric in (
                self.queue_seconds,
                self.compute_seconds,
                self.batch_rows,
                self.first_token_seconds,
                self.inter_token_seconds,
                self.queued,
                self.running,
                self.failures,
                self.loaded,
            ):
                metric.remove(model, str(version))
            for reason in REFUSALS:
                self.rejected.remove(model, str(version), reason)

    def _without_gone(self, file: Path) -> Path:
        """A copy of a file of figures with those alone that are told."""
        fresh = file.with_suffix(".fresh")
        kept = MmapedDict(str(fresh))
        for key, value, stamp, _ in MmapedDict.read_all_values_from_file(file):
            if self._is_current(json.loads(key)[2]):
                kept.write_value(key, value, stamp)
        kept.close()
        return fresh

    def _is_current(self, labels: Mapping[str, str]) -> bool:
        """Whether a figure with such labels is told: one of no version, or of one that is there."""
        return (
            self._there is None or "version" not in labels or (labels["model"], int(labels["version"])) in self._there
        )

    def render(self) -> bytes:
        """All figures of all workers in Prometheus' text format."""
        return generate_latest(self)

    def totals(self) -> dict[tuple[str, str, str], float]:
        """The counts and sums of all workers by figure, model and version."""
        found: dict[tuple[str, str, str], float] = defaultdict(float)
        for family in self.collect():
            for sample in family.samples:
                if "version" in sample.labels and not sample.name.endswith("_bucket"):
                    found[sample.name, sample.labels["model"], sample.labels["version"]] += sample.value
        return found

    def collect(self) -> Iterator[Metric]:
        """The figures of all workers."""
        families = self.registry.collect()
        if SHARED in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
            with file_lock(Path(os.environ[SHARED])):  # nobody's are moved meanwhile
                families = list(registry.collect())
        for family in families:
            family.samples = [sample for sample in family.samples if self._is_current(sample.labels)]
            yield family


class VersionMetrics:
    """The figures of one version, what its engines tell of, and its part in the accounts of requests."""

    def __init__(self, metrics: Metrics, model: str, version: int) -> None:
        self.model, self.version = self.key = model, version
        self._metrics, self._labels = metrics, (model, str(version))
        self.bind()

    def bind(self) -> None:
        """Look up what is told most often."""
        self._queue = self._metrics.queue_seconds.labels(*self._labels)
        self._compute = self._metrics.compute_seconds.labels(*self._labels)
        self._rows = self._metrics.batch_rows.labels(*self._labels)

    @log_errors
    def on_dequeued(self, members: Sequence[BatchMember]) -> None:
        observe = self._queue.observe
        for member in members:
            observe(member.started_at - member.queued_at)
            if account := member.trace:
                if not account.started_at:
                    account.model, account.version = self.model, self.version
                    account.queued_at, account.started_at = member.queued_at, member.started_at
                account.rows += member.rows

    @log_errors
    def on_batch(self, rows: int, seconds: float) -> None:
        self._compute.observe(seconds)
        self._rows.observe(rows)

    @log_errors
    def on_completed(self, members: Sequence[BatchMember]) -> None:
        for member in members:
            if account := member.trace:
                account.ended_at = max(account.ended_at, member.ended_at)
        if self._metrics.tracer:
            self._metrics.tracer.computed(self.model, self.version, members)

    @log_errors
    def on_first_token(self, member: BatchMember, seconds: float) -> None:
        self._metrics.first_token_seconds.labels(*self._labels).observe(seconds)
        if member.trace and not member.trace.time_to_first_token:
            member.trace.time_to_first_token = seconds

    @log_errors
    def on_inter_token(self, seconds: float) -> None:
        self._metrics.inter_token_seconds.labels(*self._labels).observe(seconds)

    @log_errors
    def on_rejected(self, reason: str) -> None:
        self._metrics.rejected.labels(*self._labels, reason).inc()

    @log_errors
    def on_failure(self, error: Exception) -> None:
        self._metrics.failures.labels(*self._labels).inc()
        log.error("%s@%s failed", self.model, self.version, exc_info=error)

    @log_errors
    def on_loaded(self, size: int) -> None:
        self._metrics.loaded.labels(*self._labels).set(size)

    @log_errors
    def on_load(self, queued: int, running: int) -> None:
        self._metrics.queued.labels(*self._labels).set(queued)
        self._metrics.running.labels(*self._labels).set(running)


def shared_metrics() -> AbstractContextManager[Callable[[int], None]]:
    """Have all processes that are forked from now on count together. Entered, it gives what forgets one that has died.

    They count in files, in memory where there is such a folder: it can be written even in a read-only container.
    Raises OSError where no folder can be.
    """
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else gettempdir()
    for left in Path(parent).glob(f"quartet-*/{ALIVE}"):  # by a service that was killed, and all its workers
        with suppress(OSError), file_lock(left, wait=False):
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = TemporaryDirectory(prefix=f"quartet-{os.getpid()}-", dir=parent)
    alive = ExitStack()
    held = Path(folder.name, f"{ALIVE}.new")
    held.touch()
    alive.enter_context(file_lock(held))  # until the last process is gone that was forked from this one
    held.rename(held.with_name(ALIVE))
    os.environ[SHARED] = folder.name
    values.ValueClass = values.get_value_class()  # chosen when it was imported, before this was known

    @contextmanager
    def shared() -> Iterator[Callable[[int], None]]:
        with alive, folder:
            yield reap

    return shared()


@log_errors
def reap(process: int) -> None:
    """Add what a process that has died had counted to what those before it had, in one file of each kind.

    Else every one that dies would leave files to be read, and to be kept in memory, for ever.
    """
    multiprocess.mark_process_dead(process)
    folder = Path(os.environ[SHARED])
    with file_lock(folder):
        for own in folder.glob(f"*_{process}.db"):
            every = folder / f"{own.name.partition('_')[0]}_{DEAD}.db"
            fresh = every.with_suffix(".fresh")
            if every.exists():
                shutil.copyfile(every, fresh)
            sums = MmapedDict(str(fresh))
            for key, value, stamp, _ in MmapedDict.read_all_values_from_file(own):
                sums.write_value(key, sums.read_value(key)[0] + value, stamp)
            sums.close()
            fresh.replace(every)
            own.unlink()
