"""What is captured of a request, and how feedback measures its answer."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field

from app.errors import BadValue, quote_value
from app.store import Card, TaskName
from app.tasks.classification import ClassifyJob
from app.tasks.forecasting import ForecastJob
from app.tasks.image_generation import SampleJob
from app.tasks.job import Job
from app.tasks.text_generation import ContinueJob

# For each kind of job: the fields that are not captured, and a function that returns what is captured of the answer
ANSWERS: Mapping[type[Job], tuple[Sequence[str], Callable[[Any], dict[str, Any]]]] = {
    ClassifyJob: (("pixels",), lambda answer: {"probabilities": answer.probabilities}),
    ContinueJob: ((), lambda answer: {"texts": [text.text for text in answer.texts]}),
    ForecastJob: ((), lambda answer: {"forecasts": [vars(each) for each in answer.forecasts]}),
    SampleJob: (("latents", "classes"), lambda answer: {"labels": answer.labels}),
}
FIELDS = {  # that are captured
    kind: sorted({each.name for each in fields(kind)} - {each.name for each in fields(Job)} - set(omitted))
    for kind, (omitted, _) in ANSWERS.items()
}
Value = Annotated[float, Field(ge=-1e150, le=1e150)]
ENCODING = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS


def _json(content: object) -> str:
    return orjson.dumps(content, np.ndarray.tolist, ENCODING).decode()


def answer_json(job: Job, answer: Any) -> str:
    """Return what is captured of the answer to a job."""
    return _json(ANSWERS[type(job)][1](answer))


@dataclass(frozen=True)
class Captured:
    """A request and its answer. ``key`` is the name of the API key. ``pixels`` are images [channels, side, side]."""

    request: str
    model: str
    version: int
    task: TaskName
    job: str  # JSON
    answer: str  # JSON
    key: str | None = None
    pixels: Sequence[np.ndarray] = ()
    result: ClassVar = "stored"
    time: float = field(default_factory=time.time)

    @staticmethod
    def of(request: str, key: str | None, card: Card, job: Job, answer: Any) -> Captured:
        """Return what is captured of a request. The type of ``job`` must be in ``ANSWERS``."""
        job_text = _json({name: getattr(job, name) for name in FIELDS[type(job)]})
        pixels = [image.numpy() for image in getattr(job, "pixels", ())]
        return Captured(request, card.name, card.version, card.task, job_text, answer_json(job, answer), key, pixels)

    def row(self) -> Sequence[Any]:
        """Return the row of the table of requests."""
        return self.request, self.time, self.key, self.model, self.version, self.task, self.job, self.answer

    def digests(self) -> list[str]:
        """Return the SHA-256 of the shape and the pixels of each image."""
        return [hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest() for image in self.pixels]


@dataclass(frozen=True)
class Measured:
    """One measurement of an item of an answer. ``step`` is that of a forecast, or 0."""

    item: int
    step: int
    name: str
    value: float


@dataclass(frozen=True)
class Compared:
    """The answer of a shadow to a captured request, as JSON, and the measurements of each version."""

    request: str
    model: str
    version: int
    answer: str
    result: ClassVar = "compared"
    measured: Mapping[int, Sequence[Measured]]


class FeedbackRequest(BaseModel):
    """Exactly one of `label`, `values`, `accepted` and `text`, as the task of the request needs."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    request_id: str = Field(max_length=200)
    """the `x-request-id` of the answer"""
    item: int = Field(0, ge=0)
    """which image, text or series of the answer, from 0"""
    label: str | None = Field(None, max_length=1000)
    """the right label of an image"""
    values: list[Value | None] | None = Field(None, min_length=1, max_length=10_000)
    """the actual values of a series, from `first_step` of its forecast; null: not known yet"""
    first_step: int = Field(0, ge=0)
    accepted: bool | None = None
    """whether the text was used as it was"""
    text: str | None = Field(None, max_length=100_000)
    """the corrected text"""

    def steps(self) -> dict[int, Any]:
        """Return what is known about each step."""
        if self.values is not None:
            return {self.first_step + i: value for i, value in enumerate(self.values) if value is not None}
        return {0: next(each for each in (self.label, self.accepted, self.text) if each is not None)}


