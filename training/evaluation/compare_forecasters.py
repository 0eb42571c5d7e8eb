"""Compare a served forecaster with seasonal naive, Theta and AutoETS (statsforecast) on series it was not trained on.

    python -m training.evaluation.compare_forecasters [--store DIR] [--model NAME]

Needs the extra ``compare``: pip install -e '.[compare]'. All forecasters receive the same past and season. MASE is that
of the median forecast; its scale is the mean absolute seasonal difference of each past, as in M4.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from app import store
from app.store import rollout
from app.tasks.forecasting import GlobalForecaster
from app.tasks.seasonality import SEASONS
from training.data import datasets
from training.data.series.synthetic import synthetic
from training.evaluation import backtest, forecast_metrics
from training.evaluation.forecaster import forecast_series

UNSEEN_SEED = 1_000_000  # synthetic series with seeds from here on are not used in training
MAX_ETS_SEASON = 24  # AutoETS supports no longer season; such series are passed without a season

Bounds = tuple[np.ndarray, np.ndarray, np.ndarray]  # median, lower and upper bound of 95 %, each [horizon]
Forecast = Callable[[Sequence[np.ndarray], int, int], list[Bounds]]  # pasts, season, horizon -> one each


@dataclass(frozen=True)
class EvaluationSet:
    """Pasts [T] with a common season, and the actual values [N, horizon] after them."""

    name: str
    season: int
    past: list[np.ndarray]
    actual: np.ndarray


def evaluation_sets() -> list[EvaluationSet]:
    """All test sets; none was used in training, and none is like M4's series."""
    ett, airline, sine = datasets.etth1(), datasets.airline(), datasets.sine()
    result = [
        windows("ETTh1 OT, test months", ett.values.numpy()[: 20 * 720], 24, 16 * 720, 48, 48, 2000),
        windows("airline passengers, last 3 years", airline.values.numpy(), 12, 108, 12, 2, 2000),
        windows("noisy sine, last fifth", sine.values.numpy(), 1, sine.split, 48, 8, 2000),
    ]
    for season in (1, *SEASONS):
        series = synthetic(season, 24, 448, UNSEEN_SEED + season).numpy()
        result.append(EvaluationSet("synthetic, 24 of each season", season, list(series[:, :400]), series[:, 400:]))
    return result


def windows(
    name: str, values: np.ndarray, season: int, start: int, horizon: int, step: int, max_past: int
) -> EvaluationSet:
    """Origins every ``step`` values from ``start`` on, each with up to ``max_past`` values before it."""
    origins = range(start, len(values) - horizon + 1, step)
    past = [values[max(origin - max_past, 0) : origin] for origin in origins]
    return EvaluationSet(name, season, past, np.stack([values[origin : origin + horizon] for origin in origins]))


def seasonal_naive(past: Sequence[np.ndarray], season: int, horizon: int) -> list[Bounds]:
    """Seasonal naive; its normal errors grow with the square root of the number of seasons ahead."""
    return [(each.median, *each.interval(95)) for each in backtest.seasonal_naive(past, season, horizon)]


def statsforecast(model_name: str) -> Forecast:
    """A model of statsforecast by its class name."""
    from statsforecast import models

    def forecast(past: Sequence[np.ndarray], season: int, horizon: int) -> list[Bounds]:
        forecasts = []
        for values in past:
            no_season = season > MAX_ETS_SEASON and model_name == "AutoETS"
            model = getattr(models, model_name)(season_length=1 if no_season else season)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = model.forecast(values, horizon, level=[95])
            forecasts.append((result["mean"], result["lo-95"], result["hi-95"]))
        return forecasts

    return forecast


def served(forecaster: GlobalForecaster) -> Forecast:
    """The forecaster as the service computes it."""

    def forecast(past: Sequence[np.ndarray], season: int, horizon: int) -> list[Bounds]:
        return [(each.median, *each.interval(95)) for each in forecast_series(forecaster, list(past), season, horizon)]

    return forecast


def row(name: str, parts: Sequence[EvaluationSet], forecaster: str, forecast: Forecast) -> str:
    """One row of the table: a forecaster on all test sets with the same name."""
    forecasts = [each for part in parts for each in forecast(part.past, part.season, part.actual.shape[1])]
    median, lower, upper = (np.stack(side) for side in zip(*forecasts, strict=True))
    actual = np.concatenate([part.actual for part in parts])
    scale = np.array([forecast_metrics.mase_scale(values, part.season) for part in parts for values in part.past])
    cells = [
        f"{forecast_metrics.mase(actual, median, scale):.3f}",
        f"{forecast_metrics.msis(actual, lower, upper, scale):.1f}",
        f"{forecast_metrics.coverage(actual, lower, upper):.3f}",
    ]
    return f"| {name} | {forecaster} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--store",
        metavar="DIR",
        type=Path,
        default=Path("models_store"),
        help="folder with the model (default: %(default)s)",
    )
    parser.add_argument(
        "--model", metavar="NAME", default="series-lstm", help="forecaster to compare (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        version = rollout.serving(options.store, options.model, rollout.read(options.store, options.model))
    except store.StoreError as error:
        parser.error(f"--model {options.model}: {error}")
    if version is None:
        parser.error(f"--model {options.model}: {options.store} holds no usable version of it")
    forecaster = GlobalForecaster(store.read_version(options.store, options.model, version), torch.device("cpu"))
    methods: dict[str, Forecast] = {
        f"{options.model}@{version}": served(forecaster),
        "seasonal naive": seasonal_naive,
        "Theta": statsforecast("Theta"),
        "AutoETS": statsforecast("AutoETS"),
    }
    print("| series | forecaster | MASE | MSIS | coverage of 95 % |")
    print("|---|---|--:|--:|--:|")
    for name, parts in groupby(evaluation_sets(), key=lambda part: part.name):
        same_name = list(parts)
        for forecaster_name, forecast in methods.items():
            print(row(name, same_name, forecaster_name, forecast), flush=True)


if __name__ == "__main__":
    main()
