"""Compute the forecasts and errors of a backtest for the report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from app.tasks.forecasting import QuantileForecast
from training.data.tables import Table
from training.evaluation import backtest, forecast_metrics
from training.evaluation.backtest import ForecastFunction, Origins, Split
from training.evaluation.report import ets

MAX_WINDOWS = 300  # largest number of test windows in a report; if there are more, only some series are used
NAIVE, ETS = "seasonal naive", "ETS"
SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
MONTHS = {"month": 1, "quarter": 3, "half-year": 6, "year": 12}


@dataclass(frozen=True)
class Errors:
    """The errors of one method over all windows. ``by_step`` [horizon] is the MASE of each step ahead."""

    mase: float
    wql: float
    coverage: float
    by_step: np.ndarray


@dataclass(frozen=True)
class Backtest:
    """Test windows of your own series, and the forecasts of each method for all windows.

    A test window is the horizon of one forecast in the test part of a series. ``splits`` are the splits of the series
    that have windows. ``series`` is the number of series in the table that could be split. ``tuned`` is the name of the
    method with the tuned network. Plots show the intervals of this method.
    """

    table: Table
    splits: list[Split]
    series: int
    origins: Origins
    methods: dict[str, list[QuantileForecast]]
    tuned: str
    remarks: list[str]

    @property
    def horizon(self) -> int:
        """Return the number of steps of each forecast."""
        return int(self.origins.actual.shape[1])

    def errors(self, method: str) -> Errors:
        """Return the errors of a method."""
        forecasts, actual, scale = self.methods[method], self.origins.actual, self.origins.mase_scale
        median = np.stack([forecast.median for forecast in forecasts])
        quantiles = forecast_metrics.quantiles_of(forecasts)
        lower, upper = (np.stack(side) for side in zip(*(each.interval(80) for each in forecasts), strict=True))
        scaled = np.abs(actual - median) / scale[:, None]
        counts = (~np.isnan(scaled)).sum(axis=0)
        return Errors(
            forecast_metrics.mase(actual, median, scale),
            forecast_metrics.wql(actual, list(np.moveaxis(quantiles, 2, 0))),
            forecast_metrics.coverage(actual, lower, upper),
            np.where(counts, np.nansum(scaled, axis=0) / np.maximum(counts, 1), np.nan),
        )

    def windows(self, number: int) -> list[int]:
        """Return the indices of the windows of ``splits[number]``."""
        return [at for at, (other, _) in enumerate(self.origins.places) if other == number]

    def verdict(self) -> str:
        """Return a sentence that compares the tuned method with the best other method."""
        scores = {name: self.errors(name).mase for name in self.methods}
        own = scores.pop(self.tuned)
        other = min(scores, key=lambda name: scores[name])
        if scores[other] > 0:
            change = own / scores[other] - 1
            relation = f"{abs(change):.0%} {'below' if change < 0 else 'above'}"
            relation = "equal to" if abs(change) < 0.005 else relation
        else:  # the other method is exact, for example because the test values are constant
            relation = "above" if own > 0 else "equal to"
        return (
            f"The mean absolute scaled error of {self.tuned} is {own:.3f}, {relation} that of the best other method, "
            f"{other} ({scores[other]:.3f})."
        )


@dataclass(frozen=True)
class References:
    """Test windows, and the forecasts of the methods that need no network; the result of ``references``."""

    splits: list[Split]
    origins: Origins
    methods: dict[str, list[QuantileForecast]]
    remarks: list[str]

    def compare(self, table: Table, series: int, networks: dict[str, ForecastFunction]) -> Backtest:
        """Add the forecasts of networks; return the backtest. The last network is the tuned network.

        ``series`` is the number of series in the table that could be split.
        """
        horizon = int(self.origins.actual.shape[1])
        own = {name: forecast(self.origins.past, self.origins.season, horizon) for name, forecast in networks.items()}
        methods = {**self.methods, **own}
        return Backtest(table, self.splits, series, self.origins, methods, list(methods)[-1], self.remarks)


def references(splits: Sequence[Split], season: int, horizon: int, seconds: float) -> References:
    """Return at most MAX_WINDOWS test windows, and the seasonal naive and ETS forecasts for these windows.

    If all series together have more windows, only some series are used. ``seconds`` is the time limit of ETS.
    """
    stride, chosen = 1, list(splits)
    origins = backtest.origins(chosen, season, horizon, "test")
    while len(origins.past) > MAX_WINDOWS and len(chosen) > 1:
        stride += max(1, stride // 4)
        chosen = list(splits[::stride])
        origins = backtest.origins(chosen, season, horizon, "test")
    methods = {NAIVE: backtest.seasonal_naive(origins.past, season, horizon)}
    forecasts, replaced, remarks = ets.forecasts(origins, [split.series.name for split in chosen], seconds)
    if replaced < len(chosen):
        fitted = len(chosen) - replaced
        methods[f"{ETS}, {fitted:,} of {len(chosen):,} series" if replaced else ETS] = forecasts
    return References(chosen, origins, methods, remarks)


def times(start: str, step: str, positions: Sequence[int]) -> list[pd.Timestamp] | None:
    """Return the times of positions in a series that starts at ``start``.

    The result is None if ``start`` is not a date, or ``step`` is not a known time step.
    """
    parts = re.fullmatch(r"(\d{4}-\d\d-\d\d\S*)(?: \+ (\d+) steps)?", start)
    unit = re.fullmatch(r"(?:([\d.]+) )?([a-z -]+?)s?", step)
    if not parts or not unit:
        return None
    first, offset, size, name = pd.Timestamp(parts[1]), int(parts[2] or 0), float(unit[1] or 1), unit[2]
    steps = [offset + at for at in positions]
    if name == "business day":
        return [first + pd.offsets.BusinessDay(step) for step in steps]
    if name in MONTHS:
        months = [first + pd.DateOffset(months=int(size) * MONTHS[name] * step) for step in steps]
        return [time + pd.offsets.MonthEnd(0) for time in months] if first.is_month_end else months
    return [first + pd.Timedelta(seconds=size * SECONDS[name] * step) for step in steps] if name in SECONDS else None
