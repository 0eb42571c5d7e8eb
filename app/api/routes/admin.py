"""Administration endpoints for most commands of ``python -m app.models``.

Requests need the admin key. The endpoints exist only if an admin key is set.
"""

from __future__ import annotations

import hashlib
import hmac
import tempfile
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Path, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response, StreamingResponse

from app.api.deadline import set_deadline
from app.api.openapi import BINARY, query_parameters, request_body
from app.api.request_body import BodyReader, RequestBody, read_json, spool_body
from app.api.request_head import read_query
from app.api.responses import ERROR_RESPONSES, file_response, json_response, success_response
from app.api.routes import admin_add
from app.api.routes.admin_responses import (
    ImportResponse,
    StoredModelList,
    StoredVersions,
    StoreVerification,
)
from app.errors import BadValue, Conflict, NotFound, QuartetError, StoreUnavailable, Unauthorized
from app.serving.models import Models
from app.serving.plan import State
from app.serving.snapshot import Snapshot
from app.settings import Settings, SettingsError
from app.store import (
    Card,
    RolloutRefused,
    Store,
    StoreError,
    VersionNotFound,
    VersionNumber,
    archive,
    catalogue,
)
from app.store.disk_pool import DiskPool
from app.store.rollout import LATEST
from app.tasks import check_loading

PREFIX = "/v1/admin"
SPOOLED = {f"{PREFIX}/import", f"{PREFIX}/add"}  # bodies are written to disk, not kept in memory
MIN_KEY_LENGTH = 16  # characters
JSON_BYTES = 16 * 1024
MAX_COMMAS = 16

R = TypeVar("R")
bearer = HTTPBearer(scheme_name="admin_key", auto_error=False, description="the admin key")
ModelName = Annotated[str, Path(description="a model's name", examples=["shakespeare-rnn"])]
FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {
        **ERROR_RESPONSES["4XX"],
        "description": "400: invalid value. 401: missing or unknown admin key. 404: unknown model or version. "
        "408: the body arrived too slowly. 409: the state of the store does not allow the request. 413: too large.",
    },
    "5XX": {
        **ERROR_RESPONSES["5XX"],
        "description": "500: internal error. 504: the request took too long. 507: the store cannot be read or written.",
    },
}


def _number_or_latest(value: object) -> object:
    if value == LATEST or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9):
        return value
    raise PydanticCustomError("version", "Input should be the number of a version, or 'latest'")


class Activation(RequestBody):
    version: Annotated[VersionNumber | Literal["latest"], BeforeValidator(_number_or_latest)] = Field(
        description="a version number, or `latest` to always serve the newest version"
    )
    share: float = Field(
        100,
        gt=0,
        le=100,
        description="share of the requests without a version number, in per cent. Below 100, the version becomes the "
        "canary.",
    )


class Retirement(RequestBody):
    version: VersionNumber
    undo: bool = Field(False, description="whether to serve the retired version again")


class VersionQuery(BaseModel):
    version: int | None = Field(None, ge=1, description="the version's number; by default the active version")


class ImportQuery(BaseModel):
    renumber: bool = Field(
        False,
        description="whether to give the version the next free number instead of its number in the archive",
        examples=[True],
    )


def admin_key(settings: Settings) -> str | None:
    """Return the admin key from the settings or from its file, or None if neither is set.

    Spaces and line breaks at the start and end of the key are removed, as they are from the key in a request.

    Raises:
        SettingsError: the key and the file are both set, the file cannot be read, or the key is too short or is not
            printable ASCII.
    """
    if settings.admin_key and settings.admin_key_file:
        raise SettingsError("QUARTET_ADMIN_KEY and QUARTET_ADMIN_KEY_FILE are both set; set one of them")
    key, source = settings.admin_key.get_secret_value().strip() if settings.admin_key else None, "QUARTET_ADMIN_KEY"
    if path := settings.admin_key_file:
        source = f"QUARTET_ADMIN_KEY_FILE is {str(path)!r}: its content"
        try:
            key = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"QUARTET_ADMIN_KEY_FILE is {str(path)!r}: it cannot be read: {error}") from None
    if key is not None and (len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable()):
        allowed = f"a key has at least {MIN_KEY_LENGTH} characters, all of them printable ASCII"
        raise SettingsError(f"{source} has {len(key)} characters; {allowed}")
    return key


