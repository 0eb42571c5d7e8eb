"""Forecasting: ``/v1/series/forecast``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self, cast

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Discriminator, Field, Tag
from starlette.responses import Response

from app.api import openapi
from app.api.inference import Inference, InferenceBody, JsonEndpoint
from app.api.openapi import request_body
from app.api.request_body import ModelName, text_or_list, with_limits
from app.api.responses import ERROR_RESPONSES, ForecastResponse, json_response, success_response, with_model
from app.errors import BadValue, quote_value
from app.serving.model import Model
from app.serving.models import Models
from app.settings import Settings
from app.tasks import FORECAST
from app.tasks.covariates import read_covariates
from app.tasks.forecasting import AnyForecaster, GlobalForecaster

VALUES_PER_SERIES = 3000  # parsing a series costs as much as this many values, in addition to its own values
BYTES_PER_NUMBER = 26  # largest size of a value in JSON

Value = Annotated[float, Field(ge=-1e300, le=1e300)] | None
Level = Annotated[float, Field(gt=0, lt=100)]
Known = Annotated[float, Field(ge=-1e300, le=1e300)]
Start = Annotated[str, Field(max_length=100)]
Starts = Annotated[Annotated[Start, Tag("one")] | Annotated[list[Start], Tag("many")], Discriminator(text_or_list)]


def _one_or_many(value: Any) -> str:
    """Return the union tag for ``value``: ``one`` for one series, ``many`` for a list of series."""
    return "many" if isinstance(value, list) and value and isinstance(value[0], list) else "one"


class ForecastRequest(InferenceBody):
    values: Annotated[
        Annotated[list[Value], Field(fail_fast=True), Tag("one")]
        | Annotated[list[Annotated[list[Value], Field(fail_fast=True)]], Field(fail_fast=True), Tag("many")],
        Discriminator(_one_or_many),
    ] = Field(description="a series or a list of series; null marks a missing value")
    horizon: int = Field(24, ge=1, description="number of values to forecast")
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
                Annotated[list[Known], Field(fail_fast=True), Tag("one")]
                | Annotated[list[Annotated[list[Known], Field(fail_fast=True)]], Field(fail_fast=True), Tag("many")],
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
    h: int | None = Field(None, ge=1, description="alias of `horizon`, as in Nixtla's API")
    level: list[Level] | None = Field(None, max_length=10, description="alias of `levels`, as in Nixtla's API")

    def resolved(self) -> Self:
        """Return the body with ``h`` and ``level`` moved to ``horizon`` and ``levels``.

        Raises:
            BadValue: a field and its alias were both sent, or a level is repeated in ``level``.
        """
        changes: dict[str, Any] = {}
        for field, alias in (("horizon", "h"), ("levels", "level")):
            if (value := getattr(self, alias)) is not None:
                if field in self.model_fields_set:
                    raise BadValue(f"{alias} is another name of {field}; send one of them", alias)
                changes |= {field: value, alias: None}
        _check_levels(self.level or [], "level")
        return self.model_copy(update=changes) if changes else self


def _check_levels(levels: list[float], param: str) -> None:
    """Raise BadValue, with the name ``param``, if a level is repeated."""
    if len(set(levels)) < len(levels):
        raise BadValue(f"{param} is {quote_value(levels)}; each level may occur only once", param)


def request_model(settings: Settings) -> type[ForecastRequest]:
    """Return the Pydantic class of the body, with the limits in ``settings``."""
    values = (
        f"a series, or a list of at most {settings.max_series} series, with at most {settings.max_series_values:,} "
        "values in all; null marks a missing value"
    )
    horizon = {"le": settings.max_horizon}
    return with_limits(ForecastRequest, values={"description": values}, horizon=horizon, h=horizon)


def parse_size(body: ForecastRequest) -> int:
    """Return the cost of parsing the series, in values. Parsing fills gaps in each series and detects its season."""
    is_list = bool(body.values) and isinstance(body.values[0], list)
    lengths = [len(series) for series in body.values if isinstance(series, list)] if is_list else [len(body.values)]
    return sum(VALUES_PER_SERIES + length for length in lengths)


def parse_series(
    model: Model[AnyForecaster],
    body: ForecastRequest,
    settings: Settings,
    series_param: str = "values.{}",
    start_param: str = "start.{}",
) -> list[Any]:
    """Return one engine item for each series.

    ``series_param`` and ``start_param`` are patterns for the names of a series and of its start time in error messages,
    with {} in place of the number of the series.

    Raises:
        BadValue: there are too many series or values, a level is repeated, or the model cannot read the values.
    """
    is_list = bool(body.values) and isinstance(body.values[0], list)
    series: list[Any] = list(body.values) if is_list else [body.values]
    field = series_param.partition(".")[0]
    if len(series) > settings.max_series:
        raise BadValue(f"{field} has {len(series)} series; the maximum is {settings.max_series}", field)
    if (count := sum(map(len, series))) > settings.max_series_values:
        raise BadValue(f"{field} has {count:,} values; the maximum is {settings.max_series_values:,}", field)
    covariates = _covariates(model, body, [len(values) for values in series], is_list, settings, start_param)
    _check_levels(body.levels, "levels")
    parse, season = model.predictor.parse, body.seasonality
    params = [series_param.format(i) if is_list else "values" for i in range(len(series))]
    if covariates is not None:  # only global forecasters, which forecast any series, have covariates
        parse = cast(GlobalForecaster, model.predictor).parse
        rows = zip(params, series, covariates, strict=True)
        return [parse(values, body.horizon, param, season, known) for param, values, known in rows]
    return [parse(values, body.horizon, param, season) for param, values in zip(params, series, strict=True)]


def _covariates(
    model: Model[AnyForecaster],
    body: ForecastRequest,
    lengths: list[int],
    is_list: bool,
    settings: Settings,
    start_param: str,
) -> list[np.ndarray] | None:
    """Return the covariates of each series, or None if the model takes no covariates. Raises BadValue."""
    columns = (body.covariates or {}).values()
    rows = [row for each in columns for row in (each if each and isinstance(each[0], list) else [each])]
    count = sum(lengths) + sum(len(row) for row in rows if isinstance(row, list))
    if count > (allowed := settings.max_series_values):
        raise BadValue(f"values and covariates have {count:,} values; the maximum is {allowed:,}", "covariates")
    traits = model.card.series
    known = traits.known if traits else None
    sent = body.covariates, body.start
    return read_covariates(model.card.name, known, *sent, lengths, body.horizon, is_list, start_param)


def level_name(level: float) -> str:
    """Return the key of an interval, such as ``80`` or ``99.9``."""
    return repr(level).removesuffix(".0")


def forecast_results(
    model: Model[AnyForecaster], items: Sequence[Any], outputs: Sequence[Any], body: ForecastRequest
) -> list[dict[str, Any]]:
    """Return the forecast of each series: the mean, the median, the interval bounds of each level, and the seasonality.

    The mean, the median and each bound are arrays [horizon]. ``body`` contains the levels, and whether results are
    rounded.
    """
    results = []
    for item, output in zip(items, outputs, strict=True):
        forecast = model.predictor.forecast(item, output)
        if body.integer:
            forecast = forecast.rounded()
        bounds = [dict(zip(("lower", "upper"), forecast.interval(level), strict=True)) for level in body.levels]
        intervals = dict(zip(map(level_name, body.levels), bounds, strict=True))
        results.append(
            {
                "mean": forecast.mean,
                "median": forecast.median,
                "intervals": intervals,
                "seasonality": forecast.seasonality,
            }
        )
    return results


class ForecastInference(Inference[AnyForecaster]):
    """Forecasts the series of a request to ``/v1/series/forecast``."""

    series_param = "values.{}"
    start_param = "start.{}"

    def __init__(self, model: Model[AnyForecaster], body: ForecastRequest, settings: Settings) -> None:
        super().__init__(model)
        self.parse_size = parse_size(body)
        self.body = body
        self.settings = settings
        self.items: list[Any] = []

    def parse(self) -> list[Any]:
        self.items = parse_series(self.model, self.body, self.settings, self.series_param, self.start_param)
        return self.items

    def response_size(self, outputs: Sequence[Any]) -> int:
        return len(self.items) * self.body.horizon * (1 + len(self.body.levels))

    def results(self, outputs: Sequence[Any]) -> list[dict[str, Any]]:
        return forecast_results(self.model, self.items, outputs, self.body)

    def respond(self, outputs: Sequence[Any]) -> Response:
        return json_response(with_model(self.model, results=self.results(outputs)))


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the route ``/v1/series/forecast``. ``settings`` has the limits for requests."""
    routes = APIRouter(prefix="/v1", tags=["Tasks"], responses=ERROR_RESPONSES)
    body_model = request_model(settings)
    endpoint = JsonEndpoint(
        models,
        FORECAST,
        body_model,
        lambda _, model, body: ForecastInference(model, body, settings),
        content_bytes=BYTES_PER_NUMBER * settings.max_series_values,
        content_commas=settings.max_series_values + settings.max_series,
    )

    @routes.post(
        "/series/forecast",
        operation_id="forecast_series",
        summary="Forecast series",
        openapi_extra=request_body(body_model, openapi.FORECAST_EXAMPLE),
        responses=success_response(ForecastResponse, description="Mean, median and intervals of each series"),
    )
    async def forecast(request: Request) -> Response:
        """Forecast the next values of one or several series of numbers, with prediction intervals."""
        return await endpoint.run(request)

    return routes
