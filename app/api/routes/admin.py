"""Administration endpoints for most commands of ``quartet models``.

Requests need the admin key. The endpoints exist only if an admin key is set.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response, StreamingResponse
from typing_extensions import TypedDict

from app.api.openapi import BINARY
from app.api.operation import Operation, Request
from app.api.request_body import Described, RequestBody, read_json, spool_body
from app.api.request_head import read_query
from app.api.responses import ErrorBody, error_responses, json_response
from app.api.routes.models import Canary, Shadow
from app.errors import BadValue, Conflict, NotFound, QuartetError, StoreUnavailable
from app.serving.plan import State
from app.store import (
    Card,
    RolloutRefused,
    Store,
    StoreError,
    TaskName,
    VersionNotFound,
    VersionNumber,
    archive,
    catalogue,
)
from app.store.rollout import LATEST
from app.store.snapshot import Snapshot
from app.tasks import check_loading

PREFIX = "/v1/admin"
UPLOAD = "upload"  # name of the file with the body of a request

R = TypeVar("R")
_failures = error_responses(
    ErrorBody,
    "400: invalid value. 401: missing or unknown admin key. 404: unknown model or version. 408: the body arrived too "
    "slowly. 409: the state of the store does not allow the request. 413: too large.",
    " 507: the store cannot be read or written.",
)
FAILURES = {status: _failures[status] for status in ("4XX", "5XX")}


def _number_or_latest(value: object) -> object:
    if value == LATEST or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9):
        return value
    raise PydanticCustomError("version", "Input should be the number of a version, or 'latest'")


class Activation(RequestBody):
    version: Annotated[VersionNumber | Literal["latest"], BeforeValidator(_number_or_latest)]
    """a version number, or `latest` to always serve the newest version"""
    share: float = Field(100, gt=0, le=100)
    """share of the requests without a version number, in per cent. Below 100, the version becomes the canary."""


class ShadowRequest(RequestBody):
    version: VersionNumber | None
    """a version number, or null to end the shadow"""
    share: float = Field(100, gt=0, le=100)
    """share of the captured requests, in per cent"""


class Retirement(RequestBody):
    version: VersionNumber
    undo: bool = False
    """whether to serve the retired version again"""


class VersionQuery(Described):
    version: int | None = Field(None, ge=1)
    """the version's number; by default the active version"""


class ImportQuery(Described):
    renumber: bool = Field(False, examples=[True])
    """whether to give the version the next free number instead of its number in the archive"""


class RolloutState(TypedDict):
    """The rollout state of a model."""  # subclasses of typed dictionaries inherit no strings below fields

    name: str
    state: Annotated[str, Field(description="the state in words, such as `sales@3 is active; retired: 1`")]
    task: Annotated[TaskName | None, Field(description="null if no version can be read")]
    default: Annotated[
        bool, Field(description="whether this is the default model of its task, for requests without a model")
    ]
    active: Annotated[int | None, Field(description="the version for requests without a version number")]
    update_policy: Annotated[
        Literal["latest", "pinned"],
        Field(
            description="`latest` if new versions become active when they are published, `pinned` if an admin chose "
            "the active version"
        ),
    ]
    canary: Canary | None
    shadow: Shadow | None
    previous: Annotated[int | None, Field(description="the version that a rollback activates")]
    retired: list[int]
    unloaded: bool
    changed: Annotated[str, Field(description="time of the last change in ISO 8601, or empty if there was no change")]
    by: Annotated[str, Field(description="the last command that changed the state")]
    problem: Annotated[str, Field(description="empty if the state can be read")]


class StoredModel(RolloutState):
    versions: list[int]


class StoredVersion(TypedDict):
    version: int
    role: Literal["", "active", "canary", "shadow", "previous", "retired"]
    problem: str
    """empty if the version can be served; otherwise the fields below are left out"""
    bytes: NotRequired[int]
    """size of all files"""
    title: NotRequired[str]
    created: NotRequired[str]
    """ISO 8601"""
    metrics: NotRequired[dict[str, float]]
    notes: NotRequired[str]


