"""KServe's time series protocol: forecasts with quantiles."""

from __future__ import annotations

import calendar
import secrets
from datetime import date, datetime, timedelta
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, RootModel
from pydantic_core import PydanticCustomError
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.inference import Call, Protocol, json_endpoint
from app.api.openapi import SALES
from app.api.operation import Operation, Request
from app.api.request_body import ModelName, RequestBody, limited
from app.api.responses import ERROR_RESPONSES, Floats, json_response
from app.api.routes.forecast import Value
from app.errors import BadValue, quote_value
from app.limits import Limits
from app.store import Card
from app.tasks import FORECAST
from app.tasks.covariates import parse_time, step_seconds
from app.tasks.forecasting import ForecastAnswer, ForecastJob, SeriesForecast

SECONDS = {
    **{"second": 1, "S": 1, "minute": 60, "T": 60, "hour": 3600, "H": 3600},
    **{"day": 86400, "D": 86400, "week": 604800, "W": 604800},
}
MONTHS = {"month": 1, "M": 1, "quarter": 3, "Q": 3, "year": 12, "Y": 12}
Frequency = Literal[
    "second", "S", "minute", "T", "hour", "H", "day", "D", "week", "W", "month", "M", "quarter", "Q", "year", "Y"
]


def _level(quantile: float) -> float:
    """Return the level, in per cent, of the central prediction interval that ends at ``quantile``.

    The level of the median is 0.
    """
    return round(abs(2 * quantile - 1) * 100, 10)


def _check_level(quantile: float) -> float:
    """Return ``quantile``, or raise an error if ``_level`` would round its level to 100 per cent."""
    if _level(quantile) == 100:
        raise PydanticCustomError("quantile", "Input should be at least 1e-12 away from 0 and from 1")
    return quantile


Quantile = Annotated[float, Field(gt=0, lt=1), AfterValidator(_check_level)]


class TimeSeriesInput(RequestBody):
    type: Literal["univariate_time_series"]
    name: str = Field("", max_length=200)
    series: Annotated[list[Value], Field(fail_fast=True)]
    """null marks a missing value"""
    frequency: Frequency
    start_timestamp: str | None = Field(None, max_length=100)
    """time of the first value in ISO 8601. Versions trained with `--holidays` need it."""


class ForecastOptions(RequestBody):
    horizon: int = Field(ge=1, json_schema_extra=limited("max_horizon"))
    """number of values to forecast"""
    quantiles: list[Quantile] | None = Field(None, max_length=10)


class TimeSeriesRequest(RequestBody):
    model: ModelName = None
    inputs: Annotated[list[TimeSeriesInput], Field(fail_fast=True)] = Field(
        min_length=1, json_schema_extra=limited("max_series", "maxItems")
    )
    """series with at most {max_series_values:,} values in all"""
    options: ForecastOptions
    metadata: dict[str, Any] | None = None
    """ignored"""


class TimeSeriesModelNames(RootModel[list[str]]):
    pass


class TimeSeriesContent(TypedDict):
    type: Literal["univariate_time_series"]
    name: str
    mean_forecast: Floats
    """mean of the forecast at each of the `horizon` steps"""
    frequency: str
    start_timestamp: str
    """time of the first forecast value in ISO 8601; empty if the request has no start time"""
    quantiles: dict[str, Floats]
    """for each requested quantile, its value at each of the `horizon` steps"""


class TimeSeriesOutput(TypedDict):
    type: Literal["time_series_forecast"]
    id: str
    status: Literal["completed"]
    content: list[TimeSeriesContent]


class TimeSeriesResponse(TypedDict):
    id: str
    created_at: int
    """Unix time in seconds"""
    status: Literal["completed"]
    error: None
    model: str
    version: int
    outputs: list[TimeSeriesOutput]
    """one output for each input, in the order of the request"""


def encode(call: Call[TimeSeriesRequest], job: ForecastJob, answer: ForecastAnswer) -> TimeSeriesResponse:
    quantiles = call.body.options.quantiles or []
    outputs: list[TimeSeriesOutput] = []
    for i, (series, forecast) in enumerate(zip(call.body.inputs, answer.forecasts, strict=True)):
        content: TimeSeriesContent = {
            "type": series.type,
            "name": series.name,
            "mean_forecast": forecast.mean,
            "frequency": series.frequency,
            "start_timestamp": _forecast_start(series, f"inputs.{i}", _step(call.model.card)) or "",
            "quantiles": {repr(quantile): _quantile(forecast, quantile) for quantile in quantiles},
        }
        name = f"{job.request_id}-{i}"
        outputs.append({"type": "time_series_forecast", "id": name, "status": "completed", "content": [content]})
    return {
        "id": job.request_id,
        "created_at": job.created,
        "status": "completed",
        "error": None,
        "model": call.model.card.name,
        "version": call.model.card.version,
        "outputs": outputs,
    }


def _quantile(forecast: SeriesForecast, quantile: float) -> np.ndarray:
    """Return the forecasts [horizon] of a quantile, which is the median or a bound of a central interval."""
    if not (level := _level(quantile)):
        return forecast.median
    lower, upper = forecast.bounds[level]
    return lower if quantile < 0.5 else upper


def _step(card: Card) -> str | None:
    """Return the time step of a model that uses holidays, otherwise None."""
    known = card.series.known if card.series else None
    return known.calendar.step if known and known.calendar else None


