"""Parse time stamps. A reading is one interpretation of a column: 3/4/2024 may be read as 3 April or as 4 March."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

YEARS = (1600, 2199)
MONTHS = {name: name for name in ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]}
MONTHS |= {"mär": "mar", "mrz": "mar", "mai": "may", "okt": "oct", "dez": "dec", "jän": "jan"}  # German
MONTH = re.compile(rf"({'|'.join(MONTHS)})[a-zä]*")
CLOCK = r"\d{1,2}(?::\d\d){1,2}(?:[.,]\d{1,9})?(?:\s*[ap]\.?m\.?)?|\d{1,2}\s*[ap]\.?m\.?"
ZONE = r"\s*(z|utc|gmt|[+-]\d\d:?(?:\d\d)?)"
PARTS = (  # weekday, date, time of day, zone, and the end of an interval, such as in 10:00 - 11:00
    r"(?s)^(?:(?:mo|tu|di|we|mi|th|do|fr|sa|su|so)(?!ek)[a-z]*[., ]+)?"
    rf"(.*?)(?:(?:t|[ ,]\s*)({CLOCK})(?:{ZONE})?)?(?:\s+(?:[-–]|to|bis)\s+\d.*|/\d{{4}}-.*)?$"
)
ISO = r"\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?)?"
# (label, period) of the formats of strptime. All separators are written as "-", and months as three letters.
FORMATS = {
    **dict.fromkeys(("%Y-%m-%d", "%d/%m/%Y", "%m/%d/%Y", "%d/%m/%y", "%m/%d/%y", "%y/%m/%d"), ""),
    **dict.fromkeys(("%d %b %Y", "%d %b %y", "%b %d %Y", "%b %d %y", "%Y %b %d"), ""),
    **dict.fromkeys(("%b %Y", "%Y %b", "%b %y", "%Y-%m", "%m/%Y"), "month"),
    **{"q-%Y-%m": "quarter", "q-%y-%m": "quarter", "w-%G-%V-%u": "week"},  # see ``_normalised``
}
PATTERNS = {label: re.sub("[/ ]", "-", label) for label in FORMATS}
WIDTHS = {"%Y": r"\d{4}", "%G": r"\d{4}", "%y": r"\d\d", "%b": "[a-z]{3}"}
SHAPES = {
    label: re.sub("%.", lambda match: WIDTHS.get(match[0], r"\d\d?"), pattern) for label, pattern in PATTERNS.items()
}
SAMPLE_CELLS = 100  # number of cells on which each format is tried first
# (label, period, format, smallest, largest). The format is one of strptime for the digits, or the number of
# microseconds in a unit.
NUMERIC: list[tuple[str, str, str | float, float, float]] = [
    ("years", "year", "%Y", *YEARS),
    ("year and month", "month", "%Y%m", 190001, 210012),
    ("year, month and day", "", "%Y%m%d", 19000101, 21001231),
    ("year, month, day and hour", "", "%Y%m%d%H", 1900010100, 2100123123),
    ("year, month, day, hour and minute", "", "%Y%m%d%H%M", 190001010000, 210012312359),
    ("year, month, day and time", "", "%Y%m%d%H%M%S", 19000101000000, 21001231235959),
    ("seconds since 1970", "", 1e6, 3e8, 4.1e9),
    ("milliseconds since 1970", "", 1e3, 3e11, 4.1e12),
    ("microseconds since 1970", "", 1.0, 3e14, 4.1e15),
    ("nanoseconds since 1970", "", 1e-3, 3e17, 4.1e18),
    ("Excel dates", "", 86_400e6, 18000, 80000),
]


@dataclass(frozen=True)
class Reading:
    """One interpretation of the cells of a column as time stamps.

    Attributes:
        label: name of the format.
        period: "month", "quarter", "week" or "year" if the cells are such periods, otherwise "".
        times: datetime64[us]; NaT where a cell is not a time stamp.
        remark: a text about the time zone, or "".
        names: the columns with the cells.
    """

    label: str
    period: str
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
        return [Reading("%Y-%m-%d", "", times.reindex(cells.index))]
    codes, unique = pd.factorize(known)
    texts = pd.Series(unique, dtype="str").str.lower().str.replace(r"\s+", " ", regex=True).str.strip()
    sample = _split(texts.iloc[:: len(texts) // SAMPLE_CELLS + 1], week)["date"]
    likely = [label for label, shape in SHAPES.items() if sample.str.fullmatch(shape).mean() > share / 2]
    if not likely:
        return []
    parts = _split(texts, week)
    clock = times_of_day(parts["clock"]).mask(parts["clock"].isna(), pd.Timedelta(0))
    results = []
    for label in likely:
        stamps = pd.to_datetime(parts["date"], format=PATTERNS[label], errors="coerce").astype("datetime64[us]")
        stamps = stamps.where(stamps.dt.year.between(*YEARS))
        stamps = stamps.mask(parts["clock"].notna()) if FORMATS[label] else stamps + clock
        results.append(_reading(label, FORMATS[label], stamps, parts["zone"]))
    counts = [int(own.times.notna().sum()) for own in results]
    results = [own for own, count in zip(results, counts, strict=True) if count == max(counts) >= share * len(texts)]
    if texts.str.contains(r"^\D*\d\d?\.").any() and any(own.label[:3] == "%d/" for own in results):
        results = [own for own in results if own.label[:3] not in ("%m/", "%y/")]  # with dots, the day comes first
    distinct = {(own.period, own.times.to_numpy().tobytes()): own for own in reversed(results)}
    return [
        replace(own, times=pd.Series(own.times.to_numpy()[codes], known.index).reindex(cells.index))
        for own in reversed(distinct.values())
    ]


def _split(texts: pd.Series, week: bool) -> pd.DataFrame:
    """Return the normalised date, the time of day and the zone of each text."""
    parts = texts.str.extract(PARTS).set_axis(["date", "clock", "zone"], axis=1).reset_index(drop=True)
    codes, dates = pd.factorize(parts["date"])
    return parts.assign(date=pd.Series([_normalised(date, week) for date in dates], dtype="str").to_numpy()[codes])


def _reading(label: str, period: str, times: pd.Series, zones: pd.Series) -> Reading:
    """Return a reading with times in UTC. Beside times with a zone, a time without a zone becomes NaT.

    If all times are midnights in their zone, the zone is ignored. With daylight saving time, these midnights would not
    all be 24 hours apart in UTC.
    """
    zones = zones.reindex(times.index)
    known = times.dropna()
    if zones[known.index].isna().all() or (known == known.dt.floor("D")).all():
        return Reading(label, period, times.astype("datetime64[us]"))
    texts = zones.str.replace("z|utc|gmt", "+00", regex=True).str.replace(":", "", regex=False).str.ljust(5, "0")
    midnight = pd.to_datetime("1970-01-01" + texts, format="%Y-%m-%d%z", utc=True).dt.tz_localize(None)
    utc = (times + (midnight - pd.Timestamp(0))).astype("datetime64[us]")
    return Reading(label, period, utc, "time stamps with a zone are converted to UTC")


def _normalised(date: str, week: bool) -> str:
    """Return a date with three-letter months, and "-" between all its parts.

    A quarter is written as q, the year and the first month. A week is written as w, the year, the week and its day 1.
    """
    text = re.sub(r"^(\d{4})-?(\d\d)$", r"\1-w\2", date) if week else date
    text = MONTH.sub(lambda match: MONTHS[match[1]], text)
    text = re.sub(r"^(\d{4})(\d\d)(\d\d)$", r"\1-\2-\3", text)
    words, numbers = re.findall("[a-zä]+", text), sorted(re.findall(r"\d+", text), key=len, reverse=True)
    letter = words[0].removeprefix("k")[0] if len(words) == 1 and len(numbers) == 2 and words[0] != "k" else ""
    if letter == "q" and len(numbers[1]) == 1:
        return f"q-{numbers[0]}-{3 * int(numbers[1]) - 2}"
    if letter == "w" and len(numbers[0]) == 4:
        return f"w-{numbers[0]}-{numbers[1]:0>2}-1"
    text = re.sub(r"(?<=\d)(?=[a-zä])|(?<=[a-zä])(?=\d)", "-", text)
    return re.sub(r"^-|-$", "", re.sub(r"[-/.,_ '–]+", "-", text))


def times_of_day(clocks: pd.Series) -> pd.Series:
    """Return the times of day as timedeltas; NaT for other texts."""
    texts = clocks.astype("str").str.lower().str.replace(",", ".", regex=False)
    texts = texts.str.replace(r"([ap])\.?m\.?$", r"\1m", regex=True)
    texts = "1970-01-01 " + texts.where(texts.str.fullmatch(CLOCK))
    return (pd.to_datetime(texts, format="mixed", errors="coerce") - pd.Timestamp(0)).astype("timedelta64[us]")


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
        if isinstance(pattern, float):
            micro = (known * pattern).round().astype("int64")
            times = pd.to_datetime(micro, unit="us", origin="1899-12-30" if label == "Excel dates" else "unix")
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
