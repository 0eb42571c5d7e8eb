"""The paths of the Open Inference Protocol that name a model, with its version or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from app.api.inference import resolve_model
from app.engine.observer import VersionKey
from app.errors import BadValue, NotReady, UnknownModel, UnloadedModel, quote_value
from app.observability.middleware import REQUEST_ID
from app.serving.loader import LoadedModel
from app.serving.registry import Registry
from app.tasks import TASKS

Endpoint = Callable[..., Any]
SeriesModel = Annotated[str, Path(description="`name` or `name@version`", examples=["sine-lstm"])]
OptionalModel = Annotated[  # one that serves no task by default, so that it may be unloaded
    str, Path(description="a model's name", examples=["mnist-gan"])
]
TextModel = Annotated[str, Path(description="`name` or `name@version`", examples=["shakespeare-rnn"])]


def add_routes(routes: APIRouter, method: str, path: str, **more: Any) -> Callable[[Endpoint], Endpoint]:
    """A decorator for an endpoint of a model: ``/models/{name}`` and the path, and the same of one version."""

    def add(endpoint: Endpoint) -> Endpoint:
        versioned = f"/models/{{name}}/versions/{{version}}{path}"
        routes.add_api_route(f"/models/{{name}}{path}", endpoint, methods=[method], **more)
        routes.add_api_route(versioned, endpoint, methods=[method], include_in_schema=False)
        return endpoint

    return add


async def model_in_path(registry: Registry, request: Request, name: str, until: float) -> LoadedModel:
    """The version that a path means; one that is not in memory is waited for.

    Raises BadValue, UnknownModel, RetiredModel, UnloadedModel, TimedOut, and NotReady for a model that is broken.
    """
    try:
        found, number = version_in_path(registry, request, name)
    except UnloadedModel:
        await registry.recheck(name.partition("@")[0])  # another process may just have been told to load it
        found, number = version_in_path(registry, request, name)
    card = registry.card(found, number)
    if card is None:  # removed a moment ago
        raise UnknownModel(name, registry.version_sets, "name")
    return await resolve_model(request, registry, TASKS[card.task], f"{found}@{number}", until)


def version_in_path(registry: Registry, request: Request, name: str) -> VersionKey:
    """The name and number that a path means, in memory or not. Raises as ``asked`` does, but not TimedOut."""
    version = request.path_params.get("version")
    if version is None:
        if name not in registry.version_sets and (
            reasons := [entry.reason for entry in registry.failures if entry.name == name]
        ):
            raise NotReady(f"model {quote_value(name)} is not whole: {'; '.join(reasons)}")
        return registry.resolve_name(name, request.scope.get(REQUEST_ID, ""), "name")
    if not (version.isascii() and version.isdigit()):
        raise BadValue(f"version is {quote_value(version)}; it should be a number", "version")
    return registry.resolve_name(f"{name}@{version}", param="version")
