"""Load a version from the store: read it, verify it, warm it up, and create its engine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import torch
from typing_extensions import TypeVar

from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.engine.observer import ObserverFactory, VersionKey
from app.engine.text_engine import TextEngine
from app.errors import is_out_of_memory
from app.settings import Settings, SettingsError
from app.store import CARD, WEIGHTS, Card, Store, StoreError
from app.store.weights_size import weights_size
from app.tasks import TASKS, BatchPredictor, Predictor, SplittingPredictor, Task
from app.tasks.text_generation import Continuation

log = logging.getLogger("quartet")

RETRY_SECONDS = 30.0  # seconds after which loading is tried again if the error was transient
PERMANENT_ERRORS = (FileNotFoundError, NotADirectoryError, PermissionError)
BACKGROUND_NICENESS = 10  # niceness of a thread that loads a version while other versions serve requests
Engine = Batcher[Any, Any] | TextEngine[Any]
P = TypeVar("P", bound=Predictor, default=Any)
FileStamps = tuple[tuple[int, int, int], ...]  # size in bytes, and times of two changes in ns, of each file


@dataclass(eq=False)
class Model(Generic[P]):
    """A version in memory. Its predictor parses inputs and computes results. Its engine schedules the computations."""

    card: Card
    predictor: P
    engine: Engine
    explainer: Batcher[Any, Any] | None = None  # computes ``predictor.explain`` in batches, if it exists
    tensors: Batcher[Any, Any] | None = None  # computes requests of tensors, for imported classifiers
    bytes: int = 0  # size of the weights in memory
    last_used_at: float = 0.0  # time.monotonic() at the last request, or at loading if there was no request

    @property
    def id(self) -> str:
        """The version as ``name@version``."""
        return f"{self.card.name}@{self.card.version}"

    @property
    def engines(self) -> list[Engine]:
        """All engines that compute with the version."""
        return [engine for engine in (self.engine, self.explainer, self.tensors) if engine]

    def stream(self, texts: Sequence[Continuation]) -> AsyncGenerator[None, None]:
        """Yield whenever some of the texts have new characters, as ``TextEngine.stream`` does."""
        assert isinstance(self.engine, TextEngine)
        return self.engine.stream(texts)


@dataclass(frozen=True)
class LoadFailure:
    """A version or a file of the store that cannot be used, and the reason.

    Attributes:
        name: the name of the model, or a path in the store if ``version`` is 0.
        version: the version number; 0 for a file or folder that does not belong to a version.
        reason: the error message.
        files: ``file_stamps`` of the version when its files were read. If they change, the version is loaded again.
        retry_at: a time on the clock of ``time.monotonic``. After this time, the version is loaded again even if its
            files have not changed.
    """

    name: str
    version: int
    reason: str
    files: FileStamps = ()
    retry_at: float = math.inf

    @property
    def label(self) -> str:
        """The version as ``name@version``, or the path if ``version`` is 0."""
        return f"{self.name}@{self.version}" if self.version else self.name

    @property
    def message(self) -> str:
        """The reason for an error message. It names the version; the reason of another failure names its file."""
        return f"{self.label}: {self.reason}" if self.version else self.reason

    def log(self) -> None:
        """Log the failure as an error."""
        log.error("%s is not served: %s", self.label, self.reason)


@dataclass(frozen=True)
class PreparedModel:
    """A verified version whose predictor is warmed up. The version has no engine yet.

    Attributes:
        bytes: size of the weights in memory.
        files: ``file_stamps`` of the version when its files were read.
    """

    card: Card
    task: Task[Any]
    predictor: Any
    bytes: int
    files: FileStamps

    @classmethod
    def load(cls, settings: Settings, device: torch.device, name: str, number: int) -> PreparedModel:
        """Read a version, verify it, and warm up its predictor. Any exception of these steps is raised."""
        files = file_stamps(settings.store, name, number)
        version = Store(settings.store).read(name, number)
        task = TASKS[version.card.task]
        predictor = task.load(version, device, **{option: getattr(settings, option) for option in task.options})
        predictor.warm_up(max_rows(settings, task))
        return cls(version.card, task, predictor, weights_size(settings.store, version.card), files)


PreparedModels = dict[VersionKey, PreparedModel]


@dataclass
class Loader:
    """Loads versions for one process, with the device, the executor and the settings of the process.

    ``prepared`` are versions that the supervisor loaded before it forked this process. Each of them is used at most
    once.
    """

    settings: Settings
    observers: ObserverFactory
    executor: Executor
    device: torch.device
    prepared: PreparedModels = field(default_factory=dict)

    def load(self, name: str, number: int, in_background: bool = False) -> Model | LoadFailure:
        """Load a version, verify it and warm it up. Returns a failure if one of these steps fails. Never raises.

        ``in_background`` lowers the priority of this thread permanently, so that requests for other versions are not
        delayed.
        """
        if in_background and sys.platform == "linux":  # on other systems, a thread has no priority of its own
            thread = threading.get_native_id()
            niceness = max(BACKGROUND_NICENESS, os.getpriority(os.PRIO_PROCESS, thread))  # only root may lower niceness
            with contextlib.suppress(OSError):  # the system may forbid it, for example by a seccomp filter
                os.setpriority(os.PRIO_PROCESS, thread, niceness)
        files = file_stamps(self.settings.store, name, number)
        try:
            prepared = self.prepared.pop((name, number), None)
            if prepared is None or prepared.files != files:
                prepared = PreparedModel.load(self.settings, self.device, name, number)
            return self._loaded_model(prepared)
        except Exception as error:  # one damaged version must not keep others from serving
            reason = str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
            retry_at = time.monotonic() + RETRY_SECONDS if _is_transient(error) else math.inf
            return LoadFailure(name, number, reason, files, retry_at)

    def _loaded_model(self, prepared: PreparedModel) -> Model:
        card, task, predictor, size = prepared.card, prepared.task, prepared.predictor, prepared.bytes
        if task.engine == "text":
            predictor.max_prompt_seconds = self.settings.max_prompt_seconds
            observer = self.observers.for_version(card.name, card.version)
            rows, queue = max_rows(self.settings, task), self.settings.queue_rows
            engine = TextEngine(_label(card), predictor.step, predictor.seconds, self.executor, observer, rows, queue)
            return Model(card, predictor, engine, bytes=size)
        splitter = predictor if task.splits else None
        batcher = self._batcher(card, predictor, predictor.predict, predictor.seconds, splitter)
        explainer = tensors = None
        if runner := getattr(predictor, "tensors", None):
            tensors = self._batcher(card, runner, runner.predict, runner.seconds, runner)
        if task.explains and hasattr(predictor, "explain"):  # imported networks have no heat maps
            explainer = self._batcher(card, predictor, predictor.explain, predictor.explain_seconds)
        return Model(card, predictor, batcher, explainer, tensors, size)

    def _batcher(
        self,
        card: Card,
        predictor: BatchPredictor,
        compute: Callable[..., Any],
        seconds: Callable[..., float],
        splitter: SplittingPredictor | None = None,
    ) -> Batcher[Any, Any]:
        return Batcher(
            _label(card),
            compute,
            predictor.rows,
            seconds,
            self.executor,
            self.observers.for_version(card.name, card.version),
            batch_rows=self.settings.batch_rows,
            queue_rows=self.settings.queue_rows,
            splitter=splitter,
        )


def max_rows(settings: Settings, task: Task[Any]) -> int:
    """Return the maximum number of rows in a batch of a task."""
    return settings.max_running_texts if task.engine == "text" else settings.batch_rows


def _is_transient(error: Exception) -> bool:
    """Return whether loading may succeed later, because memory or a file may be unavailable only for a moment."""
    return any(
        is_out_of_memory(cause) or (isinstance(cause, OSError) and not isinstance(cause, PERMANENT_ERRORS))
        for cause in (error, error.__cause__)
    )


def file_stamps(folder: Path, name: str, number: int) -> FileStamps:
    """Return the sizes of a version's card and weights, and the times when their content and their inode changed.

    A change of the permissions changes only the inode. A missing file is left out.
    """
    stamps = []
    for file in (CARD, WEIGHTS):
        with contextlib.suppress(OSError):
            stat = (folder / name / str(number) / file).stat()
            stamps.append((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(stamps)


def _label(card: Card) -> str:
    """Return the name of a version's engine for error messages."""
    return f"{card.name}@{card.version}"


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
