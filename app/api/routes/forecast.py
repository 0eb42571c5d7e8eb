"""Forecasting: ``/v1/series/forecast``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, NotRequired

from pydantic import Discriminator, Field, Tag
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.errors import MANY, ONE
from app.api.inference import Call, Protocol, json_endpoint, resolve, run_job
from app.api.openapi import JSON, SALES, TEXT
from app.api.operation import Operation, Request
from app.api.request_body import ModelName, RequestBody, limited, text_or_list
from app.api.request_head import preferred_media_type, read_query, reject_query
from app.api.responses import BAD_REQUESTS, ErrorBody, Floats, ModelAnswer, error_responses, json_response, model_fields
from app.api.routes.forecast_table import BODIES, CSV, DEFAULT_HORIZON, ReadTable, TableQuery, is_table, read_table
from app.errors import BadValue
from app.limits import Limits
from app.tasks import FORECAST
from app.tasks.forecasting import ForecastAnswer, ForecastJob

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
    ]
    """a series, or a list of at most {max_series} series, with at most {max_series_values:,} values in all; null marks
    a missing value"""
    horizon: int = Field(DEFAULT_HORIZON, ge=1, json_schema_extra=HORIZON)
    """number of values to forecast"""
    levels: list[Level] = Field([80.0, 95.0], max_length=10)
    """levels of the intervals in per cent"""
    seasonality: int | None = Field(None, ge=1)
    """values per season, such as 24 for hourly values. If it is null, a network that was fine-tuned on a table uses the
    season of the table. Otherwise the service detects the season."""
    integer: bool = False
    """whether to round all results to integers, for example for counts"""
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
    ) = Field(None, examples=[{"price": [2.5, 2.5, 2.0, 2.5, 2.0], "promo": [0, 0, 1, 0, 1]}], max_length=100)
    """for versions trained with `--known-covariates`: a list of numbers for each covariate. The list has one number for
    each value of the series, followed by one for each step of the horizon. For a list of series, send one list of
    numbers for each series."""
    start: Starts | None = Field(None, examples=["2024-04-22"])
    """for versions trained with `--holidays`: time of the first value in ISO 8601. Send one time for all series, or a
    list with one time for each series."""
    model: ModelName = None
    h: int | None = Field(None, ge=1, json_schema_extra=HORIZON)
    """alias of `horizon`, as in Nixtla's API"""
    level: list[Level] | None = Field(None, max_length=10)
    """alias of `levels`, as in Nixtla's API"""


class Interval(TypedDict):
    lower: Floats
    upper: Floats


class ReadSeries(TypedDict):
    """How a series was read from a table."""

    start: str
    """time of the first value"""
    end: str
    """time of the last value"""
    length: int
    """number of values, including the missing ones"""
    missing: int
    """number of missing values"""


class History(TypedDict):
    times: list[str]
    values: list[float | None]


class SeriesResult(TypedDict):
    mean: Floats
    """mean of the forecast at each of the `horizon` steps"""
    median: Floats
    intervals: dict[str, Interval]
    """prediction intervals by level in per cent, such as `80`"""
    seasonality: int | None
    """values per season, or null if the model does not use seasons"""
    series: NotRequired[str]
    """only for a table, as are `read` and `times`: its name"""
    read: NotRequired[ReadSeries]
    times: NotRequired[list[str]]
    """the time of each of the `horizon` steps"""
    history: NotRequired[History]
    """only with `history`: the series as it was read"""


class TableDescription(TypedDict):
    """How a table was read."""

    step: str
    """time step, such as `day`; `step` without time stamps"""
    remarks: list[str]
    """what was detected, and what was left out or repaired, with reasons"""


class ForecastResponse(ModelAnswer):
    results: list[SeriesResult]
    """one forecast for each series, in the order of the request"""
    table: NotRequired[TableDescription]
    """only for a table: how it was read"""


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
    names = model_fields(call.model)
    return {"model": names["model"], "version": names["version"], "results": results}


def level_name(level: float) -> str:
    """Return the key of an interval, such as ``80`` or ``99.9``."""
    return repr(level).removesuffix(".0")


