"""Response schemas of ``/v1/admin``, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.api.responses import Canary, ResponseModel
from app.store import TaskName


class RolloutState(ResponseModel):
    """The rollout state of a model."""

    name: str
    task: TaskName | None = Field(description="null if no version can be read")
    default: bool = Field(description="whether this is the default model of its task, for requests without a model")
    active: int | None = Field(description="the version for requests without a version number")
    update_policy: Literal["latest", "pinned"] = Field(
        description="`latest` if new versions become active when they are published, `pinned` if an admin chose the "
        "active version"
    )
    canary: Canary | None
    previous: int | None = Field(description="the version that a rollback activates")
    retired: list[int]
    unloaded: bool
    changed: str = Field(description="time of the last change in ISO 8601, or empty if there was no change")
    by: str = Field(description="the last command that changed the state")
    problem: str = Field(description="empty if the state can be read")


class StoredModel(RolloutState):
    versions: list[int]


class StoredVersion(ResponseModel):
    version: int
    role: Literal["", "active", "canary", "previous", "retired"]
    problem: str = Field(description="empty if the version can be served; otherwise the fields below are left out")
    bytes: int | None = Field(None, description="size of all files")
    title: str | None = None
    created: str | None = Field(None, description="ISO 8601")
    metrics: dict[str, float] | None = None
    notes: str | None = None


class StoredVersions(RolloutState):
    versions: list[StoredVersion]


class ImportResponse(StoredVersions):
    imported: int = Field(description="number of the new version")


class StoredModelList(ResponseModel):
    data: list[StoredModel]


class StoreCheck(ResponseModel):
    what: str = Field(description="the file or version that was checked")
    problem: str = Field(description="the problem that was found, or empty")


class StoreVerification(ResponseModel):
    data: list[StoreCheck]