def check_model(card: Card, body: TimeSeriesRequest, job: ForecastJob) -> None:
    """Complete the job with the times that the model needs.

    Raises:
        BadValue: the model needs covariates, or a time is missing or wrong.
    """
    known = card.series.known if card.series else None
    if known and known.named:
        problem = f"{card.name} needs {', '.join(known.named)}, for which this protocol has no field"
        raise BadValue(f"{problem}; use /v1/series/forecast", "model")
    step = _step(card)
    for i, series in enumerate(body.inputs):
        _forecast_start(series, f"inputs.{i}", step)
    if step:
        job.start = [_start(series, f"inputs.{i}", card.name, step) for i, series in enumerate(body.inputs)]


def _start(series: TimeSeriesInput, param: str, model: str, step: str) -> str:
    """Return the time of the first value, for a model that uses the holidays in each time step ``step``.

    Raises BadValue if there is no time, or if the frequency is not the unit of the time step.
    """
    unit = step.split(" ")[-1].removesuffix("s")  # such as "minute" for "15 minutes", and "day" for "business day"
    allowed = [frequency for frequency, seconds in SECONDS.items() if seconds == SECONDS.get(unit)]
    if series.frequency not in allowed:
        problem = f"{param}.frequency is {quote_value(series.frequency)}; {model} was trained with one value per {step}"
        raise BadValue(f"{problem}, so it should be {' or '.join(map(repr, allowed))}", f"{param}.frequency")
    if series.start_timestamp is None:
        reason = f"{model} needs the time of the first value, to know the holidays"
        raise BadValue(f"{param}.start_timestamp is missing; {reason}", f"{param}.start_timestamp")
    return series.start_timestamp


def _forecast_start(series: TimeSeriesInput, param: str, step: str | None) -> str | None:
    """Return the time of the first forecast, or None if the series has no start time. Raises BadValue.

    ``step`` is the time step of a model that uses holidays. If it is None, the frequency of the series is the step.
    """
    if series.start_timestamp is None:
        return None
    param, count = f"{param}.start_timestamp", len(series.series)
    try:
        start = datetime.fromisoformat(series.start_timestamp)
        if step is None:
            forecast_start = _add_steps(start, series.frequency, count).isoformat()
        else:
            day = parse_time(series.start_timestamp, param, step).date()
            forecast_start = (start + _duration(day, step, count)).isoformat()
    except (ValueError, OverflowError):
        reason = f"{param} is {quote_value(series.start_timestamp)}; it should be a time in ISO 8601"
        raise BadValue(f"{reason} from which {count:,} steps can be counted", param) from None
    if series.start_timestamp.endswith(("Z", "z")):  # the form that KServe's own server reads and writes
        return forecast_start.removesuffix("+00:00") + "Z"
    return forecast_start


def _duration(day: date, step: str, steps: int) -> timedelta:
    """Return the duration of ``steps`` time steps that begin on ``day``. The time step is fixed or a business day."""
    if (seconds := step_seconds(step)) is not None:
        return timedelta(seconds=seconds * steps)
    days = np.busday_offset(day, steps, roll="forward") - np.datetime64(day)
    return timedelta(days=int(days.astype(int)))


def _add_steps(start: datetime, frequency: str, steps: int) -> datetime:
    """Return the time that is ``steps`` steps later than ``start``.

    If ``start`` is the last day of a month, steps of months, quarters or years also end on the last day of a month.
    """
    if frequency in SECONDS:
        return start + timedelta(seconds=SECONDS[frequency] * steps)
    years, month = divmod(start.month - 1 + MONTHS[frequency] * steps, 12)
    year = start.year + years
    last_day = calendar.monthrange(year, month + 1)[1]
    on_last_day = start.day == calendar.monthrange(start.year, start.month)[1]
    return start.replace(year=year, month=month + 1, day=last_day if on_last_day else min(start.day, last_day))


@json_endpoint(FORECAST, TimeSeriesRequest, Protocol(encode), check_model)
def forecast_time_series(body: TimeSeriesRequest, limits: Limits) -> ForecastJob:
    """Forecast the next values of one or several series, with quantiles."""
    return ForecastJob(
        [series.series for series in body.inputs],
        body.options.horizon,
        sorted({level for level in map(_level, body.options.quantiles or []) if level}),
        names={"horizon": "options.horizon", "series": "inputs.{}.series", "start": "inputs.{}.start_timestamp"},
        request_id=f"forecast-{secrets.token_hex(12)}",
    )


async def list_forecasting_models(request: Request) -> Response:
    """List the names of all models that forecast series."""
    cards = map(request.models.card, request.models.version_sets)
    return json_response(sorted(card.name for card in cards if card and card.task == FORECAST.name))


TAG = "KServe time series"
OPERATIONS = [
    Operation(
        "POST",
        "/v1/timeseries/forecast",
        forecast_time_series,
        TAG,
        "Forecast time series",
        TimeSeriesResponse,
        "Mean and quantiles of each series",
        body=TimeSeriesRequest,
        example={
            "model": "series-lstm",
            "inputs": [{"type": "univariate_time_series", "name": "sales", "series": SALES, "frequency": "quarter"}],
            "options": {"horizon": 4, "quantiles": [0.1, 0.5, 0.9]},
        },
        errors=ERROR_RESPONSES,
    ),
    Operation(
        "GET",
        "/v1/timeseries/models",
        list_forecasting_models,
        TAG,
        "List the forecasting models",
        TimeSeriesModelNames,
        "Names of models",
        errors=ERROR_RESPONSES,
    ),
]
