"""Find the column of time stamps, or several columns that form time stamps together, such as year and month."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from training.data.datasets import DataError
from training.data.tables import frequency, numbers, timestamps
from training.data.tables.header import INDEX_NAME, ROLE, Body, role
from training.data.tables.timestamps import Reading

LIKE_DATE = re.compile(rf"\d{{1,2}}\.\d{{1,2}}\.(\d{{2}}){{1,2}}.*|\d{{4}}[-/ .,_]*({'|'.join(timestamps.MONTHS)})\.?")
MANY_COLUMNS = 5  # in a table with more columns, each row may be a series


@dataclass(frozen=True)
class TimeColumn:
    """The columns with the time stamps. ``reading`` holds the time of each row; NaT for rows without a time."""

    names: list[str]
    reading: Reading


def values_of(cells: pd.Series) -> pd.Series:
    """Return the numbers of a column; NaN for cells that Python's ``float`` does not read as a number."""
    return cells.map(lambda cell: float(cell) if numbers.is_typed(cell) or numbers.is_plain(cell) else math.nan).astype(
        "float64"
    )


def detect(body: Body, time: str | None, pattern: str | None, columns: Sequence[str]) -> TimeColumn | None:
    """Find the time stamps of a table; return None if it has none.

    ``time``, ``pattern``: values of --time and --format. ``columns``: columns that do not hold time stamps.

    Raises:
        DataError: several columns or several formats are possible, or time stamps cannot be read.
    """
    frame = body.frame
    if time is not None and time.lower() == "none" and time not in frame:
        return None
    if time is not None:
        names = [time] if time in frame else [name.strip() for name in time.split(",")]
        return _named(body, names, pattern)
    candidates = [name for name in frame.columns if name not in columns]
    strong = {name: readings for name in candidates if (readings := time_readings(body, name))}
    _reject_mixed(body, [name for name in candidates if name not in strong])
    strong = _without_derived(strong)
    if pattern is not None and not strong:
        fitting = [name for name in candidates if _fits(frame[name], pattern)]
        if len(fitting) != 1:
            raise body.error(
                f"--format {pattern} fits {len(fitting)} columns; name the column of time stamps with --time"
            )
        return _named(body, fitting, pattern)
    if len(strong) > 1:
        options = " or ".join(f"--time {name!r}" for name in strong)
        raise body.error(f"several columns hold time stamps; choose one: {options}")
    if strong:
        (name,) = strong
        return _named(body, [name, *_clock_columns(frame, name, strong[name])], pattern)
    if parts := _parts(frame, candidates):
        return _named(body, parts, pattern)
    return _from_numbers(body, candidates, columns, pattern)


def time_readings(body: Body, name: str) -> list[Reading]:
    """Return the possible readings of a column; [] if it holds plain numbers or no time stamps."""
    cells = body.frame[name]
    if numbers.share(cells) > 0.8 and not _like_dates(cells):
        return []
    return timestamps.readings(cells, week=role(name) == "week")


def _like_dates(cells: pd.Series) -> bool:
    """Return whether all cells are dates that look like numbers.

    Examples are 05.01.24, and 2024 Jan, where Jan looks like a unit.
    """
    known = [cell for cell in cells if not numbers.is_missing(cell)]
    return all(isinstance(cell, str) and LIKE_DATE.fullmatch(cell.strip().lower()) for cell in known)


def _reject_mixed(body: Body, names: Sequence[str]) -> None:
    """Raise DataError if a column mixes time stamps with other cells, such as dates of Excel with text."""
    for name in names:
        known = [cell for cell in body.frame[name] if not numbers.is_missing(cell)]
        times = sum(map(timestamps.is_time, known))
        if known and times >= 0.3 * len(known):
            other = next((cell for cell in known if not timestamps.is_time(cell)), known[0])
            raise body.error(
                f"column {name!r} mixes dates and other cells, for example {str(other)[:40]!r}; use one format for "
                "all dates, or leave the column out with --time none"
            )


def _without_derived(strong: dict[str, list[Reading]]) -> dict[str, list[Reading]]:
    """Leave out columns that only repeat the day, week, month, quarter, half-year or year of another column."""

    def derived(coarse: Reading, fine: Reading) -> bool:
        if fine.times.equals(coarse.times) or fine.period:
            return False
        period = {"month": "M", "quarter": "Q", "year": "Y", "week": "W", "half-year": "6M"}.get(coarse.period, "D")
        try:
            floored = fine.times.dt.to_period(period).dt.start_time if period != "D" else fine.times.dt.floor("D")
        except (ValueError, AttributeError):
            return False
        return bool((floored == coarse.times).all())

    remaining = dict(strong)
    for name, own in strong.items():
        others = [reading for other, readings in strong.items() if other != name for reading in readings]
        if any(derived(coarse, fine) for coarse in own for fine in others):
            del remaining[name]
    return remaining or strong


