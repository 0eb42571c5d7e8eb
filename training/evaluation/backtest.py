"""Backtests: split each series into parts for training, validation and testing, and measure forecasts.

A forecast origin is the position of the first value of a forecast. There are many origins in the validation part and in
the test part, which are at the end of each series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.tasks.forecasting import SCORES, QuantileForecast
from training.data.datasets import DataError
from training.data.tables import Series, Table
from training.evaluation import forecast_metrics
from training.options import Part
from training.run import metric

MIN_PAST = 8  # smallest number of values before the first origin
# The test part is this share of the series, but at most this number of horizons long.
TEST_SHARE, MAX_TEST_HORIZONS = 0.25, 24
VALIDATION_SHARE, MAX_VALIDATION_HORIZONS = 0.2, 12  # the same limits for the validation part
MAX_PAST = 1500  # largest number of values that a forecaster receives (four years of days); more would change little
ROUNDING = 1e-9  # values repeat if they differ by less than this share of the largest value

# Computes forecasts from the pasts of the series, the season, and the number of steps.
ForecastFunction = Callable[[Sequence[np.ndarray], int, int], list[QuantileForecast]]


@dataclass(frozen=True)
class Split:
    """The parts of a series.

    Values [0, ``validation``) are for training, [``validation``, ``test``) for validation, and the rest for testing.
    """

    series: Series
    validation: int
    test: int


@dataclass(frozen=True)
class Origins:
    """N forecast origins, with the values before and after them.

    Attributes:
        past: the values [T] before each origin; NaN after the last value that the table has before the origin.
        actual: the actual values [N, horizon] after each origin; NaN where the table has no value.
        mase_scale: the MASE scale [N] of each origin's series.
        season: number of steps in a season.
        places: for each origin, the index of its split and its position in the series.
        covariates: for each origin, the values [T + horizon, K] of the known covariates in its past and its horizon.
    """

    past: list[np.ndarray]
    actual: np.ndarray
    mase_scale: np.ndarray
    season: int
    places: list[tuple[int, int]]
    covariates: list[np.ndarray]

    def subset(self, max_origins: int) -> Origins:
        """Return at most ``max_origins`` of the origins, evenly spaced."""
        indices = np.linspace(0, len(self.past) - 1, min(max_origins, len(self.past))).round().astype(int)
        past = [self.past[index] for index in indices]
        places = [self.places[index] for index in indices]
        covariates = [self.covariates[index] for index in indices]
        scales = self.mase_scale[indices]
        return Origins(past, self.actual[indices], scales, self.season, places, covariates)

    @property
    def series_count(self) -> int:
        """Number of series that the origins come from."""
        return len({number for number, _ in self.places})


def longest_horizon(table: Table) -> int:
    """Return the longest horizon, at least 1, for which a series of median length can be split."""
    median = int(np.median([len(series.values) for series in table.series]))
    return max(1, (median - max(table.season + 2, MIN_PAST)) // 3)


def _repeats(values: np.ndarray, season: int) -> bool:
    """Return whether the values repeat exactly with the season, except for rounding."""
    return forecast_metrics.mase_scale(values, season) <= ROUNDING * float(np.abs(values).max())


def split(table: Table, horizon: int) -> list[Split]:
    """Split all usable series. For each series that is left out, add the reason to the table's remarks.

    A series is usable if its training part is long enough, and if the values of this part do not repeat exactly in each
    season. The training part must hold one horizon and, before it, one season and two values, or MIN_PAST values if
    this number is larger.

    Raises:
        DataError: no series is usable.
    """
    min_training = max(table.season + 2, MIN_PAST) + horizon
    splits = []
    for series in table.series:
        count = len(series.values)
        test, validation = (
            min(max(int(share * count / horizon), 1), max_horizons) * horizon
            for share, max_horizons in (
                (TEST_SHARE, MAX_TEST_HORIZONS),
                (VALIDATION_SHARE, MAX_VALIDATION_HORIZONS),
            )
        )
        if count - test - validation < min_training:  # the series is short, and its horizon even shorter
            test = validation = horizon
        parts = Split(series, count - test - validation, count - test)
        if parts.validation < min_training:
            table.remarks.append(
                f"{series.name}: {count} values; season {table.season} and horizon {horizon} need at least "
                f"{min_training + 2 * horizon}, so the series is left out"
            )
        elif _repeats(series.values[: parts.validation], table.season):
            table.remarks.append(
                f"{series.name}: its first {parts.validation} values repeat exactly with season {table.season}, so "
                "errors have no scale (MASE divides by 0): the series is left out"
            )
        else:
            splits.append(parts)
    if not splits:
        raise DataError(f"{table.name}: no series can be used for training and testing; {table.remarks[-1]}")
    return splits


def origins(splits: Sequence[Split], season: int, horizon: int, part: Part) -> Origins:
    """Return all forecast origins of the test part or of the validation part.

    The origins are one horizon apart in the test part, and a quarter of a horizon apart in the validation part.

    Origins without an actual value in their horizon are skipped.

    Raises:
        DataError: no origin has an actual value in its horizon.
    """
    past, actual, scales, places, covariates = [], [], [], [], []
    for number, parts in enumerate(splits):
        values = parts.series.values
        start, end = (parts.validation, parts.test) if part == "validation" else (parts.test, len(values))
        scale = forecast_metrics.mase_scale(values[: parts.validation], season)
        actual_values = np.where(parts.series.observed, values, np.nan)
        for origin in range(start, end - horizon + 1, horizon if part == "test" else max(1, horizon // 4)):
            future = actual_values[origin : origin + horizon]
            if not np.isnan(future).all():
                past.append(past_of(parts.series, origin))
                covariates.append(parts.series.covariates[max(origin - MAX_PAST, 0) : origin + horizon])
                actual.append(future)
                scales.append(scale)
                places.append((number, origin))
    if not past:
        raise DataError(f"all values of the {part} parts are missing, so no forecast can be measured")
    return Origins(past, np.stack(actual), np.array(scales), season, places, covariates)


def observed_end(series: Series, end: int) -> int:
    """Return the position after the last value that the table has before the position ``end``.

    The values from there to ``end`` are interpolated with values after ``end``. They would show the future to a
    forecaster.
    """
    return int(np.flatnonzero(series.observed[:end])[-1]) + 1


def past_of(series: Series, origin: int) -> np.ndarray:
    """Return at most MAX_PAST values before an origin, with NaN for the values that the table does not have."""
    return np.where(series.observed, series.values, np.nan)[:origin][-MAX_PAST:]


def without_gap(past: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the values [T] without NaN at the end, and the number of these NaN. Other NaN are interpolated."""
    known = np.flatnonzero(~np.isnan(past))
    end = int(known[-1]) + 1
    return np.interp(np.arange(end), known, past[known]), len(past) - end


