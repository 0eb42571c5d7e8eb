"""Parse time stamps. A reading is one interpretation of a column: 3/4/2024 may be read as 3 April or as 4 March."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from app.tables.numbers import MISSING, is_plain, written

YEARS = (1600, 2199)
MONTHS = {name: name for name in ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]}
MONTHS |= {"mär": "mar", "mrz": "mar", "mai": "may", "okt": "oct", "dez": "dec", "jän": "jan"}  # German
MONTH = re.compile(rf"({'|'.join(MONTHS)})[a-zä]*")
_WEEKDAY = (
    r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|satur|sat|sun)(?:day)?|(?:mon|diens|donners|frei|sams|sonn)tag|"
    r"mittwoch|mo|di|mi|do|fr|sa|so)\.?[ ,]+"
)
_CLOCK = (
    r"(?P<H>\d{1,2})(?:[:h](?P<M>\d\d)(?::(?P<S>(?:\d\d(?:[.,]\d{1,9})?)?))?|\.(?P<M2>\d\d)\.(?P<S2>\d\d)|(?=\s*[ap]\.?m|h$))"
    r"\s*(?:(?P<ap>[ap])\.?m\.?|h|uhr)?"
)
CLOCK = re.compile(_CLOCK)
_ZONE = r"(?P<zone>z|utc|gmt|[+-]\d\d:?(?:\d\d)?)"
CLOCK_START = re.compile(r"(?:t|[ ,]\s*)(?=\d{1,2}(?:[:h]\d\d|\s*[ap]\.?m))")
TIME_OF_DAY = rf"^{_CLOCK}\s*{_ZONE}?(?:\s+(?:[-–]|to|bis)\s+.*)?$"
BESIDE_DATE = re.compile(rf"^{_WEEKDAY}|\s*(?:z|utc|gmt)$|\s+(?:[-–]|to|bis)\s+\d{{1,4}}[-/.:].*$")
ISO = r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?"
# (label, period) of the formats of strptime. All separators are written as "-", and months as three letters.
FORMATS = {
    **dict.fromkeys(("%Y-%m-%d", "%Y%m%d", "%d/%m/%Y", "%m/%d/%Y", "%d/%m/%y", "%m/%d/%y", "%y/%m/%d"), ""),
    **dict.fromkeys(("%d %b %Y", "%d %b %y", "%b %d %Y", "%b %d %y", "%Y %b %d"), ""),
    **dict.fromkeys(("%b %Y", "%Y %b", "%b %y", "%y %b", "%Y-%m", "%m/%Y", "%m/%y", "%y/%m"), "month"),
}
NO_YEAR = ("%d %b", "%b %d", "%d/%m", "%m/%d")
# (label, period, pattern) of other formats, with the year, the number of the period, and perhaps the weekday
_Q = r"q(?:tr|uarter|uartal)?"
PERIODS = [
    ("year and quarter", "quarter", rf"(?P<year>\d{{4}})-{_Q}-(?P<number>[1-4])"),
    ("quarter and year", "quarter", rf"{_Q}-(?P<number>[1-4])-(?P<year>\d{{4}}|\d\d)"),
    ("quarter and year", "quarter", rf"(?P<number>[1-4])-{_Q}-(?P<year>\d{{4}}|\d\d)"),
    ("year and half", "half-year", r"(?P<year>\d{4})-[hs]-(?P<number>[12])"),
    ("half and year", "half-year", r"[hs]-(?P<number>[12])-(?P<year>\d{4})"),
    ("year, ISO week and day", "", r"(?P<year>\d{4})-w-(?P<number>\d\d?)-(?P<day>[1-7])"),
    ("year and ISO week", "week", r"(?P<year>\d{4})-w-(?P<number>\d\d?)"),
    ("ISO week and year", "week", r"w-(?P<number>\d\d?)-(?P<year>\d{4})"),
    ("year and ISO week", "week", r"(?P<year>\d{4})-(?P<number>\d\d)"),
    ("two years", "year", r"(?P<year>\d{4})-(?:\d\d)?(?P<next>\d\d)"),
]
COMPACT = re.compile(r"^(\d{8})[t ]?(\d\d)(\d\d)(\d\d)?$")  # a date and a time of day without separators
SAMPLE_CELLS = 100  # number of cells on which each format is tried first


@dataclass(frozen=True)
class Reading:
    """One interpretation of the cells of a column as time stamps.

    Attributes:
        label: name of the format.
        period: "month", "quarter", "half-year", "week" or "year" if the cells are such periods, "step" if they count
            steps, otherwise "".
        times: local times datetime64; NaT where a cell is not a time stamp.
        offsets: timedeltas east of UTC, NaT for cells without a time zone; None if no cell has a zone.
    """

    label: str
    period: str
    times: pd.Series
    offsets: pd.Series | None = None

    @property
    def same(self) -> tuple[str, bytes]:
        """A key that is equal for equal readings."""
        return self.period, self.times.to_numpy().tobytes()


def readings(cells: pd.Series, missing: pd.Series, week: bool = False) -> list[Reading]:
    """Return the plausible, distinct readings that fit the most cells of a column of texts or dates.

    If these readings fit less than 80 % of the cells, return []. ``missing``: bool for each cell. ``week``: read
    2024-05 as a week, not as a month.
    """
    known = cells[~missing]
    if not len(known):
        return []
    typed = (
        known.map(lambda cell: isinstance(cell, datetime.date)) if known.dtype == object else known.dtype.kind == "M"
    )
    if isinstance(known.dtype, pd.DatetimeTZDtype) or np.any(typed):
        return _typed(cells, known[typed] if known.dtype == object else known, len(known))
    texts = known if isinstance(known.dtype, pd.StringDtype) else known.astype(str)
    if texts.iloc[:SAMPLE_CELLS].str.fullmatch(ISO).all() and texts.str.fullmatch(ISO).all():
        times = pd.to_datetime(texts, format="ISO8601", errors="coerce").astype("datetime64[us]")
        results = [Reading("%Y-%m-%d", "", times)]
    else:
        codes, unique = pd.factorize(texts)
        results = [
            Reading(own.label, own.period, _spread(own.times, codes, texts.index),
                    None if own.offsets is None else _spread(own.offsets, codes, texts.index))
            for own in parsed(pd.Series(unique), sample=True)
        ]  # fmt: skip
    most = max((int(own.times.notna().sum()) for own in results), default=0)
    if most < 0.8 * len(known):
        return []
    results = _plausible([own for own in results if own.times.notna().sum() == most], texts, week)
    return [
        Reading(own.label, own.period, own.times.reindex(cells.index), own.offsets if own.offsets is None else
                own.offsets.reindex(cells.index)) for own in {own.same: own for own in reversed(results)}.values()
    ][::-1]  # fmt: skip


def _spread(values: pd.Series, codes: np.ndarray, index: pd.Index) -> pd.Series:
    return pd.Series(values.to_numpy()[codes], index)


def _plausible(results: list[Reading], texts: pd.Series, week: bool) -> list[Reading]:
    labels = {own.label for own in results}
    omitted: set[str] = set()
    if texts.str.contains(".", regex=False).any():  # with dots, the day comes first
        omitted |= {"%m/%d/%Y"} if "%d/%m/%Y" in labels else set()
        omitted |= {"%m/%d/%y", "%y/%m/%d"} if "%d/%m/%y" in labels else set()
    if "%b %y" in labels:  # Jan-24 is rarely 24 January without a year
        omitted.add("%b %d without a year")
    if {"%Y-%m", "year and ISO week"} <= labels:
        omitted |= {"%Y-%m", "two years"} if week else {"year and ISO week"}
    return [own for own in results if own.label not in omitted]


def parsed(texts: pd.Series, sample: bool = False) -> list[Reading]:
    """Return a reading of distinct texts for each format that fits at least one of them.

    ``sample``: try each format on SAMPLE_CELLS dates, and skip it if it fits less than half of them.
    """
    lower = [COMPACT.sub(r"\1 \2:\3:\4", text) if text[:8].isdigit() else text for text in texts.str.lower().tolist()]
    pieces = [CLOCK_START.split(text, maxsplit=1) for text in lower]
    codes, unique = pd.factorize(np.array([own[0] for own in pieces], dtype=object))
    dates = pd.Series([_normalised(date) for date in unique], dtype=object)
    clock_codes, clocks = pd.factorize(np.array([own[1] if len(own) > 1 else "0h" for own in pieces], dtype=object))
    parts = pd.Series(clocks, dtype=object).str.extract(TIME_OF_DAY)
    clock = _time_of_day(parts).to_numpy()[clock_codes]
    timed = np.array([len(own) > 1 for own in pieces])
    offsets = None
    zone = parts["zone"].dropna()
    if len(zone):
        digits = zone.str.replace(r"^(z|utc|gmt)$", "+00", regex=True).str.replace(":", "").str.ljust(5, "0")
        minutes = digits.str[1:3].astype(int) * 60 + digits.str[3:5].astype(int)
        minutes *= np.where(digits.str[0] == "-", -1, 1)
        by_clock = pd.to_timedelta(minutes.reindex(parts.index), unit="min")
        offsets = pd.Series(by_clock.to_numpy()[clock_codes], texts.index)
    trial = dates.iloc[:: max(1, len(dates) // SAMPLE_CELLS)] if sample else dates
    results = []
    for label, period, pattern, read in READERS:
        if sum(map(bool, map(pattern.fullmatch, trial))) < (max(1, 0.5 * len(trial)) if sample else 1):
            continue
        times = read(dates)
        micro = times.where(times.dt.year.between(*YEARS)).to_numpy().astype("datetime64[us]")
        stamps = pd.Series(micro[codes] + clock, texts.index).astype("datetime64[us]")
        if period or "without" in label:
            stamps = stamps.mask(timed)
        results.append(Reading(label, period, stamps, offsets))
    return [own for own in results if own.times.notna().any()]


def _normalised(date: Any) -> str:
    """Return a date with three-letter months, no ordinals, and "-" between all its parts."""
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", BESIDE_DATE.sub("", date))
    text = MONTH.sub(lambda match: MONTHS[match[1]], text) if MONTH.search(text) else text
    text = re.sub(r"\b(?:kw|cw|week|wk|woche)", "w", text)
    text = re.sub(r"(?<=\d)(?=[a-zä])|(?<=[a-zä])(?=\d)", "-", text)
    return re.sub(r"^-|-$", "", re.sub(r"[-/.,_ '–]+", "-", text)).replace("-m-", "-")


def _strptime(pattern: str, prefix: str = "") -> tuple[re.Pattern[str], Callable[[pd.Series], pd.Series]]:
    pattern = re.sub("[/ ]", "-", pattern)
    shapes = {"%Y": r"\d{4}", "%y": r"\d\d", "%b": "[a-z]{3}"}
    width = r"\d\d" if pattern == "%Y%m%d" else r"\d\d?"
    shape = re.compile(re.sub("%.", lambda match: shapes.get(match[0], width), pattern))
    return shape, lambda dates: pd.to_datetime(prefix + dates, format=prefix + pattern, errors="coerce")


def _periods(period: str, pattern: str) -> tuple[re.Pattern[str], Callable[[pd.Series], pd.Series]]:
    def read(dates: pd.Series) -> pd.Series:
        parts = dates.str.extract(f"^{pattern}$")
        year = pd.to_numeric(parts["year"])
        year = year.mask(year < 69, year + 2000).mask(year.between(69, 99), year + 1900)
        if "next" in parts:
            return _assembled(year.where(pd.to_numeric(parts["next"]) == (year + 1) % 100))
        if period not in ("quarter", "half-year"):
            text = parts["year"] + "-" + parts["number"].str.zfill(2) + "-" + parts.get("day", "1")
            return pd.to_datetime(text, format="%G-%V-%u", errors="coerce")
        return _assembled(year, (pd.to_numeric(parts["number"]) - 1) * (3 if period == "quarter" else 6) + 1)

    return re.compile(pattern), read


def _assembled(year: pd.Series, month: Any = 1) -> pd.Series:
    return pd.to_datetime(pd.DataFrame({"year": year, "month": month, "day": 1}), errors="coerce")


# (label, period, shape of the normalised dates, function that reads them)
READERS = [
    *((label, period, *_strptime(label)) for label, period in FORMATS.items()),
    *((f"{label} without a year", "", *_strptime(label, "2000-")) for label in NO_YEAR),
    *((label, period, *_periods(period, pattern)) for label, period, pattern in PERIODS),
]


def _time_of_day(parts: pd.DataFrame) -> pd.Series:
    """Return the times of day as timedeltas: 0 without a time, NaT if it is impossible, such as 25:00."""
    hour = pd.to_numeric(parts["H"])
    minute = pd.to_numeric(parts["M"].fillna(parts["M2"])).fillna(0)
    second = pd.to_numeric(parts["S"].fillna(parts["S2"]).str.replace(",", "."), errors="coerce").fillna(0)
    half = parts["ap"].notna()
    valid = (minute < 60) & (second < 60) & (hour + minute / 60 + second / 3600 <= 24) & (~half | hour.between(1, 12))
    hour = hour.mask(half, hour % 12 + 12 * (parts["ap"] == "p"))
    micro = (hour * 60 + minute) * 60_000_000 + (second * 1e6).round()
    return pd.to_timedelta(micro.where(valid), unit="us")


def times_of_day(cells: pd.Series) -> pd.Series | None:
    """Return the times of day in a column as timedeltas; None if a filled cell holds no time of day with minutes."""
    texts = cells.dropna().astype(str).str.strip().str.lower()
    parts = texts.str.extract(f"^{_CLOCK}$")
    if not len(texts) or parts["M"].fillna(parts["M2"]).isna().any():
        return None
    return _time_of_day(parts).reindex(cells.index)


def _typed(cells: pd.Series, dates: pd.Series, known: int) -> list[Reading]:
    """Return the reading of dates from Excel or Parquet; [] if less than 80 % of the known cells are dates."""
    if len(dates) < 0.8 * known:
        return []
    offsets = None
    if (
        isinstance(dates.dtype, pd.DatetimeTZDtype)
        or dates.map(lambda cell: getattr(cell, "tzinfo", None)).notna().any()
    ):
        stamps = dates.map(pd.Timestamp)
        offsets = pd.to_timedelta(stamps.map(lambda stamp: stamp.utcoffset())).reindex(cells.index)
        dates = stamps.map(lambda stamp: stamp.tz_localize(None))
    times = pd.to_datetime(dates).astype("datetime64[us]").reindex(cells.index)
    return [Reading("dates", "", times, offsets)]


def with_format(cells: pd.Series, pattern: str) -> Reading:
    """Read cells in a strptime format. Raises ValueError if the format is invalid."""
    texts = cells.map(lambda cell: str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell))
    texts = texts.mask(cells.isna())
    times, offsets = pd.to_datetime(texts, format=pattern, errors="coerce", utc="%z" in pattern), None
    if "%z" in pattern:
        zones = [stamp.utcoffset() for stamp in (pd.to_datetime(text, format=pattern) for text in texts[times.notna()])]
        offsets = pd.Series(pd.to_timedelta(zones), texts.index[times.notna()]).reindex(cells.index)
        times = times.dt.tz_localize(None) + offsets
    period = "" if re.search("%[djuw]", pattern) else "month" if re.search("%[mbB]", pattern) else "year"
    return Reading(pattern, period, times.astype("datetime64[us]"), offsets)


def kinds(cells: Iterable[Any]) -> dict[Any, str]:
    """Return the kind of each cell.

    The kinds are ``.`` for a missing cell, ``n`` for a number, ``t`` for a date or period, ``c`` for a time of day, and
    ``s`` for anything else.
    """
    result: dict[Any, str] = {}
    texts = []
    for cell in set(cells):
        if isinstance(cell, datetime.date | datetime.time):
            result[cell] = "t" if isinstance(cell, datetime.date) else "c"
        elif not isinstance(cell, str):
            result[cell] = "." if pd.isna(cell) else "s" if isinstance(cell, bool) else "n"
        elif cell.lower() in MISSING:
            result[cell] = "."
        elif CLOCK.fullmatch(cell.lower()) and ":" in cell:
            result[cell] = "c"
        else:
            result[cell] = "n" if written(cell) else "s"
            if not is_plain(cell) and re.search(r"\d", cell) and not re.fullmatch(r"[-+]?[\d,' ]*\.?\d*", cell):
                texts.append(cell)
    if texts:
        unique = pd.Series(texts, dtype=object)
        for own in parsed(unique):
            if "without" not in own.label:
                result |= dict.fromkeys(unique[own.times.notna()], "t")
    return result


# --- numbers that may be time stamps

# (label, period, format, smallest, largest): a format of strptime for the digits, or the unit of a time since 1970
NUMERIC = [
    ("years", "year", "%Y", *YEARS),
    ("year and month", "month", "%Y%m", 190001, 210012),
    ("year and ISO week", "week", "%G%V%u", 190001, 210053),
    ("year, month and day", "", "%Y%m%d", 19000101, 21001231),
    ("year, month, day and hour", "", "%Y%m%d%H", 1900010100, 2100123123),
    ("year, month, day, hour and minute", "", "%Y%m%d%H%M", 190001010000, 210012312359),
    ("year, month, day and time", "", "%Y%m%d%H%M%S", 19000101000000, 21001231235959),
    ("seconds since 1970", "", "s", 3e8, 4.1e9),
    ("milliseconds since 1970", "", "ms", 3e11, 4.1e12),
    ("microseconds since 1970", "", "us", 3e14, 4.1e15),
    ("nanoseconds since 1970", "", "ns", 3e17, 4.1e18),
    ("Excel dates", "", "D", 18000, 80000),
]


def numeric_readings(values: pd.Series, week: bool = False) -> list[Reading]:
    """Return a reading for each time stamp format that fits all numbers. ``values`` has NaN for other cells.

    ``week``: read 202405 as a week, not as a month. If a number cannot be a month, all numbers are read as weeks.
    """
    known = values.dropna()
    results: list[Reading] = []
    for label, period, pattern, low, high in NUMERIC:
        if not len(known) or known.min() < low or known.max() > high:
            continue
        if not pattern.startswith("%"):
            micro = (known * {"s": 1e6, "ms": 1e3, "us": 1, "ns": 1e-3, "D": 86_400e6}[pattern]).round().astype("int64")
            times = pd.to_datetime(micro, unit="us", origin="1899-12-30" if pattern == "D" else "unix")
        elif (known % 1 != 0).any() or (pattern == "%Y%m" and week):
            continue
        else:
            digits = known.astype("int64").astype(str) + ("1" if pattern == "%G%V%u" else "")
            times = pd.to_datetime(digits, format=pattern, errors="coerce")
        if times.notna().all() and not (pattern == "%G%V%u" and results):
            results.append(Reading(label, period, times.astype("datetime64[us]").reindex(values.index)))
    return results