def _fits(cells: pd.Series, pattern: str) -> bool:
    known = cells[[not numbers.is_missing(cell) for cell in cells]]
    try:
        return len(known) > 0 and timestamps.with_format(known, pattern).count > 0.8 * len(known)
    except ValueError:
        return False


def _clock_columns(frame: pd.DataFrame, date: str, readings: list[Reading]) -> list[str]:
    """Return the columns with the time of day that belong to the column ``date``.

    Return [] if no date occurs twice, or if no column fits.
    """
    times = readings[0].times.dropna()
    if readings[0].period or not times.duplicated().any() or (times != times.dt.floor("D")).any():
        return []
    for name in frame.columns:
        if name == date or frame[name].nunique() < 2:
            continue
        known = [cell for cell in frame[name] if not numbers.is_missing(cell)]
        if all(map(timestamps.is_clock, known)):
            return [str(name)]
        if role(name) in ("hour", "clock") and all(re.fullmatch(r"\d{1,2}(\.0)?", str(cell)) for cell in known):
            return _with_minutes(frame, str(name))
    return []


def _with_minutes(frame: pd.DataFrame, hour: str) -> list[str]:
    """Return the column ``hour``, and the columns of the minute and the second if they are called exactly that."""
    names = [hour]
    for part in ("minute", "second"):
        fitting = [name for name in frame.columns if ROLE.get(name.strip().lower()) == part and _in_sixty(frame[name])]
        if not fitting:
            break
        names.append(fitting[0])
    return names


def _in_sixty(cells: pd.Series) -> bool:
    """Return whether all cells are whole numbers from 0 to 59."""
    return all(re.fullmatch(r"[0-5]?\d(\.0)?", str(cell)) for cell in cells if not numbers.is_missing(cell))


def _parts(frame: pd.DataFrame, candidates: Sequence[str]) -> list[str] | None:
    """Return the columns of year and month, year and quarter, or year and week; None if there are none.

    If the table also has columns of the day, the hour, the minute and the second, they follow the column of the month.
    """
    roles: dict[str, str] = {}
    for name in candidates:
        roles.setdefault(role(name), name)
    months = [name for name in candidates if _are(frame[name], lambda text: text.strip(".") in timestamps.MONTHS)]
    quarters = [
        name for name in candidates if _are(frame[name], lambda text: re.fullmatch(r"q[1-4]", text) is not None)
    ]
    year = roles.get("year")
    if year is None or not _are(frame[year], lambda text: re.fullmatch(r"(1[6-9]|2[01])\d\d", text) is not None):
        return None
    month, quarter = next(iter(months), roles.get("month")), next(iter(quarters), roles.get("quarter"))
    if month:
        day, hour = roles.get("day"), roles.get("hour")
        in_month = day and _are(frame[day], lambda text: re.fullmatch(r"[1-9]|0[1-9]|[12]\d|3[01]", text) is not None)
        clock = _with_minutes(frame, hour) if hour and in_month else []
        return [year, month, *([day] if day and in_month else []), *clock]
    return [year, part] if (part := quarter or roles.get("week")) else None


def _are(cells: pd.Series, fits: Any) -> bool:
    known = [_plain(cell).lower() for cell in cells if not numbers.is_missing(cell)]
    return bool(known) and sum(map(fits, known)) > 0.8 * len(known)


def _plain(cell: Any) -> str:
    """Return a cell as text: whole numbers without decimals, dates at midnight without the time of day."""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).removesuffix(" 00:00:00").strip()


def _named(body: Body, names: Sequence[str], pattern: str | None) -> TimeColumn:
    """Read the time stamps of the columns ``names``. Raises DataError if they cannot be read or are ambiguous."""
    for name in names:
        if name not in body.frame:
            raise body.error(f"has no column {name!r}; its columns are: {', '.join(map(str, body.frame.columns))}")
    cells = body.frame[names[0]] if len(names) == 1 else _joined(body, names)
    label = ", ".join(map(repr, names))
    if pattern is not None:
        try:
            reading = timestamps.with_format(cells, pattern)
        except ValueError as error:
            raise body.error(f"--format {pattern}: {error}") from error
        if reading.count < 0.8 * (cells.notna().sum()) or not re.search("%[YyG]", pattern):
            raise body.error(f"--format {pattern} does not fit the cells of {label}, for example {_example(cells)!r}")
        return TimeColumn(list(names), reading)
    readings: list[Reading] = []
    if numbers.share(cells) <= 0.8 or _like_dates(cells):
        readings = timestamps.readings(cells, week=any(role(name) == "week" for name in names))
    else:
        week = any(role(name) == "week" for name in names)
        readings = timestamps.numeric_readings(cells, values_of(cells), week) or timestamps.readings(cells)
    if not readings and (counter := _counter(cells)):
        readings = [counter]
    if not readings:
        raise _unreadable(body, label, cells)
    return TimeColumn(list(names), choose(body, label, cells, readings))


