"""Parse time stamps. A reading is one interpretation of a column: 3/4/2024 may be read as 3 April or as 4 March."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

YEARS = (1600, 2199)
MONTHS = {name: name for name in ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]}
MONTHS |= {"mär": "mar", "mrz": "mar", "mai": "may", "okt": "oct", "dez": "dec", "jän": "jan"}  # German
MONTH = re.compile(rf"({'|'.join(MONTHS)})[a-zä]*")
CLOCK = r"\d{1,2}(?::\d\d){1,2}(?:[.,]\d{1,9})?(?:\s*[ap]\.?m\.?)?|\d{1,2}\s*[ap]\.?m\.?"
ZONE = r"\s*(z|utc|gmt|[+-]\d\d:?(?:\d\d)?)"
PARTS = re.compile(  # weekday, date, time of day, zone, and the end of an interval, such as in 10:00 - 11:00
    r"(?:(?:mo|tu|di|we|mi|th|do|fr|sa|su|so)(?!ek)[a-z]*[., ]+)?"
    rf"(.*?)(?:(?:t|[ ,]\s*)({CLOCK})(?:{ZONE})?)?(?:\s+(?:[-–]|to|bis)\s+\d.*)?",
    re.DOTALL,
)
ISO = r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?"
# (label, period) of the formats of strptime. All separators are written as "-", and months as three letters.
FORMATS = {
    **dict.fromkeys(("%Y-%m-%d", "%d/%m/%Y", "%m/%d/%Y", "%d/%m/%y", "%m/%d/%y", "%y/%m/%d"), ""),
    **dict.fromkeys(("%d %b %Y", "%d %b %y", "%b %d %Y", "%b %d %y", "%Y %b %d"), ""),
    **dict.fromkeys(("%b %Y", "%Y %b", "%b %y", "%Y-%m", "%m/%Y"), "month"),
    **{"q-%Y-%m": "quarter", "w-%G-%V-%u": "week"},  # see ``_normalised``
}
WIDTHS = {"%Y": r"\d{4}", "%G": r"\d{4}", "%y": r"\d\d", "%b": "[a-z]{3}"}
PATTERNS = {label: re.sub("[/ ]", "-", label) for label in FORMATS}
SHAPES = {
    label: re.compile(re.sub("%.", lambda match: WIDTHS.get(match[0], r"\d\d?"), pattern))
    for label, pattern in PATTERNS.items()
}
SAMPLE_CELLS = 100  # number of cells on which each format is tried first
# (label, period, format, smallest, largest): a format of strptime for the digits, or the unit of a time since 1970
NUMERIC = [
    ("years", "year", "%Y", *YEARS),
    ("year and month", "month", "%Y%m", 190001, 210012),
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


@dataclass(frozen=True)
class Reading:
    """One interpretation of the cells of a column as time stamps.

    Attributes:
        label: name of the format.
        period: "month", "quarter", "week" or "year" if the cells are such periods, "step" if they count
            steps, otherwise "".
        times: datetime64[us]; NaT where a cell is not a time stamp.
        remark: a text about the time zone, or "".
    """

    label: str
    period: str
    times: pd.Series
    remark: str = ""


def readings(cells: pd.Series, week: bool = False, share: float = 0.8) -> list[Reading]:
    """Return the distinct readings that fit the most cells of a column of texts; [] if they fit less than ``share``.

    Cells are NaN if they are missing. ``week``: read 2024-05 and 202405 as a week, not as a month.
    """
    known = cells.dropna()
    if len(known) and known.str.fullmatch(ISO).all():
        times = pd.to_datetime(known, format="ISO8601", errors="coerce").astype("datetime64[us]")
        return [Reading("%Y-%m-%d", "", times.reindex(cells.index))]
    codes, unique = pd.factorize(known)
    return [
        replace(own, times=pd.Series(own.times.to_numpy()[codes], known.index).reindex(cells.index))
        for own in _readings([" ".join(text.lower().split()) for text in unique], week, share)
    ]


def _readings(texts: list[str], week: bool, share: float) -> list[Reading]:
    matches = [match.groups() for text in texts if (match := PARTS.fullmatch(text))]
    parts = pd.DataFrame(matches, columns=["date", "clock", "zone"], dtype="str")
    codes, unique = pd.factorize(parts["date"])
    dates = list(unique)
    if week:
        dates = [re.sub(r"^(\d{4})-?(\d\d)$", r"\1-w\2", date) for date in dates]
    sample = [_normalised(date) for date in dates[:: max(1, len(dates) // SAMPLE_CELLS)]]
    counts = {label: sum(map(bool, map(shape.fullmatch, sample))) for label, shape in SHAPES.items()}
    fitting = [label for label, count in counts.items() if count > share / 2 * len(sample)]
    if not fitting:
        return []
    normalised, clock, has_clock = (
        [_normalised(date) for date in dates],
        times_of_day(parts["clock"]),
        parts["clock"].notna(),
    )
    results = []
    for label in fitting:
        times = pd.Series(pd.to_datetime(normalised, format=PATTERNS[label], errors="coerce"))
        times = times.where(times.dt.year.between(*YEARS)).astype("datetime64[us]")
        stamps = pd.Series(times.to_numpy()[codes])
        stamps = stamps.mask(has_clock) if FORMATS[label] else stamps + clock.mask(~has_clock, pd.Timedelta(0))
        results.append(_reading(label, FORMATS[label], stamps, parts["zone"]))
    most = max(own.times.notna().sum() for own in results)
    results = [own for own in results if own.times.notna().sum() == most >= share * len(texts)]
    if any("." in date for date in dates) and any(own.label[:3] == "%d/" for own in results):
        results = [own for own in results if own.label[:3] not in ("%m/", "%y/")]  # with dots, the day comes first
    return list({(own.period, own.times.to_numpy().tobytes()): own for own in reversed(results)}.values())[::-1]


def _reading(label: str, period: str, times: pd.Series, zones: pd.Series) -> Reading:
    """Return a reading with times in UTC. Beside times with a zone, a time without a zone becomes NaT.

    If all times are midnights in their zone, the zone is ignored. With daylight saving time, these midnights would not
    all be 24 hours apart in UTC.
    """
    zones = zones.reindex(times.index)
    known = times.dropna()
    if zones[known.index].isna().all() or (known == known.dt.floor("D")).all():
        return Reading(label, period, times.astype("datetime64[us]"))
    unique = {zone: re.sub("z|utc|gmt", "+00", zone).replace(":", "").ljust(5, "0") for zone in zones.dropna().unique()}
    minutes = zones.map({zone: int(own[0] + "1") * (60 * int(own[1:3]) + int(own[3:])) for zone, own in unique.items()})
    utc = times - pd.to_timedelta(minutes, unit="min")
    return Reading(label, period, utc.astype("datetime64[us]"), "time stamps with a zone are converted to UTC")


def _normalised(date: str) -> str:
    """Return a date with three-letter months, and "-" between all its parts.

    A quarter is written as q, the year and the first month. A week is written as w, the year, the week and its day 1.
    """
    text = MONTH.sub(lambda match: MONTHS[match[1]], date)
    text = re.sub(r"^(\d{4})(\d\d)(\d\d)$", r"\1-\2-\3", text)
    words, numbers = re.findall("[a-zä]+", text), sorted(re.findall(r"\d+", text), key=len, reverse=True)
    letter = words[0].removeprefix("k")[0] if len(words) == 1 and len(numbers) == 2 and words[0] != "k" else ""
    if letter == "q" and len(numbers[0]) in (2, 4) and len(numbers[1]) == 1:
        century = "" if len(numbers[0]) == 4 else "20" if numbers[0] < "69" else "19"
        return f"q-{century}{numbers[0]}-{3 * int(numbers[1]) - 2}"
    if letter == "w" and len(numbers[0]) == 4:
        return f"w-{numbers[0]}-{numbers[1]:0>2}-1"
    text = re.sub(r"(?<=\d)(?=[a-zä])|(?<=[a-zä])(?=\d)", "-", text)
    return re.sub(r"^-|-$", "", re.sub(r"[-/.,_ '–]+", "-", text))


def times_of_day(clocks: pd.Series) -> pd.Series:
    """Return the times of day as timedeltas; NaT for other texts."""
    codes, unique = pd.factorize(clocks)
    texts = (
        pd.Series(unique, dtype="str")
        .str.lower()
        .str.replace(",", ".")
        .str.replace(r"([ap])\.?m\.?$", r"\1m", regex=True)
    )
    texts = "1970-01-01 " + texts.where(texts.str.fullmatch(CLOCK))
    times = pd.to_datetime(texts, format="mixed", errors="coerce") - pd.Timestamp(0)
    return pd.Series(np.append(times.to_numpy("timedelta64[us]"), np.timedelta64("NaT"))[codes], clocks.index)


def with_format(cells: pd.Series, pattern: str) -> Reading:
    """Read cells in a strptime format. Raises ValueError if the format is invalid."""
    texts, zones = cells, pd.Series(dtype="str")
    if "%z" in pattern:
        texts = cells.str.lower()
        texts, zones = texts.str.replace(ZONE + "$", "", regex=True), texts.str.extract(ZONE + "$")[0]
    times = pd.to_datetime(texts, format=pattern.replace("%z", "").strip(), errors="coerce")
    period = "" if re.search("%[djuw]", pattern) else "month" if re.search("%[mbB]", pattern) else "year"
    return _reading(pattern, period, times, zones)


def numeric_readings(values: pd.Series) -> list[Reading]:
    """Return a reading for each time stamp format that fits all numbers. ``values`` has NaN for other cells."""
    known = values.dropna()
    results: list[Reading] = []
    for label, period, pattern, low, high in NUMERIC:
        if not known.between(low, high).all() or not len(known):
            continue
        if not pattern.startswith("%"):
            micro = (known * {"s": 1e6, "ms": 1e3, "us": 1, "ns": 1e-3, "D": 86_400e6}[pattern]).round().astype("int64")
            times = pd.to_datetime(micro, unit="us", origin="1899-12-30" if pattern == "D" else "unix")
        else:
            texts = known.astype("int64").astype("str").where(known % 1 == 0)
            times = pd.to_datetime(texts, format=pattern, errors="coerce")
        if times.notna().all():
            results.append(Reading(label, period, times.astype("datetime64[us]").reindex(values.index)))
    return results


def are_times(cells: pd.Series) -> pd.Series:
    """Return whether each text is a time stamp by itself. Plain numbers such as 2024 are not."""
    texts = cells.where(cells.str.contains(r"\d") & ~cells.str.fullmatch(r"[-+]?[\d,' ]*\.?\d*"))
    return pd.DataFrame([own.times.notna() for own in readings(texts, share=0)], columns=cells.index).any()
