"""The format of the model card, ``card.json``, which contains all metadata of a version."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

CARD = "card.json"
MAX_BYTES = 4 * 2**20  # limit of card.json and the other JSON files; a long vocabulary takes a few thousand bytes
TaskName = Literal["classify", "continue", "forecast", "sample", "infer"]
VersionNumber = Annotated[int, Field(ge=1, lt=10**9)]
INT64_LIMIT = 2**63
Int64 = Annotated[int, Field(ge=-INT64_LIMIT, lt=INT64_LIMIT)]
UNKNOWN_CHARACTER = "<unk>"
HIGHER_IS_BETTER = ("accuracy", "mean_average_precision")  # main figures; of all others, a lower value is better


class StoreError(Exception):
    """A version or file of the store is invalid. The message states the place and the problem."""


class VersionNotFound(StoreError):
    """The model or the version does not exist."""


NAME = r"[a-z0-9][a-z0-9-]{0,63}"


def _not_reserved(name: str) -> str:
    """Return ``name``. Raises PydanticCustomError for ``stats``, because /v2/models/stats is another endpoint."""
    if name == "stats":
        raise PydanticCustomError("reserved_name", "'stats' is reserved, because /v2/models/stats is another endpoint")
    return name


ModelName = Annotated[str, Field(pattern=f"^{NAME}$"), AfterValidator(_not_reserved)]


def is_model_name(text: str) -> bool:
    """Return whether a text is an allowed name of a model."""
    return re.fullmatch(NAME, text) is not None and text != "stats"


def check_name(text: str) -> None:
    """Raise VersionNotFound for a text that is not an allowed name of a model."""
    if not is_model_name(text):
        raise VersionNotFound(
            f"{shorten(text)} is not a model name; a name has 1 to 64 lower-case letters, digits and hyphens, does not "
            "begin with a hyphen, and is not reserved"
        )


def shorten(value: object) -> str:
    """Return a value for an error message: quoted, and cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class StrictModel(BaseModel):
    """A JSON object of the store. Unknown fields are ignored, because a newer service may have written them."""

    # With defer_build, a class that is only a part of Card gets no schema of its own, which shortens the start.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


def _timestamp(text: str) -> str:
    """Return ``text``. Raises ValueError if it is not a time in ISO 8601 that has a timestamp in seconds."""
    datetime.fromisoformat(text).timestamp()  # raises ValueError for 1 January of the year 1
    return text


def _json_safe(value: Any) -> Any:
    """Return ``value``. Raises ValueError if it contains, at any depth, a number that some JSON readers reject."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _json_safe(item)
    if isinstance(value, int) and not -INT64_LIMIT <= value < INT64_LIMIT:
        raise ValueError("an integer should have at most 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number should be finite")
    return value


def _date(value: str) -> str:
    """Return ``value``. Raises ValueError if it is not a date in ISO 8601."""
    date.fromisoformat(value)
    return value


class TensorSpec(StrictModel):
    """An input or output tensor of a network, as the API reads or returns it. A size of -1 in ``shape`` may vary.

    A network with an unknown property of a tensor might compute wrong results, so unknown fields are an error.
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    dtype: str
    shape: list[Int64]


class Metric(StrictModel):
    """A measured value on a ``split`` of the data. ``decimals`` is the number of its decimal places.

    A new measurement that differs by at most one in the last decimal place confirms the value. ``interval`` has the
    bounds of its 95 % confidence interval. ``weights`` names the network: this version, the network before the training
    on all data, or another method.
    """

    value: float
    split: str
    decimals: int = Field(4, ge=0, le=17)
    interval: list[float] | None = None
    weights: Literal["published", "before refit", "other method"] = "published"


class Speed(StrictModel):
    """The speed of a network on one thread of the machine ``hardware``. ``Task.unit`` is the unit, such as images."""

    milliseconds: float  # for a batch of one
    per_second: float  # for batches of ``rows``
    rows: Int64
    hardware: str


class Reading(StrictModel):
    """An earlier measurement on the same test part, which may have influenced this version."""

    reason: str
    metrics: dict[str, float]


class Ancestor(StrictModel):
    """A network from which this network learned, or whose calibration it has.

    ``name`` is NAME@VERSION, or describes an unpublished network. ``data`` and ``refit_steps`` are those of its card;
    ``refit_steps`` is null if only a last layer, which was replaced since, was trained on all data. ``minutes`` is null
    if the duration of its training is unknown.
    """

    name: str
    role: Literal["base", "teacher", "calibration"]
    weights_sha256: str | None
    data: dict[str, str]
    refit_steps: Int64 | None = None
    command: str
    minutes: float | None


class KnownCovariate(StrictModel):
    """A covariate: a column whose future values the client knows.

    ``mean`` and ``scale`` are its mean and standard deviation in the training data. ``coefficient`` is the effect of
    one standard deviation, relative to the values of a series; see ``app.tasks.covariates``.
    """

    name: str
    mean: float
    scale: Annotated[float, Field(gt=0)]
    coefficient: float


