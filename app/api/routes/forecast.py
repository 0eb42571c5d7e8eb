"""Go on with series of numbers."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from app.api import openapi
from app.api.deadline import Deadline, deadline
from app.api.inference import resolve_model
from app.api.openapi import request_body
from app.api.request import (
    EXTRA_COMMAS,
    BodyReader,
    ModelName,
    RequestBody,
    json_response,
    max_json_bytes,
    read_json,
    with_limits,
)
from app.api.responses import ForecastResponse, success_response, with_model
from app.errors import BadValue, quote_value
from app.serving.loader import LoadedModel
from app.serving.registry import Registry
from app.settings import Settings
from app.tasks import FORECAST
from app.tasks.forecasting import AnyForecaster

VALUES_PER_SERIES = 3000  # values that are read in the time that a series takes besides them
BYTES_PER_NUMBER = 26  # bytes that a value can take in JSON

Value = Annotated[float, Field(ge=-1e300, le=1e300)] | None
Level = Annotated[float, Field(gt=0, lt=100)]


def _one_or_many(value: Any) -> str:
    """Whether it is a series or a list of series."""
    return "many" if isinstance(value, list) and value and isinstance(value[0], list) else "one"


class ForecastRequest(RequestBody):
    values: Annotated[
        Annotated[list[Value], Field(fail_fast=True), Tag("one")]
        | Annotated[list[Annotated[list[Value], Field(fail_fast=True)]], Field(fail_fast=True), Tag("many")],
        Discriminator(_one_or_many),
    ] = Field(description="a series or a list of series; null marks a missing value")
    horizon: int = Field(24, ge=1)
    levels: list[Level] = Field([80.0, 95.0], max_length=10, description="per cent that an interval is to hold")
    seasonality: int | None = Field(
        None, ge=1, description="values in a season, such as 24 for hours; null: it is looked for"
    )
    model: ModelName = None
    h: int | None = Field(None, ge=1, description="Nixtla's name of `horizon`")
    level: list[Level] | None = Field(None, max_length=10, description="Nixtla's name of `levels`")

    def resolved(self) -> Self:
        """The same in our own names. Raises BadValue where a value came by both."""
        given: dict[str, Any] = {}
        for ours, theirs in (("horizon", "h"), ("levels", "level")):
            if (value := getattr(self, theirs)) is not None:
                if ours in self.model_fields_set:
                    raise BadValue(f"{theirs} is another name of {ours}; send one of them", theirs)
                given |= {ours: value, theirs: None}
        return self.model_copy(update=given) if given else self


def add(routes: APIRouter, registry: Registry, settings: Settings) -> None:
    """``/v1/series/forecast``, with the limits of the settings."""
    parsing, histories = registry.parse_executor, request_model(settings)
    limit = max_json_bytes(settings.max_body_bytes, BYTES_PER_NUMBER * settings.max_series_values)
    reading = BodyReader(limit, settings.body_seconds, parsing)
    most = settings.max_series_values + settings.max_series + EXTRA_COMMAS

    @routes.post(
        "/series/forecast",
        openapi_extra=request_body(histories, openapi.FORECAST_EXAMPLE),
        responses=success_response(ForecastResponse),
    )
    async def forecast(request: Request) -> Response:
        """Go on with series of numbers, with intervals."""
        until = deadline(request, settings.request_seconds)
        body = (await read_json(request, histories, reading, most)).resolved()
        live = await resolve_model(request, registry, FORECAST, body.model, until)
        live.engine.admit(1)
        async with Deadline(request, until):
            items = await parsing.run_or_inline(size(body), parse_series, live, body, settings)
            answers = await live.engine.submit(items)
            length = len(items) * body.horizon * (1 + len(body.levels))
            return await parsing.run_admitted_or_inline(length, _response, live, items, answers, body.levels)


def request_model(settings: Settings) -> type[ForecastRequest]:
    """The body, with the limits of the settings."""
    return with_limits(ForecastRequest, horizon={"le": settings.max_horizon}, h={"le": settings.max_horizon})


def size(body: ForecastRequest) -> int:
    """How long its series take to be read, in values: in each a season is looked for, and gaps are filled."""
    many = bool(body.values) and isinstance(body.values[0], list)
    lengths = [len(series) for series in body.values if isinstance(series, list)] if many else [len(body.values)]
    return sum(VALUES_PER_SERIES + length for length in lengths)


def parse_series(
    live: LoadedModel[AnyForecaster], body: ForecastRequest, settings: Settings, series_at: str = "values.{}"
) -> list[Any]:
    """The series of a request as items; ``series_at`` is how sentences name one of several. Raises BadValue."""
    many = bool(body.values) and isinstance(body.values[0], list)
    series: list[Any] = list(body.values) if many else [body.values]
    field = series_at.partition(".")[0]
    if len(series) > settings.max_series:
        raise BadValue(f"{field} has {len(series)} series; allowed are {settings.max_series}", field)
    if (count := sum(map(len, series))) > settings.max_series_values:
        raise BadValue(f"{field} has {count:,} values; allowed are {settings.max_series_values:,}", field)
    if len(set(body.levels)) < len(body.levels):
        raise BadValue(f"levels is {quote_value(body.levels)}; each may come once", "levels")
    parse, season = live.predictor.parse, body.seasonality
    names = [series_at.format(i) if many else "values" for i in range(len(series))]
    return [parse(values, body.horizon, name, season) for name, values in zip(names, series, strict=True)]


def level_name(level: float) -> str:
    """The key of an interval: ``80``, ``99.9``."""
    return repr(level).removesuffix(".0")


def results(
    live: LoadedModel[AnyForecaster], items: list[Any], answers: list[Any], levels: list[float]
) -> list[dict[str, Any]]:
    """What is told of each series: arrays [horizon], an interval for each of ``levels``."""
    told = []
    for item, answer in zip(items, answers, strict=True):
        outlook = live.predictor.forecast(item, answer)
        bounds = [dict(zip(("lower", "upper"), outlook.interval(level), strict=True)) for level in levels]
        intervals = dict(zip(map(level_name, levels), bounds, strict=True))
        season = outlook.seasonality
        told.append({"mean": outlook.mean, "median": outlook.median, "intervals": intervals, "seasonality": season})
    return told


def _response(live: LoadedModel[AnyForecaster], items: list[Any], answers: list[Any], levels: list[float]) -> Response:
    return json_response(with_model(live, results=results(live, items, answers, levels)))
