"""Which networks are live, which were refused and why, and whether they still answer."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Live:
    """A version that is served: its predictor parses and computes, its engine says when."""

    card: Card
    predictor: Predictor
    engine: Batcher[Any, Any] | TextEngine[Any]
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
    stopping: bool = False

    def __post_init__(self) -> None:
        self.device = find_device(self.settings.device)
        self.lane = Lane("compute", at_once=self.settings.at_once_seconds)
        self.parsing = Lane("parse", self.settings.parse_threads)
        find_store(self.settings.store)

    def load(self) -> None:
        """Read, verify and warm up every version."""
        folder = self.settings.store
        for name, number in store.versions(folder):
            try:
                version = store.read(folder, name, number)
                predictor = self._predictor(version)
                predictor.warm_up(self._full(version.card))
            except Exception as error:  # whatever is wrong with one version, the others are served
                reason = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
                log.error("%s@%s is not served: %s", name, number, reason)
                self.broken.append(Broken(name, number, reason))
            else:
                live = self._live(version.card, predictor)
                self.live.setdefault(name, {})[number] = live
        try:
            self.defaults = store.defaults(folder)
        except StoreError as error:
            self._refuse_default(str(error))
        for task, name in list(self.defaults.items()):
            default = self.newest(name)
            if default and default.card.task != task:
                del self.defaults[task]
                self._refuse_default(f"defaults.json: {name!r} is for {default.card.task!r}, expected one for {task!r}")

    def _refuse_default(self, reason: str) -> None:
        log.error("%s", reason)
        self.broken.append(Broken("defaults.json", 0, reason))

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
        if silent > self.settings.hang_seconds:
            return [f"the engine has not answered for {silent:.0f} s"]
        return []

    async def close(self) -> None:
        """Refuse new requests, finish or tell the running ones."""
        self.stopping = True
        served = [live for versions in self.live.values() for live in versions.values()]
        engines = [engine for live in served for engine in (live.engine, live.explainer) if engine]
        await asyncio.gather(*(engine.close(self.settings.stop_seconds) for engine in engines))
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
