"""Decide for one process which version serves a request and which versions are in memory.

After each scan of the store, `Models` determines the desired versions. It loads missing versions, and evicts
versions that are not needed any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import cast
from weakref import WeakSet

from app.engine.executor import Executor
from app.engine.observer import EngineObserver, ObserverFactory, VersionKey
from app.errors import BadValue, NotFound, NotReady, TimedOut, UnknownModel, UnloadedModel, quote_value
from app.serving.device import find_device, free_bytes, limit_threads
from app.serving.model import Engine, Loader, LoadFailure, Model, P, PreparedModels, check_store
from app.serving.model_cache import LoadTask, ModelCache, ModelLoading, VersionState, VersionStatus
from app.serving.reconcile import (
    check_defaults,
    desired_versions,
    sets_to_serve,
    versions_to_evict,
    versions_to_load,
    versions_to_replace,
)
from app.serving.recovery import RecoveryMonitor
from app.serving.store_watcher import StoreWatcher
from app.serving.version_set import VersionSet, models_for, resolve_name, served_names
from app.settings import Settings
from app.store import Card, Store, TaskName
from app.store.disk_thread import DiskThread
from app.tasks import Task

log = logging.getLogger("quartet")

PARSE_NICENESS = 5  # so that decoding large images and unpacking bodies does not delay the event loop


class Models:
    """Chooses the model version for each request, and keeps the desired versions in memory.

    The resident versions of each model (see ``reconcile``) stay in memory if ``settings.model_bytes`` and the GPU allow
    it. Other versions are loaded on demand. A damaged version never prevents other versions from being served.

    ``prepared`` are versions that were loaded before this process was forked.

    Raises:
        SettingsError: the device or the store does not exist.
    """

    def __init__(self, settings: Settings, observers: ObserverFactory, prepared: PreparedModels | None = None) -> None:
        self.settings = settings
        self.observers = observers
        self.device = find_device(settings.device)
        executor = partial(Executor, prepare_thread=limit_threads)
        self.executor = executor("compute", inline_seconds=settings.inline_seconds)
        waiting = settings.queue_rows
        self.parse_executor = executor("parse", settings.parse_threads, max_waiting=waiting, niceness=PARSE_NICENESS)
        self.large_image_executor = executor("large images", niceness=PARSE_NICENESS)  # one at a time, to limit memory
        self.load_executor = executor("load")  # its thread gets a low priority when it loads while requests are served
        check_store(settings.store)
        self.store = Store(settings.store)
        self.cache = ModelCache(observers, settings.model_bytes, partial(free_bytes, self.device))
        self.loader = Loader(settings, observers, self.executor, self.device, prepared or {})
        self.watcher = StoreWatcher(
            self.store, settings.store_poll_seconds, failed=self.cache.failures, on_scan=self._reconcile
        )
        self._picture_disk = DiskThread("pictures")
        self.version_sets: dict[str, VersionSet] = {}  # the served versions, by model name
        self.defaults: dict[TaskName, str] = {}
        self.stopping = self.closed = False  # while the service stops, it still answers requests until it is closed
        self.recovery = RecoveryMonitor(self.loaded, self.executor)
        self._default_failures: list[LoadFailure] = []
        self._engines: WeakSet[Engine] = WeakSet()  # also engines of evicted versions that finish requests
        self._reported_observers: set[EngineObserver] = set()  # observers whose last report may not be 0
        self._reconcile_task: asyncio.Task[None] | None = None
        self._in_background = False  # whether requests are served while versions are loaded

    # Resolving requests

    def resolve(self, task: Task[P], model: str | None, request_id: str = "") -> Model[P]:
        """Return the version that serves a request. If it is not in memory, start to load it.

        ``model`` is a name, ``name@version``, or None for the task's default model. Without a version number,
        ``request_id`` decides between the active version and the canary, if there is one.

        Raises:
            UnknownModel: no such model or version.
            RetiredModel, UnloadedModel: the version is retired, or the model is unloaded.
            BadValue: the model is for another task.
            NotFound: ``model`` is None, and the task has models but no default model.
            NotReady: no model serves the task, shutdown has begun, or the process ends because of a failure.
            ModelLoading: the version is not in memory; its loading has begun.
            TooManyVersions: the version is not in memory, and the versions that it would replace are in use.
        """
        if self.closed or self.recovery.failure:
            raise NotReady("the service is stopping")
        name, number = (
            self._resolve_default(task.name, request_id) if model is None else self.resolve_name(model, request_id)
        )
        loaded = self.cache.get(name, number)
        card = loaded.card if loaded else self.card(name, number)
        if card is None:  # the version was just removed from the store
            raise UnknownModel(model or name, served_names(self.version_sets))
        if card.task != task.name:
            mismatch = f"model {quote_value(model or name)} is for the task {card.task!r}, not {task.name!r}"
            names = models_for(task.name, self.version_sets, self.card) or "none"
            raise BadValue(f"{mismatch}; models for that task: {names}", "model")
        if loaded is None:
            self._make_room(name, number)
            raise ModelLoading(f"{name}@{number}", self._load_version(name, number))
        loaded.last_used_at = time.monotonic()
        return cast("Model[P]", loaded)  # ``task`` is the task of the card

    def _make_room(self, name: str, number: int) -> None:
        """Evict versions to make room for the version that a request needs. Raises TooManyVersions."""
        sets = [*self.version_sets.values(), *self._desired().values()]
        resident = {(version_set.name, each) for version_set in sets for each in version_set.resident}
        loading, models = self.cache.loading(), self.cache.models()
        if (name, number) in loading or (name in self.defaults.values() and (name, number) in resident):
            return
        keys = [*loading, *((model.card.name, model.card.version) for model in models), (name, number)]
        surplus = sum(key not in resident for key in keys) - self.settings.max_on_demand_versions
        sizes, limit = self.watcher.snapshot.weights_bytes, self.cache.limit()
        coming = sum(sizes.get(key, 0) for key in (*loading, (name, number)))  # a loading version may not be in sizes
        surplus_bytes = self.cache.bytes() + coming - limit if limit else 0
        others = [model for model in models if not self._is_default(model)]
        surplus = 0 if (name, number) in resident else surplus
        replaced = versions_to_replace(others, surplus, surplus_bytes, resident.__contains__, time.monotonic(), loading)
        for model in replaced:
            self.cache.evict(model, f"{name}@{number} replaces it")

    async def wait_for(self, task: Task[P], model: str | None, request_id: str, deadline: float) -> Model[P]:
        """Return the version that serves a request, as ``resolve`` does, but wait until it is in memory.

        ``deadline`` is on the event loop's clock. Before an unloaded model is rejected, its rollout is read again,
        because another process may have just loaded the model.

        Raises:
            TimedOut: the deadline has passed.
        """
        rechecked = False
        while True:
            try:
                return self.resolve(task, model, request_id)
            except UnloadedModel:
                if rechecked:
                    raise
                await self.recheck((model or "").partition("@")[0], deadline)
                rechecked = True
                continue
            except ModelLoading as loading:
                load_task = loading.task
            try:
                async with asyncio.timeout_at(deadline):
                    result = await asyncio.shield(load_task)  # other requests may wait for this task too
            except TimeoutError:
                raise TimedOut("the deadline passed before the model was in memory") from None
            if isinstance(result, Model):
                return cast("Model[P]", result)

    def resolve_name(self, model: str, request_id: str = "", param: str = "model") -> VersionKey:
        """Return the model name and the version number for ``model``; see ``version_set.resolve_name``.

        Raises:
            UnknownModel, RetiredModel, UnloadedModel: see ``resolve``.
        """
        return resolve_name(self.version_sets, model, request_id, param)

    def _resolve_default(self, task: TaskName, request_id: str) -> VersionKey:
        name = self.defaults.get(task, "")
        number = version_set.version_for(request_id) if (version_set := self.version_sets.get(name)) else None
        if number is None:
            defaults, names = self.watcher.snapshot.defaults, models_for(task, self.version_sets, self.card)
            if names and defaults is not None and task not in defaults:
                raise NotFound(f"the task {task!r} has no default model; set model to one of: {names}", "model")
            reasons = [failure.message for failure in self.failures]
            raise NotReady(f"no model serves the task {task!r}" + (f" ({'; '.join(reasons)})" if reasons else ""))
        return name, number

    # Models and versions

    def card(self, name: str, number: int | None = None) -> Card | None:
        """Return the card of a version, or None if it does not exist. Without ``number``, use the active version."""
        if number is None and name in self.version_sets:
            number = self.version_sets[name].active
        return None if number is None else self.watcher.snapshot.cards.get((name, number))

    def pictures(self, card: Card) -> tuple[str, ...]:
        """Return the file names of the pictures that the training of a version has made."""
        files = self.watcher.snapshot.files.get((card.name, card.version))
        return files.pictures if files else ()

    async def read_picture(self, card: Card, file: str) -> bytes:
        """Return the content of a picture of a version. ``file`` is one of the names that ``pictures`` returns.

        Raises:
            NotFound: the file cannot be read, for example because it was removed.
            TimedOut: the store has not answered within ``request_seconds``.
        """
        path = self.store.path(card.name, card.version) / file
        try:
            return await self._picture_disk.run_within(self.settings.request_seconds, self.store.disk.read, path)
        except TimeoutError:
            raise TimedOut("the deadline passed before the store answered") from None
        except OSError as error:
            raise NotFound(f"{path.name} cannot be read: {error.strerror}", "file") from None

    def state(self, name: str, number: int) -> VersionState:
        """Return the state of a version. If its card cannot be read, the state is failed."""
        if any((failure.name, failure.version) == (name, number) for failure in self.watcher.snapshot.failures):
            return VersionState.FAILED
        return self.cache.state(name, number)

    def versions(self) -> list[VersionStatus]:
        """Return the state of each version that is served, in memory or failed, or whose model is unloaded.

        The list is sorted by name and number. The list contains a retired version only while this version is in memory
        or failed.
        """
        reasons = {(failure.name, failure.version): failure.reason for failure in self.failures if failure.version}
        ready = {(model.card.name, model.card.version) for model in self.cache.models()}
        served = {(each.name, n) for each in self.version_sets.values() for n in (*each.numbers, *each.unloaded)}
        return [
            VersionStatus(*key, self.state(*key), reasons.get(key, "")) for key in sorted({*reasons, *ready, *served})
        ]

    def loaded(self) -> list[Model]:
        """Return the versions in memory, sorted by name and number."""
        return self.cache.models()

    @property
    def failures(self) -> list[LoadFailure]:
        """The versions and files that cannot be used, each with the reason. ``version`` is 0 for files."""
        return [*self.watcher.snapshot.failures, *self.cache.failures().values(), *self._default_failures]

    # Reconciling: store snapshot -> desired versions -> difference -> load, publish, evict

    async def load(self) -> None:
        """Scan the store and load the versions that stay in memory, default models first."""
        await self.watcher.scan()
        self._update_defaults()
        self._update_served()
        await self._load_missing()
        self._update_defaults()
        self._in_background = True

    async def recheck(self, name: str, deadline: float) -> None:
        """Scan the store if another process has loaded or unloaded this model since the last scan.

        The check reads only one small file. A scan reads the whole store, which would delay texts being generated.

        Raises:
            TimedOut: the scan has not ended before ``deadline``, a time on the event loop's clock.
        """
        version_set = self.version_sets.get(name)
        if version_set is None:
            return
        unloaded = await self.watcher.is_unloaded(name)
        if unloaded not in (None, bool(version_set.unloaded)):
            await self.refresh(deadline)

    async def refresh(self, deadline: float) -> None:
        """Scan the store now, unless polling is off, and start to load and evict versions accordingly.

        Raises:
            TimedOut: ``deadline``, a time on the event loop's clock, has passed.
        """
        try:
            async with asyncio.timeout_at(deadline):
                await self.watcher.refresh()
        except TimeoutError:
            raise TimedOut("the deadline passed before the store answered") from None

    def _reconcile(self) -> None:
        """Apply a new scan: publish and evict versions now, and load missing versions in a background task."""
        for name, number in self.watcher.snapshot.retry:
            self.cache.reset_failed(name, number)
        self._update_served()
        for model, reason in versions_to_evict(self.cache.models(), self.version_sets, time.monotonic()):
            self.cache.evict(model, reason)
        self._update_defaults()
        if not self._reconcile_task or self._reconcile_task.done():
            self._reconcile_task = asyncio.create_task(self._load_missing())

    def _desired(self) -> dict[str, VersionSet]:
        return desired_versions(self.watcher.snapshot, self.cache.failures())

    def _to_load(self, desired: dict[str, VersionSet]) -> list[VersionKey]:
        cache, defaults, sizes = self.cache, set(self.defaults.values()), self.watcher.snapshot.weights_bytes
        return versions_to_load(
            desired, self.version_sets, cache.sizes(), defaults, cache.limit(), sizes, cache.loading()
        )

    async def _load_missing(self) -> None:
        """Load the missing versions one after the other. After each load, determine the next version again."""
        while to_load := self._to_load(self._desired()):
            await self._load_version(*to_load[0])
            self._update_served()

    def _update_served(self) -> None:
        """Use the desired version set of each model if ``sets_to_serve`` yields it. Otherwise keep the old set."""
        desired = self._desired()
        for name in self.version_sets.keys() - desired.keys():
            del self.version_sets[name]
        for version_set in sets_to_serve(desired, self.version_sets, self._to_load(desired)):
            self._serve(version_set)

    def _serve(self, version_set: VersionSet) -> None:
        current = self.version_sets.get(version_set.name)
        self.version_sets[version_set.name] = version_set
        if self._in_background and (current is None or current.describe() != version_set.describe()):
            log.info("%s: %s", version_set.name, version_set.describe())

    def _load_version(self, name: str, number: int) -> LoadTask:
        """Return the task that loads a version. All callers share one task."""
        task = self.cache.load_task(name, number)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(name, number))
            self.cache.set_loading(name, number, task)
        return task

    async def _load(self, name: str, number: int) -> Model | LoadFailure:
        """Load a version on ``load_executor``, which loads one version at a time, and record the result."""
        result = await self.load_executor.run(self.loader.load, name, number, in_background=self._in_background)
        if isinstance(result, LoadFailure):
            self.cache.set_failed(result)
            result.log()
            if current := self.version_sets.get(name):
                self._serve(self._desired()[name] if current.active == number else current.without(number))
            return result
        result.last_used_at = time.monotonic()
        self._engines.update(result.engines)
        self.cache.add(result, must_stay=self._is_default)
        return result

    def _is_default(self, model: Model) -> bool:
        """Return whether a version is the active version of a task's default model."""
        version_set = self.version_sets.get(model.card.name)
        return model.card.name in self.defaults.values() and (
            not version_set or version_set.active == model.card.version
        )

    def _update_defaults(self) -> None:
        """Use the valid default models of the snapshot. If ``defaults.json`` is unreadable, keep the current models."""
        snapshot = self.watcher.snapshot
        defaults = self.defaults if snapshot.defaults is None else snapshot.defaults
        self.defaults, reasons = check_defaults(defaults, self.card, snapshot.names, snapshot.unloaded)
        if snapshot.defaults_error:
            reasons.insert(0, snapshot.defaults_error)
        if reasons != [failure.reason for failure in self._default_failures]:
            self._default_failures = [LoadFailure("defaults.json", 0, reason) for reason in reasons]
            for reason in reasons:
                log.error("%s", reason)

    # Health and shutdown

    def problems(self, models: list[Model] | None = None) -> list[str]:
        """Return the reasons why this process should get no requests for ``models``, by default for any version."""
        if self.stopping:
            return ["the service is stopping"]
        if not (models := models or self.loaded()):
            return ["no model in the store can be served"]
        limit = min(self.settings.unready_after_seconds, self.settings.liveness_timeout_seconds)
        for executor, name in (
            (self.executor, "compute thread has"),
            (self.parse_executor, "decoding threads have"),
            (self.large_image_executor, "thread for large images has"),
        ):
            if (seconds := executor.stalled_seconds()) > limit:
                return [f"the {name} not answered for {seconds:.0f} s"]
        failing = [model for model in models if any(engine.circuit_breaker.is_open() for engine in model.engines)]
        return [f"{model.id} fails on every input" for model in failing]

    def report(self) -> None:
        """Report the waiting and running rows and the number of versions. Called at intervals, not for each request."""
        engines = list(self._engines)
        counts = dict.fromkeys(self._reported_observers, (0, 0))  # an observer without engines reports 0 once
        for engine in engines:
            waiting, running = counts.get(engine.observer, (0, 0))
            counts[engine.observer] = waiting + engine.row_counts[0], running + engine.row_counts[1]
        for observer, (waiting, running) in counts.items():
            observer.on_queue(waiting, running)
        self._reported_observers = {engine.observer for engine in engines}
        models, stored = self.loaded(), self.watcher.snapshot.numbers
        known = {(model.card.name, model.card.version) for model in models} | {observer.key for observer in counts}
        known |= {(name, number) for name, numbers in stored.items() for number in numbers}
        self.observers.on_versions(len(models), len(self.failures), frozenset(known))

    async def close(self) -> None:
        """Reject new requests, stop loading, and finish running requests within ``shutdown_grace_seconds``."""
        self.stopping = self.closed = True
        if self._reconcile_task:
            self._reconcile_task.cancel()
        for task in self.cache.load_tasks():
            task.cancel()
        await asyncio.gather(*(engine.close(self.settings.shutdown_grace_seconds) for engine in list(self._engines)))
        for executor in (self.executor, self.parse_executor, self.large_image_executor, self.load_executor):
            executor.close()
