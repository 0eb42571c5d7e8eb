"""Keep model versions in memory, and record the state of each version in this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from app.engine.observer import ObserverFactory, VersionKey
from app.errors import NotReady
from app.serving.model import LoadFailure, Model

log = logging.getLogger("quartet")
LoadTask = asyncio.Task[Model | LoadFailure]
GPU_WEIGHTS_SHARE = 0.5  # share of the free memory of a GPU that further weights may use; the rest is for computations


class VersionState(Enum):
    """The state of a version in this process. Each version has exactly one state."""

    UNLOADED = "unloaded"  # in the store but not in memory
    LOADING = "loading"
    READY = "ready"  # in memory
    FAILED = "failed"  # cannot be loaded, for example because its files are damaged


@dataclass(frozen=True)
class VersionStatus:
    """The state of one version. ``reason`` says why a failed version cannot be served."""

    name: str
    number: int
    state: VersionState
    reason: str = ""

    @property
    def label(self) -> str:
        """The version as ``name@version``."""
        return f"{self.name}@{self.number}"


class ModelLoading(NotReady):
    """The version is not in memory yet. ``task`` loads it and returns the model or the failure."""

    def __init__(self, label: str, task: LoadTask) -> None:
        super().__init__(f"{label} is being loaded")
        self.task = task


class ModelCache:
    """Stores an entry for each version that is loading, ready or failed. A version without an entry is unloaded.

    The weights of all ready versions should have at most ``max_bytes`` bytes in total, where 0 means no limit. Above
    this limit, ``add`` evicts the least recently used versions. ``free_bytes`` returns the free memory of a GPU, or
    None for the CPU.
    """

    def __init__(
        self, observers: ObserverFactory, max_bytes: int = 0, free_bytes: Callable[[], int | None] = lambda: None
    ) -> None:
        self.max_bytes = max_bytes
        self._free_bytes = free_bytes
        self._observers = observers
        self._entries: dict[VersionKey, LoadTask | Model | LoadFailure] = {}

    def state(self, name: str, number: int) -> VersionState:
        """Return the state of a version."""
        entry = self._entries.get((name, number))
        if entry is None:
            return VersionState.UNLOADED
        if isinstance(entry, Model):
            return VersionState.READY
        return VersionState.FAILED if isinstance(entry, LoadFailure) else VersionState.LOADING

    def get(self, name: str, number: int) -> Model | None:
        """Return a version if it is ready, otherwise None."""
        entry = self._entries.get((name, number))
        return entry if isinstance(entry, Model) else None

    def models(self) -> list[Model]:
        """Return the ready versions, sorted by name and number."""
        entries = [entry for entry in self._entries.values() if isinstance(entry, Model)]
        return sorted(entries, key=lambda model: (model.card.name, model.card.version))

    def failures(self) -> dict[VersionKey, LoadFailure]:
        """Return the versions that could not be loaded, in the order of their failures."""
        return {key: entry for key, entry in self._entries.items() if isinstance(entry, LoadFailure)}

    def load_task(self, name: str, number: int) -> LoadTask | None:
        """Return the task that loads a version, or None if the version is not loading."""
        entry = self._entries.get((name, number))
        return entry if isinstance(entry, asyncio.Task) else None

    def loading(self) -> list[VersionKey]:
        """Return the versions that are loading."""
        return [key for key, entry in self._entries.items() if isinstance(entry, asyncio.Task)]

    def load_tasks(self) -> list[LoadTask]:
        """Return the tasks of all versions that are loading."""
        return [entry for entry in self._entries.values() if isinstance(entry, asyncio.Task)]

    def sizes(self) -> dict[VersionKey, int]:
        """Return the size of the weights of each ready version, in bytes."""
        return {(model.card.name, model.card.version): model.bytes for model in self.models()}

    def bytes(self) -> int:
        """Return the total size of the weights in memory, in bytes."""
        return sum(self.sizes().values())

    def limit(self) -> int:
        """Return how many bytes the weights of all versions, ready and future, may have in total; 0 means no limit."""
        free = self._free_bytes()
        if free is None:
            return self.max_bytes
        available = self.bytes() + max(1, int(GPU_WEIGHTS_SHARE * free))  # above 0, because 0 would mean no limit
        return min(self.max_bytes or available, available)

    def set_loading(self, name: str, number: int, task: LoadTask) -> None:
        """Record that ``task`` loads a version. If the task ends without a result, the state becomes unloaded again."""
        key = name, number
        self._entries[key] = task

        def remove(_: object) -> None:
            if self._entries.get(key) is task:
                del self._entries[key]

        task.add_done_callback(remove)

    def set_failed(self, failure: LoadFailure) -> None:
        """Record that a version could not be loaded."""
        self._entries.pop((failure.name, failure.version), None)  # so that the new entry is the last one
        self._entries[failure.name, failure.version] = failure

    def reset_failed(self, name: str, number: int) -> None:
        """Change the state of a failed version to unloaded, so that it can be loaded again."""
        if isinstance(self._entries.get((name, number)), LoadFailure):
            del self._entries[name, number]

    def add(self, model: Model, must_stay: Callable[[Model], bool]) -> None:
        """Record that a version is ready. While the limit is exceeded, evict others that need not stay."""
        self._entries[model.card.name, model.card.version] = model
        self._observers.for_version(model.card.name, model.card.version).on_memory(model.bytes)
        log.info("%s is loaded", model.id)
        while self.max_bytes and (size := self.bytes()) > self.max_bytes:
            evictable = [other for other in self.models() if other is not model and not must_stay(other)]
            if not evictable:
                log.warning("QUARTET_MODEL_BYTES is %s, but the versions in use need %s bytes", self.max_bytes, size)
                return
            self.evict(min(evictable, key=lambda other: other.last_used_at), "QUARTET_MODEL_BYTES is exceeded")

    def evict(self, model: Model, reason: str) -> None:
        """Remove a ready version from memory. Its engine still finishes the requests that it has accepted."""
        del self._entries[model.card.name, model.card.version]
        self._observers.for_version(model.card.name, model.card.version).on_memory(0)
        log.info("%s is evicted: %s", model.id, reason)
