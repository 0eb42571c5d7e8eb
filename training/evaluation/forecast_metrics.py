"""Forecast metrics as in the M4 competition ("Benchmarks and Evaluation.R") and in GluonTS, computed by utilsforecast.

sMAPE is from 0 to 200 as in M4, and from 0 to 1 in utilsforecast. Quantile losses are twice the pinball loss as in
GluonTS, so that they equal the absolute error if all quantiles are equal. Steps without an actual value do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from utilsforecast import losses

from app.tasks.forecasting import QuantileForecast, like_series

LEVELS = np.arange(1, 10) / 10
COLUMNS = {"q": [f"q{level}" for level in LEVELS]}  # the quantiles in a frame
# sMAPE and MASE of M4's benchmark Naive2, by data set
NAIVE2 = {"m4_hourly": (18.383, 2.395), "m4_weekly": (9.161, 2.777)}


def scaled_frame(actual: np.ndarray, scale: np.ndarray, quantiles: np.ndarray, **others: np.ndarray) -> pd.DataFrame:
    """Return a frame for utilsforecast with a row for each forecast and each step that has an actual value.

    Args:
        actual: the actual values [N, horizon]; NaN where there is none.
        scale: the MASE scale [N] of each series. All values are divided by it.
        quantiles: the quantiles [N, horizon, LEVELS] of the forecasts.
        others: further columns [N, horizon].
    """
    count, horizon = actual.shape
    columns = {"y": actual, **others, **dict(zip(COLUMNS["q"], np.moveaxis(quantiles, -1, 0), strict=True))}
    frame = pd.DataFrame({name: (values / scale[:, None]).ravel() for name, values in columns.items()})
    frame["unique_id"], frame["step"] = np.arange(count).repeat(horizon), np.tile(np.arange(horizon), count)
    return frame.dropna(subset="y")


def quantile_losses(frame: pd.DataFrame) -> np.ndarray:
    """Return the quantile loss [N] of each forecast in a frame: the mean over steps and levels."""
    return 2 * losses.mqloss(frame, COLUMNS, LEVELS)["q"].to_numpy()


@dataclass(frozen=True)
class Errors:
    """The errors of N forecasts.

    ``actual`` [N, horizon]: the actual values. ``scale`` [N]: the MASE scale of each series.
    """

    actual: np.ndarray
    scale: np.ndarray
    forecasts: Sequence[QuantileForecast]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """The forecasts. Their quantiles are not negative if the series are not."""
        quantiles = np.stack([like_series(each.quantiles, each.non_negative) for each in self.forecasts])
        columns = {"m": np.stack([each.median for each in self.forecasts])}
        for level in (80, 95):
            bounds = np.stack([each.interval(level) for each in self.forecasts])  # [N, 2, horizon]
            columns |= {f"m-lo-{level}": bounds[:, 0], f"m-hi-{level}": bounds[:, 1]}
        return scaled_frame(self.actual, self.scale, quantiles[..., 1:-1], **columns)

    @cached_property
    def losses(self) -> np.ndarray:
        """The quantile loss [N] of each forecast, in MASE scales."""
        return quantile_losses(self.frame)

    @cached_property
    def scaled(self) -> np.ndarray:
        """The mean absolute scaled error (MASE) [N] of each forecast."""
        return losses.mae(self.frame, ["m"])["m"].to_numpy()

    @property
    def smape(self) -> np.ndarray:
        """The symmetric mean absolute percentage error [N] of each forecast, from 0 to 200."""
        return 200 * losses.smape(self.frame, ["m"])["m"].to_numpy()

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
        errors = losses.mae(self.frame, ["m"], "step").set_index("step")["m"]
        return errors.reindex(range(self.actual.shape[1])).to_numpy()

    def coverage(self, level: int) -> float:
        """Return the share of the actual values in the intervals. ``level``: 80 or 95, in per cent."""
        return float(losses.coverage(self.frame.assign(unique_id=0), ["m"], level)["m"].item())

    @property
    def msis(self) -> float:
        """The mean scaled interval score of the 95 % intervals: their width, plus a penalty for values outside."""
        return float(losses.winkler_score(self.frame, ["m"], 95)["m"].mean())

    @property
    def wql(self) -> float:
        """The weighted quantile loss: the sum of quantile losses, divided by the sum of absolute actual values.

        The result is the mean over the levels. It is NaN if all actual values are 0.
        """
        frame = replace(self, scale=np.ones_like(self.scale)).frame.assign(unique_id=0)
        return float(quantile_losses(frame).item() / (frame["y"].abs().mean() or np.nan))


def mase_scale(past: np.ndarray, season: int) -> float:
    """Return the mean absolute difference between values of ``past`` [T] that are one season apart.

    MASE and MSIS divide errors by this scale.
    """
    return float(np.abs(past[season:] - past[:-season]).mean())


def owa(data_set: str, smape: float, mase: float) -> float:
    """Return the overall weighted average of M4: the mean of sMAPE and MASE, each relative to M4's benchmark Naive2."""
    naive_smape, naive_mase = NAIVE2[data_set]
    return 0.5 * (smape / naive_smape + mase / naive_mase)
