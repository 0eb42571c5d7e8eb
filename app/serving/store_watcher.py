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
from app.serving.loader import Broken, Engine, Live, Loader, find_device, find_store
from app.serving.model_cache import Memory
from app.serving.store_snapshot import Survey, unloaded
from app.serving.version_set import Shelf
from app.settings import Settings
from app.store import Card, StoreError, Task

log = logging.getLogger("quartet")
IDLE = 300.0  # seconds that a version stays in memory which was asked for by its number alone


@dataclass
class Stock:
    """The versions of the store; a broken one never keeps the others from serving.

    In memory are, of each name, what serves, the canary and the version before; others come when they are asked for.
    Raises SettingsError for a device or a store that is not there.
    """

    settings: Settings
    watch: ObserverFactory
    executor: Executor = field(init=False)
    memory: Memory = field(init=False)
    shelves: dict[str, Shelf] = field(default_factory=dict)
    defaults: dict[Task, str] = field(default_factory=dict)
    engines: WeakSet[Engine] = field(default_factory=WeakSet)  # also of versions that finish what they were asked

    def __post_init__(self) -> None:
        self.device = find_device(self.settings.device)
        self.executor = Executor("compute", inline_seconds=self.settings.at_once_seconds)
        self.memory = Memory(self.watch, self.settings.model_bytes)
        find_store(self.settings.store)
        self._loader = Loader(self.settings, self.watch, self.executor, self.device)
        self._survey = Survey()
        self._failed: dict[VersionKey, Broken] = {}  # versions that could not be loaded
        self._refused: list[Broken] = []  # entries of defaults.json
        self._coming: dict[VersionKey, asyncio.Task[Live | Broken]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._looking = asyncio.Lock()
        self._looked = -math.inf  # when the last look at the store began
        self._bringing: asyncio.Task[None] | None = None
        self._serving = False  # from then on, versions are loaded aside

    @property
    def live(self) -> dict[str, dict[int, Live]]:
        """What is in memory."""
        return self.memory.live

    @property
    def there(self) -> frozenset[VersionKey]:
        """All versions that lie in the store, or are in memory still."""
        stored = {(name, number) for name, numbers in self._survey.numbers.items() for number in numbers}
        return frozenset(stored | {(live.card.name, live.card.version) for live in self.memory.all()})

    @property
    def broken(self) -> list[Broken]:
        """What is not served, and why; ``version`` is 0 for a file that is no version."""
        return [*self._survey.broken, *self._failed.values(), *self._refused]

    async def load(self) -> None:
        """Read the store, and bring into memory what stays there: first what serves the tasks by default."""
        self._choose_defaults()
        await self._look()
        self._place()
        await self._bring()
        self._choose_defaults()
        self._serving = True

    async def follow(self) -> None:
        """Look at the store every few moments, for ever: what is published or chosen comes, what is removed goes.

        New versions are read and warmed up on a thread of low priority, then served from one request to the next;
        requests under way finish on the version that they began with.
        """
        while self.settings.store_seconds:
            await asyncio.sleep(self.settings.store_seconds)
            await self.refresh()

    async def refresh(self) -> None:
        """Serve what lies in the store now, where it is followed, without waiting for the next look at it.

        What is new is loaded beside. Many who want it at once share one look: it only has to begin after they asked.
        """
        asked = time.monotonic()
        async with self._looking:
            if self._looked > asked or not self.settings.store_seconds:
                return
            self._looked = time.monotonic()
            try:
                await self._look()
                self._place()
                self._part()
                self._choose_defaults()
                if not self._bringing or self._bringing.done():  # what is chosen does not wait for what is loaded
                    self._bringing = asyncio.create_task(self._bring())
            except Exception:  # such as a store that is away for a moment
                log.exception("the store cannot be followed")

    async def recheck(self, name: str) -> None:
        """Look at the store when a model has just been loaded or unloaded by way of another process.

        That is one small file to read: to look at all of it takes long beside texts that are written.
        """
        shelf = self.shelves.get(name)
        if shelf and await asyncio.to_thread(unloaded, self.settings.store, name) not in (None, bool(shelf.unloaded)):
            await self.refresh()

    async def _look(self) -> None:
        known, asked = set(self._survey.broken), dict(self._failed)
        self._survey = await asyncio.to_thread(Survey.of, self.settings.store, self._survey, asked)
        for key in asked.keys() - self._survey.failed.keys():
            del self._failed[key]  # to be tried again, if it is still there
        for entry in self._survey.broken:
            if entry not in known:
                _complain(entry)

    def _place(self) -> None:
        """Serve each name as was chosen, where what it needs for that is in memory or will come on demand, as it does
        for a name of which nothing is served so far, since it was unloaded.
        """
        for name in self.shelves.keys() - self._survey.numbers.keys():
            del self.shelves[name]
        for name in self._survey.numbers:
            shelf, before = self._shelf(name), self.shelves.get(name)
            due = any(number and self._should_load(shelf, number) for number in (shelf.active, shelf.canary))
            if not due or (before and before.unloaded):
                self._put(shelf)

    async def _bring(self) -> None:
        """Load what is to be in memory, one after the other."""
        while (due := self._due()) is not None:
            await self.fetch(*due)
            self._place()

    def _due(self) -> VersionKey | None:
        """The next version to load before anybody asks: of all names what serves comes first, then the rest."""
        first = set(self.defaults.values())
        names = sorted(self._survey.numbers, key=lambda name: (name not in first, name))
        kept = [(name, shelf, shelf.kept) for name in names for shelf in [self._shelf(name)]]
        for most in (1, None):
            for name, shelf, numbers in kept:
                for number in numbers[:most]:
                    if self._should_load(shelf, number):
                        return name, number
        return None

    def _shelf(self, name: str) -> Shelf:
        """What follows for a name from the store, and from what could be loaded of it."""
        broken = {number for known, number in self._failed if known == name}
        found = [number for number in self._survey.numbers[name] if (name, number) in self._survey.cards]
        return Shelf.of(name, found, self._survey.chosen[name], broken)

    def _put(self, shelf: Shelf) -> None:
        before = self.shelves.get(shelf.name)
        self.shelves[shelf.name] = shelf
        if self._serving and (before is None or before.told() != shelf.told()):
            log.info("%s: %s", shelf.name, shelf.told())

    def _should_load(self, shelf: Shelf, number: int) -> bool:
        """Whether to load a version that nobody has asked for yet. What serves a task by default always is."""
        name, most = shelf.name, self.settings.model_bytes
        if self.memory.get(name, number):
            return False
        if not most or (number == shelf.active and name in self.defaults.values()):
            return True
        before = self.shelves.get(name)
        if number == shelf.active and before and before.active and self.memory.get(name, before.active):
            return True  # in place of the one that served until now
        return self.memory.bytes() + store.size(self.settings.store, name, number) <= most

    def fetch(self, name: str, number: int) -> asyncio.Task[Live | Broken]:
        """The loading of a version, which all who want it share."""
        key = name, number
        if key not in self._coming:
            self._coming[key] = asyncio.get_running_loop().create_task(self._load(name, number))
            self._coming[key].add_done_callback(lambda _: self._coming.pop(key))
        return self._coming[key]

    async def _load(self, name: str, number: int) -> Live | Broken:
        async with self._one_at_a_time:
            entry = await asyncio.to_thread(self._loader.load, name, number, aside=self._serving)
        if isinstance(entry, Broken):
            self._failed[name, number] = entry
            _complain(entry)
            if shelf := self.shelves.get(name):
                self._put(self._shelf(name) if shelf.active == number else shelf.without(number))
            return entry
        entry.used = time.monotonic()
        self.engines.update(engine for engine in (entry.engine, entry.explainer) if engine)
        self.memory.add(entry, stays=self._by_default)
        return entry

    def _by_default(self, live: Live) -> bool:
        shelf = self.shelves.get(live.card.name)
        return live.card.name in self.defaults.values() and (not shelf or shelf.active == live.card.version)

    def _part(self) -> None:
        """Part with versions that are not served any more, and with those of no role that nobody has asked for lately.

        What they were asked already, they still answer.
        """
        now = time.monotonic()
        for live in self.memory.all():
            shelf = self.shelves.get(live.card.name)
            if shelf is None or live.card.version not in shelf.numbers:
                self.memory.drop(live, "served no longer")
            elif live.card.version not in shelf.kept and now - live.used > IDLE:
                self.memory.drop(live, "unloaded: nobody has asked for it lately")

    def _choose_defaults(self) -> None:
        """What serves each task; an entry that cannot is refused, and a file that cannot be read changes nothing."""
        reasons: list[str] = []
        try:
            found = store.defaults(self.settings.store)
        except StoreError as error:
            found, reasons = self.defaults, [str(error)]
        for task, name in list(found.items()):
            card = self.card(name)
            if card and card.task != task:
                del found[task]
                reasons.append(f"defaults.json: {name!r} is for {card.task!r}, expected one for {task!r}")
        self.defaults = found
        if reasons != [entry.reason for entry in self._refused]:
            self._refused = [Broken("defaults.json", 0, reason) for reason in reasons]
            for reason in reasons:
                log.error("%s", reason)

    def card(self, name: str, number: int | None = None) -> Card | None:
        """The card of a version, by default of the one that serves when none is asked for."""
        if number is None and name in self.shelves:
            number = self.shelves[name].active
        return None if number is None else self._survey.cards.get((name, number))

    def all(self) -> list[Live]:
        """Every version that is served."""
        return self.memory.all()

    def stop_loading(self) -> None:
        """Load nothing more."""
        if self._bringing:
            self._bringing.cancel()
        for coming in list(self._coming.values()):
            coming.cancel()


def _complain(entry: Broken) -> None:
    log.error("%s is not served: %s", entry.label, entry.reason)