@json_endpoint(FORECAST, ForecastRequest, Protocol(encode))
def forecast_json(body: ForecastRequest, limits: Limits) -> ForecastJob:
    names = {}
    for field, alias in (("horizon", "h"), ("levels", "level")):
        if getattr(body, alias) is not None:
            if field in body.model_fields_set:
                raise BadValue(f"{alias} is another name of {field}; send one of them", alias)
            names[field] = alias
    horizon = getattr(body, names.get("horizon", "horizon"))
    if not {"horizon", "h"} & body.model_fields_set:
        horizon = min(DEFAULT_HORIZON, limits.max_horizon)
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


@dataclasses.dataclass
class TableJob(ForecastJob):
    """The series of a table. Errors name a series as the table does."""

    table: ReadTable = dataclasses.field(kw_only=True)

    def answer_size(self, outputs: Sequence[Any]) -> int:
        return super().answer_size(outputs) + sum(map(len, self.series))  # with the history

    def series_name(self, index: int) -> str:
        return f"file.{self.table.series[index].name}"


async def forecast_table(request: Request) -> Response:
    """Answer a request with a table. Raises the errors of ``read_table``, ``resolve`` and ``run_job``."""
    query = read_query(request, TableQuery)
    model = await resolve(request, FORECAST, query.model)
    model.engine.admit(1)  # reject before the body is read
    table = await read_table(request, query, model.card)
    known = model.card.series and model.card.series.known
    job = TableJob(
        [series.values for series in table.series],
        len(table.series[0].steps),
        query.levels or [80.0, 95.0],
        query.seasonality,
        query.integer,
        {name: [each.covariates[name] for each in table.series] for name in table.series[0].covariates} or None,
        [series.start for series in table.series] if known and known.calendar else None,
        names={"start": "file"},
        table=table,
    )
    job.check(request.limits)
    return await run_job(Call(request, query, model), job, Protocol(encode_table))


def encode_table(call: Call[TableQuery], job: TableJob, answer: ForecastAnswer) -> Response:
    from app.tables.forecast import forecast_rows, write_csv

    content = encode(call, job, answer)
    pairs = list(zip(job.table.series, content["results"], strict=True))
    if preferred_media_type(call.request.headers.get("accept", "*/*"), [JSON, CSV]) == CSV:
        rows = [row for series, result in pairs for row in forecast_rows(series, result)]
        return Response(write_csv(rows), media_type=CSV)
    for series, result in pairs:
        length = len(series.values)
        past, missing = series.times[:length], series.values.count(None)
        read: ReadSeries = {"start": past[0], "end": past[-1], "length": length, "missing": missing}
        result |= {"series": series.name, "read": read, "times": series.steps}
        if call.body.history:
            result["history"] = {"times": past, "values": series.values}
    content["table"] = {"step": job.table.step, "remarks": job.table.remarks}
    return json_response(content)


async def forecast_series(request: Request) -> Response:
    """Forecast the next values of one or several series of numbers, with prediction intervals.

    Send JSON with the values, or a table: a CSV or .xlsx file as the body, or as `file` in a form. The query parameters
    are for tables only; repeat one to send several values. A form may also have a table `future` with the future values
    of known covariates; without it, they are in the rows after the last value. If a table can be read in several ways,
    the error names the parameter that decides. With the header `Accept: text/csv`, the answer to a table is a table.
    """
    if is_table(request):
        return await forecast_table(request)
    if request.scope["query_string"]:
        reject_query(request, in_body=True)
    return await forecast_json(request)


OPERATIONS = [
    Operation(
        "POST",
        "/v1/series/forecast",
        forecast_series,
        "Tasks",
        "Forecast series",
        ForecastResponse,
        "Mean, median and intervals of each series",
        other_answers={CSV: {"schema": TEXT}},
        body=ForecastRequest,
        example={"values": SALES, "horizon": 4, "levels": [80, 95]},
        other_bodies=BODIES,
        query=TableQuery,
        errors=error_responses(ErrorBody, f"{BAD_REQUESTS} 413: too large. 415: tables cannot be read here."),
    )
]