class HolidayCalendar(StrictModel):
    """The dates of a country's public holidays in ISO 8601, from ``first_year`` to ``last_year``.

    ``step`` is the time step of the series for which the holidays are counted.
    """

    country: str
    step: str
    first_year: Int64
    last_year: Int64
    dates: list[Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$"), AfterValidator(_date)]]


class KnownCovariates(StrictModel):
    """The covariates of a forecaster. Each request gives their past and future values.

    If there is a ``calendar``, the service itself computes the last column: the number of holidays in each time step.
    ``proportional`` says whether effects are relative to the usual value at the same position in the season. Otherwise,
    effects are relative to the mean absolute value of the series.
    """

    columns: Annotated[list[KnownCovariate], Field(min_length=1)]
    proportional: bool = False
    calendar: HolidayCalendar | None = None

    @property
    def named(self) -> list[str]:
        """The names of the columns that requests give: all columns except the column with the holidays."""
        names = [column.name for column in self.columns]
        return names[:-1] if self.calendar else names


class SeriesTraits(StrictModel):
    """Properties of the series in the training data, which determine how the service prepares and forecasts a series.

    Attributes:
        season: values per season; 1 means no season, and None means that the season of each series is detected.
        year: values per year, if a yearly pattern is removed from each series and added to its forecast.
        non_negative: whether the forecast of a series without negative values has no negative values either.
        integer: whether the forecast of a series of integers is rounded to integers.
        known: the covariates that each request must give.
    """

    season: Annotated[int, Field(ge=1, le=168)] | None = 1
    year: Annotated[float, Field(ge=2, le=1000)] | None = None
    non_negative: bool = False
    integer: bool = False
    known: KnownCovariates | None = None


class Histogram(StrictModel):
    """The numbers of validation examples between ``edges`` of a feature, sorted.

    ``threshold`` is the population stability index above which a window of requests has drifted.
    """

    edges: list[float]
    counts: list[int]
    threshold: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _has_all_bins(self) -> Self:
        if len(self.counts) != len(self.edges) + 1 or sum(self.counts) < 1:
            raise ValueError("there should be one more count than edges, and some should not be 0")
        return self


class Reference(StrictModel):
    """The features of the validation data, with which ``window`` requests are compared; see ``records.drift``."""

    window: Annotated[int, Field(ge=1)]
    features: dict[str, Histogram]


class Card(StrictModel):
    """The content of ``card.json``: everything needed to use the weights, and how they were trained.

    ``kind`` is the key of the network in ``KINDS``. ``command`` is the command that trained or imported the network.
    ``ancestors`` lists all networks from which the network descends, the oldest first. ``held_out`` is the number of
    training examples that were not used for training. ``refit_layers`` says which layers the training on all data
    changed.
    ``licence`` and ``source`` are given for an imported network, and for a network whose training started with
    pretrained weights from outside this project.
    """

    name: ModelName
    version: VersionNumber
    task: TaskName
    title: str
    kind: str
    sizes: Annotated[dict[str, Any], AfterValidator(_json_safe)]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    labels: list[str] | None = None
    thresholds: list[float] | None = None
    vocabulary: list[str] | None = None
    residuals: list[float] | None = None
    series: SeriesTraits | None = None
    refit_steps: Int64 | None = None
    refit_layers: Literal["all", "last"] | None = None
    held_out: Int64 | None = None
    metrics: dict[str, Metric]
    earlier_readings: list[Reading] | None = None
    data: dict[str, str]
    ancestors: list[Ancestor] | None = None
    seed: Int64
    command: str
    commit: str
    resumed: list[str] | None = None
    versions: dict[str, str]
    hardware: str
    minutes: float
    created: Annotated[str, AfterValidator(_timestamp)]
    notes: str
    weights_sha256: str
    speed: Speed | None = None
    licence: str | None = None
    source: str | None = None
    reference: Reference | None = None


def is_worse(card: Card, other: Card) -> bool:
    """Return whether the main figure of a version is worse than that of another one by more than its uncertainty.

    That is, whether the other value is outside its 95 % interval. The result is False without an interval, or if both
    versions were not measured on the same data.
    """
    figures = main_figures(card, other)
    if figures is None or not (interval := figures[1].interval):
        return False
    name, _, before = figures
    low, high = interval
    return before.value > high if name in HIGHER_IS_BETTER else before.value < low


def main_figures(card: Card, other: Card) -> tuple[str, Metric, Metric] | None:
    """Return the name and both values of the first figure, or None if both were not measured on the same data."""
    name = next(iter(card.metrics), "")
    if name not in other.metrics or card.data != other.data or card.metrics[name].split != other.metrics[name].split:
        return None
    return name, card.metrics[name], other.metrics[name]


class NewCard(Card):
    """A card before its publication. Unknown fields are an error."""

    model_config = ConfigDict(extra="forbid")


def card_text(content: Mapping[str, Any]) -> bytes:
    """Return the content of ``card.json``. Raises StoreError for a text that is not Unicode."""
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        text = error.object[max(error.start - 40, 0) : error.end]
        raise StoreError(f"the card of {content['name']!r} has a text that is not Unicode: {text!r}") from None


def parse_card(content: bytes, path: str) -> Card:
    """Parse the card of a new version. Raises StoreError if it is invalid. ``path`` is for error messages."""
    return parse(NewCard, content, path)


M = TypeVar("M", bound=BaseModel)


def parse(model: type[M], content: bytes, path: str) -> M:
    """Parse a JSON file of the store. Raises StoreError if it is invalid. ``path`` is for error messages."""
    if len(content) > MAX_BYTES:
        raise StoreError(f"{path} is too large; the maximum is {MAX_BYTES:,} bytes")
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise StoreError(f"{path}: {key}: {first['msg']}, found {str(first['input'])[:80]!r}") from None
