"""Parse time stamps. A reading is one interpretation of a column: 3/4/2024 may be read as 3 April or as 4 March."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

YEARS = (1600, 2199)
MONTH = "(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
CLOCK = r"\d{1,2}(?::\d\d){1,2}(?:[.,]\d{1,9})?(?:\s*[ap]\.?m\.?)?|\d{1,2}\s*[ap]\.?m\.?"
ZONE = r"\s*(z|utc|gmt|[+-]\d\d:?(?:\d\d)?)"
PARTS = (  # weekday, date, time of day, zone, and the end of an interval, such as in 10:00 - 11:00
    r"(?s)^(?:(?:mo|tu|di|we|mi|th|do|fr|sa|su|so)(?!ek)[a-z]*[., ]+)?"
    rf"(.*?)(?:(?:t|[ ,]\s*)({CLOCK})(?:{ZONE})?)?(?:\s+(?:[-–]|to|bis)\s+\d.*|/\d{{4}}-.*)?$"
)
ISO = r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?"
FORMATS = [  # of strptime, for dates with "-" between all parts, and three letters for a month
    *("%Y-%m-%d", "%d/%m/%Y", "%m/%d/%Y", "%d/%m/%y", "%m/%d/%y", "%y/%m/%d"),
    *("%d %b %Y", "%d %b %y", "%b %d %Y", "%b %d %y", "%Y %b %d"),
    *("%b %Y", "%Y %b", "%b %y", "%Y-%m", "%m/%Y"),
    *("q-%Y-%m", "q-%y-%m", "w-%G-%V-%u"),  # see ``_normalised``
]
SAMPLE_CELLS = 100  # number of cells on which each format is tried first
NUMBERS: dict[str, tuple[Any, str, tuple[int, int]]] = {  # unit, first day and possible years of numbers
    "seconds since 1970": ("s", "unix", (1979, 2099)),
    "milliseconds since 1970": ("ms", "unix", (1979, 2099)),
    "microseconds since 1970": ("us", "unix", (1979, 2099)),
    "nanoseconds since 1970": ("ns", "unix", (1979, 2099)),
    "Excel dates": ("D", "1899-12-30", (1949, 2119)),
}


@dataclass(frozen=True)
class Reading:
    """One interpretation of the cells of a column as time stamps.

    Attributes:
        label: name of the format.
        times: datetime64[us]; NaT where a cell is not a time stamp.
        remark: a text about the time zone, or "".
        names: the columns with the cells.
    """

    label: str
    times: pd.Series
    remark: str = ""
    names: Sequence[str] = ()


def readings(cells: pd.Series, week: bool = False, share: float = 0.8) -> list[Reading]:
    """Return the distinct readings that fit the most cells of a column of texts; [] if they fit less than ``share``.

    Cells are NaN if they are missing. ``week``: read 2024-05 and 202405 as a week, not as a month.
    """
    known = cells.dropna()
    if len(known) and known.str.fullmatch(ISO).all():
        times = pd.to_datetime(known, format="ISO8601", errors="coerce").astype("datetime64[us]")
        return [Reading("%Y-%m-%d", times.reindex(cells.index))]
    codes, unique = pd.factorize(known)
    texts = pd.Series(unique, dtype="str").str.lower().str.replace(r"\s+", " ", regex=True).str.strip()
    sample = _split(texts.iloc[:: len(texts) // SAMPLE_CELLS + 1], week)["date"]
    shapes = {*map(_shape, sample.dropna())}  # because each attempt with a format takes a millisecond
    likely = [label for label in FORMATS if _shape(pd.Timestamp(0).strftime(label)) in shapes
              and _parsed(sample, label).notna().mean() > share / 2]  # fmt: skip
    if not likely:
        return []
    parts = _split(texts, week)
    clock = times_of_day(parts["clock"]).mask(parts["clock"].isna(), pd.Timedelta(0))
    results = []
    for label in likely:
        stamps = _parsed(parts["date"], label)
        stamps = stamps + clock if "%d" in label else stamps.mask(parts["clock"].notna())
        results.append(_reading(label, stamps, parts["zone"]))
    counts = [int(own.times.notna().sum()) for own in results]
    results = [own for own, count in zip(results, counts, strict=True) if count == max(counts) >= share * len(texts)]
    if texts.str.contains(r"^\D*\d\d?\.").any() and any(own.label[:3] == "%d/" for own in results):
        results = [own for own in results if own.label[:3] not in ("%m/", "%y/")]  # with dots, the day comes first
    distinct = {own.times.to_numpy().tobytes(): own for own in reversed(results)}
    return [
        replace(own, times=pd.Series(own.times.to_numpy()[codes], known.index).reindex(cells.index))
        for own in reversed(distinct.values())
    ]


def _shape(date: str) -> str:
    """Return a date with 0 in place of each number, and a in place of each word."""
    return re.sub("[a-z]+", "a", re.sub(r"\d+", "0", re.sub("[/ ]", "-", date.lower())))


def _parsed(dates: pd.Series, label: str) -> pd.Series:
    times = pd.to_datetime(dates, format=re.sub("[/ ]", "-", label), errors="coerce").astype("datetime64[us]")
    return times.where(times.dt.year.between(*YEARS))


def _split(texts: pd.Series, week: bool) -> pd.DataFrame:
    """Return the normalised date, the time of day and the zone of each text."""
    parts = texts.str.extract(PARTS).set_axis(["date", "clock", "zone"], axis=1).reset_index(drop=True)
    codes, dates = pd.factorize(parts["date"])
    return parts.assign(date=pd.Series([_normalised(date, week) for date in dates], dtype="str").to_numpy()[codes])


def _reading(label: str, times: pd.Series, zones: pd.Series) -> Reading:
    """Return a reading with times in UTC. Beside times with a zone, a time without a zone becomes NaT.

    If all times are midnights in their zone, the zone is ignored. With daylight saving time, these midnights would not
    all be 24 hours apart in UTC.
    """
    known = times.dropna()
    if zones.reindex(known.index).isna().all() or (known == known.dt.floor("D")).all():
        return Reading(label, times.astype("datetime64[us]"))
    texts = zones.str.replace("z|utc|gmt", "+00", regex=True).str.replace(":", "", regex=False).str.ljust(5, "0")
    utc = times - pd.to_timedelta(texts.str[:3] + ":" + texts.str[3:] + ":00")
    remark = "time stamps with a zone are converted to UTC; for local days, write local times without a zone"
    return Reading(label, utc.astype("datetime64[us]"), remark)


def _normalised(date: str, week: bool) -> str:
    """Return a date with three-letter months, and "-" between all its parts.

    A quarter is written as q, the year and the first month. A week is written as w, the year, the week and its day 1.
    """
    text = re.sub(r"^(\d{4})-?(\d\d)$", r"\1-w\2", date) if week else date
    text = re.sub(MONTH, r"\1", text)
    text = re.sub(r"^(\d{4})(\d\d)(\d\d)$", r"\1-\2-\3", text)
    words, numbers = re.findall("[a-z]+", text), sorted(re.findall(r"\d+", text), key=len, reverse=True)
    letter = words[0].removeprefix("k")[0] if len(words) == 1 and len(numbers) == 2 and words[0] != "k" else ""
    if letter == "q" and len(numbers[1]) == 1:
        return f"q-{numbers[0]}-{3 * int(numbers[1]) - 2}"
    if letter == "w" and len(numbers[0]) == 4:
        return f"w-{numbers[0]}-{numbers[1]:0>2}-1"
    text = re.sub(r"(?<=\d)(?=[a-z])|(?<=[a-z])(?=\d)", "-", text)
    return re.sub(r"^-|-$", "", re.sub(r"[-/.,_ '–]+", "-", text))


def times_of_day(clocks: pd.Series) -> pd.Series:
    """Return the times of day as timedeltas; NaT for other texts."""
    texts = clocks.astype("str").str.lower().str.replace(",", ".", regex=False)
    texts = texts.str.replace(r"([ap])\.?m\.?$", r"\1m", regex=True)
    texts = "1970-01-01 " + texts.where(texts.str.fullmatch(CLOCK))
    return (pd.to_datetime(texts, format="mixed", errors="coerce") - pd.Timestamp(0)).astype("timedelta64[us]")


def with_format(cells: pd.Series, pattern: str) -> Reading:
    """Read cells in a strptime format. Raises ValueError if the format is invalid, or has a day but no year."""
    if "%Z" in pattern:
        raise ValueError("names of time zones are not supported; use %z for offsets such as +0100, or omit the format")
    if re.search("%[djUW]", pattern) and not re.search("%[yYGcx]", pattern):
        raise ValueError
    texts, zones = cells, pd.Series(dtype="str")
    if "%z" in pattern:
        texts = cells.str.lower()
        texts, zones = texts.str.replace(ZONE + "$", "", regex=True), texts.str.extract(ZONE + "$")[0]
    times = pd.to_datetime(texts, format=pattern.replace("%z", "").strip(), errors="coerce")
    return _reading(pattern, times, zones)


def numeric_readings(values: np.ndarray) -> list[Reading]:
    """Return a reading for each time stamp format that fits all numbers. ``values`` has NaN for other cells."""
    known = (cells := pd.Series(values)).dropna()
    if not len(known) or known.min() < 1000 or known.max() >= 2**63:
        return []
    found = {
        label: (pd.to_datetime(known, unit=unit, origin=origin, errors="coerce"), years)
        for label, (unit, origin, years) in NUMBERS.items()
    }
    digits = {len(str(int(number))) for number in (known.min(), known.max())}
    if len(digits) == 1 and digits < {4, 6, 8, 10, 12, 14} and (known % 1 == 0).all():
        pattern = "%Y%m%d%H%M%S"[: digits.pop() - 2]  # the year has four digits, the other parts have two
        found[pattern] = pd.to_datetime(known.astype("int64").astype("str"), format=pattern, errors="coerce"), YEARS
    return [
        Reading(label, times.astype("datetime64[us]").reindex(cells.index))
        for label, (times, years) in found.items()
        if times.dt.year.between(*years).all()
    ]


def are_times(cells: pd.Series) -> pd.Series:
    """Return whether each text is a time stamp by itself. Plain numbers such as 2024 are not."""
    texts = cells.where(cells.str.contains(r"\d") & ~cells.str.fullmatch(r"[-+]?[\d,' ]*\.?\d*"))
    return pd.DataFrame([own.times.notna() for own in readings(texts, share=0)], columns=cells.index).any()
