"""What is served: the models, their versions and cards."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from app.api.request import json_response
from app.api.responses import ERROR_RESPONSES
from app.api.routes.page import cached_response
from app.errors import NotFound, quote_value
from app.serving.model_cache import VersionState
from app.serving.registry import Registry

PictureName = Annotated[str, Path(examples=["curves.png"])]
PICTURE: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}, "description": "the picture"}}


def router(registry: Registry) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["models"], responses={"4XX": ERROR_RESPONSES["4XX"]})

    @routes.get("/models")
    async def list_models() -> Response:
        """All models: task, versions, card, inputs, labels, state, and what is broken and why."""
        return json_response({"object": "list", "data": [_model(registry, name) for name in _names(registry)]})

    @routes.get("/models/{name}")
    async def show_model(name: str) -> Response:
        """One model, by `name` or `name@version`."""
        if name in _names(registry):
            return json_response(_model(registry, name))
        return json_response(_model(registry, *registry.resolve_name(name, param="name")))

    @routes.get("/models/{name}/pictures/{file}", response_class=Response, responses=PICTURE)
    async def show_picture(request: Request, name: str, file: PictureName) -> Response:
        """A picture of a model's training: `curves.png` and others, as its `pictures` list them."""
        found, number = registry.resolve_name(name, param="name")
        card = registry.card(found, number)
        there = registry.pictures(card) if card else {}
        if card is None or file not in there:  # the caller's name is looked up and never part of a path
            known = ", ".join(there) or "none"
            raise NotFound(f"{found}@{number} has no picture {quote_value(file)}; there are: {known}", "file")
        content = await asyncio.to_thread(there[file].read_bytes)
        return cached_response(request, content, "image/png", f"{card.weights_sha256[:16]}-{file}")

    return routes


def _names(registry: Registry) -> list[str]:
    return sorted({*registry.version_sets, *(entry.name for entry in registry.failures if entry.version)})


def _model(registry: Registry, name: str, number: int | None = None) -> dict[str, Any]:
    """OpenAI's keys of a model, and ours."""
    broken = [{"version": entry.version, "reason": entry.reason} for entry in registry.failures if entry.name == name]
    card, shelf = registry.card(name, number), registry.version_sets.get(name)
    if card is None or shelf is None:
        state = "unloaded" if shelf and shelf.unloaded else "broken"
        return {"id": name, "object": "model", "created": 0, "owned_by": "quartet", "state": state, "broken": broken}
    return {
        "id": name,
        "object": "model",
        "created": int(datetime.fromisoformat(card.created).timestamp()),
        "owned_by": "quartet",
        "state": "ready",
        "task": card.task,
        "title": card.title,
        "version": card.version,
        "versions": list(shelf.numbers),
        "active": shelf.active,
        "canary": {"version": shelf.canary, "share": shelf.share} if shelf.canary else None,
        "previous": shelf.previous,
        "retired": list(shelf.retired),
        "loaded": [number for number in shelf.numbers if registry.state(name, number) is VersionState.READY],
        "default": registry.defaults.get(card.task) == name,
        "device": str(registry.device),
        "inputs": [spec.model_dump() for spec in card.inputs],
        "outputs": [spec.model_dump() for spec in card.outputs],
        "labels": card.labels,
        "pictures": sorted(registry.pictures(card)),
        "broken": broken,
        "card": card.model_dump(),
    }
