"""Triton's model repository: list versions and their states, load and unload models.

The store records which models are unloaded. Therefore a model stays unloaded in all processes that use the store, and
after a restart. An unloaded model is not loaded on demand. Otherwise any request for the model, even a readiness check,
would load it again.

Other processes apply a change at their next scan of the store. Some requests read the store immediately, so that they
do not use an outdated state: requests for the index, readiness checks of models, and requests for an unloaded model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, RootModel
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.deadline import DEADLINE
from app.api.open_inference.decode import LenientModel
from app.api.open_inference.paths import FAILURES, TAG, InferenceError, model_in_path
from app.api.operation import Operation, Request
from app.api.request_body import read_json
from app.api.responses import error_responses, json_response
from app.api.routes.admin import on_store
from app.errors import BadValue, Conflict, NotEnabled, UnknownModel, quote_value
from app.serving.model import Model
from app.serving.models import Models
from app.serving.plan import Entry, State
from app.store import Store, VersionNotFound
from app.store.rollout import Rollout

ADMIN_FAILURES = error_responses(  # of ``load`` and ``unload``, which change the store
    InferenceError,
    "400: invalid value. 401: missing or unknown admin key. 404: unknown model or version. 408: the body arrived too "
    "slowly. 409: a setting or the state of the store does not allow the request. 413: too large.",
    " 507: the store cannot be read or written.",
)


class IndexRequest(LenientModel):
    ready: bool = False
    """list only versions that are ready"""


class LoadRequest(LenientModel):
    parameters: dict[str, Any] = Field({})
    """`unload_dependents` has no effect, because models do not depend on each other"""


class RepositoryEntry(TypedDict):
    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class RepositoryIndex(RootModel[list[RepositoryEntry]]):
    pass


class ModelLoaded(TypedDict):
    name: str
    version: str
    load: Literal[True]


class ModelUnloaded(TypedDict):
    name: str
    unload: Literal[True]


async def list_repository(request: Request) -> Response:
    """List the states of all versions that are not retired. `reason` says why a version is unavailable."""
    models, body = request.models, await read_json(request, IndexRequest)
    await models.refresh(request.scope[DEADLINE])
    versions = [version for version in models.versions() if version.state is State.READY or not body.ready]
    return json_response([_entry(models, version) for version in versions])


async def refuse(request: Request) -> Response:
    raise NotEnabled(
        "loading and unloading require an admin key, but neither QUARTET_ADMIN_KEY nor QUARTET_ADMIN_KEY_FILE is "
        "set; the models in the store are loaded automatically",
        "name",
    )


async def load_model(request: Request) -> Response:
    """Serve an unloaded model again. The response is sent when the active version is in memory.

    With `name@version`, the service loads this version, and responds when it is in memory.
    """
    name = request.path_params["name"]
    _check((await read_json(request, LoadRequest)).parameters)
    stored = await _change(request, lambda: _load(request.settings.store, name))
    # with a chosen active version, there may be a canary, which the name alone could also mean
    pinned = "@" not in name and stored.active is not None
    load = _active_model if pinned else model_in_path
    card = (await load(request)).card
    return json_response(ModelLoaded(name=card.name, version=str(card.version), load=True))


async def unload_model(request: Request) -> Response:
    """Stop serving a model until it is loaded, or a version is activated. Running requests are still answered.

    The default model of a task cannot be unloaded. In this case, the status is 409.
    """
    name = request.path_params["name"]
    await read_json(request, LoadRequest)
    if "@" in name:
        allowed = "all versions of a model are unloaded together; use `retire` for one version"
        raise BadValue(f"name is {quote_value(name)}; {allowed}", "name")
    await _change(request, lambda: Store(request.settings.store).unload(name))
    return json_response(ModelUnloaded(name=name, unload=True))


async def _change(request: Request, change: Callable[[], Rollout]) -> Rollout:
    """Change the store, and apply the change in this process. Return the result of ``change``.

    Raises Conflict, TimedOut, and errors of ``on_store``.
    """
    if not request.settings.store_poll_seconds:
        raise Conflict("QUARTET_STORE_POLL_SECONDS is 0: this service reads its store only at the start")
    stored = await on_store(request, change)
    await request.models.refresh(request.scope[DEADLINE])
    return stored


def _load(models: Path, name: str) -> Rollout:
    """Serve an unloaded model again. Raise VersionNotFound for ``name@version`` without such a version to serve."""
    store, (model, at, version) = Store(models), name.partition("@")
    if at:
        numbers = store.find(model)
        served = [str(number) for number in numbers if number not in store.rollout(model).retired]
        if version not in served:
            versions = ", ".join(served) or "none"
            raise VersionNotFound(f"{quote_value(name)} cannot be loaded; versions that can be loaded: {versions}")
    return store.load(model)


async def _active_model(request: Request) -> Model[Any]:
    """Return the active version of a model when it is in memory. A version that cannot be loaded is not active.

    Raises the errors of ``model_in_path``.
    """
    name, models = request.path_params["name"], request.models
    while True:
        version_set = models.desired.get(name)
        if version_set is None or version_set.active is None:
            return await model_in_path(request)
        try:
            return await model_in_path(request, f"{name}@{version_set.active}")
        except UnknownModel:
            if models.entry(name, version_set.active).state is not State.FAILED:
                raise


def _check(parameters: dict[str, Any]) -> None:
    """Raise BadValue for parameters that would replace the model's configuration or files."""
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise BadValue(
                f"there is a parameter {quote_value(name)}; models are only loaded from the store, so send no "
                "configuration or files; /v1/admin/import adds a version to the store",
                "parameters",
            )


def _entry(models: Models, version: Entry) -> RepositoryEntry:
    """Return the entry of a version in the index.

    A version that its first request will load is listed as unavailable, because Triton has no state for such a version.
    """
    reason = version.reason
    if version.state in (State.UNLOADED, State.LOADING):
        served = version.version in models.version_sets[version.name].numbers
        reason = "available, but not in memory; the first request loads it" if served else "unloaded"
    state: Any = "READY" if version.state is State.READY else "UNAVAILABLE"
    return {"name": version.name, "version": str(version.version), "state": state, "reason": reason}


# The example is not the default model of a task, so that it may be unloaded.
_CHANGE: dict[str, Any] = {
    "body": LoadRequest,
    "example": {},
    "parameters": {"name": ("a model's name", "mnist-gan")},
    "errors": ADMIN_FAILURES,
    "is_admin": True,
}
_LOAD, _UNLOAD = "/v2/repository/models/{name}/load", "/v2/repository/models/{name}/unload"


OPERATIONS = [
    Operation(
        "POST",
        "/v2/repository/index",
        list_repository,
        TAG,
        "List all versions in the store except retired ones",
        RepositoryIndex,
        "The versions in the store",
        body=IndexRequest,
        example={"ready": True},
        errors=FAILURES,
    ),
    Operation("POST", _LOAD, load_model, TAG, "Load a model", ModelLoaded, "The version is in memory", **_CHANGE),
    Operation(
        "POST", _UNLOAD, unload_model, TAG, "Unload a model", ModelUnloaded, "The model is no longer served", **_CHANGE
    ),
    # for services without an admin key, which do not have the two above
    Operation("POST", _LOAD, refuse),
    Operation("POST", _UNLOAD, refuse),
]
