"""Which networks are live, which were refused and why, and whether they still answer."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from app import store
from app.engine.batcher import Batcher
from app.engine.lane import Lane
from app.engine.text import TextEngine
from app.engine.watch import Watch
from app.errors import BadValue, NotReady, UnknownModel, shown
from app.predictors import PREDICTORS, Predictor
from app.predictors.cnn import ImageClassifier
from app.predictors.rnn import Continuation, TextContinuer
from app.settings import Settings, SettingsError
from app.store import Card, StoreError, Task, Version

log = logging.getLogger("quartet")
ASIDE = 10  # niceness of a thread that warms up a version while others are served
Engine = Batcher[Any, Any] | TextEngine[Any]


@dataclass(frozen=True)
class Live:
    """A version that is served: its predictor parses and computes, its engine says when."""

    card: Card
    predictor: Predictor
    engine: Engine
    explainer: Batcher[Any, Any] | None = None  # of classifiers: the same with heat maps

    @property
    def id(self) -> str:
        return f"{self.card.name}@{self.card.version}"

    def follow(self, texts: Sequence[Continuation]) -> AsyncGenerator[None, None]:
        """Texts of this version each time they have grown; see ``TextEngine.follow``."""
        assert isinstance(self.engine, TextEngine)
        return self.engine.follow(texts)


@dataclass(frozen=True)
class Broken:
    """A version that is not served, and why."""

    name: str
    version: int
    reason: str


@dataclass
class Registry:
    """All versions of the store. ``load`` reads and warms them up; a broken one never keeps the others from serving.

    Raises SettingsError for a device or a store that is not there.
    """

    settings: Settings
    watch: Watch
    lane: Lane = field(init=False)
    parsing: Lane = field(init=False)
    live: dict[str, dict[int, Live]] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    defaults: dict[Task, str] = field(default_factory=dict)
    engines: WeakSet[Engine] = field(default_factory=WeakSet)  # also of versions that finish what they were asked
    stopping: bool = False

    def __post_init__(self) -> None:
        self.device = find_device(self.settings.device)
        self.lane = Lane("compute", at_once=self.settings.at_once_seconds)
        self.parsing = Lane("parse", self.settings.parse_threads)
        find_store(self.settings.store)

    def load(self) -> None:
        """Read, verify and warm up every version."""
        for name, number in store.versions(self.settings.store):
            self._adopt(self._read(name, number))
        self._choose_defaults()

    async def follow(self) -> None:
        """Look at the store every few moments, for ever: what is published comes, what is removed goes.

        New versions are read and warmed up on a thread of low priority, then served from one request to the next;
        requests under way finish on the version that they began with.
        """
        while self.settings.store_seconds:
            await asyncio.sleep(self.settings.store_seconds)
            try:
                await self._catch_up()
            except Exception:  # such as a store that is away for a moment
                log.exception("the store cannot be followed")

    async def _catch_up(self) -> None:
        found = await asyncio.to_thread(lambda: list(store.versions(self.settings.store)))
        known = {(name, number) for name, versions in self.live.items() for number in versions}
        known |= {(entry.name, entry.version) for entry in self.broken if entry.version}
        for name, number in found:
            if (name, number) not in known:
                entry = await asyncio.to_thread(self._read, name, number, aside=True)
                self._adopt(entry)
                log.info(
                    "%s@%s is %s", name, number, "not served" if isinstance(entry, Broken) else "served from now on"
                )
        for name, number in known - set(found):
            self._drop(name, number)
        self._choose_defaults()

    def _read(self, name: str, number: int, aside: bool = False) -> Live | Broken:
        """A version, verified and warmed up, or why it is not; ``aside``: while others are served."""
        if aside and hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), ASIDE)
        try:
            version = store.read(self.settings.store, name, number)
            predictor = self._predictor(version)
            predictor.warm_up(self._full(version.card))
        except Exception as error:  # whatever is wrong with one version, the others are served
            return Broken(
                name, number, str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
            )
        return self._live(version.card, predictor)

    def _adopt(self, entry: Live | Broken) -> None:
        if isinstance(entry, Live):
            self.live.setdefault(entry.card.name, {})[entry.card.version] = entry
            self.engines.update(engine for engine in (entry.engine, entry.explainer) if engine)
        else:
            log.error("%s@%s is not served: %s", entry.name, entry.version, entry.reason)
            self.broken.append(entry)

    def _drop(self, name: str, number: int) -> None:
        """Serve a version no longer; what it was asked already, it still answers."""
        self.broken = [entry for entry in self.broken if (entry.name, entry.version) != (name, number)]
        if number in self.live.get(name, {}):
            del self.live[name][number]
            log.info("%s@%s is served no longer", name, number)
            if not self.live[name]:
                del self.live[name]

    def _choose_defaults(self) -> None:
        """What serves each task; an entry that cannot is refused, and a file that cannot be read changes nothing."""
        reasons: list[str] = []
        try:
            found = store.defaults(self.settings.store)
        except StoreError as error:
            found, reasons = self.defaults, [str(error)]
        for task, name in list(found.items()):
            default = self.newest(name)
            if default and default.card.task != task:
                del found[task]
                reasons.append(f"defaults.json: {name!r} is for {default.card.task!r}, expected one for {task!r}")
        self.defaults = found
        refused = [entry for entry in self.broken if not entry.version]
        if reasons != [entry.reason for entry in refused]:
            self.broken = [entry for entry in self.broken if entry.version]
            self.broken += [Broken("defaults.json", 0, reason) for reason in reasons]
            for reason in reasons:
                log.error("%s", reason)

    def _full(self, card: Card) -> int:
        """The rows of the largest batch that a network will see."""
        return self.settings.text_rows if card.task == "continue" else self.settings.batch_rows

    def _predictor(self, version: Version) -> Predictor:
        if version.card.task == "classify":
            return ImageClassifier(version, self.device, self.settings.views)
        return PREDICTORS[version.card.task](version, self.device)

    def _live(self, card: Card, predictor: Any) -> Live:
        settings = self.settings
        if isinstance(predictor, TextContinuer):
            pace, rows = predictor.pace, settings.text_rows
            engine = TextEngine(card.name, predictor.step, pace, self.lane, self.watch, rows, settings.queue_rows)
            return Live(card, predictor, engine)
        explainer = None
        if isinstance(predictor, ImageClassifier):
            explainer = self._batcher(card, predictor.explain, predictor)
        return Live(card, predictor, self._batcher(card, predictor.predict, predictor), explainer)

    def _batcher(self, card: Card, compute: Callable[..., Any], predictor: Any) -> Batcher[Any, Any]:
        return Batcher(
            card.name,
            compute,
            predictor.rows,
            predictor.seconds,
            self.lane,
            self.watch,
            batch_rows=self.settings.batch_rows,
            queue_rows=self.settings.queue_rows,
        )

    def pick(self, task: Task, model: str | None) -> Live:
        """The version that serves a request: of a name, a name@version, or the task's default for None.

        Raises UnknownModel, BadValue when the model is for another task, and NotReady when none serves the task.
        """
        if self.stopping:
            raise NotReady("the service is stopping")
        if model is None:
            return self._default(task)
        live = self.find(model)
        if live.card.task != task:
            fitting = [name for name in self.live if self.live[name][max(self.live[name])].card.task == task]
            raise BadValue(
                f"model {shown(model)} is for the task {live.card.task!r}, not {task!r}; "
                f"for that there are: {', '.join(fitting) or 'none'}",
                "model",
            )
        return live

    def find(self, model: str, param: str = "model") -> Live:
        """The version that ``name`` or ``name@version`` means. Raises UnknownModel."""
        name, at, number = model.partition("@")
        versions = self.live.get(name, {})
        if not at:
            live = self.newest(name)
        else:
            live = versions.get(int(number)) if re.fullmatch(r"[1-9][0-9]{0,8}", number) else None
        if live is None:
            raise UnknownModel(model, [f"{name}@{known}" for known in versions] if versions else self.live, param)
        return live

    def _default(self, task: Task) -> Live:
        live = self.newest(self.defaults.get(task, ""))
        if live is None:
            reasons = [f"{entry.name}@{entry.version}: {entry.reason}" for entry in self.broken]
            raise NotReady(f"no model serves the task {task!r}" + (f" ({'; '.join(reasons)})" if reasons else ""))
        return live

    def newest(self, name: str) -> Live | None:
        """The version of a name that serves when none is asked for."""
        versions = self.live.get(name)
        return versions[max(versions)] if versions else None

    def problems(self) -> list[str]:
        """Why this process should get no requests: empty when it is ready."""
        if self.stopping:
            return ["the service is stopping"]
        if not self.live:
            return ["no whole model in the store"]
        silent = self.lane.unanswered()
        if silent > min(self.settings.silent_seconds, self.settings.hang_seconds):
            return [f"the engine has not answered for {silent:.0f} s"]
        served = [live for versions in self.live.values() for live in versions.values()]
        return [f"{live.id} fails on whatever it is asked" for live in served if live.engine.failing.now()]

    async def close(self) -> None:
        """Refuse new requests, finish or tell the running ones."""
        self.stopping = True
        await asyncio.gather(*(engine.close(self.settings.stop_seconds) for engine in list(self.engines)))
        self.lane.close()
        self.parsing.close()


def find_store(folder: Path) -> None:
    """Raises SettingsError for a store that is not there."""
    if not folder.is_dir():
        raise SettingsError(f"QUARTET_STORE is {str(folder)!r}: there is no such folder")


def find_device(wanted: str) -> torch.device:
    """``auto`` is the GPU when there is one. Raises SettingsError for a GPU that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda:0" if count else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"there are {count} GPUs" if count else "there is no GPU that torch can use"
        raise SettingsError(
            f"QUARTET_DEVICE is {wanted!r}: {there}; allowed are auto, cpu" + (", cuda:N" if count else "")
        )
    return device
