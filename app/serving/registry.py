"""Which version serves a request, and whether this process still answers."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from app import store
from app.engine.executor import Executor
from app.engine.observer import EngineObserver, VersionKey
from app.errors import BadValue, NotReady, RetiredModel, TimedOut, UnknownModel, UnloadedModel, quote_value
from app.serving.loader import LoadedModel, LoadFailure
from app.serving.store_watcher import StoreWatcher
from app.store import Card, TaskName
from app.tasks import Predictor, Task

P = TypeVar("P", bound=Predictor)


class ModelLoading(NotReady):
    """A version that is not in memory. Its loading has begun: ``coming`` ends with it, or with why it cannot be."""

    def __init__(self, label: str, coming: asyncio.Task[LoadedModel | LoadFailure]) -> None:
        super().__init__(f"{label} is being loaded")
        self.loading = coming


@dataclass
class Registry(StoreWatcher):
    """The stock, and who of it answers whom. Raises as ``StoreWatcher`` does."""

    parse_executor: Executor = field(init=False)
    stopping: bool = False
    reported_observers: set[EngineObserver] = field(default_factory=set)  # those that may have been told of rows

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parse_executor = Executor("parse", self.settings.parse_threads, max_waiting=self.settings.queue_rows)

    def resolve(self, task: Task[P], model: str | None, request_id: str = "") -> LoadedModel[P]:
        """The version that serves a request: of a name, a name@version, or the task's default for None.

        While a canary is tried, ``request_id`` decides. Raises UnknownModel, RetiredModel, BadValue when the model is
        for another task, NotReady when none serves the task, and Asleep for a version that is not in memory.
        """
        if self.stopping:
            raise NotReady("the service is stopping")
        name, number = (
            self._resolve_default(task.name, request_id) if model is None else self.resolve_name(model, request_id)
        )
        live = self.cache.get(name, number)
        card = live.card if live else self.card(name, number)
        if card is None:  # removed a moment ago
            raise UnknownModel(model or name, self.version_sets)
        if card.task != task.name:
            fitting = [known for known in self.version_sets if (other := self.card(known)) and other.task == task.name]
            raise BadValue(
                f"model {quote_value(model)} is for the task {card.task!r}, not {task.name!r}; "
                f"for that there are: {', '.join(fitting) or 'none'}",
                "model",
            )
        if live is None:
            raise ModelLoading(f"{name}@{number}", self.load_version(name, number))
        live.last_used_at = time.monotonic()
        return cast(LoadedModel[P], live)  # the loader made its predictor by the same table

    async def wait_for(self, task: Task[P], model: str | None, request_id: str, deadline: float) -> LoadedModel[P]:
        """As ``pick``, but waits for a version that is not in memory, ``until`` the event loop's clock says so.

        Raises TimedOut then. Before an unloaded model is refused, it is looked up once more.
        """
        looked = False
        while True:
            try:
                return self.resolve(task, model, request_id)
            except UnloadedModel:
                if looked:
                    raise
                await self.recheck((model or "").partition("@")[0])
                looked = True
                continue
            except ModelLoading as asleep:
                coming = asleep.loading
            try:
                async with asyncio.timeout_at(deadline):
                    entry = await asyncio.shield(coming)  # others may wait for it too
            except TimeoutError:
                raise TimedOut("the deadline passed before the model was in memory") from None
            if isinstance(entry, LoadedModel):
                return cast(LoadedModel[P], entry)

    def resolve_name(self, model: str, request_id: str = "", param: str = "model") -> VersionKey:
        """The name and number that ``name`` or ``name@version`` means. Raises UnknownModel and RetiredModel."""
        name, at, number = model.partition("@")
        shelf = self.version_sets.get(name)
        if shelf is None:
            raise UnknownModel(model, self.version_sets, param)
        if shelf.unloaded:
            raise UnloadedModel(f"model {quote_value(name)} is unloaded, until somebody loads it", param)
        found = shelf.version_for(request_id)
        if at:
            found = int(number) if re.fullmatch(r"[1-9][0-9]{0,8}", number) else None
            if found in shelf.retired:
                raise RetiredModel(
                    f"model {quote_value(model)} is retired; there are: {', '.join(shelf.labels())}", param
                )
        if found is None or found not in shelf.numbers:
            raise UnknownModel(model, shelf.labels() or self.version_sets, param)
        return name, found

    def _resolve_default(self, task: TaskName, request_id: str) -> VersionKey:
        name = self.defaults.get(task, "")
        shelf = self.version_sets.get(name)
        number = shelf.version_for(request_id) if shelf else None
        if number is None:
            reasons = [f"{entry.label}: {entry.reason}" for entry in self.failures]
            raise NotReady(f"no model serves the task {task!r}" + (f" ({'; '.join(reasons)})" if reasons else ""))
        return name, number

    def pictures(self, card: Card) -> dict[str, Path]:
        """The pictures of a version's training, by file name."""
        return store.version_pictures(self.settings.store, card.name, card.version)

    def problems(self) -> list[str]:
        """Why this process should get no requests: empty when it is ready."""
        if self.stopping:
            return ["the service is stopping"]
        if not self.loaded:
            return ["no whole model in the store"]
        silent = self.executor.oldest_job_seconds()
        if silent > min(self.settings.unready_after_seconds, self.settings.liveness_timeout_seconds):
            return [f"the engine has not answered for {silent:.0f} s"]
        return [
            f"{live.id} fails on whatever it is asked" for live in self.all() if live.engine.circuit_breaker.is_open()
        ]

    def report(self) -> None:
        """Tell how many rows wait and run, and how many versions there are: now and then, so that no request pays."""
        engines = list(self.engines)
        loads = dict.fromkeys(self.reported_observers, (0, 0))  # also of versions that are gone, this once more
        for engine in engines:
            queued, running = loads.get(engine.observer, (0, 0))
            loads[engine.observer] = queued + engine.load[0], running + engine.load[1]
        for watch, load in loads.items():
            watch.on_load(*load)
        self.reported_observers = {engine.observer for engine in engines}
        there = self.known_versions | {watch.key for watch in loads}
        self.observers.on_versions(sum(map(len, self.loaded.values())), len(self.failures), there)

    async def close(self) -> None:
        """Refuse new requests, finish or tell the running ones."""
        self.stopping = True
        self.stop_loading()
        await asyncio.gather(*(engine.close(self.settings.shutdown_grace_seconds) for engine in list(self.engines)))
        self.executor.close()
        self.parse_executor.close()
