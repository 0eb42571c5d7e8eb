"""Backtests: divide series into parts for training, validation and testing, and measure forecasts.

A forecast origin is the position of the first value of a forecast. There are many origins in each part after the
training part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from app.tasks.forecasting import QuantileForecast
from training.data.datasets import DataError
from training.data.tables import Series, Table
from training.evaluation import forecast_metrics

MIN_PAST = 8  # smallest number of values before the first origin
# Share of each part after the training part in a series of median length, and its largest number of horizons. The
# validation part selects the epoch. The decision part decides whether fine-tuning helped.
SHARES = {"validation": (0.1, 6), "decision": (0.1, 6), "test": (0.25, 24)}
MAX_PAST = 1500  # largest number of values that a forecaster receives (four years of days); more would change little
ROUNDING = 1e-9  # values repeat if they differ by less than this share of the largest value

HeldOut = Literal["validation", "decision", "test"]


@dataclass(frozen=True)
class Split:
    """The parts of a series. Values [0, ``validation``) are for training.

    ``validation``, ``decision`` and ``test`` are the positions at which the other parts begin. The last part ends with
    the series.
    """

    series: Series
    validation: int
    decision: int
    test: int

    def bounds(self, part: HeldOut) -> tuple[int, int]:
        """Return the position of the first value of a part, and the position after its last value."""
        ends = {"validation": self.decision, "decision": self.test, "test": len(self.series.values)}
        return getattr(self, part), ends[part]


@dataclass(frozen=True)
class Origins:
    """N forecast origins, with the values before and after them.

    Attributes:
        past: the values [T] before each origin; NaN after the last value that the table has before the origin.
        actual: the actual values [N, horizon] after each origin; NaN where the table has no value.
        mase_scale: the MASE scale [N] of each origin's series.
        season: number of steps in a season.
        places: for each origin, the index of its split and its position in the series.
        covariates: for each origin, the values [T + horizon, K] of the known covariates in its past and its horizon, or
            None.
    """

    past: list[np.ndarray]
    actual: np.ndarray
    mase_scale: np.ndarray
    season: int
    places: list[tuple[int, int]]
    covariates: list[np.ndarray | None]

    @property
    def horizon(self) -> int:
        """Number of steps of each forecast."""
        return int(self.actual.shape[1])

    def subset(self, max_origins: int) -> Origins:
        """Return at most ``max_origins`` of the origins, evenly spaced."""
        return self.at(np.linspace(0, len(self.past) - 1, min(max_origins, len(self.past))).round().astype(int))

    def at(self, indices: Sequence[int] | np.ndarray) -> Origins:
        """Return the origins with these indices."""
        lists: dict[str, Any] = {
            name: [getattr(self, name)[at] for at in indices] for name in ("past", "places", "covariates")
        }
        return replace(self, actual=self.actual[list(indices)], mase_scale=self.mase_scale[list(indices)], **lists)

    def errors(self, forecasts: Sequence[QuantileForecast]) -> forecast_metrics.Errors:
        """Return the errors of forecasts from all origins."""
        return forecast_metrics.Errors(self.actual, self.mase_scale, forecasts)

    @property
    def series_count(self) -> int:
        """Number of series that the origins come from."""
        return len({number for number, _ in self.places})


@dataclass(frozen=True)
class Method:
    """A forecast method.

    Attributes:
        name: its name in reports.
        prefix: the beginning of the names of its metrics on a card.
        explanation: what it does, for reports.
        forecast: computes a forecast from each origin.
    """

    name: str
    prefix: str
    explanation: str
    forecast: Callable[[Origins], list[QuantileForecast]]


def longest_horizon(table: Table) -> int:
    """Return the longest horizon, at least 1, for which a series of median length can be split."""
    return max(1, (_median_length(table) - max(table.season + 2, MIN_PAST)) // 4)


def _median_length(table: Table) -> int:
    return int(np.median([len(series.values) for series in table.series]))


def _repeats(values: np.ndarray, season: int) -> bool:
    """Return whether the values repeat exactly with the season, except for rounding."""
    return forecast_metrics.mase_scale(values, season) <= ROUNDING * float(np.abs(values).max())


def split(table: Table, horizon: int) -> list[Split]:
    """Split all usable series. For each series that is left out, add the reason to the table's remarks.

    All series are cut at the same three times, so that no part of one series is later than a later part of another.
    Series without time stamps are taken to end at the same time.

    A series is usable if its training part is long enough, and if the values of this part do not repeat exactly in each
    season. The training part must hold one horizon and, before it, one season and two values, or MIN_PAST values if
    this number is larger.

    Raises:
        DataError: no series is usable.
    """
    min_training, count = max(table.season + 2, MIN_PAST) + horizon, _median_length(table)
    lengths = [min(max(int(share * count / horizon), 1), most) * horizon for share, most in SHARES.values()]
    if count - sum(lengths) < min_training:  # the series are short, and the horizon is even shorter
        lengths = [horizon] * len(SHARES)
    left = np.cumsum(lengths[::-1])[::-1].tolist()  # values from each cut to the end of a series that ends last
    cuts, splits = _cuts(table, left), []
    for series in table.series:
        parts = Split(series, *_positions(series, left, cuts))
        if parts.validation < min_training:
            table.remarks.append(
                f"{series.name}: {parts.validation} values before the validation part; season {table.season} and "
                f"horizon {horizon} need at least {min_training}, so the series is left out"
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


def _cuts(table: Table, left: Sequence[int]) -> list[np.datetime64]:
    """Return the times at which the parts begin. The list is empty if the table has no time stamps.

    Of the series that hold all parts, the one that ends last determines these times. A time lies between two values of
    this series, because the times of day of other series may differ.
    """
    long = [series for series in table.series if series.dated and len(series.values) > left[0]]
    if not long:
        return []
    times = max(long, key=lambda series: (series.times[-1], len(series.times))).times
    return [times[-steps] - (times[-steps] - times[-steps - 1]) // 2 for steps in left]


def _positions(series: Series, left: Sequence[int], cuts: Sequence[np.datetime64]) -> list[int]:
    if cuts:
        return [int(np.searchsorted(series.times, cut)) for cut in cuts]
    return [max(len(series.values) - steps, 0) for steps in left]


def origins(splits: Sequence[Split], season: int, horizon: int, part: HeldOut) -> Origins:
    """Return all forecast origins of a part: one horizon apart or, in the validation part, a quarter of a horizon.

    Origins without an actual value in their horizon are skipped.

    Raises:
        DataError: no origin has an actual value in its horizon.
    """
    rows = []
    step = max(1, horizon // 4) if part == "validation" else horizon
    for number, parts in enumerate(splits):
        values, (start, end) = parts.series.values, parts.bounds(part)
        scale = forecast_metrics.mase_scale(values[: parts.validation], season)
        actual_values = np.where(parts.series.observed, values, np.nan)
        for origin in range(start, end - horizon + 1, step):
            future = actual_values[origin : origin + horizon]
            if not np.isnan(future).all():
                known = parts.series.covariates[max(origin - MAX_PAST, 0) : origin + horizon]
                rows.append((past_of(parts.series, origin), future, scale, (number, origin), known))
    if not rows:
        raise DataError(f"no series has values in the {part} part, so no forecast can be measured")
    return _origins(rows, season)


def origins_of(series: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], season: int) -> Origins:
    """Return the origins of windows of several series, each with its past [T] and its actual values [horizon].

    The MASE scale of a window is that of its past.
    """
    flat = [(number, past, actual) for number, own in enumerate(series) for past, actual in own]
    scale = forecast_metrics.mase_scale
    return _origins([(past, actual, scale(past, season), (at, len(past)), None) for at, past, actual in flat], season)


def _origins(rows: Sequence[tuple[Any, ...]], season: int) -> Origins:
    past, actual, scales, places, covariates = map(list, zip(*rows, strict=True))
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


def decimals(value: float) -> int:
    """Return the number of decimals of an error: 3, or more for three significant digits of an error below 0.1."""
    if not 0 < value < math.inf:
        return 3
    return min(max(3, 2 - math.floor(math.log10(value))), 12)
