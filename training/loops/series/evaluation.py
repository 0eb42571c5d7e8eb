"""Compare the fine-tuned network with the base version on a user's series, and write the report of a backtest.

The validation part decides whether fine-tuning helped. The test part is measured only if the network is published.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from app.networks.series_reader import ForecasterSizes
from app.store.version import Version
from app.tasks.forecasting import GlobalForecaster
from training import refit
from training.configs import ForecasterFinetuneConfig
from training.data.datasets import DataError
from training.evaluation import backtest
from training.evaluation.backtest import Origins
from training.evaluation.forecaster import Example, draw_samples, forecast_series, interface
from training.evaluation.report import page, results
from training.loops.series.own_series import MIN_IMPROVEMENT, OwnSeries, label, read, report, with_traits
from training.options import Options, Part
from training.run import Run

MAX_FORECASTS = 5000  # largest number of forecasts that are measured on a part of the series
MAX_ETS_SECONDS = 60.0  # time limit for the ETS forecasts of a backtest report


def as_method(forecaster: GlobalForecaster, origins: Origins) -> backtest.ForecastFunction:
    """Return a function that forecasts with the forecaster, for a backtest on these origins."""
    return lambda past, season, horizon: forecast_series(forecaster, list(past), season, horizon, origins.covariates)


def measure(forecaster: GlobalForecaster, own: OwnSeries, part: Part = "test") -> dict[str, Any]:
    """Return the metrics for the card; see ``compare``."""
    return compare(forecaster, own, part)[1]


def compare(
    forecaster: GlobalForecaster, own: OwnSeries, part: Part
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Measure the fine-tuned forecaster, the base version and the seasonal naive forecast.

    If the series have known covariates, the base version is also measured with these columns. Return the results of
    each method, and the same results as rounded metrics for the card.
    """
    origins = backtest.origins(own.splits, own.table.season, own.horizon, part).subset(MAX_FORECASTS)
    untuned = {"untuned_": own.base}
    if own.traits.known:
        untuned["untuned_known_"] = with_traits(own.base, own.traits)
    methods = {
        "": as_method(forecaster, origins),
        **{
            prefix: as_method(GlobalForecaster(version, forecaster.device), origins)
            for prefix, version in untuned.items()
        },
        "naive_": backtest.seasonal_naive,
    }
    results = {prefix: backtest.metrics(origins, method) for prefix, method in methods.items()}
    return results, backtest.card_metrics(origins, results, part)


def verdict(results: dict[str, dict[str, float]]) -> tuple[bool, str]:
    """Return whether fine-tuning helped, and a sentence about it. ``results``: those of the validation part.

    Fine-tuning helped if two conditions hold. The quantile loss is lower than the loss of the seasonal naive forecast.
    It is also lower than the loss of the base version, by at least the share MIN_IMPROVEMENT of this loss. If there are
    known covariates, the base version may use them, too.
    """
    loss = {prefix: values["quantile_loss"] for prefix, values in results.items()}
    shown = {prefix: f"{value:.{backtest.decimals('quantile_loss', value)}f}" for prefix, value in loss.items()}
    tuned, naive = loss[""], loss["naive_"]
    base = min(loss["untuned_"], loss.get("untuned_known_", loss["untuned_"]))
    losses = f"quantile loss {shown['']}; before fine-tuning {shown['untuned_']}, seasonal naive {shown['naive_']}"
    if "untuned_known_" in shown:
        losses += f"; before fine-tuning, but with the known covariates, {shown['untuned_known_']}"
    if tuned > (1 - MIN_IMPROVEMENT) * base:
        return False, f"Fine-tuning did not help on the validation part: {losses}"
    if tuned >= naive:
        part = "on the validation part"
        return False, f"Fine-tuning helped {part}, but repeating the last season is at least as good: {losses}"
    return True, f"Fine-tuning helped on the validation part: {losses}"


def card_of(own: OwnSeries, sizes: ForecasterSizes, verdict: str) -> dict[str, Any]:
    """Return the card without its metrics."""
    table, base, count = own.table, own.base.card, len(own.splits)
    names = ", ".join(split.series.name for split in own.splits[:5]) + (", ..." if count > 5 else "")
    season = f"season {table.season}" if table.season > 1 else "no season"
    season += f", yearly pattern of {own.traits.year:g} values" if own.traits.year else ""
    season += f", known covariates {', '.join(table.covariates)}" if table.covariates else ""
    return {
        **interface(sizes),
        "title": f"Forecasts of {names}, one value per {table.frequency}"[:200],
        "series": own.traits.model_dump(),
        "data": {**own.data, f"{base.name}@{base.version}": base.weights_sha256},
        "notes": (
            f"Fine-tuned from {base.name}@{base.version}. {verdict}. {count:,} series, one value per "
            f"{table.frequency}, {season}. The last quarter of each series was tested, at most "
            f"{backtest.MAX_TEST_HORIZONS} horizons of {own.horizon} steps. The fifth before it was used for "
            f"validation, at most {backtest.MAX_VALIDATION_HORIZONS} horizons: of the averaged weights, those with "
            f"the lowest validation loss were kept. {len(table.remarks):,} repairs or omissions in the table."
        ),
    }


