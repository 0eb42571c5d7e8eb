"""The model card: all metadata of a version, in ``card.json``."""

from __future__ import annotations

import math
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from app.networks import TaskName

CARD = "card.json"
ModelName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
VersionNumber = Annotated[int, Field(ge=1, lt=10**9)]
INT64_LIMIT = 2**63
Int64 = Annotated[int, Field(ge=-INT64_LIMIT, lt=INT64_LIMIT)]
UNKNOWN_CHARACTER = "<unk>"


class StoreError(Exception):
    """A version that cannot be used: the sentence names the file, the key, what was found and what was expected."""


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _timestamp(text: str) -> str:
    with suppress(OverflowError):
        datetime.fromisoformat(text).timestamp()  # of the year 1 there is none
        return text
    raise ValueError("it is no time that can be told in seconds")


def _json_safe(value: Any) -> Any:
    """What can be written as JSON again, wherever it lies."""
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _json_safe(each)
    if isinstance(value, int) and not -INT64_LIMIT <= value < INT64_LIMIT:
        raise ValueError("a whole number should be one of 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number should be finite")
    return value


class TensorSpec(StrictModel):
    """A tensor as callers see it; -1 is a dimension that varies."""

    name: str
    dtype: str
    shape: list[Int64]


class Metric(StrictModel):
    """A measured figure. ``decimals``: how many of its digits are stated, so how far a new measurement may be off."""

    value: Annotated[float, Field(strict=False)]
    split: str
    decimals: int = Field(4, ge=0, le=17)


class Speed(StrictModel):
    """How fast one thread is. A figure of a machine more than of a network: ``hardware`` says of which."""

    milliseconds: Annotated[float, Field(strict=False)]  # for one image, character or series alone
    per_second: Annotated[float, Field(strict=False)]  # of them, in batches of ``rows``
    rows: Int64
    hardware: str


class Card(StrictModel):
    """All that is needed to use a version's weights, and all that is known of how they came about."""

    name: ModelName
    version: VersionNumber
    task: TaskName
    title: str
    kind: str
    sizes: Annotated[dict[str, Any], AfterValidator(_json_safe)]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    labels: list[str] | None = None
    vocabulary: list[str] | None = None
    residuals: list[float] | None = None
    metrics: dict[str, Metric]
    data: dict[str, str]
    seed: Int64
    command: str
    commit: str
    versions: dict[str, str]
    hardware: str
    minutes: float
    created: Annotated[str, AfterValidator(_timestamp)]
    notes: str
    weights_sha256: str
    speed: Speed | None = None


def parse_card(content: bytes, path: str) -> Card:
    """A card from its text; ``path`` is how sentences name it. Raises StoreError."""
    try:
        return Card.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise StoreError(f"{path}: {key}: {first['msg']}, found {str(first['input'])[:80]!r}") from error


def read_card(folder: Path) -> Card:
    """The card of a version. Raises StoreError."""
    path = f"{folder.parent.name}/{folder.name}/{CARD}"
    try:
        card = parse_card((folder / CARD).read_bytes(), path)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    for key, found, expected in (("name", card.name, folder.parent.name), ("version", str(card.version), folder.name)):
        if found != expected:
            raise StoreError(f"{path}: {key} is {found!r}, expected {expected!r} as in the path")
    return card
