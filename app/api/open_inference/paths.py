"""Find the model in the path of a request, and describe such paths for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict

from app.api.deadline import DEADLINE
from app.api.inference import resolve
from app.api.operation import Request
from app.api.responses import BAD_REQUESTS, error_responses
from app.engine.observer import VersionKey
from app.errors import BadValue, NotReady, UnknownModel, UnloadedModel, quote_value
from app.observability.middleware import REQUEST_ID
from app.serving.model import Model
from app.store import Card
from app.tasks import TASKS

TAG = "Open Inference Protocol"


class InferenceError(TypedDict):
    """The body of every error response under /v2."""

    error: str


FAILURES = error_responses(InferenceError, f"{BAD_REQUESTS} 413: too large.")


def model_path(example: str) -> dict[str, tuple[str, str]]:
    """Return the description of a path with the name of a model."""
    return {"name": ("`name` or `name@version`", example)}


async def model_in_path(request: Request, name: str | None = None) -> Model[Any]:
    """Return the model version in the path of a request. Waits for a version that is still being loaded.

    ``name`` replaces the name in the path. Raises as ``card_in_path`` does, and if the version cannot be loaded.
    """
    card = await card_in_path(request, name)
    return await resolve(request, TASKS[card.task], f"{card.name}@{card.version}")


async def card_in_path(request: Request, name: str | None = None) -> Card:
    """Return the card of the model version in the path of a request, without loading the version.

    Raises:
        UnknownModel, RetiredModel, UnloadedModel: the version is not served.
        BadValue: the version is not a number.
        NotReady: the model cannot be served.
        TimedOut: the deadline passed.
    """
    name = name or request.path_params["name"]
    try:
        key = _version_in_path(request, name)
    except UnloadedModel:
        # another process may have just loaded the model
        await request.models.recheck(name.partition("@")[0], request.scope[DEADLINE])
        key = _version_in_path(request, name)
    card = request.models.card(*key)
    if card is None:  # the version was just removed
        raise UnknownModel(name, request.models.served_names(), "name")
    return card


def _version_in_path(request: Request, name: str) -> VersionKey:
    """Return the model name and the version number for the path of a request. Raises as ``card_in_path`` does."""
    models, version = request.models, request.path_params.get("version")
    if version is None:
        version_set = models.version_sets.get(name)
        usable = version_set is not None and (version_set.numbers or version_set.unloaded)
        if not usable and (reasons := [entry.reason for entry in models.failures if entry.name == name]):
            raise NotReady(f"model {quote_value(name)} cannot be served: {'; '.join(reasons)}")
        return models.resolve_name(name, request.scope.get(REQUEST_ID, ""), "name")
    if not (version.isascii() and version.isdigit()):
        raise BadValue(f"version is {quote_value(version)}; it should be a number", "version")
    return models.resolve_name(f"{name}@{version}", param="version")
