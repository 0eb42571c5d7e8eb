"""Load a version: read it, verify it, warm it up, and create its engines."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple

import torch
from typing_extensions import TypeVar

from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.engine.observer import ObserverFactory
from app.engine.text_engine import TextEngine
from app.errors import is_out_of_memory
from app.settings import Settings, SettingsError
from app.store import Card, Store
from app.tasks import TASKS, Task
from app.tasks.predictor import BatchPredictor, Predictor, SplittingPredictor
from app.tasks.text_generation import Continuation

PERMANENT_ERRORS = (FileNotFoundError, NotADirectoryError, PermissionError)
Engine = Batcher[Any, Any] | TextEngine[Any]
P = TypeVar("P", bound=Predictor, default=Any)


@dataclass(eq=False)
class Model(Generic[P]):
    """A version in memory. Its predictor parses inputs and computes results. Its engine schedules the computations."""

    card: Card
    predictor: P
    engine: Engine
    explainer: Batcher[Any, Any] | None = None  # computes ``predictor.explain`` in batches, if it exists
    tensors: Model[Any] | None = None  # computes requests of tensors, for imported classifiers

    @property
    def id(self) -> str:
        """The version as ``name@version``."""
        return f"{self.card.name}@{self.card.version}"

    @property
    def engines(self) -> list[Engine]:
        """All engines that compute with the version."""
        return [engine for engine in (self.engine, self.explainer, self.tensors and self.tensors.engine) if engine]

    def stream(self, texts: Sequence[Continuation]) -> AsyncGenerator[None, None]:
        """Yield whenever some of the texts have new characters, as ``TextEngine.stream`` does."""
        assert isinstance(self.engine, TextEngine)
        return self.engine.stream(texts)


class Prepared(NamedTuple):
    """The predictor of a verified version, after its warm-up. ``weights_bytes`` is the size of the weights."""

    card: Card
    predictor: Any
    weights_bytes: int


def prepare(settings: Settings, device: torch.device, name: str, number: int) -> Prepared:
    """Read a version, verify it, and warm up its predictor. Any exception of these steps is raised."""
    version = Store(settings.store).read(name, number)
    task = TASKS[version.card.task]
    predictor = task.load(version, device, **{option: getattr(settings, option) for option in task.options})
    predictor.warm_up(max_rows(settings, task))
    return Prepared(version.card, predictor, sum(tensor.nbytes for tensor in version.tensors.values()))


def with_engines(prepared: Prepared, settings: Settings, executor: Executor, observers: ObserverFactory) -> Model:
    """Return a version with its engines, which compute on ``executor``."""
    card, predictor, task = prepared.card, prepared.predictor, TASKS[prepared.card.task]
    label, observer = f"{card.name}@{card.version}", observers.for_version(card.name, card.version)

    def batcher(
        predictor: BatchPredictor,
        compute: Callable[..., Any],
        seconds: Callable[..., float],
        splitter: SplittingPredictor | None = None,
    ) -> Batcher[Any, Any]:
        rows, queue_rows = settings.limits.batch_rows, settings.queue_rows
        return Batcher(
            label, compute, predictor.rows, seconds, executor, observer, batch_rows=rows, queue_rows=queue_rows,
            splitter=splitter,
            limits=settings.limits,
        )  # fmt: skip

    if task.engine == "text":
        predictor.max_prompt_seconds = settings.limits.max_prompt_seconds
        rows = max_rows(settings, task)
        engine: Engine = TextEngine(
            label, predictor.step, predictor.seconds, executor, observer, rows, settings.queue_rows, settings.limits
        )
        return Model(card, predictor, engine)
    splitter = predictor if hasattr(predictor, "split") else None
    explainer = tensors = None
    if runner := getattr(predictor, "tensors", None):
        tensors = Model(card, runner, batcher(runner, runner.predict, runner.seconds, runner))
    if hasattr(predictor, "explain"):  # imported networks have no heat maps
        explainer = batcher(predictor, predictor.explain, lambda _: math.inf)  # never on the event loop
    engine = batcher(predictor, predictor.predict, predictor.seconds, splitter)
    return Model(card, predictor, engine, explainer, tensors)


def max_rows(settings: Settings, task: Task[Any]) -> int:
    """Return the maximum number of rows in a batch of a task."""
    return settings.limits.max_running_texts if task.engine == "text" else settings.limits.batch_rows


def is_transient(error: BaseException) -> bool:
    """Return whether loading may succeed later, because memory or a file may be unavailable only for a moment."""
    return any(
        is_out_of_memory(cause) or (isinstance(cause, OSError) and not isinstance(cause, PERMANENT_ERRORS))
        for cause in (error, error.__cause__)
    )


def check_store(folder: Path) -> None:
    """Raise SettingsError if the store does not exist or cannot be read."""
    try:
        with os.scandir(folder):
            return
    except (FileNotFoundError, NotADirectoryError):
        reason = "there is no such folder"
    except OSError as error:
        reason = f"it cannot be read: {error.strerror}"
    raise SettingsError(f"QUARTET_STORE is {str(folder)!r}: {reason}")
