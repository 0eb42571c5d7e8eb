"""Compare the fine-tuned network with the base version on a user's series, and write the report of a backtest.

The decision part decides whether fine-tuning helped. The test part is measured only if the network is published.
"""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from app.tasks.forecasting import GlobalForecaster
from training import cards, lineage
from training.configs.series import ForecasterFinetuneConfig
from training.data.datasets import DataError
from training.evaluation import backtest, leaderboard, report
from training.evaluation.backtest import HeldOut
from training.evaluation.classical import NAIVE
from training.evaluation.forecaster import Example, draw_samples, forecast_series, served
from training.evaluation.leaderboard import Leaderboard
from training.loops.series.own_series import MIN_IMPROVEMENT, OwnSeries, label, print_table, read, with_traits
from training.options import Options
from training.run import Run


def compare(forecaster: GlobalForecaster, own: OwnSeries, part: HeldOut) -> Leaderboard:
    """Compare the fine-tuned forecaster with the base version and with classical methods.

    The base version is compared without and, if the series have known covariates, with their effects.
    """
    base = label(own.base)
    versions = [(f"{base}, not tuned", own.base, "the published network", "untuned_")]
    if own.traits.known:
        known = with_traits(own.base, own.traits), "the same, with the effects of the known covariates"
        versions.append((f"{base} with known covariates", *known, "untuned_known_"))
    networks = [
        served(name, GlobalForecaster(version, forecaster.device), explanation, prefix)
        for name, version, explanation, prefix in versions
    ]
    networks.append(served(f"{forecaster.card.name}, tuned", forecaster, f"{base}, fine-tuned on the training part"))
    return leaderboard.compare(own.table, own.splits, own.horizon, part, networks)


def measure(forecaster: GlobalForecaster, own: OwnSeries) -> dict[str, Any]:
    """Return the metrics on the test part for the card."""
    return compare(forecaster, own, "test").card_metrics()


def verdict(board: Leaderboard) -> tuple[bool, str]:
    """Return whether fine-tuning helped, and a sentence about it.

    Fine-tuning helped if the quantile loss is lower than that of the seasonal naive forecast, and lower than that of
    the base version by at least the share MIN_IMPROVEMENT. If there are known covariates, the base version may use
    them, too.
    """
    losses = {name: errors.quantile_loss for name, errors in board.errors.items()}
    bases = [method.name for method in board.methods if method.prefix.startswith("untuned_")]
    base = min(bases, key=lambda name: losses[name])
    shown = {name: f"{losses[name]:.{backtest.decimals('quantile_loss', losses[name])}f}" for name in losses}
    change = leaderboard.change(board.errors[board.own].losses, board.errors[base].losses)
    others = ", ".join(f"{name} {shown[name]}" for name in (*bases, NAIVE.name))
    facts = f"on the {board.part} part: quantile loss {shown[board.own]}; {others}; change by fine-tuning {change}"
    if losses[board.own] > (1 - MIN_IMPROVEMENT) * losses[base]:
        return False, f"Fine-tuning did not help {facts}"
    if losses[board.own] >= losses[NAIVE.name]:
        return False, f"Fine-tuning helped, but repeating the last season is at least as good {facts}"
    return True, f"Fine-tuning helped {facts}"


