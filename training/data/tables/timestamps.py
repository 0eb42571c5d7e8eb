"""Parse time stamps. A reading is one interpretation of a column: 3/4/2024 may be read as 3 April or as 4 March."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from training.data.tables.numbers import is_missing, is_typed

_NAMES = """
1 jan january januar jänner janvier janv enero ene gennaio gen januari janeiro styczeń sty
2 feb february februar février févr fév febrero febbraio februari fevereiro fev luty lut
3 mar march märz mär mrz mars marzo maart mrt março marzec
4 apr april avril avr abril abr aprile kwiecień kwi
5 may mai mayo maggio mag mei maio maj
6 jun june juni juin junio giugno giu junho czerwiec cze
7 jul july juli juillet juil julio luglio lug julho lipiec lip
8 aug august août aou agosto ago augustus augusti sierpień sie
9 sep sept september septembre septiembre settembre set setembro wrzesień wrz
10 oct october oktober okt octobre octubre ottobre ott outubro out październik paź
11 nov november novembre noviembre novembro listopad lis
12 dec december dezember dez décembre déc diciembre dic dicembre dezembro grudzień gru
"""
MONTHS = {name: int(number) for number, *names in map(str.split, _NAMES.strip().splitlines()) for name in names}
WEEKDAYS = (
    "mon|monday|tue|tues|tuesday|wed|wednesday|thu|thur|thurs|thursday|fri|friday|sat|saturday|sun|sunday|mo|montag|di|"
    "dienstag|mi|mittwoch|do|donnerstag|fr|freitag|sa|samstag|so|sonntag"
)
ZONES = {"z": 0, "utc": 0, "gmt": 0, "wet": 0, "west": 1, "cet": 1, "cest": 2, "eet": 2, "eest": 3}
ZONES |= {"est": -5, "edt": -4, "cst": -6, "cdt": -5, "mst": -7, "mdt": -6, "pst": -8, "pdt": -7}

_MONTH = "(?P<name>" + "|".join(sorted(MONTHS, key=len, reverse=True)) + r")\.?"
_NTH = r"(?:st|nd|rd|th|\.)?"
_DAY = rf"(?P<d>\d{{1,2}}){_NTH}"
_YEAR = r"(?P<Y>\d{4})"
_YEAR2 = r"'?(?P<y>\d{2})"
_CLOCK = (
    r"(?:(?P<H>\d{1,2})[:h](?P<M>\d{2})(?::(?P<S>\d{2})(?:[.,](?P<f>\d{1,9}))?)?|(?P<H2>\d{2})(?P<M2>\d{2})(?P<S2>\d{2})?"
    r"|(?P<H3>\d{1,2})(?=\s*[ap]\.?m|h$|$))(?:\s*(?P<ap>[ap])\.?m\.?|\s?h|\s?uhr)?"
)
_ZONE = rf"(?P<z>[+-]\d{{2}}:?(?:\d{{2}})?|{'|'.join(sorted(ZONES, key=len, reverse=True))})"
_WEEK = r"(?:kw|cw|week|wk|woche|w)\.?\s*"
_AB4 = r"(?P<a>\d{1,2})(?P<s>[-/. ])(?P<b>\d{1,2})(?P=s)(?P<Y>\d{4})"
_AB2 = r"(?P<a>\d{1,2})(?P<s>[-/.])(?P<b>\d{1,2})(?P=s)'?(?P<c>\d{2})"
# (label, period, pattern, names of its groups with year, month and day). "?" means that there is no year.
# The same pattern with another order of the groups is another reading of the same cells.
_FORMATS: list[tuple[str, str, str, str]] = [
    ("%Y-%m-%d", "", rf"{_YEAR}(?P<s>[-/. ])(?P<m>\d{{1,2}})(?P=s){_DAY}", "Y m d"),
    ("%Y%m%d", "", r"(?P<Y>\d{4})(?P<m>\d{2})(?P<d>\d{2})", "Y m d"),
    ("%d/%m/%Y", "", _AB4, "Y b a"),
    ("%m/%d/%Y", "", _AB4, "Y a b"),
    ("%d/%m/%y", "", _AB2, "c b a"),
    ("%m/%d/%y", "", _AB2, "c a b"),
    ("%y/%m/%d", "", _AB2, "a b c"),
    ("%d %b %Y", "", rf"{_DAY}[-/ .,]*{_MONTH}[-/ .,]*{_YEAR}", "Y name d"),
    ("%d %b %y", "", rf"{_DAY}[-/ .,]*{_MONTH}[-/ .,]*{_YEAR2}", "y name d"),
    ("%b %d %Y", "", rf"{_MONTH}[-/ .]*{_DAY}[-/ ,.]+{_YEAR}", "Y name d"),
    ("%b %d %y", "", rf"{_MONTH}[-/ .]*{_DAY}[-/ ,.]+{_YEAR2}", "y name d"),
    ("%Y %b %d", "", rf"{_YEAR}[-/ .,]*{_MONTH}[-/ .,]*{_DAY}", "Y name d"),
    ("%b %Y", "month", rf"{_MONTH}[-/ .,_]*'?{_YEAR}", "Y name"),
    ("%Y %b", "month", rf"{_YEAR}[-/ .,_]*{_MONTH}", "Y name"),
    ("%b %y", "month", rf"{_MONTH}[-/ .,_]*{_YEAR2}", "y name"),
    ("%y %b", "month", rf"(?P<y>\d{{2}})[-/ .]*{_MONTH}", "y name"),
    ("%d %b without a year", "", rf"{_DAY}[-/ .]*{_MONTH}", "? name d"),
    ("%b %d without a year", "", rf"{_MONTH}[-/ ]+{_DAY}(?<!\d)", "? name d"),
    ("%Y-%m", "month", r"(?P<Y>\d{4})(?:[-/. ]|[-/. ]?m)(?P<m>\d{1,2})", "Y m"),
    ("%m/%Y", "month", r"(?P<m>\d{1,2})[-/. ](?P<Y>\d{4})", "Y m"),
    ("%m/%y", "month", r"(?P<a>\d{1,2})[-/](?P<b>\d{2})", "b a"),
    ("%y/%m", "month", r"(?P<a>\d{2})[-/](?P<b>\d{1,2})", "a b"),
    ("%d/%m without a year", "", r"(?P<a>\d{1,2})[-/.](?P<b>\d{1,2})\.?", "? b a"),
    ("%m/%d without a year", "", r"(?P<a>\d{1,2})[-/](?P<b>\d{1,2})", "? a b"),
    ("year and quarter", "quarter", r"(?P<Y>\d{4})[-/ _.,]*q(?:tr)?\s?(?P<q>[1-4])", "Y q"),
    ("quarter and year", "quarter", r"q(?P<q>[1-4])[-/ _.,']*(?P<Y>\d{4})", "Y q"),
    ("quarter and year", "quarter", r"q(?P<q>[1-4])[-/ _.,']*(?P<y>\d{2})", "y q"),
    ("quarter and year", "quarter", rf"(?P<q>[1-4]){_NTH}\s?q(?:tr|uarter|uartal)?[-/ _.,']*{_YEAR}", "Y q"),
    ("quarter and year", "quarter", r"(?P<q>[1-4])q[-/ _.,']*(?P<y>\d{2})", "y q"),
    ("year and half", "half-year", r"(?P<Y>\d{4})[-/ _]*[hs](?P<h>[12])", "Y h"),
    ("half and year", "half-year", r"[hs](?P<h>[12])[-/ _]*(?P<Y>\d{4})", "Y h"),
    ("year, ISO week and day", "", rf"(?P<Y>\d{{4}})[-/ _,]*{_WEEK}(?P<w>\d{{1,2}})-(?P<wd>[1-7])", "Y w"),
    ("year and ISO week", "week", rf"(?P<Y>\d{{4}})[-/ _,]*{_WEEK}(?P<w>\d{{1,2}})", "Y w"),
    ("ISO week and year", "week", rf"{_WEEK}(?P<w>\d{{1,2}})[-/ _,]*(?P<Y>\d{{4}})", "Y w"),
    ("year and ISO week", "week", r"(?P<Y>\d{4})[-/](?P<w>\d{2})", "Y w"),
    ("two years", "year", r"(?P<Y>\d{4})[-/–](?:\d\d)?(?P<next>\d{2})", "Y"),
    ("%Y", "year", r"(?P<Y>\d{4})", "Y"),
]
_TIME = rf"(?:(?:\s*[t,]\s*|\s+){_CLOCK})?\s*{_ZONE}?"
FORMATS = [
    (label, period, re.compile(pattern + (_TIME if not period and fields[0] != "?" else "")), fields)
    for label, period, pattern, fields in _FORMATS
]
CLOCK = re.compile(_CLOCK + r"|(?P<H4>\d{1,2})\.(?P<M4>\d{2})\.(?P<S4>\d{2})")
PREFIX = re.compile(rf"(?:{WEEKDAYS})\.?[ ,]+")
INTERVAL = re.compile(r"\s+(?:[-–]|to|bis)\s+(?=\d{1,4}[-/.:])")
SAMPLE_CELLS = 100  # number of cells on which each format is tried first
YEARS = (1600, 2199)
EXCEL_EPOCH = np.datetime64("1899-12-30", "s")


@dataclass(frozen=True)
class Reading:
    """One interpretation of the cells of a column as time stamps.

    ``label``: name of the format. ``period``: "month", "quarter", "half-year", "week" or "year" if the cells are such
    periods, "step" if they count steps, otherwise "". ``times``: local times datetime64, NaT where a cell is not a time
    stamp. ``offsets``: seconds east of UTC, NaN for cells without a time zone; None if no cell has a zone.
    """

    label: str
    period: str
    times: pd.Series
    offsets: pd.Series | None = None

    @property
    def count(self) -> int:
        """The number of cells that are time stamps."""
        return int(self.times.notna().sum())


def normalised(cell: str) -> str:
    """Return a cell in lower case, without a weekday before the date. For an interval, return only its beginning."""
    text = PREFIX.sub("", cell.strip().lower().replace("\xa0", " "), count=1)
    return INTERVAL.split(text, maxsplit=1)[0]


def readings(cells: pd.Series, week: bool = False) -> list[Reading]:
    """Return the readings that fit the most cells of a column of texts or dates.

    If these readings fit less than 80 % of the cells, return []. ``week``: read 2024-05 as a week, not as a month.
    """
    known = cells[[not is_missing(cell) for cell in cells]]
    if not len(known):
        return []
    typed = pd.Series([isinstance(cell, (datetime.date, np.datetime64)) for cell in known], index=known.index)
    if typed.any():
        return _typed(cells, known[typed])
    texts = {cell: normalised(cell) for cell in set(known) if isinstance(cell, str)}
    results = []
    sample = list(texts.values())[:: max(1, len(texts) // SAMPLE_CELLS)]
    for label, period, pattern, fields in FORMATS:
        if sum(pattern.fullmatch(text) is not None for text in sample) < 0.5 * len(sample):
            continue  # a format must fit 80 % of all cells, so a format that fits so few cells of the sample is skipped
        parsed = {cell: time for cell, text in texts.items() if (time := _time(text, pattern, fields))}
        if parsed:
            pairs = [parsed.get(cell, (None, None)) if isinstance(cell, str) else (None, None) for cell in cells]
            times = pd.Series([time for time, _ in pairs], index=cells.index, dtype="datetime64[us]")
            zones = pd.Series([zone for _, zone in pairs], index=cells.index, dtype="float64")
            results.append(Reading(label, period, times, zones if zones.notna().any() else None))
    return _plausible(results, known, week)


def _plausible(results: list[Reading], known: pd.Series, week: bool) -> list[Reading]:
    """Return the plausible, distinct readings that fit the most of the ``known`` cells; [] if less than 80 % fit."""
    max_count = max((reading.count for reading in results), default=0)
    if max_count < 0.8 * len(known):
        return []
    results = [reading for reading in results if reading.count == max_count]
    labels = {reading.label for reading in results}
    if any("." in cell for cell in known if isinstance(cell, str)):  # with dots, the day comes first
        for day_first, others in (("%d/%m/%Y", {"%m/%d/%Y"}), ("%d/%m/%y", {"%m/%d/%y", "%y/%m/%d"})):
            if day_first in labels:
                results = [reading for reading in results if reading.label not in others]
    if "%b %y" in labels:  # Jan-24 is rarely 24 January without a year
        results = [reading for reading in results if reading.label != "%b %d without a year"]
    if {"%Y-%m", "year and ISO week"} <= labels:
        results = [reading for reading in results if reading.label == ("year and ISO week" if week else "%Y-%m") or
                   (reading.label == "two years" and not week)]  # fmt: skip
    different: list[Reading] = []
    for reading in results:
        if not any(reading.times.equals(other.times) and reading.period == other.period for other in different):
            different.append(reading)
    return different


def _time(text: str, pattern: re.Pattern[str], fields: str) -> tuple[datetime.datetime, int | None] | None:
    """Return the local time of a normalised cell, and its seconds east of UTC if given; None if it does not fit."""
    match = pattern.fullmatch(text)
    if match is None:
        return None
    groups = match.groupdict()
    year, month, day = ([*fields.split(), "", ""])[:3]
    try:
        time = _date(groups, year, month, day)
        clock = _clock(groups)
        zone = groups.get("z")
        return (time + clock, _offset(zone) if zone else None) if clock is not None else None
    except (ValueError, OverflowError):
        return None


def _date(groups: dict[str, Any], year: str, month: str, day: str) -> datetime.datetime:
    """Return the date in the groups of a match. Raises ValueError if the date does not exist."""
    number = 2000 if year == "?" else int(groups[year])
    if year != "?" and len(groups[year]) == 2:
        number += 2000 if number < 69 else 1900  # as strptime does
    if groups.get("next") is not None and int(groups["next"]) != (number + 1) % 100:
        raise ValueError
    if month == "w":
        return datetime.datetime.fromisocalendar(number, int(groups["w"]), int(groups.get("wd") or 1))
    if month in ("q", "h"):
        return datetime.datetime(number, (3 if month == "q" else 6) * (int(groups[month]) - 1) + 1, 1)
    if not YEARS[0] <= number <= YEARS[1]:
        raise ValueError
    months = MONTHS[groups["name"]] if month == "name" else int(groups[month]) if month else 1
    return datetime.datetime(number, months, int(groups[day]) if day else 1)


def _clock(groups: dict[str, Any]) -> datetime.timedelta | None:
    """Return the time of day of a match; None if it is impossible, such as 25:00."""
    parts = [groups.get(key) or groups.get(f"{key}2") or groups.get(f"{key}4") or "0" for key in "HMS"]
    hour, minute, second = int(groups.get("H3") or parts[0]), int(parts[1]), int(parts[2])
    if groups.get("ap"):
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if groups["ap"] == "p" else 0)
    if hour > 24 or minute > 59 or second > 59 or (hour == 24 and minute + second):
        return None
    micro = int((groups.get("f") or "0").ljust(6, "0")[:6])
    return datetime.timedelta(hours=hour, minutes=minute, seconds=second, microseconds=micro)


def _offset(zone: str) -> int:
    if zone in ZONES:
        return 3600 * ZONES[zone]
    digits = zone[1:].replace(":", "").ljust(4, "0")
    return (-1 if zone[0] == "-" else 1) * (3600 * int(digits[:2]) + 60 * int(digits[2:]))


def _typed(cells: pd.Series, dates: pd.Series) -> list[Reading]:
    """Return the reading of dates from Excel or Parquet; [] if less than 80 % of the known cells are dates."""
    if len(dates) < 0.8 * sum(not is_missing(cell) for cell in cells):
        return []
    stamps = {row: pd.Timestamp(cell) for row, cell in dates.items()}
    zones = {row: int(zone.total_seconds()) for row, stamp in stamps.items() if (zone := stamp.utcoffset()) is not None}
    times = pd.Series({row: stamp.tz_localize(None) for row, stamp in stamps.items()}).reindex(cells.index)
    offsets = pd.Series(zones, dtype="float64").reindex(cells.index) if zones else None
    return [Reading("dates", "", times.astype("datetime64[us]"), offsets)]


def with_format(cells: pd.Series, pattern: str) -> Reading:
    """Read cells in a strptime format. Raises ValueError if the format is invalid."""
    texts = cells.map(lambda cell: str(int(cell) if is_typed(cell) and cell == int(cell) else cell))
    times = pd.to_datetime(texts, format=pattern, errors="coerce", utc="%z" in pattern)
    zones = None
    if "%z" in pattern:
        known = texts[times.notna()]
        zones = known.map(lambda text: _zone(text, pattern)).astype("int64").reindex(cells.index, fill_value=0)
        times = times.dt.tz_localize(None) + pd.to_timedelta(zones, unit="s")
    period = "" if re.search("%[djuw]", pattern) else "month" if re.search("%[mbB]", pattern) else "year"
    return Reading(pattern, period, times.astype("datetime64[us]"), zones)


def _zone(text: str, pattern: str) -> int:
    """Return the offset from UTC in seconds of a cell that fits a strptime format with %z."""
    try:
        offset = datetime.datetime.strptime(text, pattern).utcoffset()
    except ValueError:  # pandas also reads fractions of a second with nine digits, but is ten times as slow
        offset = pd.to_datetime(text, format=pattern).utcoffset()
    return int((offset or datetime.timedelta()).total_seconds())


@cache
def is_time(cell: Any) -> bool:
    """Return whether a cell is a date, or a period such as a month. Plain numbers such as 2024 do not count."""
    if isinstance(cell, datetime.date):
        return True
    if not isinstance(cell, str) or (
        re.fullmatch(r"\s*[-+]?[\d.,' ]*\s*", cell) and not re.fullmatch(r"\s*\d{1,2}\.\d{1,2}\.(\d{4}|\d{2})\s*", cell)
    ):
        return False
    text = normalised(cell)
    return any(_time(text, pattern, fields) for _, _, pattern, fields in FORMATS if fields[0] != "?")


def is_clock(cell: Any) -> bool:
    """Return whether a cell is a time of day with minutes."""
    if isinstance(cell, str):
        match = CLOCK.fullmatch(cell.strip().lower())
        return match is not None and (match["H"] or match["H4"]) is not None and _clock(match.groupdict()) is not None
    return isinstance(cell, datetime.time)


# --- numbers that may be time stamps


def _years(x: np.ndarray) -> np.ndarray | None:
    return _dates(x, np.full(len(x), 1), np.full(len(x), 1)) if _within(x, *YEARS) else None


def _year_months(x: np.ndarray) -> np.ndarray | None:
    return _dates(x // 100, x % 100, np.full(len(x), 1)) if _within(x, 190001, 210012) else None


def _year_weeks(x: np.ndarray) -> np.ndarray | None:
    weeks = x % 100
    if not _within(x, 190001, 210053) or not _within(weeks, 1, 53):
        return None
    try:
        parts = zip((x // 100).astype(int), weeks.astype(int), strict=True)
        days = [datetime.datetime.fromisocalendar(year, week, 1) for year, week in parts]
    except ValueError:  # week 53 of a year with 52 weeks
        return None
    return np.array(days, "datetime64[us]")


def _year_month_days(x: np.ndarray) -> np.ndarray | None:
    return _dates(x // 10000, x // 100 % 100, x % 100) if _within(x, 19000101, 21001231) else None


def _with_clock(digits: int) -> Callable[[np.ndarray], np.ndarray | None]:
    def read(x: np.ndarray) -> np.ndarray | None:
        days = x // 10**digits
        clock = (x - days * 10**digits) * 10 ** (6 - digits)
        hour, minute, second = clock // 10000, clock // 100 % 100, clock % 100
        dates = _year_month_days(days)
        if dates is None or not (_within(hour, 0, 23) and _within(minute, 0, 59) and _within(second, 0, 59)):
            return None
        return dates + ((hour * 60 + minute) * 60 + second).astype("int64").astype("timedelta64[s]")

    return read


def _unix(unit: str, factor: float) -> Callable[[np.ndarray], np.ndarray | None]:
    def read(x: np.ndarray) -> np.ndarray | None:
        if not _within(x, 3e8 * factor, 4.1e9 * factor):
            return None
        return np.round(x / factor * 1e6).astype("int64").astype("datetime64[us]")

    return read


def _excel(x: np.ndarray) -> np.ndarray | None:
    if not _within(x, 18000, 80000):
        return None
    return EXCEL_EPOCH.astype("datetime64[us]") + (np.round(x * 86400) * 1e6).astype("int64").astype("timedelta64[us]")


def _decimal_years(x: np.ndarray) -> np.ndarray | None:
    months = x * 12
    if not _within(x, *YEARS) or (x == np.round(x)).all():
        return None
    for shift in (0.0, 0.5):
        if (np.abs(months - shift - np.round(months - shift)) < 0.02).all():
            number = np.round(months - shift).astype(int)
            return _dates(number // 12, number % 12 + 1, np.full(len(x), 1))
    return None


def _within(x: np.ndarray, low: float, high: float) -> bool:
    return bool(len(x)) and bool(((x >= low) & (x <= high)).all())


def _dates(year: np.ndarray, month: np.ndarray, day: np.ndarray) -> np.ndarray | None:
    parts = {"year": year.astype(int), "month": month.astype(int), "day": day.astype(int)}
    times = pd.to_datetime(pd.DataFrame(parts), errors="coerce")
    return None if times.isna().any() else times.to_numpy().astype("datetime64[us]")


# (label, period, function that returns the times of numbers or None, whether all numbers must be integers)
NUMERIC: list[tuple[str, str, Callable[[np.ndarray], np.ndarray | None], bool]] = [
    ("years", "year", _years, True),
    ("year and month", "month", _year_months, True),
    ("year, month and day", "", _year_month_days, True),
    ("year, month, day and hour", "", _with_clock(2), True),
    ("year, month, day, hour and minute", "", _with_clock(4), True),
    ("year, month, day and time", "", _with_clock(6), True),
    ("seconds since 1970", "", _unix("s", 1), False),
    ("milliseconds since 1970", "", _unix("ms", 1e3), False),
    ("microseconds since 1970", "", _unix("us", 1e6), True),
    ("nanoseconds since 1970", "", _unix("ns", 1e9), True),
    ("Excel dates", "", _excel, False),
    ("decimal years", "month", _decimal_years, False),
]


def numeric_readings(cells: pd.Series, values: Iterable[float], week: bool = False) -> list[Reading]:
    """Return a ``Reading`` for each time stamp format that fits all numbers. ``values`` has NaN for other cells.

    ``week``: read 202405 as a week, not as a month. If a number cannot be a month, all numbers are read as weeks.
    """
    numbers = pd.Series(list(values), index=cells.index, dtype="float64").dropna()
    results = []
    for label, period, read, integers in NUMERIC:
        x = numbers.to_numpy()
        if integers and (x != np.round(x)).any():
            continue
        times = read(x)
        if read is _year_months and (week or times is None):
            label, period, times = "year and ISO week", "week", _year_weeks(x)
        if times is not None:
            series = pd.Series(times, index=numbers.index).reindex(cells.index)
            results.append(Reading(label, period, series.astype("datetime64[us]")))
    return results
