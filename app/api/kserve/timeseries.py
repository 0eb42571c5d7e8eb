"""KServe's time series protocol: forecasts with quantiles."""

from __future__ import annotations

import calendar
import secrets
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from app.api import openapi
from app.api.deadline import Deadline, deadline
from app.api.inference import resolve_model
from app.api.openapi import request_body
from app.api.request import (
    EXTRA_COMMAS,
    MAX_FIELDS,
    BodyReader,
    ModelName,
    RequestBody,
    json_response,
    max_json_bytes,
    read_json,
    validate,
)
from app.api.responses import ERROR_RESPONSES
from app.api.routes import forecast as series
from app.api.routes.forecast import Value
from app.errors import BadValue, quote_value
from app.serving.loader import LoadedModel
from app.serving.registry import Registry
from app.settings import Settings
from app.tasks import FORECAST

SECONDS = {
    **{"second": 1, "S": 1, "minute": 60, "T": 60, "hour": 3600, "H": 3600},
    **{"day": 86400, "D": 86400, "week": 604800, "W": 604800},
}
MONTHS = {"month": 1, "M": 1, "quarter": 3, "Q": 3, "year": 12, "Y": 12}
Frequency = Literal[
    "second", "S", "minute", "T", "hour", "H", "day", "D", "week", "W", "month", "M", "quarter", "Q", "year", "Y"
]


def _level(quantile: float) -> float:
    """The per cent of the interval that a quantile bounds; 0: it is the median."""
    return round(abs(2 * quantile - 1) * 100, 10)


def _apart(quantile: float) -> float:
    """Refuses a quantile that no interval bounds but one of 100 per cent."""
    if _level(quantile) == 100:
        raise PydanticCustomError("quantile", "Input should be at least 1e-12 away from 0 and from 1")
    return quantile


Quantile = Annotated[float, Field(gt=0, lt=1), AfterValidator(_apart)]


class TimeSeriesInput(RequestBody):
    type: Literal["univariate_time_series"]
    name: str = Field("", max_length=200)
    series: Annotated[list[Value], Field(fail_fast=True)] = Field(description="null marks a missing value")
    frequency: Frequency
    start_timestamp: str | None = Field(None, description="when the first value was taken, ISO 8601", max_length=100)


class ForecastOptions(RequestBody):
    horizon: int = Field(ge=1)
    quantiles: list[Quantile] = Field([], max_length=10)


class TimeSeriesRequest(RequestBody):
    model: ModelName = None
    inputs: Annotated[list[TimeSeriesInput], Field(fail_fast=True)] = Field(min_length=1, max_length=10**5)
    options: ForecastOptions
    metadata: dict[str, Any] | None = Field(None, description="not looked at")


def router(registry: Registry, settings: Settings) -> APIRouter:
    """The routes, with the limits of the settings."""
    routes = APIRouter(prefix="/v1/timeseries", tags=["KServe time series"], responses=ERROR_RESPONSES)
    parsing, histories = registry.parse_executor, series.request_model(settings)
    limit = max_json_bytes(settings.max_body_bytes, series.BYTES_PER_NUMBER * settings.max_series_values)
    fields = max(MAX_FIELDS, 6 * settings.max_series + EXTRA_COMMAS)
    reading = BodyReader(limit, settings.body_seconds, parsing, fields)
    most = settings.max_series_values + 8 * settings.max_series + EXTRA_COMMAS

    @routes.get("/models")
    async def models(request: Request) -> Response:
        """The names of the models that forecast."""
        cards = map(registry.card, registry.version_sets)
        return json_response(sorted(card.name for card in cards if card and card.task == FORECAST.name))

    @routes.post("/forecast", openapi_extra=request_body(TimeSeriesRequest, openapi.TIMESERIES_EXAMPLE))
    async def forecast(request: Request) -> Response:
        """Go on with series of numbers, with quantiles."""
        until = deadline(request, settings.request_seconds)
        body = await read_json(request, TimeSeriesRequest, reading, most)
        live = await resolve_model(request, registry, FORECAST, body.model, until)
        if len(body.inputs) > settings.max_series:
            raise BadValue(f"inputs has {len(body.inputs):,} series; allowed are {settings.max_series}", "inputs")
        starts = [_start(each, f"inputs.{i}") for i, each in enumerate(body.inputs)]
        levels = sorted({level for level in map(_level, body.options.quantiles) if level})
        options = validate({"values": [], "horizon": body.options.horizon, "levels": levels}, histories)
        native = options.model_copy(update={"values": [each.series for each in body.inputs]})
        live.engine.admit(1)
        async with Deadline(request, until):
            where = "inputs.{}.series"
            items = await parsing.run_or_inline(series.size(native), series.parse_series, live, native, settings, where)
            means = await live.engine.submit(items)
            size = len(items) * native.horizon * (1 + len(body.options.quantiles))
            return await parsing.run_admitted_or_inline(size, _response, live, body, items, means, levels, starts)

    return routes


def _response(
    live: LoadedModel,
    body: TimeSeriesRequest,
    items: list[Any],
    means: list[Any],
    levels: list[float],
    starts: Sequence[str | None],
) -> Response:
    identity = f"forecast-{secrets.token_hex(12)}"
    outputs = []
    told = series.results(live, items, means, levels)
    for i, (given, start, result) in enumerate(zip(body.inputs, starts, told, strict=True)):
        content = {
            "type": given.type,
            "name": given.name,
            "mean_forecast": result["mean"],
            "frequency": given.frequency,
            "start_timestamp": start,
            "quantiles": {repr(quantile): _quantile(result, quantile) for quantile in body.options.quantiles},
        }
        outputs.append({"type": given.type, "id": f"{identity}-{i}", "status": "completed", "content": [content]})
    answer = {"id": identity, "created_at": int(time.time()), "status": "completed", "error": None}
    return json_response({**answer, "model": live.card.name, "version": live.card.version, "outputs": outputs})


def _quantile(result: dict[str, Any], quantile: float) -> np.ndarray:
    """A quantile is a bound of the interval that leaves as much on both sides."""
    if not (level := _level(quantile)):
        return result["median"]
    interval = result["intervals"][series.level_name(level)]
    return interval["lower" if quantile < 0.5 else "upper"]


def _start(given: TimeSeriesInput, param: str) -> str | None:
    """When the first forecast is for, where the series says when it begins. Raises BadValue."""
    if given.start_timestamp is None:
        return None
    try:
        begin = datetime.fromisoformat(given.start_timestamp)
        return _later(begin, given.frequency, len(given.series)).isoformat()
    except (ValueError, OverflowError):
        told = f"{param}.start_timestamp is {quote_value(given.start_timestamp)}; it should be a time in ISO 8601"
        raise BadValue(f"{told} from which {len(given.series):,} steps can be counted", param) from None


def _later(begin: datetime, frequency: str, steps: int) -> datetime:
    """So many steps later. A month has no more days than it has, and what begins on its last one stays on the last."""
    if frequency in SECONDS:
        return begin + timedelta(seconds=SECONDS[frequency] * steps)
    years, month = divmod(begin.month - 1 + MONTHS[frequency] * steps, 12)
    year = begin.year + years
    last = calendar.monthrange(year, month + 1)[1]
    ends = begin.day == calendar.monthrange(begin.year, begin.month)[1]
    return begin.replace(year=year, month=month + 1, day=last if ends else min(begin.day, last))
