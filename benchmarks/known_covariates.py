"""Measure how much known covariates improve a forecast: the number of hired bicycles, with and without weather data.

    python -m pip install --no-deps "ISLP>=0.6"
    python -m benchmarks.known_covariates [--hourly] [--seeds N]

Known covariates are columns of a table whose future values are known. The data are from Fanaee-T and Gama (2014), for
the year 2011, in the package ISLP. Each network is fine-tuned on the training part, selected on the validation part,
and measured once on the test part. For the forecast steps, the known covariates contain the measured weather, not a
weather forecast.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

from training import lstm

WEATHER = "temp,hum,windspeed,rain"
FOLDER = Path("runs/known-covariates")


def read_hours() -> pd.DataFrame:
    """Return a table with the hires, the weather and the working days for each hour of 2011.

    If the package ISLP is missing, exit with a message.
    """
    spec = find_spec("ISLP")  # the package is not imported, because an import would need its dependencies
    if spec is None or not spec.submodule_search_locations:
        sys.exit('ISLP is missing; type: python -m pip install --no-deps "ISLP>=0.6"')
    table = pd.read_csv(Path(next(iter(spec.submodule_search_locations))) / "data" / "Bikeshare.csv")
    hours = pd.to_timedelta(table["day"] - 1, unit="D") + pd.to_timedelta(table["hr"].astype(int), unit="h")
    rain = table["weathersit"].str.contains("rain").astype(int)
    columns = ["bikers", "temp", "hum", "windspeed", "workingday"]
    return table[columns].assign(time=pd.Timestamp("2011-01-01") + hours, rain=rain).set_index("time")


def write_table(hourly: bool) -> Path:
    """Write a table with one row per hour or per day to FOLDER; return its path."""
    table = read_hours()
    if not hourly:
        sums = dict.fromkeys(("temp", "hum", "windspeed", "rain"), "mean")
        table = table.resample("D").agg({"bikers": "sum", **sums}).round(4)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / ("hourly.csv" if hourly else "daily.csv")
    table.to_csv(path)
    return path


def train(path: Path, hourly: bool, known: bool, seed: int) -> dict[str, float]:
    """Fine-tune a network with one seed, and return its metrics on the test part."""
    season = "24" if hourly else "7"
    name = f"{path.stem}-{'known' if known else 'plain'}-{seed}"
    options = ["--column", "bikers", "--season", season, "--horizon", season, "--name", name, "--seed", str(seed)]
    options += ["--threads", "1", "--no-refit", "--force", *(["--epochs", "6"] if hourly else [])]
    columns = f"{WEATHER},workingday" if hourly else WEATHER
    options += ["--known-covariates", columns, "--holidays", "US-DC"] if known else []
    lstm.main(["--csv", str(path), "--runs", str(FOLDER), "--store", str(FOLDER / "models"), *options])
    card = json.loads(max((FOLDER / name).glob("*/card.json")).read_text())
    return {key: metric["value"] for key, metric in card["metrics"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hourly", action="store_true", help="forecast hours instead of days")
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="number of trainings with different seeds (default: 5)"
    )
    options = parser.parse_args()
    path = write_table(options.hourly)
    results = {
        known: [train(path, options.hourly, known, seed) for seed in range(options.seeds)] for known in (False, True)
    }
    for known, measured in results.items():
        for key in measured[0]:
            values = [each[key] for each in measured]
            spread = f"{np.mean(values):.3f} ± {np.std(values, ddof=min(1, len(values) - 1)):.3f}"
            print(f"{'known' if known else 'plain'}  {key:28} {spread}  {min(values):.3f} to {max(values):.3f}")


if __name__ == "__main__":
    main()
