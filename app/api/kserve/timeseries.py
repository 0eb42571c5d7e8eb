"""KServe's time series protocol: forecasts with quantiles."""

from __future__ import annotations

import calendar
import secrets
import time
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from app.api import openapi
from app.api.inference import InferenceBody, JsonEndpoint
from app.api.kserve.responses import TimeSeriesModelNames, TimeSeriesResponse
from app.api.openapi import request_body
from app.api.request_body import EXTRA_COMMAS, MAX_FIELDS, ModelName, RequestBody, validate, with_limits
from app.api.responses import ERROR_RESPONSES, json_response, success_response
from app.api.routes import forecast as native
from app.api.routes.forecast import ForecastInference, Value
from app.errors import BadValue, quote_value
from app.serving.model import Model
from app.serving.models import Models
from app.settings import Settings
from app.tasks import FORECAST
from app.tasks.covariates import parse_time, step_seconds
from app.tasks.forecasting import AnyForecaster

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
    series: Annotated[list[Value], Field(fail_fast=True)] = Field(description="null marks a missing value")
    frequency: Frequency
    start_timestamp: str | None = Field(
        None,
        description="time of the first value in ISO 8601. Versions trained with `--holidays` need it.",
        max_length=100,
    )


class ForecastOptions(RequestBody):
    horizon: int = Field(ge=1, description="number of values to forecast")
    quantiles: list[Quantile] | None = Field(None, max_length=10)


class TimeSeriesRequest(InferenceBody):
    model: ModelName = None
    inputs: Annotated[list[TimeSeriesInput], Field(fail_fast=True)] = Field(min_length=1)
    options: ForecastOptions
    metadata: dict[str, Any] | None = Field(None, description="ignored")


class TimeSeriesInference(ForecastInference):
    """Forecasts the series of a request to ``/v1/timeseries/forecast``. Raises BadValue for invalid options."""

    series_param = "inputs.{}.series"
    start_param = "inputs.{}.start_timestamp"

    def __init__(
        self,
        model: Model[AnyForecaster],
        body: TimeSeriesRequest,
        forecast_request: type[native.ForecastRequest],
        settings: Settings,
    ) -> None:
        self.request = body
        self.quantiles = body.options.quantiles or []
        levels = sorted({level for level in map(_level, self.quantiles) if level})
        options = validate({"values": [], "horizon": body.options.horizon, "levels": levels}, forecast_request)
        fields: dict[str, Any] = {"values": [series.series for series in body.inputs]}
        name, known = model.card.name, model.card.series and model.card.series.known
        if known and known.named:
            problem = f"{name} needs {', '.join(known.named)}, for which this protocol has no field"
            raise BadValue(f"{problem}; use /v1/series/forecast", "model")
        step = known.calendar.step if known and known.calendar else None
        if step:
            fields["start"] = [_start(series, f"inputs.{i}", name, step) for i, series in enumerate(body.inputs)]
        self.starts = [_forecast_start(series, f"inputs.{i}", step) for i, series in enumerate(body.inputs)]
        super().__init__(model, options.model_copy(update=fields), settings)

    def response_size(self, outputs: Sequence[Any]) -> int:
        return len(self.items) * self.body.horizon * (1 + len(self.quantiles))

    def respond(self, outputs: Sequence[Any]) -> Response:
        results = self.results(outputs)
        forecast_id = f"forecast-{secrets.token_hex(12)}"
        rows = enumerate(zip(self.request.inputs, self.starts, results, strict=True))
        return json_response(
            {
                "id": forecast_id,
                "created_at": int(time.time()),
                "status": "completed",
                "error": None,
                "model": self.model.card.name,
                "version": self.model.card.version,
                "outputs": [
                    {
                        "type": "time_series_forecast",
                        "id": f"{forecast_id}-{i}",
                        "status": "completed",
                        "content": [self._content(series, start, result)],
                    }
                    for i, (series, start, result) in rows
                ],
            }
        )

    def _content(self, series: TimeSeriesInput, start: str | None, result: dict[str, Any]) -> dict[str, Any]:
        return {
            "type": series.type,
            "name": series.name,
            "mean_forecast": result["mean"],
            "frequency": series.frequency,
            "start_timestamp": start or "",  # KServe's client requires a string
            "quantiles": {repr(quantile): _quantile(result, quantile) for quantile in self.quantiles},
        }


def _quantile(result: dict[str, Any], quantile: float) -> np.ndarray:
    """Return the forecasts [horizon] of a quantile, which is the median or a bound of a central interval."""
    if not (level := _level(quantile)):
        return result["median"]
    interval = result["intervals"][native.level_name(level)]
    return interval["lower" if quantile < 0.5 else "upper"]


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


def router(models: Models, settings: Settings) -> APIRouter:
    """Return the routes under ``/v1/timeseries``. ``settings`` has the limits for requests."""
    routes = APIRouter(prefix="/v1/timeseries", tags=["KServe time series"], responses=ERROR_RESPONSES)
    forecast_request = native.request_model(settings)
    body_model = with_limits(
        TimeSeriesRequest,
        inputs={
            "max_length": settings.max_series,
            "description": f"series with at most {settings.max_series_values:,} values in all",
        },
        options=with_limits(ForecastOptions, horizon={"le": settings.max_horizon}),
    )
    endpoint = JsonEndpoint(
        models,
        FORECAST,
        body_model,
        lambda _, model, body: TimeSeriesInference(model, body, forecast_request, settings),
        content_bytes=native.BYTES_PER_NUMBER * settings.max_series_values,
        content_commas=settings.max_series_values + 8 * settings.max_series,
        max_fields=max(MAX_FIELDS, 6 * settings.max_series + EXTRA_COMMAS),
    )

    @routes.get(
        "/models",
        operation_id="list_forecasting_models",
        summary="List the forecasting models",
        responses=success_response(TimeSeriesModelNames, description="Names of models"),
    )
    async def list_models(request: Request) -> Response:
        """List the names of all models that forecast series."""
        cards = map(models.card, models.version_sets)
        return json_response(sorted(card.name for card in cards if card and card.task == FORECAST.name))

    @routes.post(
        "/forecast",
        operation_id="forecast_time_series",
        summary="Forecast time series",
        openapi_extra=request_body(body_model, openapi.TIMESERIES_EXAMPLE),
        responses=success_response(TimeSeriesResponse, description="Mean and quantiles of each series"),
    )
    async def forecast(request: Request) -> Response:
        """Forecast the next values of one or several series, with quantiles."""
        return await endpoint.run(request)

    return routes
