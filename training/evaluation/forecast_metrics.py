"""Forecast metrics as in the M4 competition ("Benchmarks and Evaluation.R") and in GluonTS.

Forecasts, actual values and interval bounds are arrays [N, horizon]. ``mase_scale`` [N] is the scale of each series;
see ``mase_scale()``. ``mase``, ``wql``, ``quantile_loss`` and ``coverage`` ignore actual values that are NaN. A test
compares all metrics with those of utilsforecast, whose sMAPE and quantile losses differ by a constant factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.tasks.forecasting import QuantileForecast, like_series

LEVELS = tuple(level / 10 for level in range(1, 10))  # quantile levels of wql and quantile_loss
ALPHA = 0.05  # msis uses 95 % intervals
# sMAPE and MASE of M4's benchmark Naive2, by data set
NAIVE2 = {"m4_hourly": (18.383, 2.395), "m4_weekly": (9.161, 2.777)}


def quantiles_of(forecasts: Sequence[QuantileForecast]) -> np.ndarray:
    """Return the quantiles [N, horizon, LEVELS] of forecasts, which are not negative if the series are not."""
    return np.stack([like_series(each.quantiles, each.non_negative) for each in forecasts])[..., 1:-1]


def bounds_of(forecasts: Sequence[QuantileForecast], level: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper bounds [N, horizon] of the intervals of forecasts. ``level`` is in per cent."""
    lower, upper = zip(*(each.interval(level) for each in forecasts), strict=True)
    return np.stack(lower), np.stack(upper)


def medians_of(forecasts: Sequence[QuantileForecast]) -> np.ndarray:
    """Return the medians [N, horizon] of forecasts."""
    return np.stack([each.median for each in forecasts])


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


def wql(actual: np.ndarray, quantiles: Sequence[np.ndarray], levels: Sequence[float] = LEVELS) -> float:
    """Return the weighted quantile loss: twice the sum of pinball losses, divided by the sum of absolute actual values.

    The result is the mean over the levels. ``quantiles`` has one forecast [N, horizon] per level. The result is NaN if
    all actual values are 0.
    """
    losses = [
        2 * np.nansum(np.maximum(level * (actual - quantile), (level - 1) * (actual - quantile)))
        for level, quantile in zip(levels, quantiles, strict=True)
    ]
    return float(np.mean(losses) / (np.nansum(np.abs(actual)) or np.nan))


def quantile_loss(actual: np.ndarray, quantiles: np.ndarray, mase_scale: np.ndarray) -> np.ndarray:
    """Return twice the pinball loss [N] of quantiles [N, horizon, LEVELS], divided by the MASE scale.

    The result is the mean over steps and levels. It equals MASE if the quantiles of all levels are equal.
    """
    errors = actual[:, :, None] - quantiles
    levels = np.array(LEVELS)
    losses = 2 * np.maximum(levels * errors, (levels - 1) * errors)
    return np.nanmean(losses, axis=(1, 2)) / mase_scale


def msis(actual: np.ndarray, lower: np.ndarray, upper: np.ndarray, mase_scale: np.ndarray) -> float:
    """Return the mean scaled interval score of 95 % intervals: their width, plus a penalty for values outside."""
    outside = np.maximum(lower - actual, 0) + np.maximum(actual - upper, 0)
    return float(((upper - lower + 2 / ALPHA * outside).mean(axis=1) / mase_scale).mean())


def coverage(actual: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """Return the share of actual values that are inside their intervals."""
    return float(((lower <= actual) & (actual <= upper))[~np.isnan(actual)].mean())