class StoredVersions(RolloutState):
    versions: list[StoredVersion]


class ImportResponse(StoredVersions):
    imported: int
    """number of the new version"""


class StoredModelList(TypedDict):
    data: list[StoredModel]


class StoreCheck(TypedDict):
    what: str
    """the file or version that was checked"""
    problem: str
    """the problem that was found, or empty"""


class StoreVerification(TypedDict):
    data: list[StoreCheck]


async def list_stored_models(request: Request) -> Response:
    """List all models in the store with their active, canary, previous and retired versions."""
    models = request.models
    snapshot = await on_store(request, lambda: Snapshot.read(models.store, models.snapshot))
    damaged = {key for key, entry in models.table.items() if entry.state is State.FAILED}
    rows = [catalogue.row(snapshot, name, damaged) for name in snapshot.versions]
    return json_response({"data": rows})


async def list_stored_versions(request: Request) -> Response:
    """List all versions of one model, including broken versions, with their role, size and metrics."""
    return json_response(await describe(request, request.path_params["name"]))


async def describe(request: Request, name: str) -> dict[str, Any]:
    models = request.models
    return await on_store(request, lambda: catalogue.describe_model(models.store, name))


def _checked_store(request: Request) -> Store:
    """Return the store. It refuses versions that the service cannot load."""
    return Store(request.settings.store, check_loading)


async def verify_store(request: Request) -> Response:
    """Check the default models, the rollouts, and the model cards and weights of all versions.

    The check compares hashes and sizes, and tests whether all weights are finite and whether the service could load
    each version. It does not read pictures.
    """
    store = _checked_store(request)
    return json_response({"data": await on_store(request, lambda: list(catalogue.verify(store)))})


async def _change(request: Request, work: Callable[[str], object]) -> Response:
    """Change the model in the path, and return its versions."""
    name = request.path_params["name"]
    await on_store(request, lambda: work(name))
    return json_response(await describe(request, name))


async def activate_version(request: Request) -> Response:
    """Use a version for all requests without a version number, or as a canary for a share of these requests.

    By default, all processes apply the change within two seconds.
    """
    store, body = _checked_store(request), await read_json(request, Activation)
    return await _change(request, lambda name: store.activate(name, body.version, body.share))


async def set_shadow(request: Request) -> Response:
    """Send copies of a share of the captured requests to a version, whose answers are only compared."""
    store, body = _checked_store(request), await read_json(request, ShadowRequest)
    return await _change(request, lambda name: store.shadow(name, body.version, body.share))


async def roll_back(request: Request) -> Response:
    """End the canary. Without a canary, activate the previous version."""
    store = _checked_store(request)
    await read_json(request, RequestBody)
    return await _change(request, store.rollback)


async def retire_version(request: Request) -> Response:
    """Stop serving a version, even to requests with its number. The files stay, so `undo` can serve it again."""
    store, body = _checked_store(request), await read_json(request, Retirement)
    return await _change(request, lambda name: store.retire(name, body.version, body.undo))


async def import_version(request: Request) -> Response:
    """Check an archive that was made by an export, and add its version to the store."""
    store, max_bytes = _checked_store(request), request.limits.max_import_bytes
    renumber = read_query(request, ImportQuery).renumber

    def add() -> Card:
        with (folder / UPLOAD).open("rb") as file:
            return archive.import_archive(store, file, max_bytes, renumber)

    async with uploaded(request) as folder:
        await on_store(request, store.defaults)  # an error in the store is not an error in the archive
        card = await on_store(request, add, otherwise=BadValue)
    return json_response(await describe(request, card.name) | {"imported": card.version})


