"""Which networks are live, which were refused and why, and whether they still answer."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakSet

from app import store
from app.engine.lane import Lane
from app.engine.loading import Broken, Engine, Live, Loader, find_device, find_store
from app.engine.memory import Memory
from app.engine.shelf import Shelf
from app.engine.survey import Key, Survey, unloaded
from app.engine.watch import Watch, Watcher
from app.errors import BadValue, NotReady, RetiredModel, TimedOut, UnknownModel, UnloadedModel, shown
from app.settings import Settings
from app.store import Card, StoreError, Task

log = logging.getLogger("quartet")
IDLE = 300.0  # seconds that a version stays in memory which was asked for by its number alone


class Asleep(NotReady):
    """A version that is not in memory. Its loading has begun: ``coming`` ends with it, or with why it cannot be."""

    def __init__(self, label: str, coming: asyncio.Task[Live | Broken]) -> None:
        super().__init__(f"{label} is being loaded")
        self.coming = coming


@dataclass
class Registry:
    """The versions of the store; a broken one never keeps the others from serving.

    In memory are, of each name, what serves, the canary and the version before; others come when they are asked for.
    Raises SettingsError for a device or a store that is not there.
    """

    settings: Settings
    watch: Watcher
    lane: Lane = field(init=False)
    parsing: Lane = field(init=False)
    memory: Memory = field(init=False)
    shelves: dict[str, Shelf] = field(default_factory=dict)
    defaults: dict[Task, str] = field(default_factory=dict)
    engines: WeakSet[Engine] = field(default_factory=WeakSet)  # also of versions that finish what they were asked
    stopping: bool = False
    reported: set[Watch] = field(default_factory=set)  # those that may have been told of rows

    def __post_init__(self) -> None:
        self.device = find_device(self.settings.device)
        self.lane = Lane("compute", at_once=self.settings.at_once_seconds)
        self.parsing = Lane("parse", self.settings.parse_threads)
        self.memory = Memory(self.watch, self.settings.model_bytes)
        find_store(self.settings.store)
        self._loader = Loader(self.settings, self.watch, self.lane, self.device)
        self._survey = Survey()
        self._failed: dict[Key, Broken] = {}  # versions that could not be loaded
        self._refused: list[Broken] = []  # entries of defaults.json
        self._coming: dict[Key, asyncio.Task[Live | Broken]] = {}
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
            await self._fetch(*due)
            self._place()

    def _due(self) -> Key | None:
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

    def _fetch(self, name: str, number: int) -> asyncio.Task[Live | Broken]:
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

    def pick(self, task: Task, model: str | None, request_id: str = "") -> Live:
        """The version that serves a request: of a name, a name@version, or the task's default for None.

        While a canary is tried, ``request_id`` decides. Raises UnknownModel, RetiredModel, BadValue when the model is
        for another task, NotReady when none serves the task, and Asleep for a version that is not in memory.
        """
        if self.stopping:
            raise NotReady("the service is stopping")
        name, number = self._default(task, request_id) if model is None else self.find(model, request_id)
        live = self.memory.get(name, number)
        card = live.card if live else self._survey.cards.get((name, number))
        if card is None:  # removed a moment ago
            raise UnknownModel(model or name, self.shelves)
        if card.task != task:
            fitting = [known for known in self.shelves if (other := self.card(known)) and other.task == task]
            raise BadValue(
                f"model {shown(model)} is for the task {card.task!r}, not {task!r}; "
                f"for that there are: {', '.join(fitting) or 'none'}",
                "model",
            )
        if live is None:
            raise Asleep(f"{name}@{number}", self._fetch(name, number))
        live.used = time.monotonic()
        return live

    async def reach(self, task: Task, model: str | None, request_id: str, until: float) -> Live:
        """As ``pick``, but waits for a version that is not in memory, ``until`` the event loop's clock says so.

        Raises TimedOut then. Before an unloaded model is refused, it is looked up once more.
        """
        looked = False
        while True:
            try:
                return self.pick(task, model, request_id)
            except UnloadedModel:
                if looked:
                    raise
                await self.recheck((model or "").partition("@")[0])
                looked = True
                continue
            except Asleep as asleep:
                coming = asleep.coming
            try:
                async with asyncio.timeout_at(until):
                    entry = await asyncio.shield(coming)  # others may wait for it too
            except TimeoutError:
                raise TimedOut("the deadline passed before the model was in memory") from None
            if isinstance(entry, Live):
                return entry

    def find(self, model: str, request_id: str = "", param: str = "model") -> Key:
        """The name and number that ``name`` or ``name@version`` means. Raises UnknownModel and RetiredModel."""
        name, at, number = model.partition("@")
        shelf = self.shelves.get(name)
        if shelf is None:
            raise UnknownModel(model, self.shelves, param)
        if shelf.unloaded:
            raise UnloadedModel(f"model {shown(name)} is unloaded, until somebody loads it", param)
        found = shelf.serves(request_id)
        if at:
            found = int(number) if re.fullmatch(r"[1-9][0-9]{0,8}", number) else None
            if found in shelf.retired:
                raise RetiredModel(f"model {shown(model)} is retired; there are: {', '.join(shelf.labels())}", param)
        if found is None or found not in shelf.numbers:
            raise UnknownModel(model, shelf.labels() or self.shelves, param)
        return name, found

    def _default(self, task: Task, request_id: str) -> Key:
        name = self.defaults.get(task, "")
        shelf = self.shelves.get(name)
        number = shelf.serves(request_id) if shelf else None
        if number is None:
            reasons = [f"{entry.label}: {entry.reason}" for entry in self.broken]
            raise NotReady(f"no model serves the task {task!r}" + (f" ({'; '.join(reasons)})" if reasons else ""))
        return name, number

    def card(self, name: str, number: int | None = None) -> Card | None:
        """The card of a version, by default of the one that serves when none is asked for."""
        if number is None and name in self.shelves:
            number = self.shelves[name].active
        return None if number is None else self._survey.cards.get((name, number))

    def all(self) -> list[Live]:
        """Every version that is served."""
        return self.memory.all()

    def pictures(self, card: Card) -> dict[str, Path]:
        """The pictures of a version's training, by file name."""
        return store.pictures(self.settings.store, card.name, card.version)

    def problems(self) -> list[str]:
        """Why this process should get no requests: empty when it is ready."""
        if self.stopping:
            return ["the service is stopping"]
        if not self.live:
            return ["no whole model in the store"]
        silent = self.lane.unanswered()
        if silent > min(self.settings.silent_seconds, self.settings.hang_seconds):
            return [f"the engine has not answered for {silent:.0f} s"]
        return [f"{live.id} fails on whatever it is asked" for live in self.all() if live.engine.failing.now()]

    def report(self) -> None:
        """Tell how many rows wait and run, and how many versions there are: now and then, so that no request pays."""
        loads = dict.fromkeys(self.reported, (0, 0))  # also of versions that are gone
        for engine in list(self.engines):
            queued, running = loads.get(engine.watch, (0, 0))
            loads[engine.watch] = queued + engine.load[0], running + engine.load[1]
        for watch, load in loads.items():
            watch.load(*load)
        self.reported = set(loads)
        self.watch.versions(sum(map(len, self.live.values())), len(self.broken))

    async def close(self) -> None:
        """Refuse new requests, finish or tell the running ones."""
        self.stopping = True
        if self._bringing:
            self._bringing.cancel()
        for coming in list(self._coming.values()):
            coming.cancel()
        await asyncio.gather(*(engine.close(self.settings.stop_seconds) for engine in list(self.engines)))
        self.lane.close()
        self.parsing.close()


def _complain(entry: Broken) -> None:
    log.error("%s is not served: %s", entry.label, entry.reason)
