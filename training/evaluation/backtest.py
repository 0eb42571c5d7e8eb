"""Forecasts held against what followed: each series is cut in three, and forecast from many places of its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from app.tasks.forecasting import MIN_VALUES, SCORES
from app.tasks.quantile_forecast import QuantileForecast
from training.data.datasets import DataError
from training.data.tables import Series, Table
from training.evaluation import forecasting
from training.run import metric

TESTED, MOST_TESTED = 0.25, 24  # share of a series that is held out to test, and horizons of it at most
VALIDATED, MOST_VALIDATED = 0.2, 12  # the same of what validates
RECENT = 1000  # values before an origin that are handed to a forecaster; none reads more
DECIMALS = {"mase": 3, "quantile_loss": 3, "coverage_95": 3}

Method = Callable[
    [Sequence[np.ndarray], int, int], list[QuantileForecast]
]  # pasts, season, horizon -> what follows each


@dataclass(frozen=True)
class Parts:
    """A series in three: what comes before ``validate`` is learnt from, what comes from ``test`` on is tested."""

    series: Series
    validate: int
    test: int


@dataclass(frozen=True)
class Origins:
    """Places that are forecast from: the values before each, what followed [N, horizon], and the usual step [N].

    What followed is NaN where the table has no value.
    """

    past: list[np.ndarray]
    actual: np.ndarray
    usual: np.ndarray
    season: int
    series: int  # how many they come from

    def some(self, most: int) -> Origins:
        """At most so many of them, spread evenly."""
        chosen = np.linspace(0, len(self.past) - 1, min(most, len(self.past))).round().astype(int)
        past = [self.past[place] for place in chosen]
        return Origins(past, self.actual[chosen], self.usual[chosen], self.season, self.series)


def cut(table: Table, horizon: int) -> list[Parts]:
    """The series that are long enough, each in three. Those that are not are among the table's remarks.

    What is learnt from must hold a season, a horizon and two values. Raises DataError when no series is left.
    """
    least = max(table.season + 2, MIN_VALUES) + horizon
    found = []
    for series in table.series:
        count = len(series.values)
        tested, validated = (
            min(max(int(share * count / horizon), 1), most) * horizon
            for share, most in ((TESTED, MOST_TESTED), (VALIDATED, MOST_VALIDATED))
        )
        parts = Parts(series, count - tested - validated, count - tested)
        if parts.validate < least:
            table.remarks.append(
                f"{series.name}: {count} values; with a season of {table.season} and a horizon of {horizon} it takes "
                f"{least + 2 * horizon} or more, so the series is left out"
            )
        elif not forecasting.usual_step(series.values[: parts.validate], table.season):
            table.remarks.append(
                f"{series.name}: its first {parts.validate} values repeat without any change, so there is no unit to "
                "measure errors in: the series is left out"
            )
        else:
            found.append(parts)
    if not found:
        raise DataError(f"{table.name}: no series can be learnt from and tested; {table.remarks[-1]}")
    return found


def origins(parts: Sequence[Parts], season: int, horizon: int, stage: Literal["validate", "test"]) -> Origins:
    """All origins of a stage: those that test lie a horizon apart, those that validate a quarter of one.

    An origin after which the table has no value at all is none.
    """
    past, actual, usual = [], [], []
    for one in parts:
        values = one.series.values
        begin, end = (one.validate, one.test) if stage == "validate" else (one.test, len(values))
        unit = forecasting.usual_step(values[: one.validate], season)
        known = np.where(one.series.known, values, np.nan)
        for origin in range(begin, end - horizon + 1, horizon if stage == "test" else max(1, horizon // 4)):
            followed = known[origin : origin + horizon]
            if not np.isnan(followed).all():
                past.append(values[max(origin - RECENT, 0) : origin])
                actual.append(followed)
                usual.append(unit)
    if not past:
        raise DataError(f"the last values of all series are missing, so that nothing can {stage} a forecast")
    return Origins(past, np.stack(actual), np.array(usual), season, len(parts))


def seasonal_naive(past: Sequence[np.ndarray], season: int, horizon: int) -> list[QuantileForecast]:
    """The last season again and again, with normal errors that grow by the root of the seasons ahead."""
    found = []
    for values in past:
        middle = forecasting.seasonal_naive(values, season, horizon)
        deviation = np.std(values[season:] - values[:-season]) * np.sqrt(np.arange(horizon) // season + 1)
        found.append(QuantileForecast(middle, middle, SCORES, middle[:, None] + deviation[:, None] * SCORES, season))
    return found


def figures(tried: Origins, method: Method) -> dict[str, float]:
    """How good the forecasts of a method are, over all origins."""
    answers = method(tried.past, tried.season, tried.actual.shape[1])
    lower, upper = (np.stack(side) for side in zip(*(answer.interval(95) for answer in answers), strict=True))
    quantiles = np.stack([answer.quantiles for answer in answers])[..., 1:-1]  # 0.1 to 0.9
    return {
        "mase": forecasting.mase(tried.actual, np.stack([answer.median for answer in answers]), tried.usual),
        "quantile_loss": forecasting.quantile_loss(tried.actual, quantiles, tried.usual),
        "coverage_95": forecasting.coverage(tried.actual, lower, upper),
    }


def compared(tried: Origins, contenders: dict[str, Method]) -> dict[str, Any]:
    """A card's figures of several contenders; each key begins with the contender's, that of "" does not."""
    horizon = tried.actual.shape[1]
    split = f"{len(tried.past):,} forecasts of {horizon} steps, of {tried.series:,} series, none of it learnt from"
    return {
        f"{name}{key}": metric(value, split, DECIMALS[key])
        for name, method in contenders.items()
        for key, value in figures(tried, method).items()
    }
