"""Forecasting with an imported network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.errors import BadValue, quote_value
from app.store import StoreError, Version
from app.tasks.forecasting import NORMAL, QuantileForecast, interpolated, read_values, reject_seasonality
from app.tasks.imported.tensors import TaskPredictor
from app.tasks.precision import check_finite


@dataclass(frozen=True)
class ImportedWindow:
    """A parsed series: its last values [context] as the network reads them, their units, and the steps to forecast."""

    values: np.ndarray
    location: float
    scale: float
    horizon: int


class ImportedForecaster(TaskPredictor):
    """Series to forecasts: quantiles, or points without intervals.

    Options:
        input, output: names of the tensors: series [N, context] or [N, context, 1], and forecasts [N, horizon], or
            [N, horizon, quantiles] or [N, quantiles, horizon].
        context: values that the network reads; by default that of the input.
        quantiles: levels of the output, ascending, with 0.5 among them; without it, the output are points.
        standardise: whether the network reads each window with mean 0 and deviation 1.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        super().__init__(version, device)
        self.input = self.tensor("input", self.inputs, (2, 3), "float")
        self.output = self.tensor("output", self.outputs, (2, 3), "float")
        self.minimum = int(self.options.get("context") or self.input.shape[1])
        if self.minimum < 1 or self.input.shape[1] not in (-1, self.minimum) or self.input.shape[2:] not in ([], [1]):
            raise self.mismatch(
                self.input.name, f"should be [N, {max(self.minimum, 1)}]; option context sets the length"
            )
        shape = (1, self.minimum, *self.input.shape[2:])
        if self.sizes.problem({self.input.name: shape}):
            raise self.mismatch(self.input.name, f"does not take {self.minimum} values")
        self.quantiles = np.array(self.options.get("quantiles") or [], float)
        self.standardise = bool(self.options.get("standardise"))
        self._check_output()

    def _check_output(self) -> None:
        """Set ``horizon`` and ``quantiles_last``. Raises StoreError if the output does not fit the quantiles."""
        count, (_, *sizes) = len(self.quantiles), self.output.shape
        self.quantiles_last = len(sizes) == 2 and sizes[1] == count
        if not count and sizes[1:] == [1]:
            sizes = sizes[:1]
        if count and (not np.all(np.diff([0, *self.quantiles, 1]) > 0) or 0.5 not in self.quantiles):
            raise StoreError(
                f"{self._card}: option quantiles is {self.quantiles.tolist()}; it should ascend from above 0"
            )
        if len(sizes) != (2 if count else 1) or (count and count not in sizes) or -1 in sizes:
            expected = f"[N, horizon, {count}] or [N, {count}, horizon]" if count else "[N, horizon]"
            raise self.mismatch(self.output.name, f"should have the shape {expected}")
        self.horizon = sizes[0] if not count or self.quantiles_last else sizes[1]
        self.scores = np.array([NORMAL.inv_cdf(level) for level in self.quantiles])

    def parse(
        self, values: Sequence[float | None], horizon: int, param: str = "values", seasonality: int | None = None
    ) -> ImportedWindow:
        """Prepare a series for ``predict``. Missing values (None) are interpolated linearly.

        Raises:
            BadValue: the series is too short or has no value, the horizon is too long, or ``seasonality`` is set.
        """
        name = self.card.name
        reject_seasonality(seasonality, name)
        if horizon > self.horizon:
            raise BadValue(f"horizon is {quote_value(horizon)}; {name} forecasts up to {self.horizon} steps", "horizon")
        window = interpolated(*read_values(values, self.minimum, name, param))[-self.minimum :]
        location, scale = 0.0, 1.0
        if self.standardise:
            largest = np.abs(window).max() or 1.0  # scale first, so that no square overflows
            location, scale = (float(each * largest) for each in ((window / largest).mean(), (window / largest).std()))
            window = (window - location) / (scale or 1.0)
        with np.errstate(over="ignore"):
            window = window.astype(self.input.dtype)
        if not np.isfinite(window).all():
            raise BadValue(f"{param} has a value that is too large for {name}", param)
        return ImportedWindow(window, location, scale, horizon)

    def predict_task(self, items: Sequence[ImportedWindow]) -> list[np.ndarray]:
        """Return the forecast [horizon, quantiles], or [horizon, 1] for points, of each item, in its own units."""
        windows = np.stack([item.values for item in items]).reshape(len(items), self.minimum, *self.input.shape[2:])
        forecasts = self.run_rows({self.input.name: windows}, len(items))[self.output.name].astype(np.float64)
        if forecasts.ndim == 3 and len(self.quantiles) and not self.quantiles_last:
            forecasts = forecasts.swapaxes(1, 2)
        check_finite(float((forecasts * 0).sum()), "forecasts")  # times 0: a sum of large values may overflow
        forecasts = forecasts.reshape(len(items), self.horizon, -1)
        return [
            forecast[: item.horizon] * item.scale + item.location
            for forecast, item in zip(forecasts, items, strict=True)
        ]

    def forecast(self, item: ImportedWindow, result: np.ndarray) -> QuantileForecast:
        """Convert the result of ``predict`` for an item into a forecast."""
        if not len(self.quantiles):
            points = result[:, 0].copy()
            return PointForecast(points, points, np.zeros(1), result)
        quantiles = np.sort(result, axis=1)  # quantiles of some networks cross
        median = quantiles[:, int(np.searchsorted(self.quantiles, 0.5))].copy()
        edges = np.array([0.0, *self.quantiles, 1.0])
        weights = (edges[2:] - edges[:-2]) / 2  # of each quantile in the mean
        weights[[0, -1]] += np.array([edges[1], 1 - edges[-2]]) / 2
        return QuantileForecast(quantiles @ weights, median, self.scores, quantiles)


class PointForecast(QuantileForecast):
    """A forecast without intervals."""

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Raises BadValue."""
        raise BadValue(f"levels has {level:g}; this network forecasts no intervals, so send an empty list", "levels")
