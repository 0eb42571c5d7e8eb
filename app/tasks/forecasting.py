"""Series to forecasts with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from app.errors import BadValue, quote_value
from app.networks import KINDS
from app.networks.forecaster import MEDIAN, QUANTILES
from app.networks.lstm import SeriesLSTM
from app.store import StoreError, Version
from app.tasks.latency_model import LatencyModel
from app.tasks.precision import check_finite
from app.tasks.seasonality import detect_season, fill_missing

NORMAL = NormalDist()
MIN_VALUES = 8  # values that a series must have
LONGEST_SEASON = 168  # values: a week of hours
LONGEST_GAP = 336  # missing values at the end that are forecast
TAIL_SCORES = 1000.0  # times as far from the middle as nine tenths of the values are: no value, but a fault
SCORES = np.array([NORMAL.inv_cdf(level) for level in QUANTILES])
_levels = np.array([0.0, *QUANTILES, 1.0])
SHARES = (_levels[2:] - _levels[:-2]) / 2  # of each quantile in the mean
SHARES[[0, -1]] += np.array([_levels[1], 1 - _levels[-2]]) / 2
USUAL = 48  # steps ahead, when the pace is measured
NORMAL_SCORES = np.array([-1.0, 0.0, 1.0])


@dataclass(frozen=True)
class QuantileForecast:
    """The coming values of a series, in its units.

    ``quantiles`` [horizon, Q] belong to ``scores`` [Q], ascending: how many standard deviations from the middle each
    would lie if errors were normal. One of the scores is 0: the median.
    """

    mean: np.ndarray
    median: np.ndarray
    scores: np.ndarray
    quantiles: np.ndarray
    seasonality: int | None = None

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """The lower and upper bounds [horizon] that hold ``level`` per cent."""
        score = -NORMAL.inv_cdf(0.5 - level / 200)
        return self._at(-score), self._at(score)

    def _at(self, score: float) -> np.ndarray:
        """On the line between the scores that there are; beyond them as far in proportion, as normal errors are."""
        scores, quantiles = self.scores, self.quantiles
        if not scores[0] < score < scores[-1]:
            outermost = -1 if score > 0 else 0
            return self.median + (quantiles[:, outermost] - self.median) * (score / scores[outermost])
        above = int(np.searchsorted(scores, score, "right"))
        share = (score - scores[above - 1]) / (scores[above] - scores[above - 1])
        return quantiles[:, above - 1] + share * (quantiles[:, above] - quantiles[:, above - 1])


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


@dataclass(frozen=True)
class ScaledSeries:
    """A series ready to be forecast: its last window [window], the units it is read in, and how far to go."""

    window: np.ndarray
    location: float
    scale: float
    horizon: int


class WindowForecaster:
    """A series LSTM of the store. ``residuals`` are its measured errors per step ahead, in units of the scale."""

    def __init__(self, version: Version, device: torch.device) -> None:
        card = version.card
        if not card.residuals or min(card.residuals) < 0:
            raise StoreError(f"{version.label}: residuals must be a list of standard deviations, one per step ahead")
        self.card = card
        self.device = device
        self.residuals = np.maximum.accumulate(np.array(card.residuals))  # no step is surer than one before it
        self.network = version.network().to(device)
        self.latency = LatencyModel(0.0, 0.0)
        self.minimum: int = self.network.sizes.window

    def parse(
        self, values: Sequence[float | None], horizon: int, param: str = "values", seasonality: int | None = None
    ) -> ScaledSeries:
        """A series, None where a value is missing -> an item. Missing values lie on the line between their neighbours.

        Raises BadValue for a series that is too short or has no value at all, and for a seasonality: it reads none.
        """
        if seasonality is not None:
            told = f"seasonality is {quote_value(seasonality)}; {self.card.name} has none, so leave it out"
            raise BadValue(told, "seasonality")
        if len(values) < self.minimum:
            raise BadValue(f"{param} has {len(values)} values; {self.card.name} needs at least {self.minimum}", param)
        series = np.array(values, dtype=np.float64)
        known = np.flatnonzero(~np.isnan(series))
        if not len(known):
            raise BadValue(f"{param} has only missing values; at least one must be known", param)
        series = np.interp(np.arange(len(series)), known, series[known])
        location, scale = self._units(series)
        return ScaledSeries(series[-self.minimum :], location, scale, horizon)

    def _units(self, series: np.ndarray) -> tuple[float, float]:
        """The location and scale to read a series [T] in.

        One like the series trained on keeps the training units: a window of it is shorter than its period, so that
        its own mean would mislead. Any other is standardised by itself, as the workshop does with its own.
        """
        if series.min() == series.max():
            return float(series[0]), 0.0
        if self.network.knows(torch.from_numpy(series).to(self.device)):
            return float(self.network.location), float(self.network.scale)
        largest = np.abs(series).max()  # so that no square overflows or vanishes
        unit = series / largest
        return float(unit.mean() * largest), float(unit.std(ddof=1) * largest)

    def predict(self, items: Sequence[ScaledSeries]) -> list[np.ndarray]:
        """Items -> the forecast [horizon] of each, which is the mean and, its errors being symmetric, the median."""
        with torch.inference_mode():
            location = np.array([item.location for item in items])
            scale = np.array([item.scale for item in items])
            windows = np.stack([item.window for item in items]) - location[:, None]
            windows /= np.where(scale > 0, scale, 1.0)[:, None]
            read = torch.from_numpy(windows).float().to(self.device)
            standardised = self.network(read, max(item.horizon for item in items))
        check_finite(float(standardised.double().sum()), "forecasts")
        forecasts = standardised.double().cpu().numpy() * scale[:, None] + location[:, None]
        return [forecast[: item.horizon] for forecast, item in zip(forecasts, items, strict=True)]

    def half_widths(self, item: ScaledSeries, level: float) -> np.ndarray:
        """Half the width [horizon] of the interval that holds ``level`` per cent, from the measured residuals.

        Beyond the last measured step the error grows with the square root of the distance, as a random walk's does.
        """
        return -NORMAL.inv_cdf(0.5 - level / 200) * self._deviation(item)

    def forecast(self, item: ScaledSeries, mean: np.ndarray) -> QuantileForecast:
        """What ``predict`` gave for an item, as the service answers: with normal errors around it."""
        deviation = self._deviation(item)
        quantiles = np.stack([mean - deviation, mean, mean + deviation], axis=1)
        return QuantileForecast(mean, mean, NORMAL_SCORES, quantiles)

    def _deviation(self, item: ScaledSeries) -> np.ndarray:
        measured = len(self.residuals)
        steps = np.arange(1, item.horizon + 1)
        deviation = self.residuals[np.minimum(steps, measured) - 1] * np.sqrt(np.maximum(1.0, steps / measured))
        return deviation * item.scale

    def rows(self, item: ScaledSeries) -> int:
        """How much of a batch an item takes."""
        return 1

    def seconds(self, items: Sequence[ScaledSeries]) -> float:
        """How long a batch should take: as long as its longest forecast."""
        steps = self.minimum + max(item.horizon for item in items)
        return self.latency(len(items)) * steps / (self.minimum + USUAL)

    def dummy_run(self, rows: int) -> None:
        """Compute so many series of no meaning: to warm up, and to be timed."""
        self.predict([ScaledSeries(np.zeros(self.minimum), 0.0, 1.0, USUAL)] * rows)

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
