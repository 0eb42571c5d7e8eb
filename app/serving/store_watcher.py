"""What is in memory of what lies in the store: versions come and go as they are published, chosen and asked for."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field
from weakref import WeakSet

from app import store
from app.engine.executor import Executor
from app.engine.observer import ObserverFactory, VersionKey
from app.serving.loader import Engine, LoadedModel, Loader, LoadFailure, check_store, find_device
from app.serving.model_cache import ModelCache
from app.serving.store_snapshot import StoreSnapshot, is_unloaded
from app.serving.version_set import VersionSet
from app.settings import Settings
from app.store import Card, StoreError, TaskName

log = logging.getLogger("quartet")
IDLE_SECONDS = 300.0  # seconds that a version stays in memory which was asked for by its number alone


@dataclass
class StoreWatcher:
    """The versions of the store; a broken one never keeps the others from serving.

    In memory are, of each name, what serves, the canary and the version before; others come when they are asked for.
    Raises SettingsError for a device or a store that is not there.
    """

    settings: Settings
    observers: ObserverFactory
    executor: Executor = field(init=False)
    cache: ModelCache = field(init=False)
    version_sets: dict[str, VersionSet] = field(default_factory=dict)
    defaults: dict[TaskName, str] = field(default_factory=dict)
    engines: WeakSet[Engine] = field(default_factory=WeakSet)  # also of versions that finish what they were asked

    def __post_init__(self) -> None:
        self.device = find_device(self.settings.device)
        self.executor = Executor("compute", inline_seconds=self.settings.inline_seconds)
        self.cache = ModelCache(self.observers, self.settings.model_bytes)
        check_store(self.settings.store)
        self._loader = Loader(self.settings, self.observers, self.executor, self.device)
        self._snapshot = StoreSnapshot()
        self._load_failures: dict[VersionKey, LoadFailure] = {}  # versions that could not be loaded
        self._default_failures: list[LoadFailure] = []  # entries of defaults.json
        self._loading: dict[VersionKey, asyncio.Task[LoadedModel | LoadFailure]] = {}
        self._load_lock = asyncio.Lock()
        self._scan_lock = asyncio.Lock()
        self._scanned_at = -math.inf  # when the last look at the store began
        self._load_task: asyncio.Task[None] | None = None
        self._serving = False  # from then on, versions are loaded aside

    @property
    def loaded(self) -> dict[str, dict[int, LoadedModel]]:
        """What is in memory."""
        return self.cache.models

    @property
    def known_versions(self) -> frozenset[VersionKey]:
        """All versions that lie in the store, or are in memory still."""
        stored = {(name, number) for name, numbers in self._snapshot.numbers.items() for number in numbers}
        return frozenset(stored | {(live.card.name, live.card.version) for live in self.cache.all()})

    @property
    def failures(self) -> list[LoadFailure]:
        """What is not served, and why; ``version`` is 0 for a file that is no version."""
        return [*self._snapshot.failures, *self._load_failures.values(), *self._default_failures]

    async def load(self) -> None:
        """Read the store, and bring into memory what stays there: first what serves the tasks by default."""
        self._choose_defaults()
        await self._scan()
        self._publish()
        await self._load_due()
        self._choose_defaults()
        self._serving = True

    async def watch(self) -> None:
        """Look at the store every few moments, for ever: what is published or chosen comes, what is removed goes.

        New versions are read and warmed up on a thread of low priority, then served from one request to the next;
        requests under way finish on the version that they began with.
        """
        while self.settings.store_poll_seconds:
            await asyncio.sleep(self.settings.store_poll_seconds)
            await self.refresh()

    async def refresh(self) -> None:
        """Serve what lies in the store now, where it is followed, without waiting for the next look at it.

        What is new is loaded beside. Many who want it at once share one look: it only has to begin after they asked.
        """
        asked = time.monotonic()
        async with self._scan_lock:
            if self._scanned_at > asked or not self.settings.store_poll_seconds:
                return
            self._scanned_at = time.monotonic()
            try:
                await self._scan()
                self._publish()
                self._evict_unused()
                self._choose_defaults()
                if not self._load_task or self._load_task.done():  # what is chosen does not wait for what is loaded
                    self._load_task = asyncio.create_task(self._load_due())
            except Exception:  # such as a store that is away for a moment
                log.exception("the store cannot be followed")

    async def recheck(self, name: str) -> None:
        """Look at the store when a model has just been loaded or unloaded by way of another process.

        That is one small file to read: to look at all of it takes long beside texts that are written.
        """
        shelf = self.version_sets.get(name)
        if shelf and await asyncio.to_thread(is_unloaded, self.settings.store, name) not in (
            None,
            bool(shelf.unloaded),
        ):
            await self.refresh()

    async def _scan(self) -> None:
        known, asked = set(self._snapshot.failures), dict(self._load_failures)
        self._snapshot = await asyncio.to_thread(StoreSnapshot.scan, self.settings.store, self._snapshot, asked)
        for key in asked.keys() - self._snapshot.load_failures.keys():
            del self._load_failures[key]  # to be tried again, if it is still there
        for entry in self._snapshot.failures:
            if entry not in known:
                _log_failure(entry)

    def _publish(self) -> None:
        """Serve each name as was chosen, where what it needs for that is in memory or will come on demand, as it does
        for a name of which nothing is served so far, since it was unloaded.
        """
        for name in self.version_sets.keys() - self._snapshot.numbers.keys():
            del self.version_sets[name]
        for name in self._snapshot.numbers:
            shelf, before = self._version_set(name), self.version_sets.get(name)
            due = any(number and self._should_load(shelf, number) for number in (shelf.active, shelf.canary))
            if not due or (before and before.unloaded):
                self._publish_set(shelf)

    async def _load_due(self) -> None:
        """Load what is to be in memory, one after the other."""
        while (due := self._next_due()) is not None:
            await self.load_version(*due)
            self._publish()

    def _next_due(self) -> VersionKey | None:
        """The next version to load before anybody asks: of all names what serves comes first, then the rest."""
        first = set(self.defaults.values())
        names = sorted(self._snapshot.numbers, key=lambda name: (name not in first, name))
        kept = [(name, shelf, shelf.resident) for name in names for shelf in [self._version_set(name)]]
        for most in (1, None):
            for name, shelf, numbers in kept:
                for number in numbers[:most]:
                    if self._should_load(shelf, number):
                        return name, number
        return None

    def _version_set(self, name: str) -> VersionSet:
        """What follows for a name from the store, and from what could be loaded of it."""
        broken = {number for known, number in self._load_failures if known == name}
        found = [number for number in self._snapshot.numbers[name] if (name, number) in self._snapshot.cards]
        return VersionSet.build(name, found, self._snapshot.rollouts[name], broken)

    def _publish_set(self, shelf: VersionSet) -> None:
        before = self.version_sets.get(shelf.name)
        self.version_sets[shelf.name] = shelf
        if self._serving and (before is None or before.describe() != shelf.describe()):
            log.info("%s: %s", shelf.name, shelf.describe())

    def _should_load(self, shelf: VersionSet, number: int) -> bool:
        """Whether to load a version that nobody has asked for yet. What serves a task by default always is."""
        name, most = shelf.name, self.settings.model_bytes
        if self.cache.get(name, number):
            return False
        if not most or (number == shelf.active and name in self.defaults.values()):
            return True
        before = self.version_sets.get(name)
        if number == shelf.active and before and before.active and self.cache.get(name, before.active):
            return True  # in place of the one that served until now
        return self.cache.bytes() + store.weights_size(self.settings.store, name, number) <= most

    def load_version(self, name: str, number: int) -> asyncio.Task[LoadedModel | LoadFailure]:
        """The loading of a version, which all who want it share."""
        key = name, number
        if key not in self._loading:
            self._loading[key] = asyncio.get_running_loop().create_task(self._load(name, number))
            self._loading[key].add_done_callback(lambda _: self._loading.pop(key))
        return self._loading[key]

    async def _load(self, name: str, number: int) -> LoadedModel | LoadFailure:
        async with self._load_lock:
            entry = await asyncio.to_thread(self._loader.load, name, number, in_background=self._serving)
        if isinstance(entry, LoadFailure):
            self._load_failures[name, number] = entry
            _log_failure(entry)
            if shelf := self.version_sets.get(name):
                self._publish_set(self._version_set(name) if shelf.active == number else shelf.without(number))
            return entry
        entry.last_used_at = time.monotonic()
        self.engines.update(engine for engine in (entry.engine, entry.explainer) if engine)
        self.cache.add(entry, is_pinned=self._is_default)
        return entry

    def _is_default(self, live: LoadedModel) -> bool:
        shelf = self.version_sets.get(live.card.name)
        return live.card.name in self.defaults.values() and (not shelf or shelf.active == live.card.version)

    def _evict_unused(self) -> None:
        """Part with versions that are not served any more, and with those of no role that nobody has asked for lately.

        What they were asked already, they still answer.
        """
        now = time.monotonic()
        for live in self.cache.all():
            shelf = self.version_sets.get(live.card.name)
            if shelf is None or live.card.version not in shelf.numbers:
                self.cache.evict(live, "served no longer")
            elif live.card.version not in shelf.resident and now - live.last_used_at > IDLE_SECONDS:
                self.cache.evict(live, "unloaded: nobody has asked for it lately")

    def _choose_defaults(self) -> None:
        """What serves each task; an entry that cannot is refused, and a file that cannot be read changes nothing."""
        reasons: list[str] = []
        try:
            found = store.read_defaults(self.settings.store)
        except StoreError as error:
            found, reasons = self.defaults, [str(error)]
        for task, name in list(found.items()):
            card = self.card(name)
            if card and card.task != task:
                del found[task]
                reasons.append(f"defaults.json: {name!r} is for {card.task!r}, expected one for {task!r}")
        self.defaults = found
        if reasons != [entry.reason for entry in self._default_failures]:
            self._default_failures = [LoadFailure("defaults.json", 0, reason) for reason in reasons]
            for reason in reasons:
                log.error("%s", reason)

    def card(self, name: str, number: int | None = None) -> Card | None:
        """The card of a version, by default of the one that serves when none is asked for."""
        if number is None and name in self.version_sets:
            number = self.version_sets[name].active
        return None if number is None else self._snapshot.cards.get((name, number))

    def all(self) -> list[LoadedModel]:
        """Every version that is served."""
        return self.cache.all()

    def stop_loading(self) -> None:
        """Load nothing more."""
        if self._load_task:
            self._load_task.cancel()
        for coming in list(self._loading.values()):
            coming.cancel()


def _log_failure(entry: LoadFailure) -> None:
    log.error("%s is not served: %s", entry.label, entry.reason)
