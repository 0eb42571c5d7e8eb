"""Find the time step between the rows of a table, and combine rows into longer time steps.

A time step may be a calendar step such as a month, a fixed step, or a business day.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from app.tables import TableError
from app.tables.times import Reading

SECOND, DAY = 10**6, 86_400 * 10**6  # microseconds
UNITS = {"week": 7 * DAY, "day": DAY, "hour": 3600 * SECOND, "minute": 60 * SECOND, "second": SECOND}
MONTHS = {1: "month", 2: "2 months", 3: "quarter", 4: "4 months", 6: "half-year", 12: "year"}
MAX_SPREAD = DAY // 3  # a market may close earlier on some days, and one hour later in UTC in summer
MAX_HOLES = 0.4  # largest share of steps without a time stamp; with a larger share, the times are irregular
MAX_HOLES_TO_DECIDE = 0.1  # a stricter limit, for choosing between several readings of the same cells
CALENDAR = {"W": ("W-SUN", "week"), "M": ("M", "month"), "Q": ("Q", "quarter"), "Y": ("Y", "year")}  # --resample


@dataclass(frozen=True)
class Grid:
    """The time step that all series of a table share.

    Attributes:
        step: name of the time step, such as "hour".
        positions: the step number int64 [T] of each time, from 0 in each series.
        holes: the share of steps without a time stamp, between the first and the last time of each series.
        after: returns the times that are numbers of steps after times, datetime64[us].
    """

    step: str
    positions: np.ndarray
    holes: float
    after: Callable[[np.ndarray, np.ndarray], np.ndarray]


def find(times: np.ndarray, series: np.ndarray, period: str) -> Grid | None:
    """Return the time step that all series share; None if the times are irregular.

    ``times``: datetime64[us] [T], sorted and distinct in each series. ``series``: the number of the series of each
    time, ascending. ``period``: see ``Reading``.
    """
    starts = np.flatnonzero(np.diff(series, prepend=-1))
    first = np.repeat(starts, np.diff(starts, append=len(times)))  # the first row of the same series
    inside = np.arange(1, len(times)) != first[1:]  # whether a row and the next have the same series
    if not inside.any():
        return None
    micro = times.astype(np.int64)
    days = times.astype("datetime64[D]")

    def grid(step: str, numbers: np.ndarray, after: Callable[..., np.ndarray]) -> list[Grid]:
        """Return [] if a series has two rows with the same number."""
        if not (np.diff(numbers)[inside] > 0).all():
            return []
        positions = numbers - numbers[first]
        spans = int(np.maximum.reduceat(positions, starts).sum()) + len(starts)
        return [Grid(step, positions, 1 - len(times) / spans, after)]

    def fixed(numbers: np.ndarray) -> list[Grid]:
        unit = int(np.gcd.reduce(np.diff(numbers)[inside])) or 1
        return grid(step_name(unit), (numbers - numbers[first]) // unit, _after(unit))

    def months() -> list[Grid]:
        """Unless the cells are periods, all times must be on the same day of the month or in the same week of it."""
        begin = times.astype("datetime64[M]")
        numbers = begin.astype(np.int64)
        day = (days - begin.astype("datetime64[D]")).astype(int) + 1
        lengths = ((begin + 1).astype("datetime64[D]") - begin.astype("datetime64[D]")).astype(int)
        same = (day == np.minimum(day.max(), lengths)).all() or (day <= 7).all() or (lengths - day <= 6).all()
        unit = int(np.gcd.reduce(np.diff(numbers)[inside]))
        if not unit or not (period or same):
            return []
        unit = unit if unit in MONTHS or unit % 12 == 0 else 1
        name = MONTHS.get(unit) or f"{unit // 12} years"
        is_end = bool((day == lengths).all())
        return grid(
            name, (numbers - numbers[first]) // unit, lambda start, count: _months_after(start, unit * count, is_end)
        )

    def business_days() -> list[Grid]:
        clock = (times - days).astype(np.int64)
        spread = np.maximum.reduceat(clock, starts) - np.minimum.reduceat(clock, starts)
        if len(days) < 5 or spread.max() > MAX_SPREAD or not np.is_busday(days).all():
            return []
        return grid("business day", np.busday_count("1970-01-05", days), _business_days_after)

    if period == "step":
        return grid("step", micro // SECOND, _after(SECOND))[0]
    if period == "week":  # the days of a week count as one
        candidates = fixed((days.astype(np.int64) + 3) // 7 * DAY * 7)
    else:
        candidates = [*months(), *fixed(micro), *business_days()]
    return min((own for own in candidates if own.holes <= MAX_HOLES), key=lambda own: own.holes, default=None)


def is_regular(reading: Reading) -> bool:
    """Return whether the times of a reading are regular: at least three, with few holes."""
    times = np.unique(reading.times.dropna().to_numpy())
    found = find(times, np.zeros(len(times), int), reading.period) if len(times) >= 3 else None
    return found is not None and found.holes <= MAX_HOLES_TO_DECIDE


def _after(unit: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda start, count: start + (unit * count).astype("timedelta64[us]")


def _months_after(start: np.ndarray, count: np.ndarray, is_end: bool) -> np.ndarray:
    month = start.astype("datetime64[M]")
    target = month + count
    day = start.astype("datetime64[D]") - month.astype("datetime64[D]")
    last = (target + 1).astype("datetime64[D]") - 1 - target.astype("datetime64[D]")
    return (
        target.astype("datetime64[us]")
        + (last if is_end else np.minimum(day, last))
        + (start - start.astype("datetime64[D]"))
    )


def _business_days_after(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    days = start.astype("datetime64[D]")
    return np.busday_offset(days, count).astype("datetime64[us]") + (start - days)


def step_name(step: int) -> str:
    """Return the name of a step that is given in microseconds."""
    for name, unit in UNITS.items():
        if step % unit == 0:
            return name if step == unit else f"{step // unit} {name}s"
    return f"{step / SECOND:g} seconds"


# --- longer time steps


def resample(step: str, times: pd.Series) -> tuple[pd.Series, str]:
    """Return the start of the time step that contains each time, and the period of the steps as in ``Reading``.

    ``step``: D, h, 15min, W (from Monday), M, Q, Y, or another pandas offset of fixed length.

    Raises:
        TableError: pandas does not know the step, or the step is not positive.
    """
    if step.upper() in CALENDAR:
        code, period = CALENDAR[step.upper()]
        return times.dt.to_period(code).dt.start_time.astype("datetime64[us]"), period
    offset = step if step.endswith("D") else step.lower()
    try:
        if pd.Timestamp(0) + to_offset(offset) <= pd.Timestamp(0):
            raise ValueError("a time step must be longer than 0")
        return times.dt.floor(offset), ""
    except ValueError as error:
        raise TableError(f"--resample {step}: {error}; allowed are h, D, W, M, Q, Y and 15min") from error


def incomplete(step: str, times: pd.Series) -> dict[pd.Timestamp, str]:
    """Return the first and the last time step if the rows cover only a part of them, with a remark for each.

    The sum of such a step would be too small. It is incomplete if another row would belong to it, one step before the
    first or after the last row. ``times``: the time of each row with a value.

    Raises:
        TableError: no time step is complete.
    """
    own = np.unique(times.to_numpy())
    found = find(own, np.zeros(len(own), int), "")
    gap = int(np.quantile(np.diff(own).astype(np.int64), 0.95)) if len(own) > 1 else 0  # of irregular rows
    ends = own[[0, -1]]
    beyond = (found.after if found else _after(gap))(ends, np.array([-1, 1]))
    inside, outside = resample(step, pd.Series(ends))[0], resample(step, pd.Series(beyond))[0]
    names = [("first", "begin at"), ("last", "end at")]
    result = {
        inside[
            at
        ]: f"the {name} time step, {inside[at]}, is left out: its rows {verb} {pd.Timestamp(ends[at])}, so their "
        "sum would be too small"
        for at, (name, verb) in enumerate(names)
        if inside[at] == outside[at]
    }
    if len(result) == resample(step, pd.Series(own))[0].nunique():
        raise TableError(f"--resample {step}: the rows from {times.min()} to {times.max()} cover no whole time step")
    return result
