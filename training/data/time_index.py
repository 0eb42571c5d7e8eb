"""Time stamps as places on a grid: which step a table is in, which step of it a stamp is, and what repeats."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np

from app.tasks.forecasting import LONGEST_SEASON
from training.data.datasets import DataError

FORMATS = ("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S")
SLASHED = {True: "%d/%m/%Y", False: "%m/%d/%Y"}  # by whether the day comes first
SECONDS = {1: "second", 60: "minute", 3600: "hour", 86400: "day", 7 * 86400: "week"}
SEASONS = {"second": (60,), "minute": (60, 1440), "hour": (24, 168), "day": (7, 365), "week": (52,), "month": (12,)}
SEASONS |= {"quarter": (4,), "year": (), "business day": (5,)}
SEASONAL = 0.3  # autocorrelation from which on a season counts as one ...
STANDS_OUT = 0.1  # ... and by how much it must be above those half a season before and after: a random walk's is not
WEEKEND = 5  # datetime's number of Saturday


@dataclass(frozen=True)
class Frequency:
    """The step between two values, its usual seasons in steps, and where on the grid a stamp lies."""

    name: str
    seasons: tuple[int, ...]
    place: Callable[[str], int | None]  # None for a stamp between two steps, or none at all


def parse(stamp: str, day_first: bool = True) -> datetime | None:
    """A time stamp: ISO 8601, a month 2020-01, a quarter 2020Q1, a year, days first with dots, either with slashes."""
    if re.match(r"0000|\d{17}", stamp):  # no year, and no time that there is
        return None
    if match := re.fullmatch(r"(\d{4})-?[Qq]([1-4])", stamp):
        return datetime(int(match[1]), 3 * int(match[2]) - 2, 1)
    if match := re.fullmatch(r"(\d{4})[-/.](\d{1,2})", stamp):
        return datetime(int(match[1]), int(match[2]), 1) if 1 <= int(match[2]) <= 12 else None
    if re.fullmatch(r"1[6-9]\d\d|2[01]\d\d", stamp):
        return datetime(int(stamp), 1, 1)
    if re.fullmatch(r"\d{8,}", stamp) and not re.fullmatch(r"(19|20)\d{6}", stamp):  # seconds, or milliseconds
        seconds = int(stamp) / (1000 if len(stamp) > 11 else 1)
        return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None) if seconds < 1e11 else None
    try:
        found = datetime.fromisoformat(stamp)
        return found.astimezone(UTC).replace(tzinfo=None) if found.tzinfo else found
    except ValueError:
        pass
    slashed = SLASHED[day_first]
    for pattern in (*FORMATS, slashed, f"{slashed} %H:%M", f"{slashed} %H:%M:%S"):
        try:
            return datetime.strptime(stamp, pattern)
        except ValueError:
            continue
    return None


def is_stamp(cell: str) -> bool:
    """Whether a cell is a time stamp, one way or the other."""
    return (parse(cell) or parse(cell, False)) is not None


def frequency(columns: Sequence[Sequence[str]], path: Path) -> Frequency:
    """The step of all series of a table. Raises DataError when there is none."""
    stamps = [stamp for column in columns for stamp in column]
    day_first = _day_first(stamps, path)
    times = [sorted({time for stamp in column if (time := parse(stamp, day_first))}) for column in columns]
    steps = [later - earlier for column in times for earlier, later in pairwise(column)]
    if not steps:
        raise DataError(f"{path}: its time stamps, such as {stamps[0]!r}, give no step from one to the next")
    every = [time for column in times for time in column]
    return _of_months(every, steps, day_first) or _of_seconds(every, steps, day_first)


def autocorrelation(values: np.ndarray, lag: int) -> float:
    """Of values [T] without their straight trend, at a lag; 0 where they do not vary."""
    steps = np.arange(len(values))
    rest = values - np.polyval(np.polyfit(steps, values, 1), steps)
    spread = float((rest**2).mean())
    if spread <= 1e-12 * float((values**2).mean() + 1):
        return 0.0
    return float((rest[lag:] * rest[:-lag]).mean()) / spread


def season(series: Sequence[np.ndarray], frequency: Frequency | None) -> int:
    """The steps after which the series repeat: of what the frequency suggests, the strongest; 1 where none is.

    Seasons that the forecaster cannot read are none.
    """
    candidates = [lag for lag in (frequency.seasons if frequency else range(2, 401)) if lag <= LONGEST_SEASON]
    known = [values[~np.isnan(values)] for values in series[:50]]

    def strength(lag: int, longest: int) -> float:
        found = [autocorrelation(values, lag) for values in known if len(values) >= 3 * longest]
        return float(np.mean(found)) if found else -1.0

    strengths = {lag: strength(lag, lag) for lag in candidates}
    if frequency:
        beside = {lag: [strength(lag + side * (lag // 2), lag) for side in (-1, 1)] for lag in candidates}
        strengths = {lag: own for lag, own in strengths.items() if own > np.mean(beside[lag]) + STANDS_OUT}
    else:  # a peak, not the slope of what changes slowly
        strengths = {
            lag: own
            for lag, own in strengths.items()
            if own > strengths.get(lag - 1, 1.0) and own >= strengths.get(lag + 1, -1.0)
        }
    best = max(strengths.values(), default=0.0)
    if best <= SEASONAL:
        return 1
    return min(lag for lag, own in strengths.items() if own > 0.9 * best)  # not twice the season, which is as strong


def _day_first(stamps: Sequence[str], path: Path) -> bool:
    """Whether 3/4/2020 is in April: so it is when any first number is past 12; refused when nothing tells."""
    slashed = [match for stamp in stamps if (match := re.match(r"(\d{1,2})/(\d{1,2})/\d{4}", stamp))]
    if any(int(match[1]) > 12 for match in slashed):
        return True
    if any(int(match[2]) > 12 for match in slashed) or not slashed:
        return not slashed
    days = {int(match[1]) for match in slashed}, {int(match[2]) for match in slashed}
    if min(map(len, days)) == 1 and max(map(len, days)) > 1:  # the first of each month
        return len(days[0]) == 1
    raise DataError(f"{path}: {slashed[0][0]!r} may be a day and a month or a month and a day; write 2020-01-31")


def _of_months(times: Sequence[datetime], steps: Sequence[timedelta], day_first: bool) -> Frequency | None:
    """Months, quarters or years: all stamps are of one day of the month, or all of the last one."""
    last = all((time + timedelta(days=1)).month != time.month for time in times)
    if not (last or len({(time.day, time.hour, time.minute) for time in times}) == 1):
        return None
    days = float(np.median([step.days for step in steps]))
    for name, months, low, high in (("month", 1, 28, 31), ("quarter", 3, 89, 92), ("year", 12, 365, 366)):
        if low <= days <= high:
            offset = (12 * times[0].year + times[0].month - 1) % months

            def place(stamp: str, months: int = months, offset: int = offset) -> int | None:
                time = parse(stamp, day_first)
                if time is None or (12 * time.year + time.month - 1 - offset) % months:
                    return None
                return (12 * time.year + time.month - 1 - offset) // months

            return Frequency(name, SEASONS[name], place)
    return None


def _of_seconds(times: Sequence[datetime], steps: Sequence[timedelta], day_first: bool) -> Frequency:
    """A fixed number of seconds, the commonest; of days without any weekend, business days."""
    step = int(Counter(step.total_seconds() for step in steps).most_common(1)[0][0]) or 1
    origin = Counter(_seconds(time) % step for time in times).most_common(1)[0][0]

    def place(stamp: str) -> int | None:
        time = parse(stamp, day_first)
        if time is None or (_seconds(time) - origin) % step:
            return None
        return (_seconds(time) - origin) // step

    def business(stamp: str) -> int | None:
        time = parse(stamp, day_first)
        if time is None or time.weekday() >= WEEKEND:
            return None
        return int(np.busday_count("1970-01-01", time.date().isoformat()))

    if step == 86400 and len(times) > 10 and all(time.weekday() < WEEKEND for time in times):
        return Frequency("business day", SEASONS["business day"], business)
    if step in SECONDS:
        return Frequency(SECONDS[step], SEASONS[SECONDS[step]], place)
    a_day = 86400 // step if step < 86400 and 86400 % step == 0 else 0
    name = f"{step // 60} minutes" if step % 60 == 0 and step < 86400 else f"{step} seconds"
    name = f"{step // 86400} days" if step % 86400 == 0 else name
    return Frequency(name, (a_day, 7 * a_day) if a_day else (), place)


def _seconds(time: datetime) -> int:
    return int((time - datetime(1970, 1, 1)).total_seconds())