def _unreadable(body: Body, label: str, cells: pd.Series) -> DataError:
    return body.error(
        f"column {label} holds no time stamps that can be read, for example {_example(cells)!r}; give their format, "
        "for example --format %d.%m.%Y; or use --time none if there are none and the rows are in the order of time"
        + ("; or --by-rows if each row is a series" if body.frame.shape[1] > MANY_COLUMNS else "")
    )


def _example(cells: pd.Series) -> str:
    return next((str(cell) for cell in cells if not numbers.is_missing(cell)), "")


def _joined(body: Body, names: Sequence[str]) -> pd.Series:
    """Join the cells of each row to one text, such as year-month-day, year and quarter, or date and time."""
    parts = [body.frame[name].map(lambda cell: None if numbers.is_missing(cell) else _plain(cell)) for name in names]
    hours = [
        values_of(part) if role(name) in ("hour", "clock") else None for name, part in zip(names, parts, strict=True)
    ]
    texts: list[pd.Series] = []
    clock = 0  # number of parts of the time of day in the columns directly before
    for at, (name, part) in enumerate(zip(names, parts, strict=True)):
        own, own_hours, clock_before, clock = role(name), hours[at], clock, 0
        if at and own == "quarter":
            part = part.map(lambda text: text if "q" in text.lower() else f"Q{text}", na_action="ignore")
        elif at and own == "week":
            part = part.map(lambda text: f"W{int(text):02}" if text.isdigit() else text, na_action="ignore")
        elif at and all(map(timestamps.is_clock, part.dropna())):
            part = part.map(lambda text: text.replace(".", ":"), na_action="ignore")
        elif at and own_hours is not None and own_hours.notna().sum() == part.notna().sum() and (own_hours < 100).all():
            first = 1 if own_hours.min() == 1 and own_hours.max() == 24 else 0
            if first:
                body.remarks.append(f"{name!r}: hours 1 to 24 are read as 0 to 23")
            part = own_hours.map(lambda hour, first=first: f"{int(hour) - first:02}:00", na_action="ignore")
            clock = 1
        elif clock_before in (1, 2) and own in ("minute", "second", "") and _in_sixty(part):
            part = values_of(part).map(lambda value: f":{int(value):02}", na_action="ignore")
            texts[-1] = texts[-1].str[:-3] if clock_before == 1 else texts[-1]
            clock = clock_before + 1
        texts.append(part)
    numeric = all(str(cell).isdigit() for part in texts[:3] for cell in part.dropna())
    dates = role(names[0]) == "year" and numeric
    separators = ["-" if dates and at < 3 and role(names[at]) in ("month", "day") else " " for at in range(len(names))]
    separators = ["" if text.str.startswith(":").any() else own for own, text in zip(separators, texts, strict=True)]
    rows = zip(*texts, strict=True)
    joined = [None if not all(isinstance(cell, str) for cell in row) else "".join(
        separator + cell for separator, cell in zip(separators, row, strict=True))[1:] for row in rows]  # fmt: skip
    return pd.Series(joined, index=body.frame.index, dtype=object)


def choose(body: Body, label: str, cells: pd.Series, readings: Sequence[Reading]) -> Reading:
    """Return the only reading or, if there are several, the only reading with regular times.

    Raises:
        DataError: more than one reading is possible, or the dates have no year.
    """
    possible = list(readings)
    if len(possible) > 1:
        regular = [reading for reading in possible if frequency.is_regular(reading)]
        possible = regular or possible
    if len(possible) == 1 and "without a year" not in possible[0].label:
        return possible[0]
    if any("without a year" in reading.label for reading in possible) and len(possible) == 1:
        raise body.error(
            f"column {label}: {_example(cells)!r} has no year; write dates as 2024-01-31, "
            "or leave the column out with --time none"
        )
    formats = [reading.label for reading in possible if "%" in reading.label and "without" not in reading.label]
    separator = next(iter(re.findall(r"[-/. ]", _example(cells))), "/")
    options = " or ".join(f"--format {_as_written(pattern, separator)}" for pattern in dict.fromkeys(formats))
    raise body.error(
        f"column {label}: the time stamp {_example(cells)!r} is ambiguous: {', '.join(r.label for r in possible)}; "
        f"choose {options or 'another column with --time, or --time none'}"
    )


