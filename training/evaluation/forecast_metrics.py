"""Forecast metrics as in the M4 competition ("Benchmarks and Evaluation.R") and in GluonTS.

Forecasts, actual values and interval bounds are arrays [N, horizon]. ``mase_scale`` [N] is the scale of each series;
see ``mase_scale()``. ``mase``, ``wql``, ``quantile_loss`` and ``coverage`` ignore actual values that are NaN. A test
compares all metrics with those of utilsforecast, whose sMAPE and quantile losses differ by a constant factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from app.tasks.forecasting import QuantileForecast, like_series

LEVELS = tuple(level / 10 for level in range(1, 10))  # quantile levels of wql and quantile_loss
ALPHA = 0.05  # msis uses 95 % intervals
# sMAPE and MASE of M4's benchmark Naive2, by data set
NAIVE2 = {"m4_hourly": (18.383, 2.395), "m4_weekly": (9.161, 2.777)}


@dataclass(frozen=True)
class Errors:
    """The errors of N forecasts.

    ``actual`` [N, horizon]: the actual values. ``scale`` [N]: the MASE scale of each series.
    """

    actual: np.ndarray
    scale: np.ndarray
    forecasts: Sequence[QuantileForecast]

    @cached_property
    def median(self) -> np.ndarray:
        """The medians [N, horizon]."""
        return np.stack([each.median for each in self.forecasts])

    @cached_property
    def quantiles(self) -> np.ndarray:
        """The quantiles [N, horizon, LEVELS], which are not negative if the series are not."""
        return np.stack([like_series(each.quantiles, each.non_negative) for each in self.forecasts])[..., 1:-1]

    def bounds(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and the upper bounds [N, horizon] of the intervals. ``level`` is in per cent."""
        lower, upper = zip(*(each.interval(level) for each in self.forecasts), strict=True)
        return np.stack(lower), np.stack(upper)

    @cached_property
    def losses(self) -> np.ndarray:
        """The quantile loss [N] of each forecast."""
        return quantile_loss(self.actual, self.quantiles, self.scale)

    @cached_property
    def scaled(self) -> np.ndarray:
        """The MASE [N] of each forecast."""
        return mase(self.actual, self.median, self.scale)

    @property
    def quantile_loss(self) -> float:
        """The mean quantile loss."""
        return float(self.losses.mean())

    @property
    def mase(self) -> float:
        """The mean MASE."""
        return float(self.scaled.mean())

    @property
    def by_step(self) -> np.ndarray:
        """The MASE [horizon] of each step ahead."""
        scaled = np.abs(self.actual - self.median) / self.scale[:, None]
        counts = (~np.isnan(scaled)).sum(axis=0)
        return np.where(counts, np.nansum(scaled, axis=0) / np.maximum(counts, 1), np.nan)

    @property
    def coverage_80(self) -> float:
        """The share of the actual values in the 80 % intervals."""
        return coverage(self.actual, *self.bounds(80))

    @property
    def coverage_95(self) -> float:
        """The share of the actual values in the 95 % intervals."""
        return coverage(self.actual, *self.bounds(95))


def mase_scale(past: np.ndarray, season: int) -> float:
    """Return the mean absolute difference between values of ``past`` [T] that are one season apart.

    MASE and MSIS divide errors by this scale.
    """
    return float(np.abs(past[season:] - past[:-season]).mean())


def smape(actual: np.ndarray, forecast: np.ndarray) -> np.ndarray:
    """Return the symmetric mean absolute percentage error [N] of each forecast, from 0 to 200."""
    return (200 * np.abs(actual - forecast) / (np.abs(actual) + np.abs(forecast))).mean(axis=1)


def mase(actual: np.ndarray, forecast: np.ndarray, mase_scale: np.ndarray) -> np.ndarray:
    """Return the mean absolute scaled error [N] of each forecast."""
    return np.nanmean(np.abs(actual - forecast), axis=1) / mase_scale


def owa(data_set: str, smape: float, mase: float) -> float:
    """Return the overall weighted average of M4: the mean of sMAPE and MASE, each relative to M4's benchmark Naive2."""
    naive_smape, naive_mase = NAIVE2[data_set]
    return 0.5 * (smape / naive_smape + mase / naive_mase)


def pinball(actual: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """Return twice the pinball loss [N, horizon, LEVELS] of quantiles [N, horizon, LEVELS]."""
    errors, levels = actual[:, :, None] - quantiles, np.array(LEVELS)
    return 2 * np.maximum(levels * errors, (levels - 1) * errors)


def wql(actual: np.ndarray, quantiles: np.ndarray) -> float:
    """Return the weighted quantile loss: twice the sum of pinball losses, divided by the sum of absolute actual values.

    The result is the mean over the levels of quantiles [N, horizon, LEVELS]. It is NaN if all actual values are 0.
    """
    return float(np.nansum(pinball(actual, quantiles)) / len(LEVELS) / (np.nansum(np.abs(actual)) or np.nan))


def quantile_loss(actual: np.ndarray, quantiles: np.ndarray, mase_scale: np.ndarray) -> np.ndarray:
    """Return twice the pinball loss [N] of quantiles [N, horizon, LEVELS], divided by the MASE scale.

    The result is the mean over steps and levels. It equals MASE if the quantiles of all levels are equal.
    """
    return np.nanmean(pinball(actual, quantiles), axis=(1, 2)) / mase_scale


def msis(actual: np.ndarray, lower: np.ndarray, upper: np.ndarray, mase_scale: np.ndarray) -> float:
    """Return the mean scaled interval score of 95 % intervals: their width, plus a penalty for values outside."""
    outside = np.maximum(lower - actual, 0) + np.maximum(actual - upper, 0)
    return float(((upper - lower + 2 / ALPHA * outside).mean(axis=1) / mase_scale).mean())


def coverage(actual: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """Return the share of actual values that are inside their intervals."""
    return float(((lower <= actual) & (actual <= upper))[~np.isnan(actual)].mean())
