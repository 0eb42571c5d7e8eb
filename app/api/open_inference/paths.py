"""Add routes whose paths contain a model's name and perhaps a version, and find the model in the path of a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from app.api.inference import resolve_model
from app.engine.observer import VersionKey
from app.errors import BadValue, NotReady, UnknownModel, UnloadedModel, quote_value
from app.observability.middleware import REQUEST_ID
from app.serving.model import Model
from app.serving.models import Models
from app.tasks import TASKS

Endpoint = Callable[..., Any]
ModelPath = Annotated[str, Path(description="`name` or `name@version`", examples=["sine-lstm"])]
UnloadableModelPath = Annotated[  # the example is not the default model of a task, so that it may be unloaded
    str, Path(description="a model's name", examples=["mnist-gan"])
]
TextModelPath = Annotated[str, Path(description="`name` or `name@version`", examples=["shakespeare-rnn"])]


def add_routes(routes: APIRouter, method: str, path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
    """Return a decorator that adds an endpoint at ``/models/{name}`` + ``path``, with and without a version."""

    def add(endpoint: Endpoint) -> Endpoint:
        versioned = f"/models/{{name}}/versions/{{version}}{path}"
        routes.add_api_route(f"/models/{{name}}{path}", endpoint, methods=[method], **options)
        routes.add_api_route(versioned, endpoint, methods=[method], include_in_schema=False)
        return endpoint

    return add


async def model_in_path(models: Models, request: Request, name: str, deadline: float) -> Model:
    """Return the model version in the path of a request. Waits for a version that is still being loaded.

    Raises:
        UnknownModel, RetiredModel, UnloadedModel: the version is not served.
        BadValue: the version is not a number.
        NotReady: the model cannot be served.
        TimedOut: the deadline passed.
    """
    try:
        model_name, number = version_in_path(models, request, name)
    except UnloadedModel:
        await models.recheck(name.partition("@")[0], deadline)  # another process may have just loaded the model
        model_name, number = version_in_path(models, request, name)
    card = models.card(model_name, number)
    if card is None:  # the version was just removed
        raise UnknownModel(name, models.served_names(), "name")
    return await resolve_model(request, models, TASKS[card.task], f"{model_name}@{number}", deadline)


def version_in_path(models: Models, request: Request, name: str) -> VersionKey:
    """Return the model name and the version number for the path of a request. Raises as ``model_in_path`` does."""
    version = request.path_params.get("version")
    if version is None:
        version_set = models.version_sets.get(name)
        usable = version_set is not None and (version_set.numbers or version_set.unloaded)
        if not usable and (reasons := [entry.reason for entry in models.failures if entry.name == name]):
            raise NotReady(f"model {quote_value(name)} cannot be served: {'; '.join(reasons)}")
        return models.resolve_name(name, request.scope.get(REQUEST_ID, ""), "name")
    if not (version.isascii() and version.isdigit()):
        raise BadValue(f"version is {quote_value(version)}; it should be a number", "version")
    return models.resolve_name(f"{name}@{version}", param="version")
