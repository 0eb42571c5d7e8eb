"""Forecasting: compute forecasts and prediction intervals of series of numbers.

``GlobalForecaster`` forecasts any series. ``WindowForecaster`` runs ``SeriesLSTM``, which forecasts one kind of series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from app.errors import BadValue, quote_value
from app.limits import Limits
from app.networks import KINDS
from app.networks.forecaster import MEDIAN, QUANTILES
from app.networks.lstm import SeriesDescription, SeriesLSTM
from app.store import Card, SeriesTraits, StoreError
from app.store.version import Version
from app.tasks.covariates import covariate_effect, read_covariates
from app.tasks.job import Job
from app.tasks.precision import check_finite
from app.tasks.predictor import BatchPredictor
from app.tasks.seasonality import MAX_SEASON, MIN_YEARS, detect_season, fill_missing, interpolate, yearly_pattern

NORMAL = NormalDist()
MIN_VALUES = 3  # smallest length of a series
MAX_READ = 8192  # only this many values at the end of a series are read, which limits the time
MAX_GAP = 336  # largest number of missing values at the end of a series that are forecast
OUTLIER_RATIO = 1000.0  # a value this many times further from the median than 90 % of all values is an outlier
SCORES = np.array([NORMAL.inv_cdf(level) for level in QUANTILES])
_levels = np.array([0.0, *QUANTILES, 1.0])
MEAN_WEIGHTS = (_levels[2:] - _levels[:-2]) / 2  # weight of each quantile in the mean
MEAN_WEIGHTS[[0, -1]] += np.array([_levels[1], 1 - _levels[-2]]) / 2
VALUES_PER_SERIES = 3000  # preparing a series costs as much as this many values, in addition to its own values
DUMMY_HORIZON = 48  # steps of the forecasts that are timed
NORMAL_SCORES = np.array([-1.0, 0.0, 1.0])


@dataclass(frozen=True)
class QuantileForecast:
    """A forecast on the scale of its series: mean [horizon], median [horizon], and quantiles [horizon, Q].

    ``scores`` [Q] are the quantiles of the standard normal distribution at the levels of ``quantiles``, in ascending
    order. ``non_negative`` and ``integer``: bounds of intervals are at least 0, and rounded. ``quantiles`` are not.
    """

    mean: np.ndarray
    median: np.ndarray
    scores: np.ndarray
    quantiles: np.ndarray
    seasonality: int | None = None
    non_negative: bool = False
    integer: bool = False

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the lower and upper bounds [horizon] of the interval that contains ``level`` % of the probability."""
        score = -NORMAL.inv_cdf(0.5 - level / 200)
        return self._at(-score), self._at(score)

    def rounded(self) -> QuantileForecast:
        """Return the same forecast with mean, median and bounds rounded to integers."""
        mean, median = (like_series(x, self.non_negative, True) for x in (self.mean, self.median))
        return replace(self, mean=mean, median=median, integer=True)

    def _at(self, score: float) -> np.ndarray:
        """Return the values [horizon] at a normal score, interpolated or extrapolated from the nearest quantiles."""
        scores, quantiles = self.scores, self.quantiles
        if not scores[0] < score < scores[-1]:
            middle, outermost = quantiles[:, int(np.searchsorted(scores, 0.0))], -1 if score > 0 else 0
            bound = middle + (quantiles[:, outermost] - middle) * (score / scores[outermost])
            return like_series(bound, self.non_negative, self.integer)
        above = int(np.searchsorted(scores, score, "right"))
        fraction = (score - scores[above - 1]) / (scores[above] - scores[above - 1])
        bound = quantiles[:, above - 1] + fraction * (quantiles[:, above] - quantiles[:, above - 1])
        return like_series(bound, self.non_negative, self.integer)


def like_series(x: np.ndarray, non_negative: bool, integer: bool = False) -> np.ndarray:
    """Return forecasts, with negative values set to 0 if ``non_negative``, and with rounded values if ``integer``."""
    x = np.maximum(x, 0.0) if non_negative else x
    return np.round(x) + 0.0 if integer else x  # adding 0.0 removes -0.0


