"""Find the column of time stamps, or several columns that form time stamps together, such as year and month."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from app.tables import TableError, grid, times
from app.tables.header import ROLE, Body, role, text_of
from app.tables.times import Reading

INDEX_NAME = re.compile(r"index|id|no\.?|nr\.?|#|obs|observation|rownames|unnamed: 0(\.\d+)?", re.IGNORECASE)
MANY_COLUMNS = 5  # in a table with more columns, each row may be a series
LARGEST = {"hour": 24, "clock": 24, "minute": 59, "second": 59}


@dataclass(frozen=True)
class TimeColumn:
    """The columns with the time stamps. ``reading`` holds the time of each row; NaT for rows without a time."""

    names: list[str]
    reading: Reading


def detect(body: Body, time: str | None, pattern: str | None, columns: Sequence[str]) -> TimeColumn | None:
    """Find the time stamps of a table; return None if it has none.

    ``time``, ``pattern``: values of --time and --format. ``columns``: columns that do not hold time stamps.

    Raises:
        TableError: several columns or several formats are possible, or time stamps cannot be read.
    """
    if time is not None and time.lower() == "none" and time not in body.frame:
        return None
    if time is not None:
        return named(body, [time] if time in body.frame else [name.strip() for name in time.split(",")], pattern)
    candidates = [name for name in body.frame.columns if name not in columns]
    strong = {name: readings for name in candidates if (readings := readings_of(body, name))}
    if pattern is not None and not strong:
        texts = [name for name in candidates if body.column(name).share <= 0.5] or candidates
        return named(body, texts[:1], pattern)
    if len(strong) > 1:
        raise TableError(
            f"several columns hold time stamps; choose one: {' or '.join(f'--time {name!r}' for name in strong)}"
        )
    if strong:
        (name,) = strong
        return named(body, [name, *_clock_columns(body, name, strong[name])], pattern)
    if parts := _parts(body, candidates):
        return named(body, parts, pattern)
    return _from_numbers(body, candidates, columns, pattern)


def readings_of(body: Body, name: str) -> list[Reading]:
    """Return the possible readings of a column; [] if it holds plain numbers or no time stamps."""
    column = body.column(name)
    if column.share > 0.8:
        return []
    return times.readings(column.cells, column.missing, week=role(name) == "week")


def _clock_columns(body: Body, date: str, readings: list[Reading]) -> list[str]:
    """Return the columns with the time of day that belong to the column ``date``; [] if no date occurs twice."""
    stamps = readings[0].times.dropna()
    if readings[0].period or not stamps.duplicated().any() or (stamps != stamps.dt.floor("D")).any():
        return []
    for name in body.frame.columns:
        column = body.column(name)
        if name != date and not column.share and times.times_of_day(column.cells.mask(column.missing)) is not None:
            return [name]
    return _counted(body, "hour", "minute", "second") or _counted(body, "clock")


def _counted(body: Body, *parts: str) -> list[str]:
    """Return the columns of whole numbers with these parts of the time of day, such as hour, until one is missing.

    The minute and the second must be called exactly that, because they may also be durations.
    """
    names: list[str] = []
    for part in parts:
        fitting = [
            name for name in body.frame.columns if (ROLE.get(name.strip().lower()) if names else role(name)) == part
        ]
        fitting = [name for name in fitting if body.column(name).values.between(0, LARGEST[part]).all()]
        if not fitting:
            break
        names.append(fitting[0])
    return names


def _parts(body: Body, candidates: Sequence[str]) -> list[str]:
    """Return the columns of the year and a part of it, such as the month; [] if there are none.

    If the table also has columns of the day, the hour, the minute and the second, they follow the column of the month.
    """
    names = {role(name): name for name in reversed(candidates)}
    texts = [name for name in candidates if body.column(name).share <= 0.5]
    for own, pattern in (("month", times.MONTH.pattern + r"\.?"), ("quarter", "q[1-4]")):
        fitting = [
            name for name in texts if body.frame[name].dropna().astype("str").str.lower().str.fullmatch(pattern).all()
        ]
        names |= {own: fitting[0]} if fitting else {}
    year = names.get("year", "")
    if not year or not body.column(year).values.between(*times.YEARS).mean() > 0.8:
        return []
    if "month" not in names:
        return (
            [year, *[names[part] for part in ("quarter", "week") if part in names][:1]]
            if {"quarter", "week"} & {*names}
            else []
        )
    day = names.get("day", "")
    if not day or not body.column(day).integers or not body.column(day).values.between(1, 31).all():
        return [year, names["month"]]
    return [year, names["month"], day, *_counted(body, "hour", "minute", "second")]


def named(body: Body, names: list[str], pattern: str | None) -> TimeColumn:
    """Read the time stamps of the columns ``names``. Raises TableError if they cannot be read or are ambiguous."""
    for name in names:
        if name not in body.frame:
            raise TableError(f"there is no column {name!r}; its columns are: {', '.join(body.frame.columns)}")
    label = ", ".join(map(repr, names))
    clock: pd.Series | None = None
    if len(names) == 1:
        cells, missing = body.frame[names[0]], body.column(names[0]).missing
        example = body.example(names[0])
    else:
        cells, clock, example = _joined(body, names)
        missing = cells.isna()
    week = any(role(name) == "week" for name in names)
    if pattern is not None:
        try:
            reading = times.with_format(cells.mask(missing), pattern)
        except ValueError as error:
            raise TableError(f"--format {pattern}: {error}") from error
        if reading.times.notna().sum() < 0.8 * cells.notna().sum() or not re.search("%[YyG]", pattern):
            raise TableError(f"--format {pattern} does not fit the cells of {label}, for example {example!r}")
        readings = [reading]
    elif len(names) == 1 and body.column(names[0]).share > 0.8:
        values = body.column(names[0]).values
        readings = times.numeric_readings(values, week) or times.readings(cells.astype("str"), missing)
    else:
        digits = pd.to_numeric(cells, errors="coerce") if len(names) > 1 else pd.Series([None])
        readings = times.numeric_readings(digits) if digits.notna().all() else times.readings(cells, missing, week)
    if clock is not None:
        readings = [replace(own, times=own.times + clock) for own in readings]
    if not readings and len(names) == 1 and (counter := _counter(body, names[0])):
        readings = [counter]
    if not readings:
        raise _unreadable(body, label, example)
    return TimeColumn(names, choose(label, example, readings))


def _unreadable(body: Body, label: str, example: str) -> TableError:
    return TableError(
        f"column {label} holds no time stamps that can be read, for example {example!r}; give their format, for "
        "example --format %d.%m.%Y; or use --time none if there are none and the rows are in the order of time"
        + ("; or --by-rows if each row is a series" if body.frame.shape[1] > MANY_COLUMNS else "")
    )


def _joined(body: Body, names: Sequence[str]) -> tuple[pd.Series, pd.Series | None, str]:
    """Return the dates of several columns as texts such as 2024-1-31, their times of day, and an example."""
    dates: list[pd.Series] = []
    units = ["hour", "minute", "second"]
    clock: pd.Series | None = None
    for name in names:
        column, own = body.column(name), role(name)
        cells, values = column.cells.mask(column.missing), column.values
        day = times.times_of_day(cells) if dates and not column.share else None
        if (
            dates
            and column.share == 1
            and values.max() < 100
            and (own in ("hour", "clock") or (clock is not None and units))
        ):
            units = units[units.index(own) :] if own in units else units
            first = int(values.min() == 1 and values.max() == 24)
            if first:
                body.remarks.append(f"{name!r}: hours 1 to 24 are read as 0 to 23")
            unit: Any = units.pop(0)
            day = pd.to_timedelta(values - first, unit=unit).where(values <= LARGEST[unit])
        if day is not None:
            clock = day if clock is None else clock + day
            continue
        text = cells.map(text_of, na_action="ignore").astype("str")
        prefix = {"quarter": "q", "week": "w"}.get(own, "") if column.share == 1 and dates else ""
        dates.append(prefix + text.where(~column.missing))
    joined = dates[0]
    for part in dates[1:]:
        joined = joined + "-" + part
    known = joined.dropna()
    return joined, clock, str(known.iloc[0]) if len(known) else ""


def choose(label: str, example: str, possible: list[Reading]) -> Reading:
    """Return the only reading or, if there are several, the only reading with regular times.

    Raises:
        TableError: more than one reading is possible, or the dates have no year.
    """
    if len(possible) > 1:
        possible = [reading for reading in possible if grid.is_regular(reading)] or possible
    if len(possible) == 1:
        if "without a year" in possible[0].label:
            raise TableError(
                f"column {label}: {example!r} has no year; write dates as 2024-01-31, or leave the column out with "
                "--time none"
            )
        return possible[0]
    formats = [own.label for own in possible if "%" in own.label and "without" not in own.label]
    separator = next(iter(re.findall(r"[-/. ]", example)), "/")
    written = [re.sub(r"[-/ ]", separator, pattern) for pattern in dict.fromkeys(formats)]
    options = " or ".join(f'--format "{own}"' if " " in own else f"--format {own}" for own in written)
    raise TableError(
        f"column {label}: the time stamp {example!r} is ambiguous: {', '.join(own.label for own in possible)}; choose "
        f"{options or 'another column with --time, or --time none'}"
    )


def _counter(body: Body, name: str) -> Reading | None:
    """Return the reading of a column that counts steps, such as 1, 2, 3 ...; None for other columns.

    Step n becomes the time n seconds after the start of 1970.
    """
    values = body.column(name).values
    unique = values.drop_duplicates().sort_values()
    if values.isna().any() or len(unique) < 3 or (unique % 1 != 0).any() or abs(unique.iloc[0]) > 100_000:
        return None
    if (unique.diff().iloc[1:] != 1).any():
        return None
    return Reading("steps", "step", pd.to_datetime(values, unit="s").astype("datetime64[us]"))


def _from_numbers(
    body: Body, candidates: Sequence[str], columns: Sequence[str], pattern: str | None
) -> TimeColumn | None:
    """Find time stamps in a column of numbers with a name such as year; return None if there are none.

    Raises:
        TableError: a column of numbers with another name may hold time stamps, or a column seems to hold time stamps
            but cannot be read.
    """
    numeric = [name for name in candidates if body.column(name).share > 0.8]
    others = [name for name in body.frame.columns if name in columns or body.column(name).share > 0.5]
    if others == numeric[:1] and len(numeric) == 1:  # the only column of numbers must hold the values
        numeric = []
    clear = [name for name in numeric if role(name) not in ("", "minute", "second")]  # these may be durations
    for name in clear:
        column = body.column(name)
        if times.numeric_readings(column.values) or times.readings(column.cells.astype("str"), column.missing):
            return named(body, [name], pattern)
        if role(name) == "month" and sorted(column.values.unique()) == list(range(1, 13)) and len(column.values) > 12:
            raise TableError(f"column {name!r} numbers months without a year; add a column year")
    for name in clear:
        if counter := _counter(body, name):
            return TimeColumn([name], counter)
    for name in numeric:
        values = body.column(name).values
        readings = times.numeric_readings(values)
        if any(map(grid.is_regular, readings)) and values.nunique() >= 3 and not INDEX_NAME.fullmatch(name):
            options = f"--time {name!r}, or --time none to read it as values"
            raise TableError(f"column {name!r} may hold time stamps ({readings[0].label}) or values; use {options}")
    for name in clear:
        if role(name) not in ("day", "hour", "clock"):
            raise _unreadable(body, repr(name), body.example(name))
    for name in candidates:
        column = body.column(name)
        if column.share <= 0.5 and len(column.others) > 1:
            raise _unreadable(body, repr(name), body.example(name))
    return None


def in_utc(body: Body, column: TimeColumn, holidays: bool) -> TimeColumn:
    """Convert times with a time zone to UTC.

    If all times are midnights in their time zone, the zone is ignored. With daylight saving time, these midnights would
    not all be 24 hours apart in UTC. ``holidays``: whether --holidays is set.

    Raises:
        TableError: some of the times have no time zone, and not all times are midnights.
    """
    reading = column.reading
    if reading.offsets is None:
        return column
    known = reading.times.dropna()
    local = known.index[reading.offsets[known.index].isna()]
    shifted = (reading.offsets.fillna(pd.Timedelta(0)) != pd.Timedelta(0)).any()
    if (known == known.dt.floor("D")).all():
        if shifted:
            body.remarks.append("the time stamps are local midnights; their time zone is ignored")
        return column
    if len(local):
        raise TableError(
            f"row {body.rows[local[0]]}: the time in column {', '.join(map(repr, column.names))} has no time zone, but "
            "others have one; write the zone into every row"
        )
    if shifted:
        body.remarks.append("time stamps with a zone are converted to UTC")
    if holidays:
        body.remarks.append(
            "holidays are counted from midnight to midnight UTC; for local days, write local times without a zone"
        )
    return TimeColumn(column.names, replace(reading, times=(reading.times - reading.offsets).astype("datetime64[us]")))


def holds_times(body: Body, name: str) -> bool:
    """Return whether a column holds time stamps, or numbers that may be time stamps below a name such as year."""
    numeric = role(name) and times.numeric_readings(body.column(name).values)
    return bool(numeric or readings_of(body, name))