def guard(key: str) -> Callable[..., Any]:
    """Return a dependency that raises Unauthorized for requests without the key."""

    async def check_key(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        check_admin_key(credentials.credentials if credentials else "", key)

    return check_key


def check_admin_key(sent: str, key: str) -> None:
    """Raise Unauthorized if the keys differ. The comparison takes the same time for all keys."""
    digests = (hashlib.sha256(each.encode("utf-8", "surrogateescape")).digest() for each in (sent, key))
    if not hmac.compare_digest(*digests):
        raise Unauthorized("this request needs the admin key, as `Authorization: Bearer KEY`")


def router(models: Models, settings: Settings, key: str) -> APIRouter:
    """Return the routes under ``/v1/admin``. All routes require ``key``."""
    routes = APIRouter(prefix=PREFIX, tags=["Administration"], dependencies=[Depends(guard(key))], responses=FAILURES)
    _add_reading(routes, models, Store(settings.store, check_loading))
    _add_rollout(routes, models, settings)
    _add_archives(routes, models, settings)
    admin_add.add_route(routes, models, settings)
    return routes


def _add_reading(routes: APIRouter, models: Models, checked: Store) -> None:
    @routes.get(
        "/models",
        operation_id="list_stored_models",
        summary="List the models in the store",
        responses=success_response(StoredModelList, description="The models in the store"),
    )
    async def list_store() -> Response:
        """List all models in the store with their active, canary, previous and retired versions."""
        snapshot = await on_store(models.disk, lambda: Snapshot.read(models.store, models.snapshot))
        return json_response({"data": [_row(models, snapshot, name) for name in sorted(snapshot.versions)]})

    @routes.get(
        "/models/{name}",
        operation_id="list_stored_versions",
        summary="List the versions of a model",
        responses=success_response(StoredVersions, description="The versions of the model"),
    )
    async def show_versions(name: ModelName) -> Response:
        """List all versions of one model, including broken versions, with their role, size and metrics."""
        return json_response(await on_store(models.disk, lambda: catalogue.describe_model(models.store, name)))

    @routes.get(
        "/verify",
        operation_id="verify_store",
        summary="Verify all versions in the store",
        responses=success_response(StoreVerification, description="One row for each file or version"),
    )
    async def verify() -> Response:
        """Check the default models, the rollouts, and the model cards and weights of all versions.

        The check compares hashes and sizes, and tests whether all weights are finite and whether the service could
        load each version. It does not read pictures.
        """
        return json_response({"data": await on_store(models.disk, lambda: list(catalogue.verify(checked)))})


def _row(models: Models, snapshot: Snapshot, name: str) -> dict[str, Any]:
    """Return the row of a model. Only files that have changed since the last scan were read for it."""
    versions, rollout = snapshot.versions[name], snapshot.rollouts[name]
    usable = [n for n, version in versions.items() if version.card and models.entry(name, n).state is not State.FAILED]
    roles = rollout.roles(usable)
    card = versions[roles.active].card if roles.active else None
    places = (name, f"{name}/active.json", "defaults.json")
    problems = [snapshot.problems[place] for place in places if place in snapshot.problems]
    return catalogue.row(name, list(versions), rollout, roles, card.task if card else None, snapshot.defaults, problems)


def _add_rollout(routes: APIRouter, models: Models, settings: Settings) -> None:
    store, reader = (
        Store(settings.store, check_loading),
        BodyReader(JSON_BYTES, settings.body_seconds, models.parse_executor),
    )

    async def change(name: str, work: Callable[[], object]) -> Response:
        await on_store(models.disk, work)
        return json_response(await on_store(models.disk, lambda: catalogue.describe_model(Store(settings.store), name)))

    @routes.post(
        "/models/{name}/activate",
        operation_id="activate_version",
        summary="Activate a version",
        openapi_extra=request_body(Activation, {"version": LATEST}, timeout=False),
        responses=success_response(StoredVersions, description="The versions of the model, after the change"),
    )
    async def activate(name: ModelName, request: Request) -> Response:
        """Use a version for all requests without a version number, or as a canary for a share of these requests.

        By default, all processes apply the change within two seconds.
        """
        set_deadline(request, settings.request_seconds)
        body = await read_json(request, Activation, reader, MAX_COMMAS)
        return await change(name, lambda: store.activate(name, body.version, body.share))

    @routes.post(
        "/models/{name}/rollback",
        operation_id="roll_back",
        summary="Roll back to the previous version",
        responses=success_response(StoredVersions, description="The versions of the model, after the change"),
    )
    async def roll_back(name: ModelName) -> Response:
        """End the canary. Without a canary, activate the previous version."""
        return await change(name, lambda: store.rollback(name))

    @routes.post(
        "/models/{name}/retire",
        operation_id="retire_version",
        summary="Retire a version",
        openapi_extra=request_body(Retirement, {"version": 1}, timeout=False),
        responses=success_response(StoredVersions, description="The versions of the model, after the change"),
    )
    async def retire(name: ModelName, request: Request) -> Response:
        """Stop serving a version, even to requests with its number. The files stay, so `undo` can serve it again."""
        set_deadline(request, settings.request_seconds)
        body = await read_json(request, Retirement, reader, MAX_COMMAS)
        return await change(name, lambda: store.retire(name, body.version, body.undo))


def _add_archives(routes: APIRouter, models: Models, settings: Settings) -> None:
    store, max_bytes = Store(settings.store, check_loading), settings.max_import_bytes
    file = {"requestBody": {"required": True, "content": {"application/zip": {"schema": BINARY}}}}

    @routes.post(
        "/import",
        operation_id="import_version",
        summary="Import a version from an archive",
        openapi_extra={**file, **query_parameters(ImportQuery)},
        responses=success_response(ImportResponse, description="The versions of the model, after the import"),
    )
    async def import_version(request: Request) -> Response:
        """Check an archive that was made by an export, and add its version to the store."""
        renumber = read_query(request, ImportQuery).renumber
        disk = models.disk
        try:
            body = await disk.run(lambda: tempfile.TemporaryFile(dir=store.folder))  # noqa: SIM115 - closed below
            try:
                await spool_body(request, disk, body, max_bytes, settings.body_seconds)
                await on_store(models.disk, store.defaults)  # an error in the store is not an error in the archive
                card: Card = await on_store(
                    models.disk, lambda: archive.import_archive(store, body, max_bytes, renumber), otherwise=BadValue
                )
            finally:
                await disk.run(body.close)
        except OSError as error:
            raise _unavailable(error) from None
        versions = await on_store(models.disk, lambda: catalogue.describe_model(store, card.name))
        return json_response(versions | {"imported": card.version})

    @routes.get(
        "/models/{name}/export",
        operation_id="export_version",
        summary="Export a version as an archive",
        openapi_extra=query_parameters(VersionQuery),
        response_class=Response,
        responses=file_response("application/zip", "The archive"),
    )
    async def export(name: ModelName, request: Request) -> Response:
        """Get all files of a version as one ZIP archive."""
        wanted = read_query(request, VersionQuery).version

        def open_archive() -> tuple[int, Iterator[bytes]]:
            number = wanted or store.active(name)
            return number, archive.export_version(store, name, number)

        version, chunks = await on_store(models.disk, open_archive)
        headers = {"content-disposition": f'attachment; filename="{name}-{version}.zip"'}
        return StreamingResponse(chunks, headers=headers, media_type="application/zip")


async def on_store(disk: DiskPool, work: Callable[[], R], otherwise: type[QuartetError] = Conflict) -> R:
    """Call ``work`` on a thread and translate the errors of the store.

    Raises:
        NotFound: the version does not exist.
        Conflict: the rollout does not allow the change.
        StoreUnavailable: the store cannot be read or written.
        QuartetError: another StoreError occurred, and was translated to the class ``otherwise``.
    """
    try:
        return await disk.run(work)
    except VersionNotFound as error:
        raise NotFound(str(error), "name") from None
    except RolloutRefused as error:
        raise Conflict(str(error)) from None
    except StoreError as error:
        raise otherwise(str(error)) from None
    except OSError as error:
        raise _unavailable(error) from None


def _unavailable(error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"the store cannot be read or written: {error.strerror or type(error).__name__}")
