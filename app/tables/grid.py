"""Put the values of all series on evenly spaced time steps, in one tidy frame.

The time step is found between the rows of the table, or given by --resample. It may be a calendar step such as a month,
a fixed step, or a business day.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from app.tables.messages import NO_TIME, TableError, option
from app.tables.options import ReadOptions

SERIES, STEP = "(series)", "(step)"  # columns with the number of the series, and of the time step in it
SECOND, DAY = 10**6, 86_400 * 10**6  # microseconds
UNITS = {"week": 7 * DAY, "day": DAY, "hour": 3600 * SECOND, "minute": 60 * SECOND, "second": SECOND}
MONTHS = {1: "month", 2: "2 months", 3: "quarter", 4: "4 months", 6: "half-year", 12: "year"}
MAX_SPREAD = DAY // 3  # a market may close earlier on some days, and one hour later in UTC in summer
MAX_HOLES = 0.4  # largest share of steps without a time stamp; with a larger share, the times are irregular
MAX_HOLES_TO_DECIDE = 0.1  # a stricter limit, for choosing between several readings of the same cells


@dataclass(frozen=True)
class Grid:
    """The time step that all series of a table share.

    Attributes:
        kind: "month", "business day", or "" for a step of fixed length.
        unit: the length of a step, in months, business days or microseconds.
        positions: the step number int64 [T] of each time, from 0 in each series.
        holes: the share of steps without a time stamp, between the first and the last time of each series.
        day: the largest day of the month of a time, from 0.
    """

    kind: str
    unit: int
    positions: np.ndarray
    holes: float
    day: int

    @property
    def step(self) -> str:
        """The name of the time step, such as "hour"."""
        if self.kind == "month":
            return MONTHS.get(self.unit) or f"{self.unit // 12} years"
        for name, unit in UNITS.items():
            if not self.kind and self.unit % unit == 0:
                return name if self.unit == unit else f"{self.unit // unit} {name}s"
        return self.kind or f"{self.unit / SECOND:g} seconds"

    def after(self, start: Any, count: Any) -> np.ndarray:
        """Return the times that are ``count`` steps after ``start``, both [T] or single."""
        start, count = np.asarray(start, "datetime64[us]"), np.asarray(count)
        days = start.astype("datetime64[D]")
        if self.kind == "month":
            month = start.astype("datetime64[M]") + self.unit * count
            first, following = (own.astype("datetime64[D]") for own in (month, month + 1))
            target = np.minimum(first + self.day, following - 1)
        elif self.kind == "business day":
            target = np.busday_offset(days, count)
        else:
            return start + (self.unit * count).astype("timedelta64[us]")
        return target.astype("datetime64[us]") + (start - days)


def find(times: np.ndarray, series: np.ndarray | None = None) -> Grid | None:
    """Return the time step that all series share; None if the times are irregular.

    ``times``: datetime64[us] [T], sorted and distinct in each series. ``series``: the number of the series of each
    time, ascending; None if there is one series.
    """
    series = np.zeros(len(times), int) if series is None else series
    starts = np.flatnonzero(np.diff(series, prepend=-1))
    first = np.repeat(starts, np.diff(starts, append=len(times)))  # the first row of the same series
    inside = np.diff(series) == 0
    if not inside.any():
        return None
    days, months = times.astype("datetime64[D]"), times.astype("datetime64[M]")
    begin = months.astype("datetime64[D]")
    day, last = (days - begin).astype(int), ((months + 1).astype("datetime64[D]") - begin).astype(int) - 1
    numbers = {"": times.astype(np.int64)}
    # Months have all times on the same day of the month, or in the same week of it.
    if (day == np.minimum(day.max(), last)).all() or (day < 7).all() or (last - day < 7).all():
        numbers = {"month": months.astype(np.int64)} | numbers
    if len(days) >= 5 and np.ptp((times - days).astype(np.int64)) <= MAX_SPREAD and np.is_busday(days).all():
        numbers["business day"] = np.busday_count("1970-01-05", days)
    found = []
    for kind, own in numbers.items():
        steps = np.diff(own)[inside]
        unit = int(np.gcd.reduce(steps))
        if kind == "business day" or (kind and unit not in MONTHS and unit % 12):
            unit = 1
        if steps.min() <= 0:
            continue
        positions = (own - own[first]) // unit
        spans = int(np.maximum.reduceat(positions, starts).sum()) + len(starts)
        found.append(Grid(kind, unit, positions, 1 - len(times) / spans, int(day.max())))
    return min((own for own in found if own.holes <= MAX_HOLES), key=lambda own: own.holes, default=None)


def is_regular(times: pd.Series) -> bool:
    """Return whether times are regular: at least three, with few holes."""
    own = np.unique(times.dropna().to_numpy())
    found = find(own) if len(own) >= 3 else None
    return found is not None and found.holes <= MAX_HOLES_TO_DECIDE


# --- longer time steps


def resample(data: pd.DataFrame, step: str, is_sum: bool, remarks: list[str]) -> pd.DataFrame:
    """Replace the times in ``ds`` by the start of the time step that contains them.

    ``step``: D, h, 15min, W (from Monday), M, Q, Y, or another pandas offset of fixed length. ``is_sum``: remove the
    values ``y`` in the first and the last time step if the rows cover only a part of it. Its sum would be too small.

    Raises:
        TableError: pandas does not know the step, the step is not positive, or no time step is complete.
    """
    try:
        starts = _starts(data["ds"], step)
    except ValueError as error:
        raise TableError(f"{option('resample', step)}: {error}; allowed are h, D, W, M, Q, Y and 15min") from error
    y = data["y"]
    if is_sum and y.notna().any():
        left_out = _incomplete(step, np.unique(data["ds"][y.notna()].to_numpy()))
        y = y.mask(starts.isin(list(left_out)))
        remarks += left_out.values()
    return data.assign(ds=starts, y=y)


def _starts(times: pd.Series, step: str) -> pd.Series:
    if step.upper() in ("W", "M", "Q", "Y"):
        return times.dt.to_period(step.upper()).dt.start_time.astype("datetime64[us]")
    offset = step if step.endswith("D") else step.lower()
    if pd.Timestamp(0) + to_offset(offset) <= pd.Timestamp(0):
        raise ValueError("a time step must be longer than 0")
    return times.dt.floor(offset)


def _incomplete(step: str, times: np.ndarray) -> dict[pd.Timestamp, str]:
    """Return the first and the last time step if they are incomplete, with a remark for each.

    A step is incomplete if another row would belong to it, one step before the first or after the last of ``times``,
    which are the sorted distinct times of all rows with a value.
    """
    ends, found = times[[0, -1]], find(times)
    if found:
        beyond = found.after(ends, [-1, 1])
    else:
        gap = np.quantile(np.diff(times).astype(np.int64), 0.95) if len(times) > 1 else 0
        beyond = ends + np.array([-gap, gap]).astype("timedelta64[us]")
    inside, outside = _starts(pd.Series(ends), step), _starts(pd.Series(beyond), step)
    result = {
        inside[at]: f"the {name} time step, {inside[at]}, is left out: its rows {verb} at {pd.Timestamp(ends[at])}, so "
        "their sum would be too small"
        for at, (name, verb) in enumerate([("first", "begin"), ("last", "end")])
        if inside[at] == outside[at]
    }
    if len(result) == _starts(pd.Series(times), step).nunique():
        first, last = map(pd.Timestamp, ends)
        raise TableError(f"{option('resample', step)}: the rows from {first} to {last} cover no whole time step")
    return result


# --- the tidy frame


def cut(data: pd.DataFrame, titles: list[str], known: list[str], remarks: list[str]) -> pd.DataFrame:
    """Return the rows of each series from its first to its last value.

    ``data``: the columns SERIES, which is an index of ``titles``, ``y`` and ``known``, in the order of time.

    Raises:
        TableError: there are no values.
    """
    there = data["y"].notna()
    if not there.any():
        raise TableError("has no values")
    groups = there.groupby(data[SERIES])
    count, total = groups.cumsum(), groups.transform("sum")
    remarks += [f"{titles[code]} has no values, so it is left out" for code in sorted({*data[SERIES][total == 0]})]
    later = (count == total) & ~there & (count > 0)
    if known and later.any():
        remarks.append(f"the last {later.sum()} rows have no value and are not used")
    return data[(count > 0) & ~later]


def on_grid(data: pd.DataFrame, options: ReadOptions, names: str, remarks: list[str]) -> tuple[pd.DataFrame, Grid]:
    """Return one row for each time step of each series, and the step.

    ``data``: the columns SERIES, ``ds`` and ``y``, and known covariates, sorted by series and time, without rows before
    the first or after the last value of a series. Its index has the row numbers of the file. ``names``: the columns of
    time stamps.

    Raises:
        TableError: time stamps occur twice, or are irregular.
    """
    step, aggregate = options.resample, options.aggregate
    double = data.duplicated([SERIES, "ds"])
    is_sum = aggregate == "sum" and bool(double.any())
    if double.any():
        if aggregate is None:
            stamp, code = data.loc[double, ["ds", SERIES]].iloc[0]
            rows = sorted(data.index[(data["ds"] == stamp) & (data[SERIES] == code)])
            relation = "are in the same time step" if step else f"have the same time stamp {stamp}"
            raise TableError(
                f"rows {rows[0]} and {rows[1]} {relation}; use {option('aggregate', 'sum')}, mean or last to combine "
                f"such rows; or {option('group')} with the columns that name the series; or "
                f"{option('time', f'{names},hour')} with {option('format')} if there is such a column; or {NO_TIME} if "
                "each row is one step and the rows are in the order of time"
            )
        remarks.append(f"{data.index[double].nunique()} rows are combined with others ({aggregate})")
        grouped = data.groupby([SERIES, "ds"])
        y = grouped["y"].sum(min_count=1) if is_sum else grouped["y"].agg(aggregate)
        data = grouped.mean().assign(y=y).reset_index()
    found = find(data["ds"].to_numpy(), data[SERIES].to_numpy())
    if found is None:
        raise TableError(_irregular(data, step))
    data = data.assign(**{STEP: found.positions})
    counts = data.groupby(SERIES)[STEP].max() + 1
    steps = {SERIES: np.repeat(counts.index, counts), STEP: np.concatenate([*map(np.arange, counts)])}
    full = pd.DataFrame(steps).merge(data, "left")
    holes = full["ds"].isna()
    if holes.any():
        first = full.groupby(SERIES)["ds"].transform("first")
        full.loc[holes, "ds"] = found.after(first[holes], full[STEP][holes])
        full.loc[holes, "y"] = 0.0 if is_sum else np.nan
        before = pd.Timestamp(found.after(full["ds"][holes].min(), -1).item())
        text = before.date() if (full["ds"] == full["ds"].dt.normalize()).all() else before.isoformat()
        count, effect = full["ds"][holes].nunique(), "count as 0" if is_sum else "are missing"
        remarks.append(f"{count} time steps (one per {found.step}) {effect}, the first after {text}")
    return full, found


def _irregular(data: pd.DataFrame, step: str | None) -> str:
    """Return the message for times that are on no grid of time steps, or too few. ``step``: --resample."""
    few = data[SERIES].value_counts().max() < 2
    if step:
        holes = f"more than {100 * MAX_HOLES:.0f} % of the time steps have no row; use a longer step"
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