def card_of(own: OwnSeries, network: Any, verdict: str) -> dict[str, Any]:
    """Return the card without its metrics."""
    table, base, count = own.table, own.base.card, len(own.splits)
    names = ", ".join(split.series.name for split in own.splits[:5]) + (", ..." if count > 5 else "")
    season = f"season {table.season}" if table.season > 1 else "no season"
    season += f", yearly pattern of {own.traits.year:g} values" if own.traits.year else ""
    season += f", known covariates {', '.join(table.covariates)}" if table.covariates else ""
    shares = "; ".join(
        f"{part} part: {share:.0%} of a series, at most {most} horizons of {own.horizon} steps"
        for part, (share, most) in backtest.SHARES.items()
    )
    return {
        **cards.forecaster(network),
        "title": f"Forecasts of {names}, one value per {table.frequency}"[:200],
        "series": own.traits.model_dump(),
        "data": own.data,
        "ancestors": lineage.ancestors(base, "base"),
        "notes": (
            f"Fine-tuned from {base.name}@{base.version}. {verdict}. {count:,} series, one value per "
            f"{table.frequency}, {season}. All series were cut at the same times. {shares}. Of the averaged weights, "
            f"those with the lowest loss on the validation part were kept. The decision part, which is later, decided "
            f"whether fine-tuning helped. {len(table.remarks):,} repairs or omissions in the table."
        ),
    }


def evaluate(run: Run, own: OwnSeries, network: Any) -> tuple[dict[str, Any], str, bool, Leaderboard]:
    """Evaluate with the serving code on the decision part and, if the network is to be published, on the test part.

    Return the card, a sentence that states whether fine-tuning helped, whether to publish the network, and the
    leaderboard of the last measured part. The network is published if fine-tuning helped, or with --force.
    """
    forecaster = run.predictor(GlobalForecaster, card_of(own, network, "Not measured yet"), network)
    board = compare(forecaster, own, "decision")
    helped, reason = verdict(board)
    publishes = helped or run.options.data_options["force"]
    tests = run.options.part == "test" and (publishes or run.options.data_options["backtest"])
    if tests:
        board = compare(forecaster, own, "test")
    card = run.measure(card_of(own, network, reason), lambda _: board.card_metrics(), tests)
    draw_samples(run.folder / "samples.png", examples(forecaster, own, board.part))
    if run.options.data_options["backtest"]:
        report.write(run.folder, board, run.command)
    return card, reason, publishes, board


def backtest_version(options: Options, config: ForecasterFinetuneConfig) -> Leaderboard:
    """Write the report on the published version given by ``--version``, without training; return its leaderboard.

    Raises:
        DataError: the table or the version cannot be used, or the version was trained on all rows of the table.
    """
    own = read(options, config.horizon)
    print_table(own.table)
    card, version = own.base.card, label(own.base)
    if lineage.seen_data(card, own.data):
        raise DataError(
            f"--version {version}: this version was trained on all rows of {own.table.name}, so its errors on these "
            "rows would be too low. Its backtest.png shows errors that were measured before this training. Type "
            "--backtest without --version to train and measure again"
        )
    folder = options.runs / card.name / f"backtest-{datetime.now(UTC).strftime('%Y-%m-%dT%H-%M-%S')}"
    folder.mkdir(parents=True)
    command = shlex.join(["python", "-m", options.script, *sys.argv[1:]])
    forecaster = GlobalForecaster(own.base, torch.device(options.device))
    networks = [served(version, forecaster, "the published network")]
    board = leaderboard.compare(own.table, own.splits, own.horizon, "test", networks)
    report.write(folder, board, command)
    print(board.text())
    print(f"wrote {folder / 'backtest.html'} and backtest.png")
    return board


def examples(forecaster: GlobalForecaster, own: OwnSeries, part: HeldOut) -> list[Example]:
    """Return up to eight examples to plot: for one series each, the last horizon of a part and the forecast for it."""
    shown = [split for split in own.splits if np.ptp(split.bounds(part)) >= own.horizon]
    result = []
    for split in shown[:: -(-len(shown) // 8)]:
        end = split.bounds(part)[1]
        past, actual = backtest.past_of(split.series, end - own.horizon), split.series.values[end - own.horizon : end]
        covariates = split.series.covariates[:end][-own.horizon - backtest.MAX_PAST :]
        (forecast,) = forecast_series(forecaster, [past], own.table.season, own.horizon, [covariates])
        result.append(Example(split.series.name, past, actual, forecast))
    return result
