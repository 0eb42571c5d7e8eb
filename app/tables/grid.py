"""Find the time step between the rows of a table, and combine rows into longer time steps.

A time step may be a calendar step such as a month, a fixed step, or a business day.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from app.tables.messages import TableError, option

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


def find(times: np.ndarray, series: np.ndarray) -> Grid | None:
    """Return the time step that all series share; None if the times are irregular.

    ``times``: datetime64[us] [T], sorted and distinct in each series. ``series``: the number of the series of each
    time, ascending.
    """
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
    found = find(own, np.zeros(len(own), int)) if len(own) >= 3 else None
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
    ends, found = times[[0, -1]], find(times, np.zeros(len(times), int))
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
