"""Metrics and example forecasts of a forecaster on M4's hourly and weekly series."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app.tasks.forecasting import GlobalForecaster, QuantileForecast, SeriesWindow
from training.data import datasets
from training.evaluation import backtest, forecast_metrics
from training.evaluation.backtest import Method, Origins
from training.run import metric, new_figure, save_figure

PREFIXES = {"m4_hourly": "hourly", "m4_weekly": "weekly"}  # data set -> prefix of its metrics on the card
DECIMALS = {"smape": 3, "mase": 3, "owa": 3, "wql": 4, "msis": 2, "coverage_95": 3}


@dataclass(frozen=True)
class Example:
    """A series to plot: the values before the origin [T], the actual values after it [horizon], and the forecast."""

    name: str
    past: np.ndarray
    actual: np.ndarray
    forecast: QuantileForecast


def parse(forecaster: GlobalForecaster, origins: Origins, season: int | None) -> list[SeriesWindow]:
    """Return the values before each origin as ``predict`` reads them. If ``season`` is None, it is detected."""
    return [
        forecaster.parse(past.tolist(), origins.horizon, seasonality=season, covariates=known)
        for past, known in zip(origins.past, origins.covariates, strict=True)
    ]


def predict(forecaster: GlobalForecaster, items: list[SeriesWindow], batch: int) -> list[QuantileForecast]:
    """Return forecasts, computed by the serving code in batches."""
    starts = range(0, len(items), batch)
    return [forecast for at in starts for forecast in forecaster.predict(items[at : at + batch])]


def served(name: str, forecaster: GlobalForecaster, explanation: str, prefix: str = "", detect: bool = False) -> Method:
    """Return a method that forecasts as the service does. If ``detect`` is true, the forecaster detects the season."""

    def forecast(origins: Origins) -> list[QuantileForecast]:
        return predict(forecaster, parse(forecaster, origins, None if detect else origins.season), 64)

    return Method(name, prefix, explanation, forecast)


def last_horizons(held_out: bool) -> Iterator[tuple[datasets.Collection, Origins]]:
    """Yield both M4 collections with one origin for each series, before its test part.

    If ``held_out``, the last horizons of the training parts take the place of the test parts.
    """
    for collection in (datasets.m4_hourly(), datasets.m4_weekly()):
        past, future = [series.numpy() for series in collection.past], list(collection.future.numpy())
        if held_out:
            horizon = len(future[0])
            past, future = [series[:-horizon] for series in past], [series[-horizon:] for series in past]
        yield collection, backtest.origins_of([[part] for part in zip(past, future, strict=True)], collection.season)


def evaluate(forecaster: GlobalForecaster, held_out: bool = False) -> dict[str, Any]:
    """Return the metrics on the test parts of M4, or on the last horizons of the training parts if ``held_out``."""
    result: dict[str, Any] = {}
    part = "last horizon of the training part" if held_out else "test part"
    for collection, origins in last_horizons(held_out):
        errors = origins.errors(served("", forecaster, "").forecast(origins))
        description = f"{collection.name} {part}, {len(origins.past)} series, {origins.horizon} steps"
        values: dict[str, float | np.ndarray] = {
            "smape": errors.smape,
            "mase": errors.scaled,
            "wql": errors.wql,
            "msis": errors.msis,
            "coverage_95": errors.coverage(95),
            "owa": forecast_metrics.owa(collection.name, errors.smape.mean(), errors.mase),
        }
        for key, value in values.items():
            result[f"{PREFIXES[collection.name]}_{key}"] = metric(value, description, DECIMALS[key])
    return result


def examples(forecaster: GlobalForecaster, held_out: bool = False) -> list[Example]:
    """Return four series of each M4 collection with their forecasts. ``evaluate`` explains ``held_out``."""
    result = []
    for collection, origins in last_horizons(held_out):
        some = origins.at(range(0, len(origins.past), -(-len(origins.past) // 4)))
        forecasts = served("", forecaster, "").forecast(some)
        for place, past, actual, forecast in zip(some.places, some.past, some.actual, forecasts, strict=True):
            result.append(Example(f"{collection.name}, series {place[0] + 1}", past, actual, forecast))
    return result


def draw_samples(path: Path, examples: Sequence[Example]) -> Path:
    """Plot up to eight examples to a file; return its path.

    Each plot shows the last values before the origin, the actual values, the median forecast and two intervals.
    """
    columns = min(len(examples), 4)
    figure = new_figure(3 * columns, 3 * -(-len(examples) // 4))
    axes = figure.subplots(-(-len(examples) // 4), columns, squeeze=False)
    for axis, example in zip(axes.flat, examples, strict=False):
        horizon = len(example.actual)
        past, ahead = example.past[-4 * horizon :], np.arange(horizon)
        axis.plot(np.arange(-len(past), 0), past, color="gray", linewidth=1)
        axis.plot(ahead, example.actual, color="black", linewidth=1)
        axis.plot(ahead, example.forecast.median, color="tab:blue")
        for level in (50, 95):
            axis.fill_between(ahead, *example.forecast.interval(level), color="tab:blue", alpha=0.15, linewidth=0)
        axis.set_title(example.name, fontsize=9, parse_math=False)
    return save_figure(figure, path)