def measure(captured: Captured, truth: FeedbackRequest, labels: Sequence[str]) -> list[Measured]:
    """Compare an answer with the truth. ``labels`` are those of the model. Raises BadValue if they do not fit."""
    kind, measurements = MEASURES.get(captured.task, ("", None))
    if measurements is None or not any(getattr(truth, name) is not None for name in kind.split(" or ")):
        needed = f"takes {kind}" if kind else "takes no feedback"
        raise BadValue(f"request {captured.request} is for the task {captured.task!r}, which {needed}", "request_id")
    answer = orjson.loads(captured.answer)
    items = next(iter(answer.values()))
    if truth.item >= len(items):
        raise BadValue(f"item is {truth.item}; the answer has {len(items)} items, from 0", "item")
    return list(measurements(items[truth.item], truth, labels, orjson.loads(captured.job)))


def _label(probabilities: Sequence[float], truth: FeedbackRequest, labels: Sequence[str], _: Any) -> Iterator[Measured]:
    """Yield whether the most probable label is right, and its probability, which should be as large on average."""
    if truth.label not in labels:
        raise BadValue(f"label is {quote_value(truth.label)}; the model has {', '.join(labels)}", "label")
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    yield Measured(truth.item, 0, "accuracy", float(labels[best] == truth.label))
    yield Measured(truth.item, 0, "confidence", probabilities[best])


def _values(forecast: Any, truth: FeedbackRequest, _: Any, job: Any) -> Iterator[Measured]:
    """Yield for each value its absolute scaled error (as in MASE), and whether it is inside each interval."""
    median, steps = forecast["median"], truth.steps()
    if steps and max(steps) >= len(median):
        last = max(steps)
        raise BadValue(f"values has one for step {last}; the forecast has {len(median)} steps, from 0", "values")
    scale = _scale(job["series"][truth.item], forecast["seasonality"])
    for step, value in steps.items():
        if scale > 0:
            yield Measured(truth.item, step, "mase", abs(value - median[step]) / scale)
        for level, (lower, upper) in forecast["bounds"].items():
            is_inside = float(lower[step] <= value <= upper[step])
            yield Measured(truth.item, step, f"coverage_{float(level):g}", is_inside)


def _scale(values: Sequence[float | None], seasonality: int | None) -> float:
    """Return the mean absolute difference between a series and itself one season before, or NaN."""
    series, season = np.array(values, dtype=float), seasonality or 1
    differences = np.abs(series[season:] - series[:-season])
    return float(np.nanmean(differences)) if np.isfinite(differences).any() else math.nan


def _text(written: str, truth: FeedbackRequest, *_: Any) -> Iterator[Measured]:
    """Yield whether a text was accepted. A corrected text was accepted only if it equals the answer."""
    yield Measured(
        truth.item, 0, "accepted", float(written == truth.text if truth.accepted is None else truth.accepted)
    )


def compare(job: Job, answer: Any, other: Any) -> Iterator[Measured]:
    """Compare the answer to a job with that of a shadow, ``other``.

    Images have ``agreement``, whether the likeliest labels are the same, and ``difference``, the total variation
    distance of the probabilities. Series have ``difference``, the mean absolute difference of the medians divided by
    the mean absolute change of the series.
    """
    if isinstance(job, ClassifyJob):
        for item, pair in enumerate(zip(answer.probabilities, other.probabilities, strict=True)):
            first, second = map(np.asarray, pair)
            yield Measured(item, 0, "agreement", float(first.argmax() == second.argmax()))
            yield Measured(item, 0, "difference", float(np.abs(first - second).sum() / 2))
    if isinstance(job, ForecastJob):
        for item, (first, second) in enumerate(zip(answer.forecasts, other.forecasts, strict=True)):
            if (scale := _scale(job.series[item], first.seasonality)) > 0:
                yield Measured(item, 0, "difference", float(np.abs(first.median - second.median).mean()) / scale)


MEASURES: Mapping[TaskName, tuple[str, Callable[[Any, FeedbackRequest, Any, Any], Iterable[Measured]]]] = {
    "classify": ("label", _label),
    "forecast": ("values", _values),
    "continue": ("accepted or text", _text),
}
