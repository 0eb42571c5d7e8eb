"""Forecast the series of a table: from the table to the series, and from the forecasts to a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from app.tables.messages import TableError, option
from app.tables.read import TidyTable


@dataclass(frozen=True)
class TableSeries:
    """A series of a table, and the steps after it.

    Attributes:
        name: name of the series.
        values: None where the table has no value.
        times: the time of each value, then of each step. Without time stamps, the number of its row or step.
        start: the first time in ISO 8601, or "" if the table has no time stamps.
        covariates: for each known covariate, a number for each value and then for each step.
    """

    name: str
    values: list[float | None]
    times: list[str]
    start: str
    covariates: dict[str, list[float]]

    @property
    def steps(self) -> list[str]:
        """The times of the steps after the series."""
        return self.times[len(self.values) :]


def series_of(
    table: TidyTable, future: Mapping[str, TidyTable], horizon: int | None, max_values: int | None = None
) -> Iterator[TableSeries]:
    """Yield each series of a table, or only its last ``max_values`` values, with the ``horizon`` steps after it.

    ``future``: for each known covariate, a table with its future values. Its rows are for one series or, without
    groups, for all series. Without time stamps, all rows are in the future. Without ``horizon``, all steps of
    ``future`` are used.

    Raises:
        TableError: a step has no future value.
    """
    for name, whole in table.frame.groupby("unique_id", sort=False):
        frame = whole.iloc[-max_values:] if max_values else whole
        first, last = frame["ds"].iloc[0], frame["ds"].iloc[-1]
        is_dated = isinstance(first, pd.Timestamp)
        ahead = {}
        for column, future_table in future.items():
            own = future_table.frame[future_table.frame["unique_id"].isin([name, column])]  # for one, or for all series
            ahead[column] = own[own["ds"] > last] if is_dated else own
        count = horizon or max(1, min(map(len, ahead.values())))
        steps = pd.Series(table.after(first, len(frame) + np.arange(count)))
        times = pd.concat([frame["ds"], steps]).astype("str").tolist()
        for column, own in ahead.items():
            if len(own) < count or (is_dated and list(own["ds"][:count]) != list(steps)):
                raise TableError(
                    f"{option('future')} needs {column} of {str(name)!r} for each of the {count} steps from "
                    f"{times[len(frame)]}"
                )
        yield TableSeries(
            str(name),
            [None if pd.isna(value) else value for value in frame["y"].tolist()],
            times,
            first.isoformat() if is_dated else "",
            {column: [*frame[column].tolist(), *own["y"][:count].tolist()] for column, own in ahead.items()},
        )


def forecast_rows(series: TableSeries, forecast: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table with a forecast, which has the fields of the service's JSON response."""
    for at, time in enumerate(series.steps):
        row = {"series": series.name, "time": time, "mean": forecast["mean"][at], "median": forecast["median"][at]}
        for level, bounds in forecast["intervals"].items():
            row |= {f"lower_{level}": bounds["lower"][at], f"upper_{level}": bounds["upper"][at]}
        yield row


def write_csv(rows: list[dict[str, Any]]) -> str:
    """Return rows of forecasts as CSV."""
    return pd.DataFrame(rows).to_csv(index=False)
