"""Find the time step between the rows of a table, and combine rows into longer time steps.

A time step may be a calendar step such as a month, a fixed step, a business day, or a fixed step with jitter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset

from app.tables import TableError
from app.tables.times import Reading

SECOND, DAY = 10**6, 86_400 * 10**6  # microseconds
UNITS = {"week": 7 * DAY, "day": DAY, "hour": 3600 * SECOND, "minute": 60 * SECOND, "second": SECOND}
MONTHS = {1: "month", 2: "2 months", 3: "quarter", 4: "4 months", 6: "half-year", 12: "year"}
USUAL_STEPS = np.array(  # of sensors, in seconds; their time stamps may have jitter
    [1, 2, 5, 10, 15, 20, 30, *(60 * n for n in (1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30)),
     *(3600 * n for n in (1, 2, 3, 4, 6, 8, 12, 24, 168))]
)  # fmt: skip
MAX_JITTER = 0.3  # largest deviation of a time difference from a multiple of the step, as a share of the step
MAX_HOLES = 0.4  # largest share of steps without a time stamp; with a larger share, the times are irregular
MAX_HOLES_TO_DECIDE = 0.1  # a stricter limit, for choosing between several readings of the same cells
CALENDAR = {"W": "W-SUN", "M": "M", "ME": "M", "MS": "M", "Q": "Q", "QE": "Q", "QS": "Q"}  # --resample -> periods
CALENDAR |= {"Y": "Y", "YE": "Y", "YS": "Y", "A": "Y"}
PERIODS = {"W-SUN": "week", "M": "month", "Q": "quarter", "Y": "year"}
# A time step is incomplete if its part before the first or after the last row is longer than in the median of the other
# time steps, by more than this share of the longest time between two rows. In a regular table that lacks one row, the
# difference is about one such time, but some months and quarters are shorter than others.
MAX_EMPTY_PART = 0.75
MAX_GAPS = 2  # number of the longest times between rows, at most 5 %, that do not count, because they may be gaps


@dataclass(frozen=True)
class Grid:
    """The time step that all series of a table share.

    Attributes:
        step: name of the time step, such as "hour".
        positions: the step number int64 [T] of each time, from 0 in each series.
        holes: the share of steps without a time stamp, between the first and the last time of each series.
        after: returns the time that is a number of steps after a time.
        jitter: whether times were moved to the nearest step.
    """

    step: str
    positions: np.ndarray
    holes: float
    after: Callable[[pd.Timestamp, int], pd.Timestamp]
    jitter: bool = False


class _Times:
    """Sorted, distinct times datetime64[us] [T] of several series, one series after the other."""

    def __init__(self, times: np.ndarray, series: np.ndarray) -> None:
        """``series``: the number of the series of each time."""
        self.times = times
        self.starts = np.flatnonzero(np.diff(series, prepend=-1))
        self.first = np.repeat(self.starts, np.diff(self.starts, append=len(times)))  # of the same series
        self.inside = np.arange(1, len(times)) != self.first[1:]  # whether a time and the next have the same series
        self.differences = self.within(times.astype(np.int64))

    def within(self, numbers: np.ndarray) -> np.ndarray:
        """Return the differences between consecutive numbers of the same series."""
        return np.diff(numbers)[self.inside]

    def grid(self, step: str, numbers: np.ndarray, after: Callable[[Any, int], Any], jitter: bool = False) -> Grid:
        positions = numbers - numbers[self.first]
        spans = int(np.maximum.reduceat(positions, self.starts).sum()) + len(self.starts)
        return Grid(step, positions, 1 - len(numbers) / spans, after, jitter)


def find(times: np.ndarray, series: np.ndarray, period: str) -> Grid | None:
    """Return the time step that all series share; None if the times are irregular.

    ``times``: datetime64[us] [T], sorted and distinct in each series. ``series``: the number of the series of each
    time, ascending. ``period``: see ``Reading``.
    """
    own = _Times(times, series)
    if not len(own.differences):
        return None
    if period == "step":
        return own.grid(
            "step", times.astype(np.int64) // SECOND, lambda start, count: start + pd.Timedelta(seconds=count)
        )
    if period == "week":  # the days of a week count as one
        monday = (times.astype("datetime64[D]").astype(np.int64) + 3) // 7 * DAY * 7
        candidates: list[Grid | None] = [_fixed(own, monday)]
    else:
        candidates = [_months(own, bool(period)), _fixed(own, times.astype(np.int64)), _business_days(own)]
    best = min((each for each in candidates if each), key=lambda each: each.holes, default=None)
    if best is None or best.holes > MAX_HOLES:
        best = None if period else _jittered(own)
    return best if best and best.holes <= MAX_HOLES else None


def is_regular(reading: Reading) -> bool:
    """Return whether the times of a reading are regular: at least three, without jitter, and with few holes."""
    times = np.unique(reading.times.dropna().to_numpy())
    found = find(times, np.zeros(len(times), int), reading.period) if len(times) >= 3 else None
    return found is not None and not found.jitter and found.holes <= MAX_HOLES_TO_DECIDE


def _months(own: _Times, period: bool) -> Grid | None:
    """Return a grid of months or of multiples such as quarters; None if the times do not fit.

    Times fit if no series has two times in one month. Unless ``period`` is true, all times must also be on the same day
    of the month, within its first seven days, or within its last seven days.
    """
    begin = own.times.astype("datetime64[M]")
    months = begin.astype(np.int64)
    differences = own.within(months)
    if (differences == 0).any():
        return None
    days = (own.times.astype("datetime64[D]") - begin.astype("datetime64[D]")).astype(int) + 1
    lengths = ((begin + 1).astype("datetime64[D]") - begin.astype("datetime64[D]")).astype(int)
    same = (days == np.minimum(days.max(), lengths)).all() or (days <= 7).all() or (lengths - days <= 6).all()
    if not (period or same):
        return None
    unit = int(np.gcd.reduce(differences))
    unit = unit if unit in MONTHS or unit % 12 == 0 else 1
    step = MONTHS.get(unit) or f"{unit // 12} years"
    offset = pd.offsets.MonthEnd if (days == lengths).all() else lambda count: pd.DateOffset(months=count)
    return own.grid(step, (months - months[own.first]) // unit, lambda start, count: start + offset(unit * count))


def _fixed(own: _Times, numbers: np.ndarray) -> Grid:
    """Return a grid with a fixed step, the greatest common divisor of the differences between consecutive times."""
    unit = int(np.gcd.reduce(own.within(numbers))) or 1
    return own.grid(step_name(unit), (numbers - numbers[own.first]) // unit, _after(unit))


def _after(unit: int) -> Callable[[pd.Timestamp, int], pd.Timestamp]:
    return lambda start, count: start + pd.Timedelta(microseconds=unit * count)


def step_name(step: int) -> str:
    """Return the name of a step that is given in microseconds."""
    for name, unit in UNITS.items():
        if step % unit == 0:
            return name if step == unit else f"{step // unit} {name}s"
    return f"{step / SECOND:g} seconds"


def _business_days(own: _Times) -> Grid | None:
    """Return a grid of the days from Monday to Friday; None if the times do not fit.

    Times fit if none is on a weekend, and each series has one time per day, at nearly the same time of day. For
    example, a market may close earlier on some days, and one hour later in UTC during daylight saving time.
    """
    days = own.times.astype("datetime64[D]")
    if len(days) < 5 or not np.is_busday(days).all():
        return None
    positions = np.busday_count("1970-01-05", days)
    clock = (own.times - days).astype(np.int64)
    spread = int((np.maximum.reduceat(clock, own.starts) - np.minimum.reduceat(clock, own.starts)).max())
    if spread > MAX_JITTER * DAY or (own.within(positions) == 0).any():
        return None
    return own.grid("business day", positions, lambda start, count: start + pd.offsets.BusinessDay(count), spread > 0)


def _jittered(own: _Times) -> Grid | None:
    """Return a grid with the step in USUAL_STEPS that is nearest to the median difference between consecutive times.

    Return None unless all differences are nearly multiples of this step.
    """
    median = float(np.median(own.differences)) / SECOND
    unit = SECOND * int(USUAL_STEPS[np.abs(USUAL_STEPS / median - 1).argmin()])
    counts = np.round(own.differences / unit)
    off = np.abs(own.differences / unit - counts)
    if abs(unit / SECOND / median - 1) > 0.1 or (off > MAX_JITTER).any() or (counts < 1).any():
        return None
    steps = np.zeros(len(own.times), np.int64)
    steps[1:][own.inside] = counts
    return own.grid(step_name(unit), steps.cumsum(), _after(unit), jitter=True)


# --- longer time steps


def resample(step: str, times: pd.Series) -> tuple[pd.Series, str]:
    """Return the start of the time step that contains each time, and the period of the steps as in ``Reading``.

    ``step``: D, h, 15min, W (from Monday), M, Q, Y, or another pandas offset of fixed length.

    Raises:
        TableError: pandas does not know the step, or the step is not positive.
    """
    if code := CALENDAR.get(step.upper()):
        return times.dt.to_period(code).dt.start_time.astype("datetime64[us]"), PERIODS[code]
    try:
        if pd.Timestamp(0) + to_offset(_offset(step)) <= pd.Timestamp(0):
            raise ValueError("a time step must be longer than 0")
        return times.dt.floor(_offset(step)), ""
    except ValueError as error:
        raise TableError(f"--resample {step}: {error}; allowed are h, D, W, M, Q, Y and 15min") from error


def _offset(step: str) -> str:
    return step if step.endswith("D") else step.lower()


def _working_time(times: pd.Series) -> np.ndarray:
    """Return the microseconds int64 [T] of the days from Monday to Friday before each time, since 1600."""
    stamps = times.to_numpy().astype("datetime64[us]")
    days = stamps.astype("datetime64[D]")
    return np.busday_count("1600-01-01", days) * DAY + np.where(np.is_busday(days), (stamps - days).astype(np.int64), 0)


def incomplete(step: str, times: pd.Series, starts: pd.Series) -> dict[pd.Timestamp, str]:
    """Return the first and the last time step if the rows cover only a part of them, with a remark for each.

    The sum of such a step would be too small. ``times``: the time of each row with a value. ``starts``: the start of
    its time step.

    Raises:
        TableError: no time step is complete.
    """
    weekend = (times.dt.day_of_week >= 5).any()  # otherwise, a month may begin or end with a weekend without rows
    position = (lambda x: x.to_numpy().astype("datetime64[us]").astype(np.int64)) if weekend else _working_time
    gaps = np.sort(np.diff(np.unique(position(times))))
    if not len(gaps):
        return {}
    gap = gaps[-1 - min(MAX_GAPS, len(gaps) // 20)]
    spans = times.groupby(starts).agg(["min", "max"])
    code = CALENDAR.get(step.upper())
    begin = spans.index.to_series()
    ends = (begin.dt.to_period(code) + 1).dt.start_time if code else begin + to_offset(_offset(step))
    before, after = position(spans["min"]) - position(begin), position(ends) - position(spans["max"])

    def is_longer(part: int, others: np.ndarray) -> bool:
        usual = float(np.median(others)) if len(others) else MAX_EMPTY_PART * gap
        return part > usual + MAX_EMPTY_PART * gap

    result, (first, last) = {}, (spans["min"].iloc[0], spans["max"].iloc[-1])
    if is_longer(before[0], before[1:]):
        result[begin.iloc[0]] = f"the first time step, {begin.iloc[0]}, is left out: its rows begin at {first}"
    if is_longer(after[-1], after[:-1]):
        result[begin.iloc[-1]] = f"the last time step, {begin.iloc[-1]}, is left out: its rows end at {last}"
    if len(result) == len(spans):
        raise TableError(f"--resample {step}: the rows from {first} to {last} cover no whole time step")
    return {start: f"{remark}, so their sum would be too small" for start, remark in result.items()}