@asynccontextmanager
async def uploaded(request: Request) -> AsyncIterator[Path]:
    """Write the body to the file UPLOAD in a new folder. Yield the folder, and remove it at the end.

    Raises:
        StoreUnavailable: the store cannot be written.
        TooLarge, TooSlow, CallerGone: as in ``spool_body``.
    """
    settings, disk, stack = request.settings, request.models.disk, ExitStack()
    try:
        folder = await disk.run(stack.enter_context, request.models.store.disk.scratch(settings.store))
        file = await disk.run((folder / UPLOAD).open, "wb")
        try:
            await spool_body(request, file)
        finally:
            await disk.run(file.close)
        yield folder
    except OSError as error:
        raise _unavailable(error) from None
    finally:
        await disk.run(stack.close)


async def export_version(request: Request) -> Response:
    """Get all files of a version as one ZIP archive."""
    name, wanted, store = (
        request.path_params["name"],
        read_query(request, VersionQuery).version,
        _checked_store(request),
    )

    def open_archive() -> tuple[int, Iterator[bytes]]:
        store.find(name, wanted)
        number = wanted or store.active(name)
        if request.method == "HEAD":  # do not read the weights
            store.card(name, number)
            return number, iter(())
        return number, archive.export_version(store, name, number)

    version, chunks = await on_store(request, open_archive)
    headers = {"content-disposition": f'attachment; filename="{name}-{version}.zip"'}
    return StreamingResponse(chunks, headers=headers, media_type="application/zip")


async def on_store(request: Request, work: Callable[[], R], otherwise: type[QuartetError] = Conflict) -> R:
    """Call ``work`` on a thread and translate the errors of the store.

    Raises:
        NotFound: the version does not exist.
        Conflict: the rollout does not allow the change.
        StoreUnavailable: the store cannot be read or written.
        QuartetError: another StoreError occurred, and was translated to the class ``otherwise``.
    """
    try:
        return await request.models.disk.run(work)
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


_MODEL = {"name": ("a model's name", "shakespeare-rnn")}
_ADMIN: dict[str, Any] = {"errors": FAILURES, "is_admin": True}
_CHANGE: dict[str, Any] = {**_ADMIN, "parameters": _MODEL}
_CHANGED = "The versions of the model, after the change"
_ARCHIVE = {"application/zip": {"schema": BINARY}}
TAG = "Administration"
OPERATIONS = [
    Operation(
        "GET", f"{PREFIX}/models", list_stored_models, TAG, "List the models in the store",
        StoredModelList, "The models in the store", **_ADMIN,
    ),
    Operation(
        "GET", f"{PREFIX}/models/{{name}}", list_stored_versions, TAG, "List the versions of a model",
        StoredVersions, "The versions of the model", **_CHANGE,
    ),
    Operation(
        "GET", f"{PREFIX}/verify", verify_store, TAG, "Verify all versions in the store",
        StoreVerification, "One row for each file or version", **_ADMIN,
    ),
    Operation(
        "POST", f"{PREFIX}/models/{{name}}/activate", activate_version, TAG, "Activate a version",
        StoredVersions, _CHANGED, body=Activation, example={"version": LATEST}, **_CHANGE,
    ),
    Operation(
        "POST", f"{PREFIX}/models/{{name}}/shadow", set_shadow, TAG, "Compare a version with the active version",
        StoredVersions, _CHANGED, body=ShadowRequest, example={"version": None}, **_CHANGE,
    ),
    Operation(
        "POST", f"{PREFIX}/models/{{name}}/rollback", roll_back, TAG, "Roll back to the previous version",
        StoredVersions, _CHANGED, **_CHANGE,
    ),
    Operation(
        "POST", f"{PREFIX}/models/{{name}}/retire", retire_version, TAG, "Retire a version",
        StoredVersions, _CHANGED, body=Retirement, example={"version": 1}, **_CHANGE,
    ),
    Operation(
        "POST", f"{PREFIX}/import", import_version, TAG, "Import a version from an archive",
        ImportResponse, "The versions of the model, after the import",
        other_bodies=_ARCHIVE, query=ImportQuery, spools_body=True, **_ADMIN,
    ),
    Operation(
        "GET", f"{PREFIX}/models/{{name}}/export", export_version, TAG, "Export a version as an archive",
        None, "The archive", _ARCHIVE, query=VersionQuery, **_CHANGE,
    ),
]  # fmt: skip
