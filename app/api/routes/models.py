"""The models that are served, with their versions, cards and pictures."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from app.api.responses import ERROR_RESPONSES, ModelEntry, ModelList, file_response, json_response, success_response
from app.api.routes.page import cached_response
from app.errors import NotFound, quote_value
from app.serving.models import Models
from app.serving.plan import State

VersionName = Annotated[str, Path(description="`name` or `name@version`", examples=["sine-lstm"])]
PictureName = Annotated[str, Path(description="a file name from the model's `pictures`", examples=["curves.png"])]


def router(models: Models) -> APIRouter:
    """Return the routes under ``/v1/models``."""
    routes = APIRouter(prefix="/v1", tags=["Models"], responses={"4XX": ERROR_RESPONSES["4XX"]})

    @routes.get(
        "/models",
        operation_id="list_models",
        summary="List models",
        responses=success_response(ModelList, description="All models"),
    )
    async def list_models() -> Response:
        """List all models with their tasks, versions, states, inputs, labels and model cards, and all load failures."""
        return json_response({"object": "list", "data": [_model(models, name) for name in _names(models)]})

    @routes.get(
        "/models/{name}",
        operation_id="get_model",
        summary="Get a model",
        responses=success_response(ModelEntry, description="The model"),
    )
    async def show_model(name: VersionName) -> Response:
        """Get one model, or one version of a model."""
        if name in _names(models):
            return json_response(_model(models, name))
        return json_response(_model(models, *models.resolve_name(name, param="name")))

    @routes.get(
        "/models/{name}/pictures/{file}",
        operation_id="get_model_picture",
        summary="Get a picture of a model's training",
        response_class=Response,
        responses=file_response("image/png", "The picture"),
    )
    async def show_picture(request: Request, name: VersionName, file: PictureName) -> Response:
        """Get a picture of a model's training, such as its learning curves."""
        model_name, number = models.resolve_name(name, param="name")
        if "@" not in name:  # show_model lists the pictures of the active version, not those of the canary
            number = models.version_sets[model_name].active or number
        stored = models.entry(model_name, number).stored
        card, pictures = stored.card, stored.pictures
        if card is None or file not in pictures:  # the name is only looked up, never used as a path
            known = ", ".join(pictures) or "none"
            raise NotFound(f"{model_name}@{number} has no picture {quote_value(file)}; pictures: {known}", "file")
        content = await models.read_picture(card, file)
        return cached_response(request, content, "image/png", hashlib.sha256(content).hexdigest()[:32])

    return routes


def _names(models: Models) -> list[str]:
    return sorted({*models.version_sets, *(entry.name for entry in models.failures if entry.version)})


def _model(models: Models, name: str, number: int | None = None) -> dict[str, Any]:
    """Return the description of a model or of one of its versions. It extends the model object of OpenAI's API."""
    failed = [{"version": entry.version, "reason": entry.reason} for entry in models.failures if entry.name == name]
    card, versions = models.card(name, number), models.version_sets.get(name)
    if card is None or versions is None:
        state = "unloaded" if versions and versions.unloaded else "failed"
        return {"id": name, "object": "model", "created": 0, "owned_by": "quartet", "state": state, "failed": failed}
    return {
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
        "canary": {"version": versions.canary, "share": versions.share} if versions.canary else None,
        "previous": versions.previous,
        "retired": list(versions.retired),
        "loaded": [number for number in versions.numbers if models.entry(name, number).state is State.READY],
        "default": models.defaults.get(card.task) == name,
        "device": str(models.device),
        "inputs": [spec.model_dump() for spec in card.inputs],
        "outputs": [spec.model_dump() for spec in card.outputs],
        "labels": card.labels,
        "pictures": list(models.entry(name, card.version).stored.pictures),
        "failed": failed,
        "card": card.model_dump(),
    }
