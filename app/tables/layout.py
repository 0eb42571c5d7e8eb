"""Melt tables that have one column per year, quarter, month, hour or date, so that each row holds one value."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from app.tables import TableError, times
from app.tables.header import Body, role, text_of

TIME, VALUE = "(time)", "(value)"  # names of the columns of a melted table
MIN_COLUMNS = 3  # smallest number of columns whose names are time stamps; two are enough if the names are years
MONTH = rf"(?:{'|'.join(times.MONTHS)})[a-zä]*\.?"
PART = re.compile(rf"{MONTH}|q[1-4]|\d{{1,2}}[-/. ]+{MONTH}")  # of a year: a month, a quarter or a day


class Melted(NamedTuple):
    """A table with one row per value and the columns ``labels``, TIME and VALUE.

    ``labels``: columns that name the series. ``timed``: whether TIME holds time stamps.
    """

    body: Body
    labels: list[str]
    timed: bool


def melt(body: Body, by_rows: bool, group: Sequence[str] | None = None) -> Melted | None:
    """Melt a table whose column names are time stamps; return None for all other tables.

    ``by_rows``: treat each row as a series, whatever the names of the columns are. If these names are not time stamps,
    the first column names the series, and columns of texts directly after it are left out. ``group``: the columns that
    name the series; [] if all rows are one series; None to select these columns.

    Raises:
        TableError: the columns are months or quarters without a year, weekdays, or ambiguous; or ``group`` does not
        fit.
    """
    names = list(body.frame.columns)
    years = [name for name in names if re.fullmatch(r"(1[6-9]|2[01])\d\d", name)]
    kind = times.kinds(names)
    full = [name for name in names if kind[name] == "t"] or years
    if len(full) >= (2 if full is years or by_rows else MIN_COLUMNS) and len(full) >= len(names) / 3:
        others = [name for name in names if name not in full]
        if full is years and (part := _part_of_year(body, others)):
            return _melt(body, group, full, part, lambda cells, column: cells + " " + column)
        if clash := [name for name in others if _mostly(body, name, _is_time)]:
            raise TableError(
                f"both the column {clash[0]!r} and the names of other columns are dates; delete one of them"
            )
        return _melt(body, group, full, None, lambda cells, column: column)
    for columns, parts in (
        ([name for name in names if re.fullmatch(MONTH, name.lower())], "months"),
        ([name for name in names if re.fullmatch("[Qq][1-4]", name)], "quarters"),
    ):
        if len(columns) >= MIN_COLUMNS:
            others = [name for name in names if name not in columns]
            year = next((name for name in others if _mostly(body, name, _is_year)), None)
            if year is None:
                raise TableError(
                    f"the columns {columns[0]!r} to {columns[-1]!r} are {parts} without a year; add a column year"
                )
            return _melt(body, group, columns, year, lambda cells, column: column + " " + cells)
    if hours := _hours(body, group, names):
        return hours
    weekdays = [name for name in names if re.fullmatch("(mon|tue|wed|thu|fri|sat|sun)[a-z]*", name.lower())]
    if len(weekdays) >= 5:
        raise TableError(f"the columns {weekdays[0]!r} to {weekdays[-1]!r} are days of a week; write one row per day")
    if not by_rows:
        return None
    if group is not None:
        raise TableError("--by-rows names each series by its first cell, so --group needs time stamps as column names")
    texts = list(
        itertools.takewhile(lambda name: body.column(name).others and not body.column(name).share, names[1:-1])
    )
    if texts:
        body.remarks.append(f"columns {', '.join(map(repr, texts))} hold no numbers, so they are left out")
    columns = names[1 + len(texts) :]
    return _melt(body, names[:1], columns, None, lambda cells, column: column, timed=False)


def _hours(body: Body, group: Sequence[str] | None, names: Sequence[str]) -> Melted | None:
    """Melt a table with a row per day and a column per hour or quarter of an hour; return None for other tables."""
    hours = {name: name for name in names if re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", name)}
    numbers: dict[str, int] = {}
    if len(hours) < 4:
        hours = {}
        matches = {name: re.fullmatch(r"[Hh]?(?:our|E)?[ _]?(\d{1,2})h?", name) for name in names}
        numbers = {name: int(match[1]) for name, match in matches.items() if match}
        sequence = list(numbers.values())
        if len(sequence) < 5 or sequence != list(range(sequence[0], sequence[0] + len(sequence))):
            return None
    date = next((name for name in names if name not in (hours or numbers) and _mostly(body, name, _is_time)), None)
    if date is None:
        return None
    if not hours:
        if sequence not in (list(range(24)), list(range(1, 25))):
            columns = f"{next(iter(numbers))!r} to {list(numbers)[-1]!r}"
            raise TableError(f"the columns {columns} may be parts of a day or a month; write one row per value")
        hours = {name: f"{number - sequence[0]:02}:00" for name, number in numbers.items()}
        if sequence[0]:
            body.remarks.append("the columns of the hours 1 to 24 are read as 0 to 23")
    return _melt(body, group, list(hours), date, lambda cells, column: cells + " " + column.map(hours))


def _is_time(cells: pd.Series) -> pd.Series:
    kind = times.kinds(cells)  # the cells are filled, so NaN is no key
    return cells.map(lambda cell: kind[cell] == "t")


def _is_year(cells: pd.Series) -> pd.Series:
    return cells.map(text_of).str.fullmatch(r"(1[6-9]|2[01])\d\d")


def _mostly(body: Body, name: str, fits: Callable[[pd.Series], pd.Series]) -> bool:
    known = body.frame[name][~body.column(name).missing].iloc[:200]
    return bool(len(known)) and bool(fits(known).mean() > 0.8)


def _part_of_year(body: Body, others: Sequence[str]) -> str | None:
    """Return the column with the month, quarter or day of each row, for a table with one column per year.

    Return None if there is no such column.

    Raises:
        TableError: a column holds numbers of months, quarters or days instead of their names.
    """
    for name in others:
        if _mostly(body, name, lambda cells: cells.map(lambda cell: PART.fullmatch(str(cell).lower()) is not None)):
            return name
        if role(name) in ("month", "week", "quarter", "day") and body.column(name).share > 0.8:
            raise TableError(
                f"column {name!r} holds numbers of months, quarters, weeks or days; write names such as Jan or Q1"
            )
    return None


def _melt(
    body: Body,
    group: Sequence[str] | None,
    columns: Sequence[str],
    key: str | None,
    compose: Callable[[pd.Series, pd.Series], pd.Series],
    timed: bool = True,
) -> Melted:
    """Return a table with one row for each cell of ``columns``.

    ``group``: see ``melt``. ``key``: the column with a part of the time stamp. ``compose``: returns the time stamps for
    the cells of the column ``key`` and the names of ``columns``. ``timed``: see ``Melted``.

    Raises:
        TableError: a column of ``group`` is not one of the others, or a row has no name.
    """
    body.keep(~pd.DataFrame({name: body.column(name).missing for name in body.frame.columns}).all(axis=1))
    frame, remarks = body.frame, body.remarks
    others = [name for name in frame.columns if name not in columns and name != key]
    if group is None:
        texts = [name for name in others if body.column(name).share <= 0.5 and frame[name].notna().any()]
        labels = [*texts, *(name for name in others if name not in texts and body.column(name).integers)]
        keys = [] if key is None else [key]

        def names_rows(names: list[str]) -> bool:
            blank = bool(names) and frame[names].isna().all(axis=1).any()
            return bool(keys + names) and not blank and not frame.duplicated(keys + names).any()

        selected = labels[: next((n for n in range(len(labels) + 1) if names_rows(labels[:n])), len(texts))]
    else:
        if wrong := [name for name in group if name not in others]:
            raise TableError(f"column {wrong[0]!r} holds values or a part of the time, so --group cannot name it")
        selected = list(group)
        blank = frame[selected].isna().all(axis=1)
        if selected and timed and blank.any():
            raise TableError(f"row {body.rows[blank.argmax()]} has no {', '.join(group)}; write it into every row")
    if timed and (left_out := [name for name in others if name not in selected]):
        remarks.append(f"columns {', '.join(map(repr, left_out))} are left out: they are not needed to name the series")
    if timed:
        one = f"each value of {', '.join(group)}" if group else "each row" if group is None else "the whole table"
        remarks.append(f"the columns {columns[0]!r} to {columns[-1]!r} are time stamps, and {one} is a series")
    count = len(frame)
    values = frame[list(columns)].astype(
        "object" if len({str(own) for own in frame[list(columns)].dtypes}) > 1 else frame[columns[0]].dtype
    )
    melted = frame[selected].iloc[np.repeat(np.arange(count), len(columns))].reset_index(drop=True)
    titles = pd.Series(list(columns) * count)
    cells = titles if key is None else frame[key].map(text_of).repeat(len(columns)).reset_index(drop=True)
    melted[TIME] = compose(cells, titles)
    melted[VALUE] = pd.Series(values.to_numpy().ravel(), dtype=values.dtypes.iloc[0])
    return Melted(
        Body(melted, np.repeat(body.rows, len(columns)), body.separator, remarks, body.missing), selected, timed
    )
