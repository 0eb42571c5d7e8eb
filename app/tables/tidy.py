"""Put the values of all series on evenly spaced time steps, in one tidy frame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from app.tables import grid
from app.tables.messages import NO_TIME, TableError, option
from app.tables.options import ReadOptions

SERIES, GROUP, ROW = "(series)", "(group)", "(row)"  # columns of numbers: of the series, its group, and the row
Step = tuple[str, Callable[[Any, Any], Any]]  # the name of a time step, and ``TidyTable.after``


def cut(data: pd.DataFrame, titles: list[str], known: list[str], remarks: list[str]) -> pd.DataFrame:
    """Return the rows of each series from its first to its last value.

    ``data``: the columns SERIES, which is an index of ``titles``, ``y`` and ``known``, in the order of time.

    Raises:
        TableError: there are no values.
    """
    there, series = data["y"].notna(), data[SERIES]
    if not there.any():
        raise TableError("has no values")
    begun, unfinished = there.groupby(series).cummax(), there[::-1].groupby(series[::-1]).cummax()[::-1]
    remarks += [f"{titles[code]} has no values, so it is left out" for code in sorted({*series} - {*series[begun]})]
    if known and (later := int((begun & ~unfinished).sum())):
        remarks.append(f"the last {later} rows have no value and are not used")
    return data[begun & unfinished].reset_index(drop=True)


def on_grid(data: pd.DataFrame, options: ReadOptions, names: str, remarks: list[str]) -> tuple[pd.DataFrame, Step]:
    """Return one row for each time step of each series, and the step.

    ``data``: the columns SERIES, GROUP, ROW, ``ds`` and ``y``, and known covariates, sorted by series and time, without
    rows before the first or after the last value of a series. ``names``: the columns of time stamps.

    Raises:
        TableError: time stamps occur twice, or are irregular.
    """
    step, aggregate = options.resample, options.aggregate
    double = data.duplicated([SERIES, "ds"])
    is_sum = aggregate == "sum" and bool(double.any())
    if double.any():
        if aggregate is None:
            stamp, code = data.loc[double, ["ds", SERIES]].iloc[0]
            rows = sorted(data[ROW][(data["ds"] == stamp) & (data[SERIES] == code)])
            relation = "are in the same time step" if step else f"have the same time stamp {stamp}"
            raise TableError(
                f"rows {rows[0]} and {rows[1]} {relation}; use {option('aggregate', 'sum')}, mean or last to combine "
                f"such rows; or {option('group')} with the columns that name the series; or "
                f"{option('time', f'{names},hour')} with {option('format')} if there is such a column; or {NO_TIME} if "
                "each row is one step and the rows are in the order of time"
            )
        grouped = data.groupby([SERIES, "ds"])
        y = grouped["y"].sum(min_count=1) if is_sum else grouped["y"].agg(aggregate)
        remarks.append(f"{data.loc[double, ROW].nunique()} rows are combined with others ({aggregate})")
        data = grouped[[*data.columns.difference([SERIES, "ds", "y"])]].mean().assign(y=y).reset_index()
    found = grid.find(data["ds"].to_numpy(), data[SERIES].to_numpy())
    if found is None:
        raise TableError(_irregular(data, step))
    starts = np.flatnonzero(np.diff(data[SERIES], prepend=-1))
    lengths = np.maximum.reduceat(found.positions, starts) + 1
    begins = np.cumsum(lengths) - lengths
    full = data.set_index(found.positions + np.repeat(begins, np.diff(starts, append=len(data))))
    full = full.reindex(range(lengths.sum()))
    full[[SERIES, GROUP]] = full[[SERIES, GROUP]].ffill().astype(int)
    holes = full["ds"].isna()
    if holes.any():
        first, begin = (np.repeat(own, lengths)[holes] for own in (data["ds"].to_numpy()[starts], begins))
        full.loc[holes, "ds"] = found.after(first, np.flatnonzero(holes) - begin)
        full.loc[holes, "y"] = 0.0 if is_sum else np.nan
        before = pd.Timestamp(found.after(full["ds"][holes].min(), -1).item())
        text = before.date() if (full["ds"] == full["ds"].dt.normalize()).all() else before.isoformat()
        count = len(full.loc[holes, [GROUP, "ds"]].drop_duplicates())
        effect = "count as 0" if is_sum else "are missing"
        remarks.append(f"{count} time steps (one per {found.step}) {effect}, the first after {text}")
    return full, (found.step, found.after)


def _irregular(data: pd.DataFrame, step: str | None) -> str:
    """Return the message for times that are on no grid of time steps, or too few. ``step``: --resample."""
    few = data[SERIES].value_counts().max() < 2
    if step:
        holes = f"more than {100 * grid.MAX_HOLES:.0f} % of the time steps have no row; use a longer step"
        problem = "no series has two time steps; use a shorter step" if few else holes
        return f"with {option('resample', step)}, {problem}, for example the next one of h, D, W, M, Q and Y"
    problem = "no series has two time stamps" if few else "the time stamps are irregular"
    return (
        f"{problem}, for example {', '.join(map(str, data['ds'].iloc[:4]))}; use {option('resample', 'D')} (or h, "
        f"15min, W, M) and {option('aggregate', 'sum')}, mean or last"
    )


def fill_covariates(data: pd.DataFrame, titles: list[str], known: list[str], remarks: list[str]) -> None:
    """Replace missing covariates by the value before them or, at the start, by the first value.

    Raises:
        TableError: a series has no value of a covariate.
    """
    for name in known:
        missing = data[name].isna()
        data[name] = data.groupby(SERIES)[name].ffill().groupby(data[SERIES]).bfill()
        if data[name].isna().any():
            title = titles[data[SERIES][data[name].isna()].iloc[0]]
            raise TableError(f"{title}: the known covariate {name!r} has no values")
        if missing.any():
            remarks.append(f"{missing.sum()} missing values of {name!r} repeat the value before them")