@dataclass
class ForecastJob(Job):
    """Series to forecast, in which None marks a missing value.

    ``has_many`` is false if the protocol took one series instead of a list. ``covariates`` and ``start`` are as in
    ``read_covariates``. The patterns in ``names`` for ``series`` and ``start`` have {} in place of the index.
    """

    series: Sequence[Sequence[float | None]]
    horizon: int = 24
    levels: Sequence[float] = (80.0, 95.0)
    seasonality: int | None = None
    integer: bool = False
    covariates: Mapping[str, Any] | None = None
    start: str | Sequence[str] | None = None
    has_many: bool = True

    @property
    def prepare_size(self) -> int:
        return sum(VALUES_PER_SERIES + len(values) for values in self.series)

    def answer_size(self, outputs: Sequence[Any]) -> int:
        return len(self.series) * self.horizon * (1 + len(self.levels))

    def check(self, limits: Limits) -> None:
        self.check_at_most("horizon", limits.max_horizon)
        most, count, name = limits.max_series_values, sum(map(len, self.series)), self.series_name(0).partition(".")[0]
        if len(self.series) > limits.max_series:
            raise BadValue(f"{name} has {len(self.series)} series; the maximum is {limits.max_series}", name)
        if count > most:
            raise BadValue(f"{name} has {count:,} values; the maximum is {most:,}", name)
        columns = (self.covariates or {}).values()
        rows = [row for each in columns for row in (each if each and isinstance(each[0], list) else [each])]
        count += sum(len(row) for row in rows if isinstance(row, list))
        if count > most:
            raise BadValue(f"values and covariates have {count:,} values; the maximum is {most:,}", "covariates")
        if len(set(self.levels)) < len(self.levels):
            name = self.name("levels")
            raise BadValue(f"{name} is {quote_value(self.levels)}; each level may occur only once", name)

    def series_name(self, index: int) -> str:
        """Return the name of a series in error messages."""
        return self.names.get("series", "values.{}" if self.has_many else "values").format(index)


@dataclass(frozen=True)
class SeriesForecast:
    """The forecast of one series: mean and median [horizon], and the bounds [horizon] of the interval of each level."""

    mean: np.ndarray
    median: np.ndarray
    bounds: Mapping[float, tuple[np.ndarray, np.ndarray]]
    seasonality: int | None


@dataclass(frozen=True)
class ForecastAnswer:
    """One forecast for each series."""

    forecasts: Sequence[SeriesForecast]


@dataclass(frozen=True)
class SeriesWindow:
    """A parsed series. ``values`` [context] are its last values, padded with NaN at the front.

    ``season`` is the number of values per season. ``gap`` is the number of missing values at the end of the series,
    limited to MAX_GAP. The network forecasts ``horizon`` steps. The result omits the first ``gap`` of these steps.
    ``added`` [horizon - gap] is the yearly pattern plus the effect of covariates. It is added to the forecast. Then the
    forecast is made ``non_negative`` or ``integer``.
    """

    values: np.ndarray
    season: int
    horizon: int
    gap: int = 0
    added: np.ndarray | None = None
    non_negative: bool = False
    integer: bool = False


