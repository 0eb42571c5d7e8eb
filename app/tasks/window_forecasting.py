"""Series of any scale to forecasts with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from app.errors import BadValue, quote_value
from app.store import StoreError, Version
from app.tasks.latency_model import LatencyModel, check_finite
from app.tasks.quantile_forecast import QuantileForecast

USUAL = 48  # steps ahead, when the pace is measured
SCORES = np.array([-1.0, 0.0, 1.0])


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
        return -NormalDist().inv_cdf(0.5 - level / 200) * self._deviation(item)

    def forecast(self, item: ScaledSeries, mean: np.ndarray) -> QuantileForecast:
        """What ``predict`` gave for an item, as the service answers: with normal errors around it."""
        deviation = self._deviation(item)
        quantiles = np.stack([mean - deviation, mean, mean + deviation], axis=1)
        return QuantileForecast(mean, mean, SCORES, quantiles)

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
