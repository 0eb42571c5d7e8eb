"""Response schemas of the service's own endpoints, including ``/v1/models`` and ``/health``, for the OpenAPI document.

The endpoints do not use these classes to build their responses. Tests validate real responses against the classes.
"""

from __future__ import annotations

from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, RootModel
from starlette.responses import Response

from app.api.openapi import BINARY, RETRY_AFTER, json_content
from app.serving.model import Model
from app.store import Card, TaskName, TensorSpec

MIN_LOG_PROBABILITY = -9999.0  # for an impossible character, as in vLLM, because JSON has no minus infinity


class ResponseModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Prediction(ResponseModel):
    label: str
    index: int = Field(description="index of the label in the model's list of labels, from 0")
    probability: float
    selected: bool | None = Field(
        None,
        description="only for models that can assign several labels to an image: whether the probability of the label "
        "reaches the label's threshold. For these models, the probability does not depend on the other labels.",
    )


class ImageResult(ResponseModel):
    filename: str | None = Field(description="name of the file in the form, or null if the body is not a form")
    predictions: list[Prediction] = Field(description="the `top_k` most probable labels, most probable first")
    explanation: str | None = Field(
        None, description="only with `explain`: the image with a heat map over it, as a PNG file in base64"
    )


class ClassifyResponse(ResponseModel):
    model: str
    version: int
    results: list[ImageResult] = Field(description="one result for each image, in the order of the request")


class TextResult(ResponseModel):
    text: str = Field(description="the continuation, without the prompt")
    finish_reason: Literal["length", "stop"] = Field(
        description="`length` if `max_characters` was reached, or `stop` if a stop string was found"
    )
    seed: int


class TextResponse(ResponseModel):
    model: str
    version: int
    results: list[TextResult] = Field(description="the `n` continuations")
    unknown_characters: list[str] = Field(description="characters of the prompt that the model does not know")


class Interval(ResponseModel):
    lower: list[float]
    upper: list[float]


class SeriesForecast(ResponseModel):
    mean: list[float] = Field(description="mean of the forecast at each of the `horizon` steps")
    median: list[float]
    intervals: dict[str, Interval] = Field(description="prediction intervals by level in per cent, such as `80`")
    seasonality: int | None = Field(description="values per season, or null if the model does not use seasons")


class ForecastResponse(ResponseModel):
    model: str
    version: int
    results: list[SeriesForecast] = Field(description="one forecast for each series, in the order of the request")


class GeneratedImage(ResponseModel):
    label: str | None = Field(description="null for models without labels")
    image: str = Field(description="PNG file in base64")


class ImagesResponse(ResponseModel):
    model: str
    version: int
    seed: int
    results: list[GeneratedImage]


class FailedVersion(ResponseModel):
    version: int
    reason: str


class Canary(ResponseModel):
    version: int
    share: float = Field(description="share of the requests without a version number, in per cent")


class UnavailableModel(ResponseModel):
    """A model without a version that can be served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: Literal["failed", "unloaded"]
    failed: list[FailedVersion]


class ServedModel(ResponseModel):
    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time in seconds")
    owned_by: str
    state: Literal["ready"]
    task: TaskName
    title: str
    version: int = Field(description="the version that these fields describe")
    versions: list[int] = Field(description="versions that requests may ask for")
    active: int | None = Field(description="the version for requests without a version number")
    canary: Canary | None
    previous: int | None = Field(description="the version that a rollback activates")
    retired: list[int]
    loaded: list[int] = Field(description="versions in memory")
    default: bool = Field(description="whether this is the default model of its task, for requests without a model")
    device: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    labels: list[str] | None
    pictures: list[str] = Field(description="names of the picture files, for `/v1/models/{name}/pictures/{file}`")
    failed: list[FailedVersion] = Field(description="versions that could not be loaded")
    card: Card


class ModelEntry(RootModel[ServedModel | UnavailableModel]):
    pass


class ModelList(ResponseModel):
    object: Literal["list"]
    data: list[ModelEntry]


class LiveStatus(ResponseModel):
    live: bool
    seconds_since_progress: float = Field(
        description="seconds since the compute thread started its current job; 0 if it is idle"
    )


class FailedModel(ResponseModel):
    model: str
    version: int
    reason: str


class ReadyStatus(ResponseModel):
    ready: bool
    problems: list[str]
    models: list[str] = Field(description="versions in memory, as `name@version`")
    failed: list[FailedModel] = Field(description="versions that could not be loaded")


class ErrorDetail(ResponseModel):
    message: str
    type: str
    param: str | None = Field(description="the field that is wrong, if there is one")
    code: str = Field(description="the kind of error, for programs")


class ErrorBody(ResponseModel):
    error: ErrorDetail


def error_responses(model: type[BaseModel], bad_request: str) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of an endpoint that runs a model, for the OpenAPI document.

    ``bad_request`` describes the statuses from 400 to 499.
    """
    content = json_content(model)
    return {
        "4XX": {"content": content, "description": bad_request},
        429: {
            "content": content,
            "description": "A queue or the memory for requests is full, or the API key has reached its limit.",
            "headers": RETRY_AFTER,
        },
        "5XX": {"content": content, "description": "500: internal error. 504: the deadline has passed."},
        503: {
            "content": content,
            "description": "The model or the service is not ready, or there is too little free memory now.",
            "headers": RETRY_AFTER,
        },
    }


ERROR_RESPONSES = error_responses(
    ErrorBody,
    "400: invalid value. 401: missing or unknown API key. 404: unknown model. 408: the body arrived too slowly. "
    "413: too large.",
)


def with_model(model: Model, **rest: Any) -> dict[str, Any]:
    """Return the fields ``rest`` of a response, together with the name and version of the model."""
    return {"model": model.card.name, "version": model.card.version, **rest}


def success_response(
    model: type[BaseModel], description: str, content: dict[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """Return the argument ``responses`` of a FastAPI route that responds with status 200.

    The response is JSON in the form of the Pydantic class ``model``, or has one of the media types in ``content``.
    """
    return {200: {"content": json_content(model) | (content or {}), "description": description}}


def file_response(media_type: str, description: str) -> dict[int | str, dict[str, Any]]:
    """Return the argument ``responses`` of a FastAPI route that responds with a file.

    The response class of the route must be ``Response``.
    """
    return {200: {"content": {media_type: {"schema": BINARY}}, "description": description}}


def stream_response(description: str) -> dict[str, Any]:
    """Return the ``content`` of a response that may be a stream of server-sent events.

    The schema has no type, because some tools apply it to the whole stream, and other tools apply it to each event.
    """
    return {"text/event-stream": {"schema": {"description": description}}}


def json_response(content: Any) -> Response:
    """Return a JSON response. ``content`` may contain numpy arrays."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