def read_values(values: Sequence[float | None], minimum: int, model: str, param: str) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays: the series [T] with NaN for missing values (None), and the positions of the known values.

    Raises:
        BadValue: the series is shorter than ``minimum``, or all its values are missing.
    """
    if len(values) < minimum:
        raise BadValue(f"{param} has {len(values)} values; {model} needs at least {minimum}", param)
    series = np.array(values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(series))
    if not len(known):
        raise BadValue(f"{param} has only missing values; at least one must be known", param)
    return series, known


class SeriesPredictor(BatchPredictor):
    """The steps before and after ``predict`` that all predictors for series share.

    The method ``parse(values, horizon, param, seasonality, covariates)`` prepares a series. It raises BadValue.
    """

    parse: Callable[..., Any]

    def prepare(self, job: ForecastJob) -> list[Any]:
        """Return one item for each series. Raises BadValue if the model cannot read a series or its covariates."""
        known = self.card.series.known if self.card.series else None
        lengths, start = [len(values) for values in job.series], job.names.get("start", "start.{}")
        sent = job.covariates, job.start
        covariates = read_covariates(self.card.name, known, *sent, lengths, job.horizon, job.has_many, start)
        rows: list[tuple[Any, ...]] = [(row,) for row in covariates] if covariates else [()] * len(lengths)
        return [
            self.parse(values, job.horizon, job.series_name(i), job.seasonality, *rows[i])
            for i, values in enumerate(job.series)
        ]

    def finish(self, job: ForecastJob, items: Sequence[Any], outputs: Sequence[QuantileForecast]) -> ForecastAnswer:
        """Return the answer, given the result of ``predict`` for each item."""
        forecasts = []
        for forecast in outputs:
            if job.integer:
                forecast = forecast.rounded()
            bounds = {level: forecast.interval(level) for level in job.levels}
            forecasts.append(SeriesForecast(forecast.mean, forecast.median, bounds, forecast.seasonality))
        return ForecastAnswer(forecasts)


class GlobalForecaster(SeriesPredictor):
    """Predictor for networks that forecast any series."""

    def __init__(self, version: Version, device: torch.device) -> None:
        self.card = version.card
        self.device = device
        self.network = version.network().to(device)
        self.network.combine()

    def parse(
        self,
        values: Sequence[float | None],
        horizon: int,
        param: str = "values",
        seasonality: int | None = None,
        covariates: np.ndarray | None = None,
    ) -> SeriesWindow:
        """Prepare the last values of a series for ``predict``.

        Missing values at the end are forecast. Missing values between known values are filled. Outliers count as
        missing. A season is ignored if it is not shorter than the series, or longer than the network's context. Only
        the last ``MAX_READ`` values are used, unless all of these are missing.

        Args:
            values: None marks a missing value.
            horizon: steps to forecast.
            param: name of the series in error messages.
            seasonality: values per season. If it is None, the season on the card is used or, without one, a detected
                season.
            covariates: finite values [T + horizon, K] of the known covariates on the card, or None if there are none.

        Raises:
            BadValue: the series is too short or has no value, or the season is too long.
        """
        traits, model = self.card.series or SeriesTraits(season=None), self.card.name
        context = self.network.sizes.context
        ignored = max(0, len(values) - MAX_READ)
        if ignored and not np.isnan(np.array(values[ignored:], dtype=np.float64)).all():
            values, covariates = values[ignored:], None if covariates is None else covariates[ignored:]
        series, known = read_values(values, MIN_VALUES, model, param)
        if seasonality is not None and seasonality > MAX_SEASON:
            raise BadValue(
                f"seasonality is {quote_value(seasonality)}; {model} takes seasons of up to {MAX_SEASON} values",
                "seasonality",
            )
        series = series[known[0] : known[-1] + 1]  # begins and ends with a known value
        gap = len(values) - 1 - int(known[-1])
        series[_outliers(series)] = np.nan
        seasonality = traits.season if seasonality is None else seasonality
        season = detect_season(fill_missing(series, 1)) if seasonality is None else seasonality
        if season >= len(series) or season > context:
            season = 1
        actual = series[~np.isnan(series)]
        non_negative = traits.non_negative and bool(actual.min() >= 0)
        integer = traits.integer and bool((actual % 1 == 0).all())
        window = np.full(context, np.nan)
        inputs = None if covariates is None else covariates[int(known[0]) :]
        series, added = _without_effects(series, traits, season, inputs, gap, horizon)
        series = series[-context:]
        window[context - len(series) :] = series
        if gap > MAX_GAP:  # shorten by whole seasons, because the forecast hardly changes that far ahead
            gap = MAX_GAP - (MAX_GAP - gap) % season
        return SeriesWindow(window, season, gap + horizon, gap, added, non_negative, integer)

    def predict(self, items: Sequence[SeriesWindow]) -> list[QuantileForecast]:
        """Forecast series of any lengths, seasons and horizons in one batch."""
        values = torch.from_numpy(np.stack([item.values for item in items]))
        seasons = torch.tensor([item.season for item in items])
        with torch.inference_mode():
            horizon = max(item.horizon for item in items)
            quantiles = self.network.forecast(values.to(self.device), seasons.to(self.device), horizon)  # [N, H, Q]
        check_finite(float((quantiles * 0).sum()), "forecasts")  # times 0, as a sum of large values may overflow
        return [self._forecast(item, rows) for item, rows in zip(items, quantiles.cpu().numpy(), strict=True)]

    def _forecast(self, item: SeriesWindow, quantiles: np.ndarray) -> QuantileForecast:
        quantiles = quantiles[item.gap : item.horizon]
        if item.added is not None:
            quantiles = quantiles + item.added[:, None]
        median = quantiles[:, MEDIAN].copy()
        mean = median + (quantiles - median[:, None]) @ MEAN_WEIGHTS
        mean, median = (like_series(x, item.non_negative) for x in (mean, median))
        forecast = QuantileForecast(mean, median, SCORES, quantiles, item.season, item.non_negative)
        return forecast.rounded() if item.integer else forecast

    def seconds(self, items: Sequence[SeriesWindow]) -> float:
        """Return the expected seconds of a batch. The longest forecast decides how often the network runs."""
        return self.latency(len(items)) * math.ceil(max(item.horizon for item in items) / self.network.sizes.horizon)

    def dummy_run(self, rows: int) -> None:
        """Compute a batch of ``rows`` dummy series."""
        sizes = self.network.sizes
        self.predict([SeriesWindow(np.sin(np.arange(sizes.context, dtype=np.float64)), 1, sizes.horizon)] * rows)


def _without_effects(
    series: np.ndarray, traits: SeriesTraits, season: int, covariates: np.ndarray | None, gap: int, horizon: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Fill NaN in a series [T]. Subtract its yearly pattern and the effect of covariates [T + gap + horizon, K].

    Returns the remaining series [T], and the values [horizon] to add to its forecast (None if nothing was subtracted).
    """
    filled, added = fill_missing(series, season), None
    if traits.known and covariates is not None:
        effect = covariate_effect(filled, covariates, season, traits.known, ~np.isnan(series))
        filled, added = fill_missing(series - effect[: len(series)], season), effect[len(series) + gap :]
    if traits.year and len(series) >= MIN_YEARS * traits.year:
        pattern = yearly_pattern(filled, traits.year, gap + horizon)
        ahead = pattern[len(series) + gap :]
        filled, added = filled - pattern[: len(series)], ahead if added is None else ahead + added
    return filled, added


