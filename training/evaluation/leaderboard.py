"""Compare forecast methods on the same windows, and state the uncertainty of the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from app.tasks.forecasting import QuantileForecast
from training.data.tables import Table
from training.evaluation import backtest, classical, intervals
from training.evaluation.backtest import HeldOut, Method, Origins, Split
from training.evaluation.forecast_metrics import Errors
from training.evaluation.forecaster import Example
from training.run import metric

MAX_WINDOWS = 300  # largest number of windows; if there are more, only some series are used
INTERVAL = 90  # per cent of the resamples lie in the intervals of the bootstrap


def change(losses: np.ndarray, other: np.ndarray) -> str:
    """Return the difference of the mean of ``losses`` [N] from that of ``other`` [N], relative to ``other``, as a text.

    Both have a loss for each window. The interval is from a bootstrap that draws windows, with both of their losses.
    With one window, there is no interval.
    """
    windows = np.random.default_rng(0).integers(len(losses), size=(intervals.RESAMPLES, len(losses)))
    windows = np.concatenate([[np.arange(len(losses))], windows])  # first the windows themselves
    with np.errstate(invalid="ignore", divide="ignore"):  # the other method may be exact
        value, *changes = np.nan_to_num(losses[windows].mean(axis=1) / other[windows].mean(axis=1) - 1, posinf=np.inf)
    bounds = np.quantile(changes, [0.5 - INTERVAL / 200, 0.5 + INTERVAL / 200], method="nearest")
    interval = f"{INTERVAL} % interval {bounds[0]:+.1%} to {bounds[1]:+.1%}"
    return f"{value:+.1%} ({interval if len(losses) > 1 else 'one forecast, no interval'})"


@dataclass(frozen=True)
class Leaderboard:
    """Windows of a part of a table, and the forecasts of each method for all windows.

    A window is the horizon of one forecast. ``splits`` are the splits of the series that have windows. ``series`` is
    the number of series in the table that could be split. The last method is the own one, which the others are compared
    with.
    """

    table: Table
    splits: Sequence[Split]
    series: int
    part: HeldOut
    origins: Origins
    methods: Sequence[Method]
    forecasts: Mapping[str, list[QuantileForecast]]

    @property
    def own(self) -> str:
        """The name of the own method."""
        return self.methods[-1].name

    @cached_property
    def errors(self) -> dict[str, Errors]:
        """The errors of all methods."""
        return {name: self.origins.errors(forecasts) for name, forecasts in self.forecasts.items()}

    def change(self, method: str) -> str:
        """Return the difference of a method's quantile loss from that of the own method."""
        return change(self.errors[method].losses, self.errors[self.own].losses)

    def windows(self, number: int) -> list[int]:
        """Return the indices of the windows of ``splits[number]``."""
        return [at for at, (other, _) in enumerate(self.origins.places) if other == number]

    @property
    def ranking(self) -> list[str]:
        """The names of the methods, the one with the lowest quantile loss first. Of equal methods, the own is first."""
        return sorted(self.forecasts, key=lambda name: (self.errors[name].quantile_loss, name != self.own))

    @property
    def classical_wins(self) -> bool:
        """Whether a classical method has the lowest quantile loss."""
        return self.ranking[0] in [method.name for method in classical.CLASSICAL]

    @property
    def description(self) -> str:
        """The number of windows and series."""
        count = self.origins.series_count
        return f"{len(self.origins.past):,} forecasts of {self.origins.horizon} steps, from {count:,} series"

    def verdict(self) -> str:
        """Return a sentence that compares the own method with the best other method."""
        best, second = self.ranking[:2]
        if best == self.own:
            return f"{best} has the lowest quantile loss. The loss of {second} differs by {self.change(second)}."
        advice = f", so use {best} instead of the network" if self.classical_wins else ""
        return (
            f"{best} has the lowest quantile loss{advice}. It differs from that of {self.own} by {self.change(best)}."
        )

    def text(self) -> str:
        """Return the methods as lines of text, the best first, and the verdict."""
        width = max(map(len, self.forecasts))
        lines = [f"{self.description}, {self.part} part", f"{'method':{width}}  MASE   quantile loss"]
        for name in self.ranking:
            own = self.errors[name]
            relation = "" if name == self.own else f"   {self.change(name)}"
            lines.append(f"{name:{width}}  {own.mase:.3f}  {own.quantile_loss:.3f}{relation}")
        return "\n".join([*lines, self.verdict()])

    def examples(self) -> list[Example]:
        """Return up to eight examples to plot: the last window of one series each, and the own forecast for it."""
        last = {number: at for at, (number, _) in enumerate(self.origins.places)}
        shown = list(last.items())[:: -(-len(last) // 8)]
        past, actual, own = self.origins.past, self.origins.actual, self.forecasts[self.own]
        return [Example(self.splits[number].series.name, past[at], actual[at], own[at]) for number, at in shown]

    def card_metrics(self) -> dict[str, Any]:
        """Return the errors of all methods for a model card, those of the own method first."""
        values = "held out of training" if self.part == "test" else "for validation"
        split, metrics = f"{self.description}, on values {values}", {}
        for method in reversed(self.methods):
            errors, weights = self.errors[method.name], "other method" if method.prefix else "published"
            for key, windows in (("mase", errors.scaled), ("quantile_loss", errors.losses)):
                metrics[f"{method.prefix}{key}"] = metric(windows, split, backtest.decimals(windows.mean()), weights)
            metrics[f"{method.prefix}coverage_95"] = metric(errors.coverage(95), split, 3, weights)
        return metrics


def compare(
    table: Table, splits: Sequence[Split], horizon: int, part: HeldOut, networks: Sequence[Method]
) -> Leaderboard:
    """Forecast the windows of a part with the networks and with all classical methods.

    The last network is the own method. If all series together have more than MAX_WINDOWS windows, evenly spaced series
    are used.
    """
    windows = len(backtest.origins(splits, table.season, horizon, part).past)
    chosen = splits[:: -(-windows // MAX_WINDOWS)]
    origins = backtest.origins(chosen, table.season, horizon, part).subset(MAX_WINDOWS)
    methods = [*classical.CLASSICAL, *networks]
    forecasts = {method.name: method.forecast(origins) for method in methods}
    return Leaderboard(table, chosen, len(splits), part, origins, methods, forecasts)
