"""Any series to quantiles of what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.errors import BadValue, quote_value
from app.networks import KINDS
from app.networks.forecaster import MEDIAN, QUANTILES
from app.networks.lstm import SeriesLSTM
from app.store import Version
from app.tasks.latency_model import LatencyModel, check_finite
from app.tasks.quantile_forecast import NORMAL, QuantileForecast
from app.tasks.seasonality import detect_season, fill_missing
from app.tasks.window_forecasting import WindowForecaster

MIN_VALUES = 8  # values that a series must have
LONGEST_SEASON = 168  # values: a week of hours
LONGEST_GAP = 336  # missing values at the end that are forecast
TAIL_SCORES = 1000.0  # times as far from the middle as nine tenths of the values are: no value, but a fault
SCORES = np.array([NORMAL.inv_cdf(level) for level in QUANTILES])
_levels = np.array([0.0, *QUANTILES, 1.0])
SHARES = (_levels[2:] - _levels[:-2]) / 2  # of each quantile in the mean
SHARES[[0, -1]] += np.array([_levels[1], 1 - _levels[-2]]) / 2


@dataclass(frozen=True)
class SeriesWindow:
    """A series ready to be forecast: its last values [context], NaN before it begins; its season; how far to go.

    ``gap``: how many of the first steps are not asked for, because the series ends with as many missing values.
    """

    values: np.ndarray
    season: int
    horizon: int
    gap: int = 0


class GlobalForecaster:
    """A forecaster of the store, for series of any kind."""

    def __init__(self, version: Version, device: torch.device) -> None:
        self.card = version.card
        self.device = device
        self.network = version.network().to(device)
        self.latency = LatencyModel(0.0, 0.0)
        self.minimum = MIN_VALUES

    def parse(
        self,
        values: Sequence[float | None],
        horizon: int,
        param: str = "values",
        seasonality: int | None = None,
    ) -> SeriesWindow:
        """A series, None where a value is missing -> an item. ``seasonality`` None: it is looked for.

        Of a series that is no longer than one season, only its last value can be relied on: its season is 1. Missing
        values at its end are forecast before what is asked for; a value that is beyond all measure counts as missing.
        Raises BadValue for a series that is too short or has no value at all, and for a season that is too long.
        """
        if len(values) < MIN_VALUES:
            raise BadValue(f"{param} has {len(values)} values; {self.card.name} needs at least {MIN_VALUES}", param)
        if seasonality is not None and seasonality > LONGEST_SEASON:
            raise BadValue(
                f"seasonality is {quote_value(seasonality)}; "
                f"{self.card.name} takes seasons of up to {LONGEST_SEASON} values",
                "seasonality",
            )
        series = np.array(values, dtype=np.float64)
        known = np.flatnonzero(~np.isnan(series))
        if not len(known):
            raise BadValue(f"{param} has only missing values; at least one must be known", param)
        series = series[known[0] : known[-1] + 1]  # it begins and ends with a value
        gap = len(values) - 1 - int(known[-1])
        series[_tail_quantiles(series)] = np.nan
        if seasonality is None:
            season = detect_season(fill_missing(series, 1))
        else:
            season = seasonality if seasonality < len(series) else 1
        context = self.network.sizes.context
        window = np.full(context, np.nan)
        series = fill_missing(series, season)[-context:]
        window[context - len(series) :] = series
        if gap > LONGEST_GAP:  # in the same place of the season, and as uncertain as what is far away
            gap = LONGEST_GAP - (LONGEST_GAP - gap) % season
        return SeriesWindow(window, season, gap + horizon, gap)

    def predict(self, items: Sequence[SeriesWindow]) -> list[QuantileForecast]:
        """Items of any lengths, seasons and horizons -> the outlook of each."""
        values = torch.from_numpy(np.stack([item.values for item in items]))
        seasons = torch.tensor([item.season for item in items])
        with torch.inference_mode():
            horizon = max(item.horizon for item in items)
            found = self.network.forecast(values.to(self.device), seasons.to(self.device), horizon)
        check_finite(float((found * 0).sum()), "forecasts")  # times 0: the sum of what is large may have no number
        return [self._forecast(item, own) for item, own in zip(items, found.cpu().numpy(), strict=True)]

    def _forecast(self, item: SeriesWindow, quantiles: np.ndarray) -> QuantileForecast:
        quantiles = quantiles[item.gap : item.horizon]
        median = quantiles[:, MEDIAN].copy()
        mean = median + (quantiles - median[:, None]) @ SHARES
        return QuantileForecast(mean, median, SCORES, quantiles, item.season)

    def forecast(self, item: SeriesWindow, answer: QuantileForecast) -> QuantileForecast:
        """What ``predict`` gave for an item, as the service answers."""
        return answer

    def rows(self, item: SeriesWindow) -> int:
        """How much of a batch an item takes."""
        return 1

    def seconds(self, items: Sequence[SeriesWindow]) -> float:
        """How long a batch should take: as many passes as its longest forecast needs."""
        return self.latency(len(items)) * math.ceil(max(item.horizon for item in items) / self.network.sizes.horizon)

    def dummy_run(self, rows: int) -> None:
        """Compute so many series of no meaning: to warm up, and to be timed."""
        sizes = self.network.sizes
        self.predict([SeriesWindow(np.sin(np.arange(sizes.context, dtype=np.float64)), 1, sizes.horizon)] * rows)

    def warm_up(self, rows: int) -> None:
        """Compute alone, in a full batch and between, and measure it."""
        self.latency = LatencyModel.measure(self.dummy_run, rows)


AnyForecaster = GlobalForecaster | WindowForecaster
WINDOW_NETWORKS = (SeriesLSTM,)  # networks for one kind of series; all others forecast any series


def load_forecaster(version: Version, device: torch.device) -> AnyForecaster:
    """Return the predictor for the network of a version."""
    kind = KINDS.get(version.card.kind)
    windowed = kind is not None and issubclass(kind.network, WINDOW_NETWORKS)
    return (WindowForecaster if windowed else GlobalForecaster)(version, device)


def _tail_quantiles(series: np.ndarray) -> np.ndarray:
    """Which values of a series [T] with NaN are beyond all measure; never the last ones, which may be a new level.

    The unit of a series is its usual step: one value of 1e12 among tens would make it 1e10.
    """
    away = np.abs(series / 2 - np.nanmedian(series) / 2)  # halves: a difference might overflow
    usual = np.nanquantile(away, 0.9)
    beyond = away > TAIL_SCORES * usual if usual > 0 else np.zeros(len(series), bool)
    within = np.flatnonzero(~beyond & ~np.isnan(series))
    beyond[within[-1] + 1 :] = False
    return beyond
