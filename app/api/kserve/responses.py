"""Response schemas of KServe's time series protocol, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, RootModel

from app.api.responses import ResponseModel


class TimeSeriesModelNames(RootModel[list[str]]):
    pass


class TimeSeriesContent(ResponseModel):
    type: Literal["univariate_time_series"]
    name: str
    mean_forecast: list[float] = Field(description="mean of the forecast at each of the `horizon` steps")
    frequency: str
    start_timestamp: str = Field(
        description="time of the first forecast value in ISO 8601; empty if the request has no start time"
    )
    quantiles: dict[str, list[float]] = Field(
        description="for each requested quantile, its value at each of the `horizon` steps"
    )


class TimeSeriesOutput(ResponseModel):
    type: Literal["time_series_forecast"]
    id: str
    status: Literal["completed"]
    content: list[TimeSeriesContent]


class TimeSeriesResponse(ResponseModel):
    id: str
    created_at: int = Field(description="Unix time in seconds")
    status: Literal["completed"]
    error: None
    model: str
    version: int
    outputs: list[TimeSeriesOutput] = Field(description="one output for each input, in the order of the request")
