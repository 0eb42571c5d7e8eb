"""The table of all model versions in this process, and the loop that keeps it in line with the store.

The loop scans the store, plans (see ``app.serving.plan``) and applies the plan: it serves, loads and evicts versions.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import cast
from weakref import WeakSet

from app.engine.executor import Executor
from app.engine.observer import EngineObserver, ObserverFactory, VersionKey
from app.errors import BadValue, NotFound, NotReady, RetiredModel, TimedOut, UnknownModel, UnloadedModel, quote_value
from app.serving.device import find_device, limit_threads, trim_heap
from app.serving.model import Engine, Model, P, check_store, is_transient, prepare, with_engines
from app.serving.plan import (
    Entry,
    State,
    VersionSet,
    VersionSets,
    plan,
    versions_to_replace,
)
from app.serving.preload import Preloaded
from app.serving.recovery import RecoveryMonitor
from app.settings import Settings
from app.store import Card, Store, StoreError, TaskName
from app.store.disk import Disk
from app.store.snapshot import Snapshot
from app.tasks import Task

log = logging.getLogger("quartet")

IDLE_CHECK_SECONDS = 0.005
PARSE_NICENESS = 5  # so that decoding large images and unpacking bodies does not delay the event loop
DISK_THREADS = 16  # some administrative requests take minutes
LOAD_NICENESS = 10  # so that loading a version does not delay requests for other versions


class Models:
    """Chooses the model version for each request, and keeps the resident versions (see ``plan``) in memory.

    A damaged version never prevents other versions from being served. ``preloaded`` are versions that were loaded
    before this process was forked. ``clock`` returns seconds. ``disk`` is the file system of the store.

    Attributes:
        table: all versions in the store or in memory.
        version_sets: the served versions, by model name.
        defaults: the name of the default model of each task.
        disk: the threads that access the store.

    Raises:
        SettingsError: the device or the store does not exist.
    """

    def __init__(
        self,
        settings: Settings,
        observers: ObserverFactory,
        preloaded: Preloaded | None = None,
        clock: Callable[[], float] = time.monotonic,
        disk: Disk | None = None,
    ) -> None:
        self.settings = settings
        self.observers = observers
        self.device = find_device(settings.device)
        executor = partial(Executor, prepare_thread=limit_threads)
        self.executor = executor("compute", inline_seconds=settings.limits.inline_seconds)
        waiting = settings.queue_rows
        threads = settings.limits.parse_threads
        self.parse_executor = executor("parse", threads, max_waiting=waiting, niceness=PARSE_NICENESS)
        self.large_image_executor = executor("large images", niceness=PARSE_NICENESS)  # one at a time, to limit memory
        self.load_executor = executor("load")
        check_store(settings.store)
        self.store = Store(settings.store, disk=disk)
        self.snapshot = Snapshot()
        self.table: dict[VersionKey, Entry] = {}
        self.version_sets: dict[str, VersionSet] = {}
        self.desired: VersionSets = {}  # served as soon as their versions are in memory
        self.defaults: dict[TaskName, str] = {}
        self.stopping = self.closed = False  # while the service stops, it still answers requests until it is closed
        self.recovery = RecoveryMonitor(self.loaded, self.executor, settings.limits.recovery_check_seconds)
        self._preloaded = preloaded or Preloaded()
        self._clock = clock
        self._file_problems: list[tuple[str, str]] = []  # path and error message
        self._started = False  # whether requests are served while versions are loaded
        self.disk = Executor("store", DISK_THREADS)
        self._scan_lock = asyncio.Lock()
        self._scanned_at = -math.inf  # time on the clock of the last scan, or of the end of ``start``
        self._engines: WeakSet[Engine] = WeakSet()  # also engines of evicted versions that finish requests
        self._reported_observers: set[EngineObserver] = set()  # observers whose last report may not be 0

    # Resolving requests

    async def resolve(self, task: Task[P], model: str | None, request_id: str, deadline: float) -> Model[P]:
        """Return the version that serves a request. If it is not in memory, load it and wait.

        ``model`` is a name, ``name@version``, or None for the task's default model. Without a version number,
        ``request_id`` decides between the active version and the canary, if there is one. ``deadline`` is on the event
        loop's clock. Before an unloaded model is rejected, its rollout is read again, because another process may have
        just loaded the model.

        Raises:
            UnknownModel: no such model or version.
            RetiredModel, UnloadedModel: the version is retired, or the model is unloaded.
            BadValue: the model is for another task.
            NotFound: ``model`` is None, and the task has models but no default model.
            NotReady: no model serves the task, shutdown has begun, or the process ends because of a failure.
            TooManyVersions: the version is not in memory, and the versions that it would replace are in use.
            TimedOut: the deadline has passed.
        """
        try:
            entry = self._find(task, model, request_id)
        except UnloadedModel:
            await self.recheck((model or "").partition("@")[0], deadline)
            entry = self._find(task, model, request_id)
        while entry.model is None:
            self._load_on_demand(entry)
            seconds = deadline - asyncio.get_running_loop().time()
            if not (await asyncio.wait({entry.loading}, timeout=max(seconds, 0)))[0]:
                raise TimedOut("the deadline passed before the model was in memory")
            entry = self._find(task, model, request_id)
        entry.used_at = self._clock()
        return cast("Model[P]", entry.model)  # ``task`` is the task of the card

    def _find(self, task: Task[P], model: str | None, request_id: str) -> Entry:
        """Return the entry of the version that serves a request. Raises as ``resolve`` does."""
        if self.closed or self.recovery.failure:
            raise NotReady("the service is stopping")
        key = self._resolve_default(task.name, request_id) if model is None else self.resolve_name(model, request_id)
        entry = self.table.get(key)
        if entry is None or entry.stored.card is None or entry.state is State.FAILED:  # the version was just removed
            raise UnknownModel(model or key[0], self.served_names())
        if entry.stored.card.task != task.name:
            mismatch = (
                f"model {quote_value(model or key[0])} is for the task {entry.stored.card.task!r}, not {task.name!r}"
            )
            names = ", ".join(self._names_for(task.name)) or "none"
            raise BadValue(f"{mismatch}; models for that task: {names}", "model")
        return entry

    def resolve_name(self, model: str, request_id: str = "", param: str = "model") -> VersionKey:
        """Return the model name and the version number for ``model``, which is ``name`` or ``name@version``.

        Without a version, ``request_id`` decides between the active version and the canary. ``param`` is the name of
        the request field or path parameter that contained ``model``, for error messages.

        Raises:
            UnknownModel, RetiredModel, UnloadedModel: see ``resolve``.
        """
        name, at, version = model.partition("@")
        version_set = self.version_sets.get(name)
        if version_set is None:
            raise UnknownModel(model, self.served_names(), param)
        if version_set.unloaded:
            raise UnloadedModel(f"model {quote_value(name)} is unloaded and must be loaded first", param)
        number = version_set.version_for(request_id)
        if at:
            number = next((each for each in version_set.numbers if str(each) == version), None)
        if number is None:
            served = [f"{name}@{each}" for each in version_set.numbers]
            if version in map(str, version_set.retired):
                names = ", ".join(served) or "none"
                raise RetiredModel(f"model {quote_value(model)} is retired; served models: {names}", param)
            raise UnknownModel(model, served or self.served_names(), param)
        return name, number

    def served_names(self) -> list[str]:
        """Return the names of the models that have served versions."""
        return [name for name, version_set in self.version_sets.items() if version_set.numbers]

    def _resolve_default(self, task: TaskName, request_id: str) -> VersionKey:
        name = self.defaults.get(task, "")
        number = version_set.version_for(request_id) if (version_set := self.version_sets.get(name)) else None
        if number is None:
            names = ", ".join(self._names_for(task))
            if names and task not in self.snapshot.defaults and "defaults.json" not in self.snapshot.problems:
                raise NotFound(f"the task {task!r} has no default model; set model to one of: {names}", "model")
            reasons = [f"{each.label}: {each.reason}" if each.version else each.reason for each in self.failures]
            raise NotReady(f"no model serves the task {task!r}" + (f" ({'; '.join(reasons)})" if reasons else ""))
        return name, number

    def _names_for(self, task: TaskName) -> list[str]:
        return [name for name in self.version_sets if (card := self.card(name)) and card.task == task]

    def _load_on_demand(self, entry: Entry) -> None:
        """Start to load a version that a request needs, and make room for it. Raises TooManyVersions."""
        if entry.state is State.LOADING:
            return
        sets = [*self.version_sets.values(), *self.desired.values()]
        resident = {(each.name, number) for each in sets for number in each.resident}
        if (entry.name, entry.version) not in resident:
            others = [other for key, other in self.table.items() if key not in resident and other is not entry]
            for replaced in versions_to_replace(others, self.settings.limits, self._clock()):
                self._evict(replaced, f"{entry.label} replaces it")
        self._load(entry)

    # Models and versions

    def entry(self, name: str, number: int | None = None) -> Entry:
        """Return the entry of a version. Without ``number``, use the active version. It is empty if there is none."""
        if number is None and name in self.version_sets:
            number = self.version_sets[name].active
        return self.table.get((name, number or 0)) or Entry(name, 0)

    def card(self, name: str, number: int | None = None) -> Card | None:
        """Return the card of a version, or None if it does not exist. Without ``number``, use the active version."""
        return self.entry(name, number).stored.card

    def versions(self) -> list[Entry]:
        """Return the versions that are served, in memory or failed, or whose model is unloaded, sorted."""
        served = {(each.name, n) for each in self.version_sets.values() for n in (*each.numbers, *each.unloaded)}
        states = State.READY, State.FAILED
        return [entry for key, entry in sorted(self.table.items()) if key in served or entry.state in states]

    def loaded(self) -> list[Model]:
        """Return the versions in memory, sorted by name and number."""
        return [entry.model for _, entry in sorted(self.table.items()) if entry.model]

    @property
    def failures(self) -> list[Entry]:
        """The versions and files that cannot be used, each with the reason."""
        failed = [entry for entry in self.versions() if entry.state is State.FAILED]
        return [*failed, *(Entry(path, 0, state=State.FAILED, reason=reason) for path, reason in self._file_problems)]

    def is_busy(self, except_for: Engine | None = None, running: bool = False) -> bool:
        """Return whether a request waits for an engine, or also whether one is computed if ``running``."""
        engines = [engine for model in self.loaded() for engine in model.engines]
        counts = (engine.row_counts for engine in engines if engine is not except_for)
        return any(sum(rows) if running else rows[0] for rows in counts)

    async def idle(self, seconds: float, running: bool = False) -> bool:
        """Wait until the service is not busy; see ``is_busy``. Return false if ``seconds`` pass before."""
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            await asyncio.sleep(IDLE_CHECK_SECONDS)
            if not self.is_busy(running=running):
                return True
        return False

    # The loop: scan, plan, apply

    async def start(self) -> None:
        """Scan the store and load the resident versions."""
        await self._scan()
        await self.settled()
        self._started, self._scanned_at = True, self._clock()
        self.load_executor.close()
        self.load_executor = Executor("load", niceness=LOAD_NICENESS, prepare_thread=limit_threads)

    async def settled(self) -> None:
        """Wait until no version is being loaded."""
        while tasks := self._loads():
            await asyncio.wait(tasks)

    def _loads(self) -> list[asyncio.Task[None]]:
        return [entry.loading for entry in self.table.values() if entry.state is State.LOADING]

    async def watch(self) -> None:
        """Scan the store at intervals until this task is cancelled, unless polling is off."""
        while self.settings.store_poll_seconds:
            await asyncio.sleep(self.settings.store_poll_seconds)
            await self.refresh()

    async def refresh(self, deadline: float | None = None) -> None:
        """Scan the store now, unless polling is off, and start to load and evict versions accordingly.

        Concurrent callers share one scan, if it starts after their calls. ``deadline`` is on the event loop's clock.

        Raises:
            TimedOut: the deadline has passed.
        """
        called_at = self._clock()
        try:
            async with asyncio.timeout_at(deadline), self._scan_lock:
                if self._scanned_at <= called_at and self.settings.store_poll_seconds:
                    try:
                        await self._scan()
                    except Exception:  # for example a network file system that is unavailable for a moment
                        log.exception("the store cannot be scanned")
        except TimeoutError:
            raise TimedOut("the deadline passed before the store answered") from None

    async def recheck(self, name: str, deadline: float) -> None:
        """Scan the store if another process has loaded or unloaded this model since the last scan.

        The check reads only one small file. A scan reads the whole store, which would delay texts being generated.

        Raises:
            TimedOut: the scan has not ended before ``deadline``, a time on the event loop's clock.
        """
        version_set = self.version_sets.get(name)
        if version_set is None:
            return
        with suppress(TimeoutError, StoreError):
            async with asyncio.timeout(self.settings.limits.rollout_check_seconds):
                rollout = await self.disk.run(self.store.rollout, name)
            if rollout.unloaded != bool(version_set.unloaded):
                await self.refresh(deadline)

    async def _scan(self) -> None:
        started_at = self._clock()
        self.snapshot = await self.disk.run(Snapshot.read, self.store, self.snapshot)
        self._update_table()
        self._apply()
        self._scanned_at = started_at

    def _update_table(self) -> None:
        """Copy the result of a scan to the table. A version in memory stays even if its files are damaged."""
        stored = {
            (name, number): version
            for name, numbers in self.snapshot.versions.items()
            for number, version in numbers.items()
            if version.card or number not in self.snapshot.rollouts[name].retired
        }
        for key in self.table.keys() - stored.keys():
            if self.table[key].state in (State.UNLOADED, State.FAILED):
                del self.table[key]
        for key, version in stored.items():
            entry = self.table.setdefault(key, Entry(*key))
            if entry.state is State.LOADING or (entry.state is State.READY and not version.card):
                continue
            changed, entry.stored = entry.stored != version, version
            if entry.state is State.UNLOADED or changed or self._clock() >= entry.retry_at:
                if version.problem:
                    self._fail(entry, version.problem)
                elif entry.state is State.FAILED:
                    entry.state, entry.reason = State.UNLOADED, ""

    def _apply(self) -> None:
        """Serve, evict and load versions according to a new plan. At most one version at a time is loaded for it."""
        idle_seconds = self.settings.limits.model_idle_seconds
        current = plan(self.snapshot, self.table, self.version_sets, self._clock(), idle_seconds)
        for name, version_set in current.serve.items():
            known = self.version_sets.get(name)
            if self._started and (known is None or known.state != version_set.state):
                log.info("%s: %s", name, version_set.state)
        self.version_sets, self.desired = current.serve, current.desired
        for key, reason in current.evict.items():
            self._evict(self.table[key], reason)
        if current.load and not self.closed:
            self._load(self.table[current.load[0]])
        tasks = {name: card.task for name in self.version_sets if (card := self.card(name))}
        defaults = self.snapshot.defaults
        self.defaults = {task: name for task, name in defaults.items() if tasks.get(name, task) == task}
        problems = [*self.snapshot.problems.items()]
        problems += [("defaults.json", reason) for reason in self.snapshot.default_problems(tasks)]
        for _, reason in sorted({*problems} - {*self._file_problems}):
            log.error("%s", reason)
        self._file_problems = problems

    def _load(self, entry: Entry) -> None:
        """Start to load a version, unless it is being loaded already."""
        if entry.state is not State.LOADING:
            entry.state = State.LOADING
            entry.loading = asyncio.get_running_loop().create_task(self._finish_loading(entry))

    async def _finish_loading(self, entry: Entry) -> None:
        """Load a version on ``load_executor``, which loads one version at a time, and plan again."""
        try:
            entry.model = await self.load_executor.run(self._read_model, entry)
            entry.state, entry.used_at = State.READY, self._clock()
            self._engines.update(entry.model.engines)
            log.info("%s is loaded", entry.label)
        except Exception as error:  # one damaged version must not keep others from serving
            retry_at = self._clock() + self.settings.limits.load_retry_seconds if is_transient(error) else math.inf
            reason = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
            self._fail(entry, reason, retry_at)
        self._apply()

    def _read_model(self, entry: Entry) -> Model:
        """Load a version. Called on a thread."""
        prepared = self._preloaded.take(entry.name, entry.version, entry.stored.stamp)
        if prepared is None:
            prepared = prepare(self.settings, self.device, entry.name, entry.version)
            trim_heap()
        self.observers.for_version(entry.name, entry.version).on_memory(prepared.weights_bytes)
        return with_engines(prepared, self.settings, self.executor, self.observers)

    def _fail(self, entry: Entry, reason: str, retry_at: float = math.inf) -> None:
        if entry.reason != reason or entry.state is State.LOADING:
            log.error("%s is not served: %s", entry.label, reason)
        entry.state, entry.reason, entry.retry_at = State.FAILED, reason, retry_at

    def _evict(self, entry: Entry, reason: str) -> None:
        """Remove a version from memory. Its engine still finishes the requests that it has accepted."""
        entry.state, entry.model = State.UNLOADED, None
        self._preloaded.on_evicted()
        self.observers.for_version(entry.name, entry.version).on_memory(0)
        log.info("%s is evicted: %s", entry.label, reason)

    # Health and shutdown

    def problems(self, models: list[Model] | None = None) -> list[str]:
        """Return the reasons why this process should get no requests for ``models``, by default for any version."""
        if self.stopping:
            return ["the service is stopping"]
        if not (models := models or self.loaded()):
            return ["no model in the store can be served"]
        for executor, name in (
            (self.executor, "compute thread has"),
            (self.parse_executor, "decoding threads have"),
            (self.large_image_executor, "thread for large images has"),
        ):
            if (seconds := executor.stalled_seconds()) > self.settings.limits.unready_after_seconds:
                return [f"the {name} not answered for {seconds:.0f} s"]
        failing = [model for model in models if any(engine.circuit_breaker.is_open() for engine in model.engines)]
        return [f"{model.id} fails on every input" for model in failing]

    def report(self) -> None:
        """Report rows, versions and the age of the last scan. Called at intervals, not for each request."""
        queued, running = Counter[EngineObserver](), Counter[EngineObserver]()
        for engine in list(self._engines):
            queued[engine.observer] += engine.row_counts[0]
            running[engine.observer] += engine.row_counts[1]
        for observer in self._reported_observers | queued.keys():  # an observer without engines reports 0 once
            observer.on_queue(queued[observer], running[observer])
        self._reported_observers = set(queued)
        known = frozenset(self.table.keys() | {observer.key for observer in queued})
        age = self._clock() - self._scanned_at if self.settings.store_poll_seconds and self._started else 0.0
        self.observers.on_versions(len(self.loaded()), len(self.failures), known, age)

    async def close(self) -> None:
        """Reject new requests, stop loading, and finish running requests within ``shutdown_grace_seconds``."""
        self.stopping = self.closed = True
        for task in self._loads():
            task.cancel()  # requests that wait for it are rejected
        closing = [engine.close(self.settings.shutdown_grace_seconds) for engine in list(self._engines)]
        await asyncio.gather(*closing)
        for executor in (self.executor, self.parse_executor, self.large_image_executor, self.load_executor):
            executor.close()
