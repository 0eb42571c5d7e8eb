"""From a version in the store to one that is ready to serve: read, verified, warmed up, with an engine of its own."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from typing_extensions import TypeVar

from app import store
from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.engine.observer import ObserverFactory
from app.engine.text_engine import TextEngine
from app.settings import Settings, SettingsError
from app.store import CARD, WEIGHTS, Card, StoreError, Version
from app.tasks import TASKS, BatchPredictor, Predictor, Task
from app.tasks.text_generation import Continuation

RETRY_SECONDS = 30.0  # seconds after which a version is tried again that could not be loaded for a reason that passes
TRANSIENT_ERRORS = (OSError, MemoryError, torch.OutOfMemoryError)
PERMANENT_ERRORS = (FileNotFoundError, NotADirectoryError, PermissionError)
BACKGROUND_NICENESS = 10  # niceness of a thread that warms up a version while others are served
Engine = Batcher[Any, Any] | TextEngine[Any]
P = TypeVar("P", bound=Predictor, default=Any)
FileStamps = tuple[tuple[int, int], ...]


@dataclass(eq=False)
class LoadedModel(Generic[P]):
    """A version in memory: its predictor parses and computes, its engine schedules."""

    card: Card
    predictor: P
    engine: Engine
    explainer: Batcher[Any, Any] | None = None  # of tasks that explain: batches of ``predictor.explain``
    bytes: int = 0  # of the weights
    last_used_at: float = 0.0  # time of the last request, on time.monotonic's clock

    @property
    def id(self) -> str:
        return f"{self.card.name}@{self.card.version}"

    def stream(self, texts: Sequence[Continuation]) -> AsyncGenerator[None, None]:
        """Yield each time some of the texts have grown; see ``TextEngine.stream``."""
        assert isinstance(self.engine, TextEngine)
        return self.engine.stream(texts)


@dataclass(frozen=True)
class LoadFailure:
    """A version that is not served, and why; ``seen``: its files as they were, for they may be half copied.

    ``again``: when to try it again all the same, on time.monotonic's clock: it may not have been the version's fault.
    """

    name: str
    version: int
    reason: str
    files: FileStamps = ()
    retry_at: float = math.inf

    @property
    def label(self) -> str:
        """The version as ``name@version``, or the file, where ``version`` is 0."""
        return f"{self.name}@{self.version}" if self.version else self.name


@dataclass
class Loader:
    """Makes versions ready for one process: its device, its lane, its limits."""

    settings: Settings
    observers: ObserverFactory
    executor: Executor
    device: torch.device

    def load(self, name: str, number: int, in_background: bool = False) -> LoadedModel | LoadFailure:
        """A version, verified and warmed up, or why it is not; ``aside``: while others are served."""
        if in_background and hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICENESS)
        seen = file_stamps(self.settings.store, name, number)
        try:
            version = store.read_version(self.settings.store, name, number)
            task = TASKS[version.card.task]
            options = {name: getattr(self.settings, name) for name in task.options}
            predictor = task.predictor(version, self.device, **options)
            predictor.warm_up(self._max_rows(task))
            return self._loaded_model(task, version, predictor)
        except Exception as error:  # whatever is wrong with one version, the others are served
            told = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
            again = time.monotonic() + RETRY_SECONDS if _is_transient(error) else math.inf
            return LoadFailure(name, number, told, seen, again)

    def _max_rows(self, task: Task[Any]) -> int:
        """Return the rows of the largest batch of a task."""
        return self.settings.max_running_texts if task.engine == "text" else self.settings.batch_rows

    def _loaded_model(self, task: Task[Any], version: Version, predictor: Any) -> LoadedModel:
        card = version.card
        size = sum(tensor.nbytes for tensor in version.tensors.values())
        if task.engine == "text":
            observer = self.observers.for_version(card.name, card.version)
            rows, queue = self._max_rows(task), self.settings.queue_rows
            engine = TextEngine(_label(card), predictor.step, predictor.latency, self.executor, observer, rows, queue)
            return LoadedModel(card, predictor, engine, bytes=size)
        explainer = self._batcher(card, predictor.explain, predictor) if task.explains else None
        return LoadedModel(card, predictor, self._batcher(card, predictor.predict, predictor), explainer, bytes=size)

    def _batcher(self, card: Card, compute: Callable[..., Any], predictor: BatchPredictor) -> Batcher[Any, Any]:
        return Batcher(
            _label(card),
            compute,
            predictor.rows,
            predictor.seconds,
            self.executor,
            self.observers.for_version(card.name, card.version),
            batch_rows=self.settings.batch_rows,
            queue_rows=self.settings.queue_rows,
        )


def _is_transient(error: Exception) -> bool:
    """Whether a failure may be over in a while: memory, files or the disk were not to be had."""
    if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # as torch says it on the CPU
        return True
    return any(
        isinstance(one, TRANSIENT_ERRORS) and not isinstance(one, PERMANENT_ERRORS) for one in (error, error.__cause__)
    )


def file_stamps(folder: Path, name: str, number: int) -> FileStamps:
    """The sizes and times of a version's files: when they change, so may what is wrong with it."""
    seen = []
    for file in (CARD, WEIGHTS):
        with contextlib.suppress(OSError):
            stat = (folder / name / str(number) / file).stat()
            seen.append((stat.st_size, stat.st_mtime_ns))
    return tuple(seen)


def _label(card: Card) -> str:
    """How an engine is named, in sentences and in figures."""
    return f"{card.name}@{card.version}"


def check_store(folder: Path) -> None:
    """Raises SettingsError for a store that is not there."""
    if not folder.is_dir():
        raise SettingsError(f"QUARTET_STORE is {str(folder)!r}: there is no such folder")


def find_device(name: str) -> torch.device:
    """``auto`` is the GPU when there is one. Raises SettingsError for a GPU that is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"there are {count} GPUs" if count else "there is no GPU that torch can use"
        raise SettingsError(
            f"QUARTET_DEVICE is {name!r}: {there}; allowed are auto, cpu" + (", cuda:N" if count else "")
        )
    return device
