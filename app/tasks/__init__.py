"""The tasks of the service, such as classifying images, and the predictors that run networks for them.

A predictor turns the input of a request into tensors, and the output of a network into results. ``TASKS`` lists all
tasks. The API, the deployments and the training programs read this table instead of keeping separate lists. ``KINDS``
in ``app.networks`` assigns each kind of network to a task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, cast

import torch

from app.networks import is_imported
from app.store import StoreError, TaskName
from app.store.version import Version
from app.tasks.classification import ImageClassifier
from app.tasks.forecasting import AnyForecaster, load_forecaster
from app.tasks.image_generation import ImageSampler
from app.tasks.imported.classification import ImportedClassifier
from app.tasks.imported.tensors import TensorPredictor
from app.tasks.predictor import Predictor
from app.tasks.text_generation import TextGenerator

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
    """

    name: TaskName
    predictor: Callable[..., P]
    engine: Literal["batch", "text"]
    unit: str
    paths: tuple[str, ...]
    options: tuple[str, ...] = ()

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


CLASSIFY = Task("classify", ImageClassifier, "batch", "image", ("/v1/images/classify",), ("tta",))
CONTINUE = Task("continue", TextGenerator, "text", "character", ("/v1/text/continue", "/v1/completions"))
FORECAST: Task[AnyForecaster] = Task(
    "forecast", load_forecaster, "batch", "forecast", ("/v1/series/forecast", "/v1/timeseries/forecast")
)
SAMPLE = Task("sample", ImageSampler, "batch", "image", ("/v1/images/sample", "/v1/images/generations"))

INFER = Task("infer", TensorPredictor, "batch", "row", ())  # requests consist of tensors, under /v2

IMPORTED: dict[TaskName, Callable[..., Predictor]] = {  # predictors of imported networks
    "classify": ImportedClassifier,
    "infer": TensorPredictor,
}
TASKS: dict[TaskName, Task[Any]] = {task.name: task for task in (CLASSIFY, CONTINUE, FORECAST, SAMPLE, INFER)}


def check_loading(version: Version) -> None:
    """Check that the service can load a version, without computing anything. Raises StoreError if it cannot."""
    try:
        TASKS[version.card.task].load(version, torch.device("cpu"))
    except StoreError:
        raise
    except Exception as error:  # a wrong card can cause exceptions of many classes
        raise StoreError(f"{version.label}: {type(error).__name__}: {error}") from error
