"""The shapes of the answers, for the OpenAPI document. A test holds every answer against them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from app.serving.loader import LoadedModel

MIN_LOG_PROBABILITY = -9999.0  # the log-probability of what cannot be, as vLLM has it: JSON has no minus infinity


class ResponseModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Prediction(ResponseModel):
    label: str
    index: int
    probability: float


class ImageResult(ResponseModel):
    filename: str | None
    predictions: list[Prediction]
    explanation: str | None = None


class ClassifyResponse(ResponseModel):
    model: str
    version: int
    results: list[ImageResult]


class TextResult(ResponseModel):
    text: str
    finish_reason: Literal["length", "stop"]
    seed: int


class TextResponse(ResponseModel):
    model: str
    version: int
    results: list[TextResult]
    unknown_characters: list[str]


class Interval(ResponseModel):
    lower: list[float]
    upper: list[float]


class SeriesForecast(ResponseModel):
    mean: list[float]
    median: list[float]
    intervals: dict[str, Interval]
    seasonality: int | None


class ForecastResponse(ResponseModel):
    model: str
    version: int
    results: list[SeriesForecast]


class GeneratedImage(ResponseModel):
    label: str | None
    image: str


class ImagesResponse(ResponseModel):
    model: str
    version: int
    seed: int
    results: list[GeneratedImage]


class ErrorDetail(ResponseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(ResponseModel):
    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": ErrorBody,
        "description": "400 a bad value, 401 no key, 404 an unknown model, 413 too large, 415 not an image, "
        "429 a full queue or a limit reached",
    },
    "5XX": {"model": ErrorBody, "description": "503 not ready, 504 the deadline passed"},
}


def with_model(live: LoadedModel, **rest: Any) -> dict[str, Any]:
    """An answer, and who gave it."""
    return {"model": live.card.name, "version": live.card.version, **rest}


def success_response(model: type[BaseModel], content: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """What a good answer looks like, for OpenAPI."""
    return {200: {"model": model, "content": content or {}}}