def _as_written(pattern: str, separator: str) -> str:
    pattern = re.sub(r"[-/ ]", separator, pattern)
    return f'"{pattern}"' if " " in pattern else pattern


def _counter(cells: pd.Series) -> Reading | None:
    """Return the reading of a column that counts steps, such as 1, 2, 3 ...; None for other columns.

    Step n becomes the time n seconds after the start of 1970.
    """
    values = values_of(cells)
    unique = sorted(set(values.dropna()))
    if values.isna().any() or len(unique) < 3 or any(not value.is_integer() for value in unique):
        return None
    if abs(unique[0]) > 100_000 or unique != [unique[0] + step for step in range(len(unique))]:
        return None
    return Reading("steps", "step", pd.to_datetime(values, unit="s").astype("datetime64[us]"))


def _from_numbers(
    body: Body, candidates: Sequence[str], columns: Sequence[str], pattern: str | None
) -> TimeColumn | None:
    """Find time stamps in a column of numbers with a name such as year; return None if there are none.

    Raises:
        DataError: a column of numbers with another name may hold time stamps, or a column seems to hold time stamps
            but cannot be read.
    """
    frame = body.frame
    numeric = [name for name in candidates if numbers.share(frame[name]) > 0.8]
    others = [name for name in frame.columns if name in columns or numbers.share(frame[name]) > 0.5]
    if others == numeric[:1] and len(numeric) == 1:  # the only column of numbers must hold the values
        numeric = []
    named = [name for name in numeric if role(name) not in ("", "minute", "second")]  # these may be durations
    for name in named:
        cells = frame[name]
        if timestamps.numeric_readings(cells, values_of(cells)) or timestamps.readings(cells):
            return _named(body, [name], pattern)
        if role(name) == "month" and sorted(set(values_of(cells))) == list(range(1, 13)) and len(cells) > 12:
            raise body.error(f"column {name!r} numbers months without a year; add a column year")
    for name in named:
        if counter := _counter(frame[name]):
            return TimeColumn([name], counter)
    for name in numeric:
        cells = frame[name]
        values = values_of(cells)
        readings = timestamps.numeric_readings(cells, values)
        if (
            any(frequency.is_regular(reading) for reading in readings)
            and len(set(values)) >= 3
            and not INDEX_NAME.fullmatch(name)
        ):
            options = f"--time {name!r}, or --time none to read it as values"
            raise body.error(f"column {name!r} may hold time stamps ({readings[0].label}) or values; use {options}")
    for name in named:
        if role(name) not in ("day", "hour", "clock"):
            raise _unreadable(body, repr(name), frame[name])
    for name in candidates:
        texts = {cell for cell in frame[name] if isinstance(cell, str) and not numbers.is_missing(cell)}
        if len(texts) > 1 and numbers.share(frame[name]) <= 0.5:
            raise _unreadable(body, repr(name), frame[name])
    return None


def in_utc(body: Body, column: TimeColumn, holidays: bool) -> TimeColumn:
    """Convert times with a time zone to UTC.

    If all times are midnights in their time zone, the zone is ignored. With daylight saving time, these midnights would
    not all be 24 hours apart in UTC. ``holidays``: whether --holidays is set.

    Raises:
        DataError: some of the times have no time zone, and not all times are midnights.
    """
    reading, remarks = column.reading, body.remarks
    if reading.offsets is None:
        return column
    known = reading.times.dropna()
    in_utc_already = not reading.offsets.fillna(0).any()
    if (known == known.dt.floor("D")).all():
        if not in_utc_already:
            remarks.append("the time stamps are local midnights; their time zone is ignored")
        return TimeColumn(column.names, replace(reading, offsets=None))
    if (local := known.index[reading.offsets[known.index].isna()]).size:
        raise body.error(
            f"row {local[0]}: the time in column {', '.join(map(repr, column.names))} has no time zone, but others "
            "have one; write the zone into every row"
        )
    if not in_utc_already:
        remarks.append("time stamps with a zone are converted to UTC")
    if holidays:
        remarks.append(
            "holidays are counted from midnight to midnight UTC; for local days, write local times without a zone"
        )
    times = reading.times - pd.to_timedelta(reading.offsets, unit="s")
    return TimeColumn(column.names, replace(reading, times=times.astype("datetime64[us]"), offsets=None))
