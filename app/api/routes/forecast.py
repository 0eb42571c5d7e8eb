"""Forecasting: ``/v1/series/forecast``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag
from typing_extensions import TypedDict

from app.api.errors import MANY, ONE
from app.api.inference import Call, Protocol, json_endpoint
from app.api.openapi import SALES
from app.api.operation import Operation
from app.api.request_body import ModelName, RequestBody, limited, text_or_list
from app.api.responses import ERROR_RESPONSES, Floats, ModelAnswer, model_fields
from app.errors import BadValue
from app.settings import Settings
from app.tasks import FORECAST
from app.tasks.forecasting import ForecastAnswer, ForecastJob

BYTES_PER_NUMBER = 26  # largest size of a value in JSON
DEFAULT_HORIZON = 24

Value = Annotated[float, Field(ge=-1e300, le=1e300)] | None
Level = Annotated[float, Field(gt=0, lt=100)]
Known = Annotated[float, Field(ge=-1e300, le=1e300)]
Start = Annotated[str, Field(max_length=100)]
Starts = Annotated[Annotated[Start, Tag(ONE)] | Annotated[list[Start], Tag(MANY)], Discriminator(text_or_list)]
HORIZON = limited("max_horizon")


def _one_or_many(value: Any) -> str:
    """Return the union tag for ``value``, which is one series or a list of series."""
    return MANY if isinstance(value, list) and value and isinstance(value[0], list) else ONE


class ForecastRequest(RequestBody):
    values: Annotated[
        Annotated[list[Value], Field(fail_fast=True), Tag(ONE)]
        | Annotated[list[Annotated[list[Value], Field(fail_fast=True)]], Field(fail_fast=True), Tag(MANY)],
        Discriminator(_one_or_many),
    ] = Field(
        description="a series, or a list of at most {max_series} series, with at most {max_series_values:,} values in "
        "all; null marks a missing value"
    )
    horizon: int = Field(DEFAULT_HORIZON, ge=1, description="number of values to forecast", json_schema_extra=HORIZON)
    levels: list[Level] = Field([80.0, 95.0], max_length=10, description="levels of the intervals in per cent")
    seasonality: int | None = Field(
        None,
        ge=1,
        description="values per season, such as 24 for hourly values. If it is null, a network that was fine-tuned on "
        "a table uses the season of the table. Otherwise the service detects the season.",
    )
    integer: bool = Field(False, description="whether to round all results to integers, for example for counts")
    covariates: (
        dict[
            Annotated[str, Field(max_length=200)],
            Annotated[
                Annotated[list[Known], Field(fail_fast=True), Tag(ONE)]
                | Annotated[list[Annotated[list[Known], Field(fail_fast=True)]], Field(fail_fast=True), Tag(MANY)],
                Discriminator(_one_or_many),
            ],
        ]
        | None
    ) = Field(
        None,
        description="for versions trained with `--known-covariates`: a list of numbers for each covariate. The list "
        "has one number for each value of the series, followed by one for each step of the horizon. For a list of "
        "series, send one list of numbers for each series.",
        examples=[{"price": [2.5, 2.5, 2.0, 2.5, 2.0], "promo": [0, 0, 1, 0, 1]}],
        max_length=100,
    )
    start: Starts | None = Field(
        None,
        description="for versions trained with `--holidays`: time of the first value in ISO 8601. Send one time for "
        "all series, or a list with one time for each series.",
        examples=["2024-04-22"],
    )
    model: ModelName = None
    h: int | None = Field(None, ge=1, description="alias of `horizon`, as in Nixtla's API", json_schema_extra=HORIZON)
    level: list[Level] | None = Field(None, max_length=10, description="alias of `levels`, as in Nixtla's API")


class Interval(TypedDict):
    lower: Floats
    upper: Floats


class SeriesResult(TypedDict):
    mean: Annotated[Floats, Field(description="mean of the forecast at each of the `horizon` steps")]
    median: Floats
    intervals: Annotated[
        dict[str, Interval], Field(description="prediction intervals by level in per cent, such as `80`")
    ]
    seasonality: Annotated[
        int | None, Field(description="values per season, or null if the model does not use seasons")
    ]


class ForecastResponse(ModelAnswer):
    results: Annotated[
        list[SeriesResult], Field(description="one forecast for each series, in the order of the request")
    ]


def encode(call: Call[Any], job: ForecastJob, answer: ForecastAnswer) -> ForecastResponse:
    results: list[SeriesResult] = []
    for forecast in answer.forecasts:
        intervals: dict[str, Interval] = {
            level_name(level): {"lower": lower, "upper": upper} for level, (lower, upper) in forecast.bounds.items()
        }
        results.append(
            {
                "mean": forecast.mean,
                "median": forecast.median,
                "intervals": intervals,
                "seasonality": forecast.seasonality,
            }
        )
    return {**model_fields(call.model), "results": results}


def level_name(level: float) -> str:
    """Return the key of an interval, such as ``80`` or ``99.9``."""
    return repr(level).removesuffix(".0")


def content(settings: Settings) -> tuple[int, int]:
    """Return the largest number of bytes and commas of the values in a body."""
    return BYTES_PER_NUMBER * settings.max_series_values, settings.max_series_values + settings.max_series


@json_endpoint(FORECAST, ForecastRequest, Protocol(encode), content)
def forecast_series(body: ForecastRequest, settings: Settings) -> ForecastJob:
    """Forecast the next values of one or several series of numbers, with prediction intervals."""
    names = {}
    for field, alias in (("horizon", "h"), ("levels", "level")):
        if getattr(body, alias) is not None:
            if field in body.model_fields_set:
                raise BadValue(f"{alias} is another name of {field}; send one of them", alias)
            names[field] = alias
    horizon = getattr(body, names.get("horizon", "horizon"))
    if not {"horizon", "h"} & body.model_fields_set:
        horizon = min(DEFAULT_HORIZON, settings.max_horizon)
    values: Any = body.values
    has_many = bool(values) and isinstance(values[0], list)
    return ForecastJob(
        values if has_many else [values],
        horizon,
        getattr(body, names.get("levels", "levels")),
        body.seasonality,
        body.integer,
        body.covariates,
        body.start,
        has_many,
        names=names,
    )


OPERATIONS = [
    Operation(
        "POST",
        "/v1/series/forecast",
        forecast_series,
        "Tasks",
        "Forecast series",
        ForecastResponse,
        "Mean, median and intervals of each series",
        body=ForecastRequest,
        example={"values": SALES, "horizon": 4, "levels": [80, 95]},
        errors=ERROR_RESPONSES,
        has_timeout=True,
    )
]