def _outliers(series: np.ndarray) -> np.ndarray:
    """Return a mask [T] of the extreme outliers in a series [T], which may contain NaN.

    One value of 1e12 among values around 10 would dominate the scale of the series. Values at the end are never
    outliers, because they may be a new level.
    """
    known = np.flatnonzero(~np.isnan(series))
    halves = series / 2  # because a difference might overflow
    distance = np.abs(halves - _quantile(halves[known], 0.5))
    usual = _quantile(distance[known], 0.9)
    outliers = distance > OUTLIER_RATIO * usual if usual > 0 else np.zeros(len(series), bool)
    if outliers.any():
        outliers[known[~outliers[known]][-1] + 1 :] = False
    return outliers


def _quantile(x: np.ndarray, share: float) -> float:
    """Return a quantile of numbers [N]. The function of NumPy takes five times as long."""
    return interpolate(np.sort(x), share * (len(x) - 1))


@dataclass(frozen=True)
class ScaledSeries:
    """A parsed series: its last values [window], its location and scale, and the steps to forecast."""

    window: np.ndarray
    location: float
    scale: float
    horizon: int


class WindowForecaster(SeriesPredictor):
    """Predictor for ``SeriesLSTM``.

    ``residuals`` are the measured standard deviations of the forecast errors for each step ahead, divided by the scale.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        card = version.card
        if not card.residuals or min(card.residuals) < 0:
            raise StoreError(f"{version.label}: residuals must be a list of standard deviations, one per step ahead")
        self.card, self.device = card, device
        self.residuals = np.maximum.accumulate(np.array(card.residuals))  # errors must not decrease from step to step
        self.network = version.network().to(device)
        self.training_series: SeriesDescription = self.network.training_series()
        self.minimum: int = self.network.sizes.window

    def parse(
        self, values: Sequence[float | None], horizon: int, param: str = "values", seasonality: int | None = None
    ) -> ScaledSeries:
        """Prepare a series for ``predict``. Missing values (None) are interpolated linearly.

        Raises:
            BadValue: the series is too short or has no value, or ``seasonality`` is given.
        """
        if seasonality is not None:
            problem = f"seasonality is {quote_value(seasonality)}; {self.card.name} has none, so leave it out"
            raise BadValue(problem, "seasonality")
        series, known = read_values(values, self.minimum, self.card.name, param)
        series = np.interp(np.arange(len(series)), known, series[known])
        location, scale = self._units(series)
        return ScaledSeries(series[-self.minimum :], location, scale, horizon)

    def _units(self, series: np.ndarray) -> tuple[float, float]:
        """Return the location and scale that standardise a series [T].

        A series similar to the training series gets the location and scale of the training series, because the mean of
        a window that is shorter than a period would be misleading. Other series get their own mean and deviation.
        """
        if series.min() == series.max():
            return float(series[0]), 0.0
        if self.training_series.resembles(series):
            return self.training_series.location, self.training_series.scale
        largest = np.abs(series).max()  # scale first, so that no square overflows or underflows
        unit = series / largest
        return float(unit.mean() * largest), float(unit.std(ddof=1) * largest)

    def predict(self, items: Sequence[ScaledSeries]) -> list[QuantileForecast]:
        """Return one forecast per item. Errors are assumed to be normal, so the mean equals the median."""
        with torch.inference_mode():
            location = np.array([item.location for item in items])
            scale = np.array([item.scale for item in items])
            windows = np.stack([item.window for item in items]) - location[:, None]
            windows /= np.where(scale > 0, scale, 1.0)[:, None]
            inputs = torch.from_numpy(windows).float().to(self.device)
            standardised = self.network(inputs, max(item.horizon for item in items))
        check_finite(float(standardised.double().sum()), "forecasts")
        means = standardised.double().cpu().numpy() * scale[:, None] + location[:, None]
        return [self._forecast(item, mean[: item.horizon]) for item, mean in zip(items, means, strict=True)]

    def _forecast(self, item: ScaledSeries, mean: np.ndarray) -> QuantileForecast:
        deviation = self._deviation(item)
        quantiles = np.stack([mean - deviation, mean, mean + deviation], axis=1)
        return QuantileForecast(mean, mean, NORMAL_SCORES, quantiles)

    def _deviation(self, item: ScaledSeries) -> np.ndarray:
        """Return the standard deviation of each error [horizon].

        After the last measured step, errors grow with the square root of the number of steps, as for a random walk.
        """
        measured = len(self.residuals)
        steps = np.arange(1, item.horizon + 1)
        deviation = self.residuals[np.minimum(steps, measured) - 1] * np.sqrt(np.maximum(1.0, steps / measured))
        return deviation * item.scale

    def seconds(self, items: Sequence[ScaledSeries]) -> float:
        """Return the expected seconds of a batch. The network takes one step for each value read or forecast."""
        steps = self.minimum + max(item.horizon for item in items)
        return self.latency(len(items)) * steps / (self.minimum + DUMMY_HORIZON)

    def dummy_run(self, rows: int) -> None:
        """Compute a batch of ``rows`` dummy series."""
        self.predict([ScaledSeries(np.zeros(self.minimum), 0.0, 1.0, DUMMY_HORIZON)] * rows)


AnyForecaster = GlobalForecaster | WindowForecaster


def load_forecaster(version: Version, device: torch.device) -> AnyForecaster:
    """Return the predictor for the network of a version."""
    return (WindowForecaster if is_windowed(version.card) else GlobalForecaster)(version, device)


def is_windowed(card: Card) -> bool:
    """Return whether the network of a card forecasts only one kind of series."""
    kind = KINDS.get(card.kind)
    return kind is not None and issubclass(kind.network, SeriesLSTM)
