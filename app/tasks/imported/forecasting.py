"""Forecasting with an imported network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from app.errors import BadValue, quote_value
from app.store import SeriesTraits, StoreError, Version
from app.tasks.forecasting import (
    MIN_VALUES,
    NORMAL,
    QuantileForecast,
    SeriesWindow,
    interpolated,
    like_series,
    read_values,
    read_window,
    reject_seasonality,
)
from app.tasks.imported.tensors import TaskPredictor


@dataclass(frozen=True)
class ImportedWindow:
    """A parsed series: its last values [context] as the network reads them, and their location and scale.

    The result omits the first ``gap`` steps of the forecast. ``season`` is None if the network reads no season.
    """

    values: np.ndarray
    location: float
    scale: float
    horizon: int
    gap: int = 0
    season: int | None = None
    non_negative: bool = False


class ImportedForecaster(TaskPredictor):
    """Predictor for imported networks that forecast quantiles, or one value per step without intervals.

    Options on the card:
        input: name of the tensor with the series, [N, context] or [N, context, 1].
        output: name of the tensor with the forecasts: [N, horizon] or [N, horizon, 1]; with quantiles,
            [N, horizon, quantiles] or [N, quantiles, horizon]. If both sizes are equal, the quantiles come last.
        context: number of values that the network reads; by default, the length of the input tensor.
        quantiles: levels of the quantiles in ascending order: 0.5, at least one level below it and at least one above
            it; or 0.5 alone, which gives no intervals. By default, there are no quantiles.
        standardise: whether the service scales each window to mean 0 and deviation 1, and scales the forecast back.
        seasons: name of the input [N] with the number of values per season, which is 1 for a series without a season.
            A network with this input must accept windows that begin with NaN, because the service pads short series.
        non_negative: whether forecasts are at least 0 for series without negative values.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        super().__init__(version, device)
        self.seasons = self._seasons()
        self.traits = SeriesTraits(season=None, non_negative=bool(self.options.get("non_negative")))
        others = {name: spec for name, spec in self.inputs.items() if name != self.seasons}
        self.input = self.tensor("input", others, (2, 3), "float")
        self.output = self.tensor("output", self.outputs, (2, 3), "float")
        self.reject_inputs_except(self.input.name, self.seasons)
        self.context = int(self.options.get("context") or self.input.shape[1])
        self.minimum = MIN_VALUES if self.seasons else self.context
        if self.context < 1 or self.input.shape[1] not in (-1, self.context) or self.input.shape[2:] not in ([], [1]):
            raise self.mismatch(
                self.input.name, f"should be [N, {max(self.context, 1)}]; option context sets the length"
            )
        shapes = {self.input.name: (1, self.context, *self.input.shape[2:])}
        if self.seasons:
            shapes[self.seasons] = (1,)
        if self.sizes.problem(shapes):
            raise self.mismatch(self.input.name, f"does not take {self.context} values")
        self.quantiles = np.array(self.options.get("quantiles") or [], float)
        self.standardise = bool(self.options.get("standardise"))
        self._check_output()

    def _seasons(self) -> str | None:
        """Return the name of the input with the seasons, or None if there is none. Raises StoreError."""
        name = self.options.get("seasons")
        if name is None:
            return None
        if self.options.get("standardise"):
            raise StoreError(f"{self._card}: option standardise does not go with option seasons")
        return self.tensor("seasons", self.inputs, (1,), "int").name

    def _check_output(self) -> None:
        """Set ``horizon`` and ``quantiles_last``. Raises StoreError if the output does not fit the quantiles."""
        count, (_, *sizes) = len(self.quantiles), self.output.shape
        self.quantiles_last = len(sizes) == 2 and sizes[1] == count
        if not count and sizes[1:] == [1]:
            sizes = sizes[:1]
        median = int(np.searchsorted(self.quantiles, 0.5))
        ascending = np.all(np.diff([0, *self.quantiles, 1]) > 0) and 0.5 in self.quantiles
        if count and not (ascending and (count == 1 or 0 < median < count - 1)):  # intervals need bounds on both sides
            raise StoreError(
                f"{self._card}: option quantiles is {self.quantiles.tolist()}; it should be increasing levels "
                "between 0 and 1 that include 0.5, a lower and a higher level; or only 0.5"
            )
        if len(sizes) != (2 if count else 1) or (count and count not in sizes) or -1 in sizes:
            expected = f"[N, horizon, {count}] or [N, {count}, horizon]" if count else "[N, horizon]"
            raise self.mismatch(self.output.name, f"should have the shape {expected}")
        self.horizon = sizes[0] if not count or self.quantiles_last else sizes[1]
        self.scores = np.array([NORMAL.inv_cdf(level) for level in self.quantiles])

    def parse(
        self, values: Sequence[float | None], horizon: int, param: str = "values", seasonality: int | None = None
    ) -> ImportedWindow:
        """Prepare a series for ``predict``.

        Missing values (None) are interpolated linearly or, with the option ``seasons``, filled by ``read_window``.

        Raises:
            BadValue: the series is too short or has no value, the horizon is too long, or the network does not take
                ``seasonality``.
        """
        name = self.card.name
        if horizon > self.horizon:
            raise BadValue(f"horizon is {quote_value(horizon)}; {name} forecasts up to {self.horizon} steps", "horizon")
        if self.seasons:
            return self._seasonal_window(values, horizon, param, seasonality)
        reject_seasonality(seasonality, name)
        series = interpolated(*read_values(values, self.minimum, name, param))
        non_negative = self.traits.non_negative and bool(series.min() >= 0)
        window = series[-self.context :]
        location, scale = 0.0, 1.0
        if self.standardise:
            largest = np.abs(window).max() or 1.0  # scale first, so that no square overflows
            location, scale = (float(each * largest) for each in ((window / largest).mean(), (window / largest).std()))
            window = (window - location) / (scale or 1.0)
        return ImportedWindow(self._converted(window, param), location, scale, horizon, non_negative=non_negative)

    def _seasonal_window(
        self, values: Sequence[float | None], horizon: int, param: str, seasonality: int | None
    ) -> ImportedWindow:
        """Prepare a series for a network that reads seasons. Missing values at the end of the series are forecast."""
        name = self.card.name
        window: SeriesWindow = read_window(values, horizon, name, param, self.context, self.traits, seasonality)
        if window.horizon > self.horizon:
            problem = f"{param} ends with {window.gap} missing values, which are forecast as well"
            raise BadValue(
                f"horizon is {horizon}; {name} forecasts up to {self.horizon} steps, and {problem}", "horizon"
            )
        content = self._converted(window.values, param)
        return ImportedWindow(content, 0.0, 1.0, window.horizon, window.gap, window.season, window.non_negative)

    def _converted(self, window: np.ndarray, param: str) -> np.ndarray:
        """Return a window in the data type of the input. Raises BadValue if a value is too large for this type."""
        with np.errstate(over="ignore"):
            converted = window.astype(self.input.dtype)
        if (infinite := np.isinf(converted)).any():
            value = quote_value(float(window[infinite.argmax()]))
            raise BadValue(f"{param} has {value}, which is too large for {self.card.name}", param)
        return converted

    def predict_task(self, items: Sequence[ImportedWindow]) -> list[np.ndarray]:
        """Return the forecast [horizon, quantiles or 1] of each item, on the scale of its series."""
        windows = np.stack([item.values for item in items]).reshape(len(items), self.context, *self.input.shape[2:])
        arrays = {self.input.name: windows}
        if self.seasons:
            seasons = [item.season for item in items]
            arrays[self.seasons] = np.array(seasons, self.inputs[self.seasons].dtype)
        forecasts = self.run_rows(arrays, len(items))[self.output.name].astype(np.float64)
        if forecasts.ndim == 3 and len(self.quantiles) and not self.quantiles_last:
            forecasts = forecasts.swapaxes(1, 2)
        self.check_finite(float((forecasts * 0).sum()), "forecasts")  # times 0, as a sum of large values may overflow
        forecasts = forecasts.reshape(len(items), self.horizon, -1)
        return [
            forecast[item.gap : item.horizon] * item.scale + item.location
            for forecast, item in zip(forecasts, items, strict=True)
        ]

    def forecast(self, item: ImportedWindow, result: np.ndarray) -> QuantileForecast:
        """Convert the result of ``predict`` for an item into a forecast."""
        if len(self.quantiles) < 2:  # the median alone has no intervals
            points = like_series(result[:, 0], item.non_negative)
            return PointForecast(points, points, np.zeros(1), points[:, None], item.season, item.non_negative)
        quantiles = np.sort(result, axis=1)  # some networks return quantiles in the wrong order
        median = quantiles[:, int(np.searchsorted(self.quantiles, 0.5))].copy()
        edges = np.array([0.0, *self.quantiles, 1.0])
        weights = (edges[2:] - edges[:-2]) / 2  # weight of each quantile in the mean
        weights[[0, -1]] += np.array([edges[1], 1 - edges[-2]]) / 2
        mean, median = (like_series(x, item.non_negative) for x in (quantiles @ weights, median))
        return QuantileForecast(mean, median, self.scores, quantiles, item.season, item.non_negative)


class PointForecast(QuantileForecast):
    """A forecast without intervals."""

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Raise BadValue, because there are no intervals."""
        raise BadValue(f"levels has {level:g}; this network forecasts no intervals, so send an empty list", "levels")
