"""Put the rows of all series on evenly spaced time steps, and return them as one tidy frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from app.tables import grid
from app.tables.messages import NO_TIME, TableError, option
from app.tables.options import ReadOptions
from app.tables.times import Reading

SERIES, STAMP, ROW = "(series)", "(ds)", "(row)"  # columns with the number of the series, the time and the row number
MAX_VALUE = 1e150  # largest value of a series or covariate, because squares of larger values overflow


def on_grid(
    data: pd.DataFrame, values: list[str], reading: Reading, options: ReadOptions, remarks: list[str]
) -> tuple[pd.DataFrame, str, Callable[[Any, int], Any]]:
    """Return one row for each time step of each series, in the order of time, the name of the step, and ``after``.

    ``data``: the columns ``values``, known covariates, SERIES and ROW. ``reading``: the time of each row.

    Raises:
        TableError: time stamps occur twice, or are irregular.
    """
    step, aggregate = options.resample, options.aggregate
    stamps, period = reading.times, reading.period
    if step:
        stamps, period = grid.resample(step, reading.times)
        there = data[values].notna().any(axis=1)
        if aggregate == "sum" and there.any():
            left_out = grid.incomplete(step, reading.times[there])
            data.loc[stamps.isin(list(left_out)), values] = np.nan
            remarks += left_out.values()
    data = data.assign(**{STAMP: stamps}).iloc[np.lexsort((reading.times.to_numpy(), data[SERIES]))]
    double = data.duplicated([SERIES, STAMP])
    is_sum = aggregate == "sum" and bool(double.any())
    if double.any():
        if aggregate is None:
            stamp, code = data.loc[double, [STAMP, SERIES]].iloc[0]
            rows = sorted(data[ROW][(data[STAMP] == stamp) & (data[SERIES] == code)])
            hours = ",".join([*reading.names, "hour"])
            relation = "are in the same time step" if step else f"have the same time stamp {stamp}"
            raise TableError(
                f"rows {rows[0]} and {rows[1]} {relation}; use {option('aggregate', 'sum')}, mean or last to combine "
                f"such rows; or {option('group')} with the columns that name the series; or {option('time', hours)} "
                f"with {option('format')} if there is such a column; or {NO_TIME} if each row is one step and the rows "
                "are in the order of time"
            )
        grouped = data.groupby([SERIES, STAMP])
        own = grouped[values].sum(min_count=1) if is_sum else grouped[values].agg(aggregate)
        others = data.columns.difference([*values, SERIES, STAMP])
        data = own.join(grouped[list(others)].mean()).reset_index()
        remarks.append(f"{double.sum()} rows are combined with others ({aggregate})")
    found = grid.find(data[STAMP].to_numpy(), data[SERIES].to_numpy(), period)
    if found is None:
        raise TableError(_irregular(data, step))
    starts = np.flatnonzero(np.diff(data[SERIES], prepend=-1))
    lengths = np.maximum.reduceat(found.positions, starts) + 1
    begins = np.cumsum(lengths) - lengths
    full = data.set_index(found.positions + np.repeat(begins, np.diff(starts, append=len(data))))
    full = full.reindex(range(lengths.sum())).assign(**{SERIES: np.repeat(data[SERIES].to_numpy()[starts], lengths)})
    holes = full[STAMP].isna()
    first, count = (np.repeat(own, lengths)[holes] for own in (data[STAMP].to_numpy()[starts], begins))
    full.loc[holes, STAMP] = found.after(first, np.flatnonzero(holes) - count)
    inner = holes & _inside(full[values].notna().any(axis=1), full[SERIES])
    if inner.any():
        before = full[STAMP].iloc[int(np.argmax(inner)) - 1]
        text = before.date() if (full[STAMP] == full[STAMP].dt.floor("D")).all() else before.isoformat()
        effect = "count as 0" if is_sum else "are missing"
        remarks.append(f"{inner.sum()} time steps (one per {found.step}) {effect}, the first after {text}")
    for name in values if is_sum else ():
        full.loc[holes & _inside(full[name].notna(), full[SERIES]), name] = 0.0
    return full, found.step, found.shifted


def _inside(there: pd.Series, series: pd.Series) -> pd.Series:
    """Return whether each row is between the first and the last row of its series for which ``there`` is true."""
    return there.groupby(series).cummax() & there[::-1].groupby(series[::-1]).cummax()[::-1]


def _irregular(data: pd.DataFrame, step: str | None) -> str:
    """Return the message for times that are on no grid of time steps, or too few. ``step``: --resample."""
    few = data[SERIES].value_counts().max() < 2
    if step:
        holes = f"more than {100 * grid.MAX_HOLES:.0f} % of the time steps have no row; use a longer step"
        problem = "no series has two time steps; use a shorter step" if few else holes
        return f"with {option('resample', step)}, {problem}, for example the next one of h, D, W, M, Q and Y"
    problem = "no series has two time stamps" if few else "the time stamps are irregular"
    return (
        f"{problem}, for example {', '.join(map(str, data[STAMP].iloc[:4]))}; use {option('resample', 'D')} (or h, "
        f"15min, W, M) and {option('aggregate', 'sum')}, mean or last"
    )


def tidy(
    data: pd.DataFrame, titles: Sequence[str], values: list[str], known: list[str], remarks: list[str]
) -> pd.DataFrame:
    """Return the tidy frame of all series that have values, each cut to its first and last value.

    ``data``: the columns ``values``, ``known``, SERIES and STAMP, in the order of time. ``titles``: the name for each
    column of values of each series. Missing covariates repeat the value before them or, at the start, the first value.

    Raises:
        TableError: there are no values, or a value is too large; or a column of covariates has no values.
    """
    parts = [data[[SERIES, STAMP, *known]].assign(y=data[name], label=data[SERIES] * len(values) + at) for at, name in
             enumerate(values)]  # fmt: skip
    frame = pd.concat(parts).rename(columns={STAMP: "ds"}).sort_values("label", kind="stable", ignore_index=True)
    there, label = frame["y"].notna(), frame["label"]
    if not there.any():
        raise TableError("has no values")
    inside = _inside(there, label)
    remarks += [f"{titles[code]} has no values, so it is left out" for code in sorted({*label} - {*label[inside]})]
    later = int((~there[::-1].groupby(label[::-1]).cummax() & label.isin(label[inside])).sum())
    if known and later:
        remarks.append(f"the last {later} rows have no value and are not used")
    frame, label = frame[inside], label[inside]
    numbers = frame[["y", *known]].fillna(0.0).to_numpy()
    at = int(np.abs(numbers).max(axis=1).argmax())
    largest = max(numbers[at], key=abs)
    if abs(largest) > MAX_VALUE:
        raise TableError(f"{titles[label.iloc[at]]} has the value {largest}; allowed are -{MAX_VALUE} to {MAX_VALUE}")
    for name in known:
        count = int(frame[name].isna().sum())
        frame[name] = frame.groupby("label")[name].ffill().groupby(label).bfill()
        if frame[name].isna().any():
            title = titles[label[frame[name].isna()].iloc[0]]
            raise TableError(f"{title}: the known covariate {name!r} has no values")
        if count:
            remarks.append(f"{count} missing values of {name!r} repeat the value before them")
    frame["unique_id"] = np.array(titles, object)[label]
    return frame[["unique_id", "ds", "y", *known]].reset_index(drop=True)