def seasonal_naive(past: Sequence[np.ndarray], season: int, horizon: int) -> list[QuantileForecast]:
    """Return forecasts that repeat the last season before the missing values at the end of the past.

    Each forecast is a normal distribution. Its standard deviation is the root mean square of the differences between
    seasons, multiplied by the square root of the number of seasons ahead (Hyndman and Athanasopoulos 2021, 5.5). A
    season that is not shorter than the past is ignored, as in the service.
    """
    forecasts = []
    for values, gap in map(without_gap, past):
        length = season if season < len(values) else 1
        steps = np.arange(gap, gap + horizon)
        median = forecast_metrics.seasonal_naive(values, length, gap + horizon)[gap:]
        deviation = np.sqrt(np.mean((values[length:] - values[:-length]) ** 2) * (steps // length + 1))
        quantiles = median[:, None] + deviation[:, None] * SCORES
        forecasts.append(QuantileForecast(median, median, SCORES, quantiles, season))
    return forecasts


def metrics(origins: Origins, forecast: ForecastFunction) -> dict[str, float]:
    """Return MASE, quantile loss and coverage of a forecast method over all origins."""
    forecasts = forecast(origins.past, origins.season, origins.actual.shape[1])
    lower, upper = (np.stack(side) for side in zip(*(each.interval(95) for each in forecasts), strict=True))
    quantiles = forecast_metrics.quantiles_of(forecasts)
    median = np.stack([each.median for each in forecasts])
    return {
        "mase": forecast_metrics.mase(origins.actual, median, origins.mase_scale),
        "quantile_loss": forecast_metrics.quantile_loss(origins.actual, quantiles, origins.mase_scale),
        "coverage_95": forecast_metrics.coverage(origins.actual, lower, upper),
    }


def decimals(key: str, value: float) -> int:
    """Return the number of decimals of a metric: 3, or more for three significant digits of an error below 0.1."""
    if key == "coverage_95" or not 0 < value < math.inf:
        return 3
    return min(max(3, 2 - math.floor(math.log10(value))), 12)


def card_metrics(origins: Origins, results: dict[str, dict[str, float]], part: Part = "test") -> dict[str, Any]:
    """Return the results of several methods for a model card.

    ``results`` maps prefixes to the results of ``metrics``. The prefix is added to the names of the metrics.
    """
    horizon = origins.actual.shape[1]
    values = "held out of training" if part == "test" else "for validation"
    description = (
        f"{len(origins.past):,} forecasts of {horizon} steps, from {origins.series_count:,} series, on values {values}"
    )
    return {
        f"{prefix}{key}": metric(value, description, decimals(key, value))
        for prefix, values in results.items()
        for key, value in values.items()
    }
