"""What Triton calls the model repository: which versions there are, and in which state; models are loaded and unloaded.

Whether a model is unloaded stands in the store, beside which version serves: it is true of every process that follows
the store, and still after a restart. To drop it from the memory of the one process that was asked would be a lie, for
the next request may reach another. So an unloaded model is not loaded on demand either: a stray request, or
``is_model_ready`` itself, would undo what somebody has decided. What follows within a moment elsewhere is told at
once: the index, a model's readiness, and whoever is about to be refused look at the store first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response

from app.api.errors import validation_error
from app.api.open_inference.decode import OpenModel
from app.api.open_inference.paths import OptionalModel, model_in_path
from app.api.open_inference.responses import FAILURES, ModelLoaded, ModelUnloaded, RepositoryIndex
from app.api.openapi import request_body
from app.api.request import EXTRA_COMMAS, json_response, max_json_bytes, parse_object, read_body, set_deadline
from app.api.responses import success_response
from app.api.routes.admin import guard, on_store
from app.errors import BadValue, Conflict, NotEnabled, quote_value
from app.serving.model_cache import VersionState
from app.serving.registry import Registry, VersionStatus
from app.settings import Settings
from app.store import rollout
from app.store.rollout import Rollout

B = TypeVar("B", bound=BaseModel)


class IndexRequest(OpenModel):
    ready: bool = Field(False, description="list only versions that are ready")


class LoadRequest(OpenModel):
    parameters: dict[str, Any] = Field({}, description="`unload_dependents` has no effect: no model depends on another")


def router(registry: Registry, settings: Settings, admin_key: str | None) -> APIRouter:
    """Return the routes ``/v2/repository/...``. Without an admin key, ``load`` and ``unload`` are refused."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"], responses=FAILURES)

    @routes.post(
        "/repository/index",
        operation_id="list_repository",
        summary="List all versions in the store",
        openapi_extra=request_body(IndexRequest, {"ready": True}),
        responses=success_response(RepositoryIndex, description="The versions in the store"),
    )
    async def index(request: Request) -> Response:
        """List all versions in the store with their state. `reason` says why a version is unavailable."""
        body = await _body(request, IndexRequest, settings)
        await registry.watcher.refresh()
        versions = [version for version in registry.versions() if version.state is VersionState.READY or not body.ready]
        return json_response([_entry(registry, version) for version in versions])

    if admin_key:
        _changes(routes, registry, settings, admin_key)
        return routes

    @routes.post("/repository/models/{name}/load", include_in_schema=False)
    @routes.post("/repository/models/{name}/unload", include_in_schema=False)
    async def refuse(request: Request, name: str) -> Response:
        raise NotEnabled(
            "models are loaded and unloaded with an admin key only, and this service has none: it follows its store, "
            "where a version that is published is served within moments, and one that is removed no longer",
            "name",
        )

    return routes


def _changes(routes: APIRouter, registry: Registry, settings: Settings, admin_key: str) -> None:
    guarded: dict[str, Any] = {
        "dependencies": [Depends(guard(admin_key))],
        "openapi_extra": request_body(LoadRequest, {}),
    }

    @routes.post(
        "/repository/models/{name}/load",
        operation_id="load_model",
        summary="Load a model",
        responses=success_response(ModelLoaded, description="The version is in memory"),
        **guarded,
    )
    async def load(request: Request, name: OptionalModel) -> Response:
        """Serve a model again that was unloaded. The answer comes when the active version is in memory.

        With `name@version` the service waits for that version instead.
        """
        until = set_deadline(request, settings.request_seconds)
        _check((await _body(request, LoadRequest, settings)).parameters)
        await _change(registry, lambda: rollout.load(settings.store, name.partition("@")[0]))
        live = await model_in_path(registry, request, name, until)
        return json_response({"name": live.card.name, "version": str(live.card.version), "load": True})

    @routes.post(
        "/repository/models/{name}/unload",
        operation_id="unload_model",
        summary="Unload a model",
        responses=success_response(ModelUnloaded, description="The model is no longer served"),
        **guarded,
    )
    async def unload(request: Request, name: OptionalModel) -> Response:
        """Stop serving all versions of a model until it is loaded again. Running requests are still answered.

        A model that serves a task by default cannot be unloaded: 409.
        """
        await _body(request, LoadRequest, settings)
        if "@" in name:
            told = f"name is {quote_value(name)}; all versions of a model are unloaded together, `retire` is for one"
            raise BadValue(told, "name")
        await _change(registry, lambda: rollout.unload(settings.store, name))
        return json_response({"name": name, "unload": True})


async def _change(registry: Registry, change: Callable[[], Rollout]) -> None:
    """Write it into the store and follow that at once. Raises Conflict, and as ``on_store`` does."""
    if not registry.settings.store_poll_seconds:
        raise Conflict("QUARTET_STORE_POLL_SECONDS is 0: this service looks at its store only at the start")
    await on_store(change)
    await registry.watcher.refresh()


def _check(parameters: dict[str, Any]) -> None:
    """Raises BadValue for what Triton would load in place of what lies in its repository."""
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise BadValue(
                f"there is a parameter {quote_value(name)}; a model is loaded as it lies in the store: its card is its "
                "configuration, and files come by /v1/admin/import",
                "parameters",
            )


async def _body(request: Request, kind: type[B], settings: Settings) -> B:
    """A body that may be empty. Raises BadValue."""
    set_deadline(request, settings.request_seconds)
    content = await read_body(request, max_json_bytes(settings.max_body_bytes, 0), settings.body_seconds)
    try:
        return kind.model_validate(parse_object(content, EXTRA_COMMAS))
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False)) from None


def _entry(registry: Registry, version: VersionStatus) -> dict[str, str]:
    """Return an entry of the index. Triton has no state for versions that are loaded on demand."""
    reason = version.reason
    if version.state in (VersionState.UNLOADED, VersionState.LOADING):
        served = version.number in registry.version_sets[version.name].numbers
        reason = "not in memory; it is loaded when somebody asks for it" if served else "unloaded"
    state = "READY" if version.state is VersionState.READY else "UNAVAILABLE"
    return {"name": version.name, "version": str(version.number), "state": state, "reason": reason}
