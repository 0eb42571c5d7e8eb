"""Time stamps of a table: their format, the time step between rows and the season they suggest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np

from app.tasks.forecasting import MAX_SEASON
from training.data.datasets import DataError

FORMATS = ("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%Y/%m/%d", "%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M:%S")
SLASH_FORMATS = {True: "%d/%m/%Y", False: "%m/%d/%Y"}  # by whether the day comes first
NAMED_STEPS = {1: "second", 60: "minute", 3600: "hour", 86400: "day", 7 * 86400: "week"}  # by seconds
SEASONS = {"second": (60,), "minute": (60, 1440), "hour": (24, 168), "day": (7, 365), "week": (52,), "month": (12,)}
SEASONS |= {"quarter": (4,), "year": (), "business day": (5,)}
MIN_AUTOCORRELATION = 0.3  # of a season
MIN_PROMINENCE = 0.1  # of a season over half a season before and after; a random walk has none
SATURDAY = 5  # datetime.weekday()


@dataclass(frozen=True)
class Frequency:
    """The time step of a table.

    ``seasons``: usual season lengths, in steps. ``position``: a time stamp -> its index on the grid of steps; None for
    a time stamp off the grid or text that is no time stamp.
    """

    name: str
    seasons: tuple[int, ...]
    position: Callable[[str], int | None]


def parse(stamp: str, day_first: bool = True) -> datetime | None:
    """A time stamp as a naive UTC time, or None.

    Formats: ISO 8601; month 2020-01; quarter 2020Q1; year 2020; seconds or milliseconds since 1970; 31.12.2020;
    2020/12/31; and 31/12/2020 or, with ``day_first=False``, 12/31/2020.
    """
    if re.match(r"0000|\d{17}", stamp):  # year 0, or a number too large for a time
        return None
    if match := re.fullmatch(r"(\d{4})-?[Qq]([1-4])", stamp):
        return datetime(int(match[1]), 3 * int(match[2]) - 2, 1)
    if match := re.fullmatch(r"(\d{4})[-/.](\d{1,2})", stamp):
        return datetime(int(match[1]), int(match[2]), 1) if 1 <= int(match[2]) <= 12 else None
    if re.fullmatch(r"1[6-9]\d\d|2[01]\d\d", stamp):
        return datetime(int(stamp), 1, 1)
    if re.fullmatch(r"\d{8,}", stamp) and not re.fullmatch(r"(19|20)\d{6}", stamp):  # Unix time
        seconds = int(stamp) / (1000 if len(stamp) > 11 else 1)
        return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None) if seconds < 1e11 else None
    try:
        time = datetime.fromisoformat(stamp)
        return time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time
    except ValueError:
        pass
    slash_format = SLASH_FORMATS[day_first]
    for pattern in (*FORMATS, slash_format, f"{slash_format} %H:%M", f"{slash_format} %H:%M:%S"):
        try:
            return datetime.strptime(stamp, pattern)
        except ValueError:
            continue
    return None


def is_stamp(cell: str) -> bool:
    """Whether a cell is a time stamp, with the day or the month first."""
    return (parse(cell) or parse(cell, False)) is not None


def frequency(columns: Sequence[Sequence[str]], path: Path) -> Frequency:
    """The time step shared by all series of a table; ``columns``: the time stamps of each series.

    Raises:
        DataError: no series has two time stamps, or dates such as 3/4/2020 are ambiguous.
    """
    stamps = [stamp for column in columns for stamp in column]
    day_first = _day_first(stamps, path)
    times_by_series = [sorted({time for stamp in column if (time := parse(stamp, day_first))}) for column in columns]
    steps = [later - earlier for times in times_by_series for earlier, later in pairwise(times)]
    if not steps:
        raise DataError(
            f"{path}: no series has two different time stamps, so the time step is unknown; the first time stamp is "
            f"{stamps[0]!r}"
        )
    all_times = [time for times in times_by_series for time in times]
    return _calendar_step(all_times, steps, day_first) or _fixed_step(all_times, steps, day_first)


def autocorrelation(values: np.ndarray, lag: int) -> float:
    """The autocorrelation of linearly detrended values [T] at a lag; 0 for constant values."""
    steps = np.arange(len(values))
    residual = values - np.polyval(np.polyfit(steps, values, 1), steps)
    variance = float((residual**2).mean())
    if variance <= 1e-12 * float((values**2).mean() + 1):
        return 0.0
    return float((residual[lag:] * residual[:-lag]).mean()) / variance


def season(series: Sequence[np.ndarray], frequency: Frequency | None) -> int:
    """The season length of the series, in steps; 1 without a season.

    Candidates are the usual seasons of the frequency; without one, all lags from 2 to MAX_SEASON. The strongest
    autocorrelation, averaged over up to 50 series, wins.
    """
    candidates = [lag for lag in (frequency.seasons if frequency else range(2, 401)) if lag <= MAX_SEASON]
    known_values = [values[~np.isnan(values)] for values in series[:50]]

    def strength(lag: int, candidate: int) -> float:
        correlations = [autocorrelation(values, lag) for values in known_values if len(values) >= 3 * candidate]
        return float(np.mean(correlations)) if correlations else -1.0

    strengths = {lag: strength(lag, lag) for lag in candidates}
    if frequency:
        off_season = {lag: [strength(lag + sign * (lag // 2), lag) for sign in (-1, 1)] for lag in candidates}
        strengths = {
            lag: value for lag, value in strengths.items() if value > np.mean(off_season[lag]) + MIN_PROMINENCE
        }
    else:  # only local maxima: slow changes correlate at every short lag
        strengths = {
            lag: value
            for lag, value in strengths.items()
            if value > strengths.get(lag - 1, 1.0) and value >= strengths.get(lag + 1, -1.0)
        }
    best = max(strengths.values(), default=0.0)
    if best <= MIN_AUTOCORRELATION:
        return 1
    return min(lag for lag, value in strengths.items() if value > 0.9 * best)  # multiples of a season are as strong


def _day_first(stamps: Sequence[str], path: Path) -> bool:
    """Whether 3/4/2020 is 3 April. Raises DataError if no date of the table decides."""
    matches = [match for stamp in stamps if (match := re.match(r"(\d{1,2})/(\d{1,2})/\d{4}", stamp))]
    if any(int(match[1]) > 12 for match in matches):
        return True
    if any(int(match[2]) > 12 for match in matches) or not matches:
        return not matches
    first, second = {int(match[1]) for match in matches}, {int(match[2]) for match in matches}
    if min(len(first), len(second)) == 1 and max(len(first), len(second)) > 1:  # the constant one is the day: monthly
        return len(first) == 1
    raise DataError(
        f"{path}: the date {matches[0][0]!r} is ambiguous: day/month or month/day; write dates as 2020-01-31"
    )


def _calendar_step(times: Sequence[datetime], steps: Sequence[timedelta], day_first: bool) -> Frequency | None:
    """Months, quarters or years, if all times fall on the same day of the month or all on its last day; else None."""
    month_ends = all((time + timedelta(days=1)).month != time.month for time in times)
    if not (month_ends or len({(time.day, time.hour, time.minute) for time in times}) == 1):
        return None
    days = float(np.median([step.days for step in steps]))
    for name, months, low, high in (("month", 1, 28, 31), ("quarter", 3, 89, 92), ("year", 12, 365, 366)):
        if low <= days <= high:
            offset = (12 * times[0].year + times[0].month - 1) % months

            def position(stamp: str, months: int = months, offset: int = offset) -> int | None:
                time = parse(stamp, day_first)
                if time is None or (12 * time.year + time.month - 1 - offset) % months:
                    return None
                return (12 * time.year + time.month - 1 - offset) // months

            return Frequency(name, SEASONS[name], position)
    return None


def _fixed_step(times: Sequence[datetime], steps: Sequence[timedelta], day_first: bool) -> Frequency:
    """The most common step in seconds; business days for daily times without a weekend."""
    step = int(Counter(step.total_seconds() for step in steps).most_common(1)[0][0]) or 1
    origin = Counter(_seconds(time) % step for time in times).most_common(1)[0][0]

    def position(stamp: str) -> int | None:
        time = parse(stamp, day_first)
        if time is None or (_seconds(time) - origin) % step:
            return None
        return (_seconds(time) - origin) // step

    def business_day(stamp: str) -> int | None:
        time = parse(stamp, day_first)
        if time is None or time.weekday() >= SATURDAY:
            return None
        return int(np.busday_count("1970-01-01", time.date().isoformat()))

    if step == 86400 and len(times) > 10 and all(time.weekday() < SATURDAY for time in times):
        return Frequency("business day", SEASONS["business day"], business_day)
    if step in NAMED_STEPS:
        return Frequency(NAMED_STEPS[step], SEASONS[NAMED_STEPS[step]], position)
    steps_per_day = 86400 // step if step < 86400 and 86400 % step == 0 else 0
    name = f"{step // 60} minutes" if step % 60 == 0 and step < 86400 else f"{step} seconds"
    name = f"{step // 86400} days" if step % 86400 == 0 else name
    return Frequency(name, (steps_per_day, 7 * steps_per_day) if steps_per_day else (), position)


def _seconds(time: datetime) -> int:
    return int((time - datetime(1970, 1, 1)).total_seconds())