def evaluate(run: Run, own: OwnSeries, network: Any) -> tuple[dict[str, Any], str, bool]:
    """Evaluate with the serving code on the validation part and, if the network is to be published, on the test part.

    Return the card, a sentence that states whether fine-tuning helped, and whether to publish the network. The network
    is published if fine-tuning helped on the validation part, or with --force.
    """
    forecaster = run.predictor(GlobalForecaster, card_of(own, network.sizes, "Not measured yet"), network)
    results, validation = compare(forecaster, own, "validation")
    helped, reason = verdict(results)
    publishes = helped or run.options.data_options["force"]
    card = run.measure(
        card_of(own, network.sizes, reason),
        lambda part: measure(forecaster, own) if part == "test" else validation,
        publishes,
    )
    shown = run.options.part if publishes else "validation"
    draw_samples(run.folder / "samples.png", examples(forecaster, own, shown))
    if own.references:
        write_backtest(run.folder, own, forecaster, own.base, run.options.name, run.command)
    return card, reason, publishes


def references(options: Options, own: OwnSeries) -> results.References:
    """Return the report's forecasts of methods that need no network. ETS takes at most a tenth of ``--minutes``."""
    seconds = MAX_ETS_SECONDS if options.minutes is None else min(MAX_ETS_SECONDS, 6 * options.minutes)
    return results.references(own.splits, own.table.season, own.horizon, seconds)


def write_backtest(
    folder: Path, own: OwnSeries, forecaster: GlobalForecaster, base: Version | None, name: str, command: str
) -> Path:
    """Write the report on a forecaster; return the path of the picture.

    ``base``: the version from which the forecaster was fine-tuned; the report also has its forecasts. None for a
    published forecaster. ``name``: name of the forecaster. ``command``: the command line.
    """
    assert own.references is not None
    networks, explanations = {}, {}
    tuned = f"{name}, tuned"
    if base is not None:
        untuned = f"{label(base)}, not tuned"
        networks[untuned] = as_method(GlobalForecaster(base, forecaster.device), own.references.origins)
        explanations[untuned] = "the published network, which has not been trained on this table"
        explanations[tuned] = f"{label(base)}, fine-tuned on the values before the validation part of each series"
    else:
        tuned = name
        explanations[tuned] = "the published network"
    networks[tuned] = as_method(forecaster, own.references.origins)
    compared = own.references.compare(own.table, len(own.splits), networks)
    return page.write(folder, compared, command, explanations)


def backtest_version(options: Options, config: ForecasterFinetuneConfig) -> None:
    """Write the report on the published version given by ``--version``, without training.

    Raises:
        DataError: the table or the version cannot be used, or the version was trained on all rows of the table.
    """
    own = read(options, config.horizon)
    report(own.table)
    card, version = own.base.card, label(own.base)
    if refit.seen_data(card, own.data):
        raise DataError(
            f"--version {version}: this version was trained on all rows of {own.table.name}, so its errors on these "
            "rows would be too low. Its backtest.png shows errors that were measured before this training. Type "
            "--backtest without --version to train and measure again"
        )
    own = replace(own, references=references(options, own))
    folder = options.runs / card.name / f"backtest-{datetime.now(UTC).strftime('%Y-%m-%dT%H-%M-%S')}"
    folder.mkdir(parents=True)
    command = shlex.join(["python", "-m", options.script, *sys.argv[1:]])
    forecaster = GlobalForecaster(own.base, torch.device(options.device))
    write_backtest(folder, own, forecaster, None, version, command)
    print(f"wrote {folder / 'backtest.html'} and backtest.png")


def examples(forecaster: GlobalForecaster, own: OwnSeries, part: Part) -> list[Example]:
    """Return up to eight examples to plot: for one series each, the last horizon of a part and the forecast for it."""
    result = []
    for split in own.splits[:: -(-len(own.splits) // 8)]:
        end = len(split.series.values) if part == "test" else split.test
        past, actual = backtest.past_of(split.series, end - own.horizon), split.series.values[end - own.horizon : end]
        covariates = split.series.covariates[:end][-own.horizon - backtest.MAX_PAST :]
        (forecast,) = forecast_series(forecaster, [past], own.table.season, own.horizon, [covariates])
        result.append(Example(split.series.name, past, actual, forecast))
    return result
