"""The tasks of the service, such as classifying images, and the predictors that run networks for them.

A predictor turns the input of a request into tensors, and the output of a network into results. ``TASKS`` lists all
tasks. The API, the deployments and the training programs read this table instead of keeping separate lists. ``KINDS``
in ``app.networks`` assigns each kind of network to a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

import torch

from app.networks import is_imported
from app.store import Card, StoreError, TaskName
from app.store.version import Version
from app.tasks.classification import ImageClassifier
from app.tasks.forecasting import AnyForecaster, load_forecaster
from app.tasks.image_generation import ImageSampler
from app.tasks.imported import ImportedClassifier, TensorPredictor
from app.tasks.latency_model import LatencyModel
from app.tasks.text_generation import TextGenerator


class Predictor(Protocol):
    """The methods that all predictors have. A predictor runs one version of a model for a task."""

    card: Card
    latency: LatencyModel  # predicts the seconds of a batch from its number of rows; measured by ``warm_up``

    def prepare(self, job: Any) -> Sequence[Any]:
        """Return the items of a job for the engine. Raises BadValue."""

    def finish(self, job: Any, items: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Return the answer to a job, given its items and one output for each item."""

    def dummy_run(self, rows: int) -> None:
        """Compute a batch of ``rows`` dummy rows."""

    def warm_up(self, rows: int) -> None:
        """Measure the duration of batches of 1 to ``rows`` rows. Some predictors first choose their precision."""


class BatchPredictor(Predictor, Protocol):
    """A predictor that ``Batcher`` runs. One call of ``predict`` computes a batch of items."""

    def predict(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return one result per item."""

    def rows(self, item: Any) -> int:
        """Return the number of batch rows that an item takes."""

    def seconds(self, items: Sequence[Any]) -> float:
        """Return the expected duration of a batch in seconds."""


class ExplainingPredictor(BatchPredictor, Protocol):
    """A predictor that can also explain its predictions."""

    def explain(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return one prediction and one explanation per item."""

    def explain_seconds(self, items: Sequence[Any]) -> float:
        """Return the expected duration of ``explain`` in seconds."""


class SplittingPredictor(BatchPredictor, Protocol):
    """A predictor that can compute a large item in parts. The joined results equal the result of the whole item."""

    def split(self, item: Any, rows: int) -> Sequence[Any]:
        """Split an item into parts of at most ``rows`` rows."""

    def join(self, results: Sequence[Any]) -> Any:
        """Join the results of all parts of an item."""


class TextPredictor(Predictor, Protocol):
    """A predictor that ``TextEngine`` runs. Repeated calls of ``step`` generate texts token by token."""

    max_prompt_seconds: float  # longest time in seconds to read a prompt; infinite by default

    def step(self, texts: Sequence[Any]) -> None:
        """Add one token to each text whose prompt has been read, and read the next part of all other prompts."""

    def seconds(self, texts: Sequence[Any]) -> float:
        """Return the expected duration of a step in seconds."""

    def dummy_texts(self, rows: int, characters: int) -> Sequence[Any]:
        """Return ``rows`` dummy texts for ``step``, each of which takes ``characters`` steps."""


P = TypeVar("P", bound=Predictor)


@dataclass(frozen=True)
class Task(Generic[P]):
    """One task of the service, such as classifying images.

    Attributes:
        name: the value of ``task`` on model cards.
        predictor: function ``(version, device, **options)`` that returns the predictor of a version.
        engine: "batch" for a ``BatchPredictor``, "text" for a ``TextPredictor``.
        unit: the unit of the throughput on a card, such as "image".
        paths: the HTTP paths that serve only this task.
        options: names of the settings that ``predictor`` takes as keyword arguments.
        explains: whether the predictor is an ``ExplainingPredictor``.
        splits: whether the predictor is a ``SplittingPredictor``.
    """

    name: TaskName
    predictor: Callable[..., P]
    engine: Literal["batch", "text"]
    unit: str
    paths: tuple[str, ...]
    options: tuple[str, ...] = ()
    explains: bool = False
    splits: bool = False

    def load(self, version: Version, device: torch.device, **options: Any) -> P:
        """Return the predictor of a version.

        For an imported network, ``options`` are ignored. Raises StoreError if it is for a task that it cannot serve.
        """
        if is_imported(version.card.kind):
            if self.name not in IMPORTED:
                allowed = ", ".join(IMPORTED)
                raise StoreError(
                    f"{version.label}: an imported network is for the task {self.name!r}, not for {allowed}"
                )
            return cast(P, IMPORTED[self.name](version, device))
        return self.predictor(version, device, **options)


CLASSIFY = Task("classify", ImageClassifier, "batch", "image", ("/v1/images/classify",), ("tta",), explains=True)
GENERATE_TEXT = Task("continue", TextGenerator, "text", "character", ("/v1/text/continue", "/v1/completions"))
FORECAST: Task[AnyForecaster] = Task(
    "forecast", load_forecaster, "batch", "forecast", ("/v1/series/forecast", "/v1/timeseries/forecast")
)
GENERATE_IMAGES = Task(
    "sample", ImageSampler, "batch", "image", ("/v1/images/sample", "/v1/images/generations"), splits=True
)

INFER = Task("infer", TensorPredictor, "batch", "row", (), splits=True)  # requests consist of tensors, under /v2

IMPORTED: dict[TaskName, Callable[..., Predictor]] = {  # predictors of imported networks
    "classify": ImportedClassifier,
    "infer": TensorPredictor,
}
TASKS: dict[TaskName, Task[Any]] = {
    task.name: task for task in (CLASSIFY, GENERATE_TEXT, FORECAST, GENERATE_IMAGES, INFER)
}


def check_loading(version: Version) -> None:
    """Check that the service can load a version, without computing anything. Raises StoreError if it cannot."""
    try:
        TASKS[version.card.task].load(version, torch.device("cpu"))
    except StoreError:
        raise
    except Exception as error:  # a wrong card can cause exceptions of many classes
        raise StoreError(f"{version.label}: {type(error).__name__}: {error}") from error
