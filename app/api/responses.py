"""The shapes of the answers, for the OpenAPI document. A test holds every answer against them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from app.serving.loader import LoadedModel

NEVER = -9999.0  # the log-probability of what cannot be, as vLLM has it: JSON has no minus infinity


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Prediction(Answer):
    label: str
    index: int
    probability: float


class Classified(Answer):
    filename: str | None
    predictions: list[Prediction]
    explanation: str | None = None


class Classification(Answer):
    model: str
    version: int
    results: list[Classified]


class Continued(Answer):
    text: str
    finish_reason: Literal["length", "stop"]
    seed: int


class Continuations(Answer):
    model: str
    version: int
    results: list[Continued]
    unknown_characters: list[str]


class Interval(Answer):
    lower: list[float]
    upper: list[float]


class Forecast(Answer):
    mean: list[float]
    median: list[float]
    intervals: dict[str, Interval]
    seasonality: int | None


class Forecasts(Answer):
    model: str
    version: int
    results: list[Forecast]


class Sample(Answer):
    label: str | None
    image: str


class Samples(Answer):
    model: str
    version: int
    seed: int
    results: list[Sample]


class Failure(Answer):
    message: str
    type: str
    param: str | None
    code: str


class Failed(Answer):
    error: Failure


FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": Failed,
        "description": "400 a bad value, 401 no key, 404 an unknown model, 413 too large, 415 not an image, "
        "429 a full queue or a limit reached",
    },
    "5XX": {"model": Failed, "description": "503 not ready, 504 the deadline passed"},
}


def answered(live: LoadedModel, **rest: Any) -> dict[str, Any]:
    """An answer, and who gave it."""
    return {"model": live.card.name, "version": live.card.version, **rest}


def gives(model: type[BaseModel], content: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """What a good answer looks like, for OpenAPI."""
    return {200: {"model": model, "content": content or {}}}
