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
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from app.api.deadline import DEADLINE, set_deadline
from app.api.open_inference.decode import LenientModel
from app.api.open_inference.paths import UnloadableModelPath, model_in_path
from app.api.open_inference.responses import FAILURES, REPOSITORY_FAILURES, ModelLoaded, ModelUnloaded, RepositoryIndex
from app.api.openapi import request_body
from app.api.request_body import EXTRA_COMMAS, max_json_bytes, parse_object, read_body, validate
from app.api.responses import json_response, success_response
from app.api.routes.admin import guard, on_store
from app.errors import BadValue, Conflict, NotEnabled, UnknownModel, quote_value
from app.serving.model import Model
from app.serving.models import Models
from app.serving.plan import Entry, State
from app.settings import Settings
from app.store import Store, VersionNotFound
from app.store.rollout import Rollout

B = TypeVar("B", bound=BaseModel)


class IndexRequest(LenientModel):
    ready: bool = Field(False, description="list only versions that are ready")


class LoadRequest(LenientModel):
    parameters: dict[str, Any] = Field(
        {}, description="`unload_dependents` has no effect, because models do not depend on each other"
    )


def router(models: Models, settings: Settings, admin_key: str | None) -> APIRouter:
    """Return the routes ``/v2/repository/...``. Without an admin key, ``load`` and ``unload`` are refused."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=FAILURES)

    @routes.post(
        "/repository/index",
        operation_id="list_repository",
        summary="List all versions in the store except retired ones",
        openapi_extra=request_body(IndexRequest, {"ready": True}),
        responses=success_response(RepositoryIndex, description="The versions in the store"),
    )
    async def index(request: Request) -> Response:
        """List the states of all versions that are not retired. `reason` says why a version is unavailable."""
        body = await _read_body(request, IndexRequest, settings)
        await models.refresh(request.scope[DEADLINE])
        versions = [version for version in models.versions() if version.state is State.READY or not body.ready]
        return json_response([_entry(models, version) for version in versions])

    if admin_key:
        _add_load_and_unload(routes, models, settings, admin_key)
        return routes

    @routes.post("/repository/models/{name}/load", include_in_schema=False)
    @routes.post("/repository/models/{name}/unload", include_in_schema=False)
    async def refuse(request: Request, name: str) -> Response:
        raise NotEnabled(
            "loading and unloading require an admin key, but neither QUARTET_ADMIN_KEY nor QUARTET_ADMIN_KEY_FILE is "
            "set; the models in the store are loaded automatically",
            "name",
        )

    return routes


def _add_load_and_unload(routes: APIRouter, models: Models, settings: Settings, admin_key: str) -> None:
    guarded: dict[str, Any] = {
        "dependencies": [Depends(guard(admin_key))],
        "openapi_extra": request_body(LoadRequest, {}),
    }

    @routes.post(
        "/repository/models/{name}/load",
        operation_id="load_model",
        summary="Load a model",
        responses=success_response(ModelLoaded, description="The version is in memory") | REPOSITORY_FAILURES,
        **guarded,
    )
    async def load(request: Request, name: UnloadableModelPath) -> Response:
        """Serve an unloaded model again. The response is sent when the active version is in memory.

        With `name@version`, the service loads this version, and responds when it is in memory.
        """
        deadline = set_deadline(request, settings.request_seconds)
        _check((await _read_body(request, LoadRequest, settings)).parameters)
        stored = await _change(request, models, lambda: _load(settings.store, name))
        # with a chosen active version, there may be a canary, which the name alone could also mean
        pinned = "@" not in name and stored.active is not None
        load_model = _active_model if pinned else model_in_path
        model = await load_model(models, request, name, deadline)
        return json_response({"name": model.card.name, "version": str(model.card.version), "load": True})

    @routes.post(
        "/repository/models/{name}/unload",
        operation_id="unload_model",
        summary="Unload a model",
        responses=success_response(ModelUnloaded, description="The model is no longer served") | REPOSITORY_FAILURES,
        **guarded,
    )
    async def unload(request: Request, name: UnloadableModelPath) -> Response:
        """Stop serving a model until it is loaded, or a version is activated. Running requests are still answered.

        The default model of a task cannot be unloaded. In this case, the status is 409.
        """
        await _read_body(request, LoadRequest, settings)
        if "@" in name:
            allowed = "all versions of a model are unloaded together; use `retire` for one version"
            raise BadValue(f"name is {quote_value(name)}; {allowed}", "name")
        await _change(request, models, lambda: Store(settings.store).unload(name))
        return json_response({"name": name, "unload": True})


async def _change(request: Request, models: Models, change: Callable[[], Rollout]) -> Rollout:
    """Change the store, and apply the change in this process. Return the result of ``change``.

    Raises Conflict, TimedOut, and errors of ``on_store``.
    """
    if not models.settings.store_poll_seconds:
        raise Conflict("QUARTET_STORE_POLL_SECONDS is 0: this service reads its store only at the start")
    stored = await on_store(models.disk, change)
    await models.refresh(request.scope[DEADLINE])
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


async def _active_model(models: Models, request: Request, name: str, deadline: float) -> Model:
    """Return the active version of a model when it is in memory. A version that cannot be loaded is not active.

    Raises the errors of ``model_in_path``.
    """
    while True:
        version_set = models.desired.get(name)
        if version_set is None or version_set.active is None:
            return await model_in_path(models, request, name, deadline)
        try:
            return await model_in_path(models, request, f"{name}@{version_set.active}", deadline)
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


async def _read_body(request: Request, model: type[B], settings: Settings) -> B:
    """Set the request's deadline, and return its JSON body as an instance of the Pydantic class ``model``.

    The body may be empty. Raises BadValue, and the errors of ``read_body``.
    """
    set_deadline(request, settings.request_seconds)
    content = await read_body(request, max_json_bytes(settings.max_body_bytes, 0), settings.body_seconds)
    return validate(parse_object(content, EXTRA_COMMAS), model)


def _entry(models: Models, version: Entry) -> dict[str, str]:
    """Return the entry of a version in the index.

    A version that its first request will load is listed as unavailable, because Triton has no state for such a version.
    """
    reason = version.reason
    if version.state in (State.UNLOADED, State.LOADING):
        served = version.version in models.version_sets[version.name].numbers
        reason = "available, but not in memory; the first request loads it" if served else "unloaded"
    state = "READY" if version.state is State.READY else "UNAVAILABLE"
    return {"name": version.name, "version": str(version.version), "state": state, "reason": reason}
