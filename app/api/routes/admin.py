"""What ``python -m app.models`` does, over HTTP, for whoever has the admin key. Without a key it does not exist."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response, StreamingResponse

from app.api.openapi import query_parameters, request_body
from app.api.request import BodyReader, RequestBody, json_response, read_json, read_query, set_deadline
from app.api.responses import ERROR_RESPONSES
from app.api.spooled_body import spooled_body
from app.errors import BadValue, Conflict, NotFound, QuartetError, StoreNotWritable, Unauthorized
from app.serving.registry import Registry
from app.settings import Settings, SettingsError
from app.store import Card, StoreError, VersionNumber, archive, catalogue, rollout
from app.store.rollout import NEWEST, RolloutRefused, VersionNotFound

PREFIX = "/v1/admin"
SPOOLED = f"{PREFIX}/import"  # its bodies go to the disk, and are not held in memory
SHORTEST = 16  # characters of a key
JSON_BYTES = 16 * 1024
COMMAS = 16

R = TypeVar("R")
bearer = HTTPBearer(auto_error=False, description="the admin key")


def _number_or_newest(value: object) -> object:
    if value == NEWEST or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9):
        return value
    raise PydanticCustomError("version", "Input should be the number of a version, or 'newest'")


class Activation(RequestBody):
    version: Annotated[VersionNumber | Literal["newest"], BeforeValidator(_number_or_newest)] = Field(
        description="a version's number, or `newest`: follow the newest"
    )
    share: float = Field(
        100, gt=0, le=100, description="per cent of the requests that name no version; below 100: canary"
    )


class Retirement(RequestBody):
    version: VersionNumber
    undo: bool = Field(False, description="bring it back")


class DiffQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    first: int = Field(1, ge=1, description="a version")
    second: int = Field(2, ge=1, description="another one")


class VersionQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = Field(1, ge=1, description="the version to export")


class ImportQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    renumber: bool = Field(False, description="give it the next free number instead of its own")


def admin_key(settings: Settings) -> str | None:
    """The key of the settings, or of their file. Raises SettingsError for one that cannot be used."""
    if settings.admin_key and settings.admin_key_file:
        raise SettingsError("QUARTET_ADMIN_KEY and QUARTET_ADMIN_KEY_FILE are both set: one of them is enough")
    key, source = settings.admin_key.get_secret_value() if settings.admin_key else None, "QUARTET_ADMIN_KEY"
    if path := settings.admin_key_file:
        source = f"QUARTET_ADMIN_KEY_FILE is {str(path)!r}: its content"
        try:
            key = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"QUARTET_ADMIN_KEY_FILE is {str(path)!r}: it cannot be read: {error}") from None
    if key is not None and (len(key) < SHORTEST or not key.isascii() or not key.isprintable()):
        raise SettingsError(f"{source} has {len(key)} characters; a key has at least {SHORTEST}, plain ASCII ones")
    return key


def guard(key: str) -> Callable[..., Any]:
    """Lets requests through that carry the key; how long the comparison takes tells nothing of it."""
    expected = hashlib.sha256(key.encode()).digest()

    async def allowed(found: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        given = hashlib.sha256(found.credentials.encode() if found else b"").digest()
        if not hmac.compare_digest(given, expected):
            raise Unauthorized("this needs the admin key, as `Authorization: Bearer KEY`")

    return allowed


def router(registry: Registry, settings: Settings, key: str) -> APIRouter:
    routes = APIRouter(
        prefix=PREFIX, tags=["admin"], dependencies=[Depends(guard(key))], responses={"4XX": ERROR_RESPONSES["4XX"]}
    )
    _look(routes, settings.store)
    _choose(routes, registry, settings)
    _carry(routes, settings)
    return routes


def _look(routes: APIRouter, store: Path) -> None:
    @routes.get("/models")
    async def list_store() -> Response:
        """All names in the store: which versions serve, are tried, are retired."""
        return json_response({"data": await on_store(lambda: catalogue.list_models(store))})

    @routes.get("/models/{name}")
    async def show_versions(name: str) -> Response:
        """One name with all its versions, whole or not."""
        return json_response(await on_store(lambda: catalogue.describe_model(store, name)))

    @routes.get("/models/{name}/diff", openapi_extra=query_parameters(DiffQuery))
    async def diff(name: str, request: Request) -> Response:
        """Two versions side by side: figures, sizes, data, notes."""
        pair = read_query(request, DiffQuery)
        return json_response({"data": await on_store(lambda: catalogue.diff(store, name, pair.first, pair.second))})

    @routes.get("/verify")
    async def verify() -> Response:
        """All versions, read again: hashes, sizes, finite weights."""
        return json_response({"data": await on_store(lambda: list(catalogue.verify(store)))})


def _choose(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    store, reading = settings.store, BodyReader(JSON_BYTES, settings.body_seconds, registry.parse_executor)

    @routes.post("/models/{name}/activate", openapi_extra=request_body(Activation, {"version": NEWEST}))
    async def activate(name: str, request: Request) -> Response:
        """Have a version serve who names none, or try it on a share of them. Within 2 seconds every process does."""
        set_deadline(request, settings.request_seconds)
        body = await read_json(request, Activation, reading, COMMAS)
        await on_store(lambda: rollout.activate(store, name, body.version, body.share))
        return json_response(await on_store(lambda: catalogue.describe_model(store, name)))

    @routes.post("/models/{name}/rollback")
    async def roll_back(name: str) -> Response:
        """End the canary, or else have the previous version serve again."""
        await on_store(lambda: rollout.rollback(store, name))
        return json_response(await on_store(lambda: catalogue.describe_model(store, name)))

    @routes.post("/models/{name}/retire", openapi_extra=request_body(Retirement, {"version": 1}))
    async def retire(name: str, request: Request) -> Response:
        """Serve a version no longer, not even by its number; its files stay."""
        set_deadline(request, settings.request_seconds)
        body = await read_json(request, Retirement, reading, COMMAS)
        await on_store(lambda: rollout.retire(store, name, body.version, body.undo))
        return json_response(await on_store(lambda: catalogue.describe_model(store, name)))


def _carry(routes: APIRouter, settings: Settings) -> None:
    store, most = settings.store, settings.max_import_bytes
    file = {"requestBody": {"required": True, "content": {"application/zip": {"schema": {"type": "string"}}}}}

    @routes.post("/import", openapi_extra={**file, **query_parameters(ImportQuery)})
    async def bring_in(request: Request) -> Response:
        """Add a version from an archive, once all of it is checked."""
        renumber = read_query(request, ImportQuery).renumber
        try:
            with tempfile.TemporaryFile(dir=store) as body:  # nameless: nothing is left of it, whatever happens
                await spooled_body(request, body, most, settings.body_seconds)
                card: Card = await on_store(
                    lambda: archive.import_archive(store, body, most, renumber), otherwise=BadValue
                )
        except OSError as error:
            raise _not_written(error) from None
        return json_response(
            await on_store(lambda: catalogue.describe_model(store, card.name)) | {"imported": card.version}
        )

    @routes.get("/models/{name}/export", openapi_extra=query_parameters(VersionQuery))
    async def export(name: str, request: Request) -> Response:
        """A version as one archive."""
        version = read_query(request, VersionQuery).version
        pieces = await on_store(lambda: archive.export_version(store, name, version))
        headers = {"content-disposition": f'attachment; filename="{name}-{version}.zip"'}
        return StreamingResponse(pieces, headers=headers, media_type="application/zip")


async def on_store(work: Callable[[], R], otherwise: type[QuartetError] = Conflict) -> R:
    """Do what works on the store, on a thread. Its failures become those that a caller can see."""
    try:
        return await asyncio.to_thread(work)
    except VersionNotFound as error:
        raise NotFound(str(error), "name") from None
    except RolloutRefused as error:
        raise Conflict(str(error)) from None
    except StoreError as error:
        raise otherwise(str(error)) from None
    except OSError as error:
        raise _not_written(error) from None


def _not_written(error: OSError) -> StoreNotWritable:
    return StoreNotWritable(f"the store cannot be written: {error.strerror or type(error).__name__}")
