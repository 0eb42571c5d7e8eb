"""The models that are served, with their versions, cards and pictures."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Literal, NotRequired, cast

from pydantic import RootModel
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.openapi import BINARY, DESCRIBED
from app.api.operation import Operation, Request
from app.api.responses import ERROR_RESPONSES, json_response
from app.api.routes.feedback import feedback
from app.api.routes.page import cached_response
from app.errors import NotFound, TimedOut, quote_value
from app.records.database import FeedbackFigure
from app.serving.models import Models
from app.serving.plan import State
from app.store import Card, TaskName, TensorSpec

TAG = "Models"
FAILURES = {"4XX": ERROR_RESPONSES["4XX"]}


class FailedVersion(TypedDict):
    version: int
    reason: str


class Canary(TypedDict):
    version: int
    share: float
    """share of the requests without a version number, in per cent"""


class Shadow(TypedDict):
    version: int
    share: float
    """share of the captured requests of which the version gets copies, in per cent"""


class UnavailableModel(TypedDict):
    """A model without a version that can be served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: Literal["failed", "unloaded"]
    failed: list[FailedVersion]


class ServedModel(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    """Unix time in seconds"""
    owned_by: str
    state: Literal["ready"]
    task: TaskName
    title: str
    version: int
    """the version that these fields describe"""
    versions: list[int]
    """versions that requests may ask for"""
    active: int | None
    """the version for requests without a version number"""
    canary: Canary | None
    shadow: Shadow | None
    previous: int | None
    """the version that a rollback activates"""
    retired: list[int]
    loaded: list[int]
    """versions in memory"""
    default: bool
    """whether this is the default model of its task, for requests without a model"""
    device: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    labels: list[str] | None
    pictures: list[str]
    """names of the picture files, for `/v1/models/{name}/pictures/{file}`"""
    failed: list[FailedVersion]
    """versions that could not be loaded"""
    card: Card
    feedback: NotRequired[list[FeedbackFigure]]
    """figures of the version, if there is feedback on its answers"""


class ModelEntry(RootModel[ServedModel | UnavailableModel]):
    model_config = DESCRIBED


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelEntry]


async def list_models(request: Request) -> Response:
    """List all models with their tasks, versions, states, inputs, labels and model cards, and all load failures."""
    models, figures = request.models, feedback(request)
    return json_response({"object": "list", "data": [_model(models, figures, name) for name in _names(models)]})


async def get_model(request: Request) -> Response:
    """Get one model, or one version of a model."""
    models, name, figures = request.models, request.path_params["name"], feedback(request)
    if name in _names(models):
        return json_response(_model(models, figures, name))
    return json_response(_model(models, figures, *models.resolve_name(name, param="name")))


async def get_model_picture(request: Request) -> Response:
    """Get a picture of a model's training, such as its learning curves."""
    models, name, file = request.models, request.path_params["name"], request.path_params["file"]
    model_name, number = models.resolve_name(name, param="name")
    if "@" not in name:  # ``get_model`` lists the pictures of the active version, not those of the canary
        number = models.version_sets[model_name].active or number
    pictures = models.entry(model_name, number).stored.pictures
    if file not in pictures:  # the name is only looked up, never used as a path
        known = ", ".join(pictures) or "none"
        raise NotFound(f"{model_name}@{number} has no picture {quote_value(file)}; pictures: {known}", "file")
    try:
        async with asyncio.timeout(request.settings.request_seconds):
            content = await models.disk.run(models.store.disk.read, models.store.path(model_name, number) / file)
    except TimeoutError:
        raise TimedOut("the deadline passed before the store answered") from None
    except OSError as error:  # for example because it was just removed
        raise NotFound(f"{file} cannot be read: {error.strerror}", "file") from None
    return cached_response(request, content, "image/png", hashlib.sha256(content).hexdigest()[:32])


def _names(models: Models) -> list[str]:
    return sorted({*models.version_sets, *(entry.name for entry in models.failures if entry.version)})


def _model(
    models: Models, figures: Sequence[FeedbackFigure], name: str, number: int | None = None
) -> ServedModel | UnavailableModel:
    """Return the description of a model or of one of its versions. It extends the model object of OpenAI's API."""
    failed: list[FailedVersion] = [
        {"version": entry.version, "reason": entry.reason} for entry in models.failures if entry.name == name
    ]
    card, versions = models.card(name, number), models.version_sets.get(name)
    if card is None or versions is None:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "quartet",
            "state": "unloaded" if versions and versions.unloaded else "failed",
            "failed": failed,
        }
    model: ServedModel = {
        "id": name,
        "object": "model",
        "created": int(datetime.fromisoformat(card.created).timestamp()),
        "owned_by": "quartet",
        "state": "ready",
        "task": card.task,
        "title": card.title,
        "version": card.version,
        "versions": list(versions.numbers),
        "active": versions.active,
        "canary": cast("Canary", versions.canary.model_dump()) if versions.canary else None,
        "shadow": cast("Shadow", versions.shadow.model_dump()) if versions.shadow else None,
        "previous": versions.previous,
        "retired": list(versions.retired),
        "loaded": [number for number in versions.numbers if models.entry(name, number).state is State.READY],
        "default": models.defaults.get(card.task) == name,
        "device": str(models.device),
        "inputs": card.inputs,
        "outputs": card.outputs,
        "labels": card.labels,
        "pictures": list(models.entry(name, card.version).stored.pictures),
        "failed": failed,
        "card": card,
    }
    if own := [figure for figure in figures if (figure["model"], figure["version"]) == (name, card.version)]:
        model["feedback"] = own
    return model


_NAME = {"name": ("`name` or `name@version`", "sine-lstm")}
OPERATIONS = [
    Operation("GET", "/v1/models", list_models, TAG, "List models", ModelList, "All models", errors=FAILURES),
    Operation(
        "GET", "/v1/models/{name}", get_model, TAG, "Get a model", ModelEntry, "The model",
        parameters=_NAME, errors=FAILURES,
    ),
    Operation(
        "GET",
        "/v1/models/{name}/pictures/{file}",
        get_model_picture,
        TAG,
        "Get a picture of a model's training",
        None,
        "The picture",
        {"image/png": {"schema": BINARY}},
        parameters={**_NAME, "file": ("a file name from the model's `pictures`", "curves.png")},
        errors=FAILURES,
    ),
]  # fmt: skip
