"""How forecasts are judged, as the M4 competition did ("Benchmarks and Evaluation.R") and as GluonTS does.

Forecasts, actual values and bounds are arrays [N, horizon]; ``usual`` [N] is each series' usual step. For the MASE, the
quantile loss and the coverage an actual value that is NaN does not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVELS = tuple(level / 10 for level in range(1, 10))  # of the quantiles that WQL takes
ALPHA = 0.05  # of MSIS: 95 % intervals
# sMAPE and MASE of M4's benchmark Naive2, by the name of the collection
NAIVE2 = {"m4_hourly": (18.383, 2.395), "m4_weekly": (9.161, 2.777)}


def usual_step(past: np.ndarray, season: int) -> float:
    """The mean distance of a value of ``past`` [T] from the one a season before: the unit of MASE and MSIS."""
    return float(np.abs(past[season:] - past[:-season]).mean())


def seasonal_naive(past: np.ndarray, season: int, horizon: int) -> np.ndarray:
    """The last season of ``past`` [T] again and again: [horizon]."""
    return past[-season:][np.arange(horizon) % season]


def smape(actual: np.ndarray, forecast: np.ndarray) -> float:
    """The symmetric mean absolute percentage error, 0 to 200."""
    return float((200 * np.abs(actual - forecast) / (np.abs(actual) + np.abs(forecast))).mean())


def mase(actual: np.ndarray, forecast: np.ndarray, usual: np.ndarray) -> float:
    """The mean absolute error in units of the usual step of each series."""
    return float((np.nanmean(np.abs(actual - forecast), axis=1) / usual).mean())


def owa(collection: str, smape: float, mase: float) -> float:
    """The overall weighted average: both errors relative to those of Naive2, averaged."""
    naive_smape, naive_mase = NAIVE2[collection]
    return 0.5 * (smape / naive_smape + mase / naive_mase)


def wql(actual: np.ndarray, quantiles: Sequence[np.ndarray], levels: Sequence[float] = LEVELS) -> float:
    """The weighted quantile loss: pinball losses of the levels' quantiles, pooled over all series, doubled."""
    losses = [
        2 * np.maximum(level * (actual - quantile), (level - 1) * (actual - quantile)).sum()
        for level, quantile in zip(levels, quantiles, strict=True)
    ]
    return float(np.mean(losses) / np.abs(actual).sum())


def quantile_loss(actual: np.ndarray, quantiles: np.ndarray, usual: np.ndarray) -> float:
    """The pinball losses of the levels' quantiles [N, horizon, LEVELS], doubled, in units of the usual step.

    Of a forecast without any width that is its MASE.
    """
    over = actual[:, :, None] - quantiles
    levels = np.array(LEVELS)
    losses = 2 * np.maximum(levels * over, (levels - 1) * over)
    return float((np.nanmean(losses, axis=(1, 2)) / usual).mean())


def msis(actual: np.ndarray, lower: np.ndarray, upper: np.ndarray, usual: np.ndarray) -> float:
    """The mean scaled interval score of 95 % intervals: their width, and a fine for what lies outside."""
    outside = np.maximum(lower - actual, 0) + np.maximum(actual - upper, 0)
    return float(((upper - lower + 2 / ALPHA * outside).mean(axis=1) / usual).mean())


def coverage(actual: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """The share of values inside their intervals."""
    return float(((lower <= actual) & (actual <= upper))[~np.isnan(actual)].mean())
