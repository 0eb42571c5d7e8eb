"""The served forecaster beside seasonal naive, Theta and AutoETS (statsforecast), on series it has never seen.

    python -m training.evaluation.compare [--store DIR] [--model NAME]

Needs the extra ``compare``. All forecasters are given the same past and the same season, in one run; the figures are
those of the medians. MASE is measured in steps from one season to the next over each past, as M4 does.
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
from training.data.synthetic_series import synthetic
from training.evaluation import backtest, forecasting
from training.loops.forecaster import outlooks

UNSEEN = 1_000_000  # seeds of synthetic series from here on are never learnt from
LONGEST = 24  # the longest season that AutoETS models; for a longer one it is given none

Bounds = tuple[np.ndarray, np.ndarray, np.ndarray]  # median, lower and upper bound of 95 %, each [horizon]
Method = Callable[[Sequence[np.ndarray], int, int], list[Bounds]]


@dataclass(frozen=True)
class Trial:
    """Pasts [T] of one season, and what followed each [N, horizon]."""

    name: str
    season: int
    past: list[np.ndarray]
    actual: np.ndarray


def trials() -> list[Trial]:
    """The sets: none of their values was learnt from, nor is their kind among M4's."""
    ett, airline, sine = datasets.etth1(), datasets.airline(), datasets.sine()
    found = [
        cut("ETTh1 OT, test months", ett.values.numpy()[: 20 * 720], 24, 16 * 720, 48, 48, 2000),
        cut("airline passengers, last 3 years", airline.values.numpy(), 12, 108, 12, 2, 2000),
        cut("noisy sine, last fifth", sine.values.numpy(), 1, sine.split, 48, 8, 2000),
    ]
    for season in (1, *SEASONS):
        series = synthetic(season, 24, 448, UNSEEN + season).numpy()
        found.append(Trial("synthetic, 24 of each season", season, list(series[:, :400]), series[:, 400:]))
    return found


def cut(name: str, values: np.ndarray, season: int, begin: int, horizon: int, every: int, longest: int) -> Trial:
    """Every so many values from ``begin`` on: the values before it, and the horizon that followed."""
    origins = range(begin, len(values) - horizon + 1, every)
    past = [values[max(origin - longest, 0) : origin] for origin in origins]
    return Trial(name, season, past, np.stack([values[origin : origin + horizon] for origin in origins]))


def naive(past: Sequence[np.ndarray], season: int, horizon: int) -> list[Bounds]:
    """Seasonal naive, with normal errors that grow by the root of the seasons ahead."""
    return [(answer.median, *answer.interval(95)) for answer in backtest.seasonal_naive(past, season, horizon)]


def statistical(method: str) -> Method:
    """A method of statsforecast by its name there."""
    from statsforecast import models

    def forecast(past: Sequence[np.ndarray], season: int, horizon: int) -> list[Bounds]:
        found = []
        for values in past:
            short = season > LONGEST and method == "AutoETS"
            model = getattr(models, method)(season_length=1 if short else season)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer = model.forecast(values, horizon, level=[95])
            found.append((answer["mean"], answer["lo-95"], answer["hi-95"]))
        return found

    return forecast


def served(forecaster: GlobalForecaster) -> Method:
    def forecast(past: Sequence[np.ndarray], season: int, horizon: int) -> list[Bounds]:
        return [(answer.median, *answer.interval(95)) for answer in outlooks(forecaster, list(past), season, horizon)]

    return forecast


def row(name: str, parts: Sequence[Trial], forecaster: str, method: Method) -> str:
    """A line of the table: a forecaster on all parts of a set."""
    answers = [answer for part in parts for answer in method(part.past, part.season, part.actual.shape[1])]
    middle, lower, upper = (np.stack(side) for side in zip(*answers, strict=True))
    actual = np.concatenate([part.actual for part in parts])
    usual = np.array([forecasting.usual_step(values, part.season) for part in parts for values in part.past])
    figures = [
        f"{forecasting.mase(actual, middle, usual):.3f}",
        f"{forecasting.msis(actual, lower, upper, usual):.1f}",
        f"{forecasting.coverage(actual, lower, upper):.3f}",
    ]
    return f"| {name} | {forecaster} | {' | '.join(figures)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("models_store"))
    parser.add_argument("--model", default="series-lstm")
    chosen = parser.parse_args(argv)
    serves = rollout.serving(chosen.store, chosen.model, rollout.read(chosen.store, chosen.model))
    assert serves is not None, f"no version of {chosen.model} is whole"
    forecaster = GlobalForecaster(store.read_version(chosen.store, chosen.model, serves), torch.device("cpu"))
    methods: dict[str, Method] = {
        f"{chosen.model}@{serves}": served(forecaster),
        "seasonal naive": naive,
        "Theta": statistical("Theta"),
        "AutoETS": statistical("AutoETS"),
    }
    print("| series | forecaster | MASE | MSIS | coverage of 95 % |")
    print("|---|---|--:|--:|--:|")
    for name, parts in groupby(trials(), key=lambda trial: trial.name):
        together = list(parts)
        for forecaster_name, method in methods.items():
            print(row(name, together, forecaster_name, method), flush=True)


if __name__ == "__main__":
    main()
