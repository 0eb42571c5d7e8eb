"""What Triton calls the model repository: which versions there are, and in which state."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import Field, ValidationError
from starlette.responses import Response

from app.api.bodies import NAMES, json_bytes, json_response, object_of, read
from app.api.failures import bad_value
from app.api.wire_in import Loose
from app.engine.registry import Registry
from app.errors import NotEnabled
from app.settings import Settings


class Index(Loose):
    ready: bool = Field(False, description="only versions that are ready")


def add(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    """``/v2/repository/...``."""
    content = {"application/json": {"schema": Index.model_json_schema(), "example": {"ready": True}}}

    @routes.post("/repository/index", openapi_extra={"requestBody": {"content": content}})
    async def index(request: Request) -> Response:
        """Every version in the store, ready or not and why."""
        body = _index(await read(request, json_bytes(settings.max_body_bytes, 0), settings.body_seconds))
        versions = [_entry(live.card.name, live.card.version) for live in registry.all()]
        if not body.ready:
            versions += [
                _entry(shelf.name, number, "not in memory; it is loaded when somebody asks for it")
                for shelf in registry.shelves.values()
                for number in shelf.numbers
                if not registry.memory.get(shelf.name, number)
            ]
            versions += [_entry(each.name, each.version, each.reason) for each in registry.broken if each.version]
        return json_response(sorted(versions, key=lambda entry: (entry["name"], int(entry["version"]))))

    @routes.post("/repository/models/{name}/load", include_in_schema=False)
    @routes.post("/repository/models/{name}/unload", include_in_schema=False)
    async def refuse(request: Request, name: str) -> Response:
        raise NotEnabled(
            "models are loaded and unloaded with an admin key only, and this service has none: it follows its store, "
            "where a version that is published is served within moments, and one that is removed no longer",
            "name",
        )


def _index(content: bytes) -> Index:
    """A body that may be empty. Raises BadValue."""
    try:
        return Index.model_validate(object_of(content, NAMES))
    except ValidationError as error:
        raise bad_value(error.errors(include_url=False)) from None


def _entry(name: str, version: int, reason: str = "") -> dict[str, str]:
    return {"name": name, "version": str(version), "state": "UNAVAILABLE" if reason else "READY", "reason": reason}
