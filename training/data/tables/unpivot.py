"""Unpivot tables that have one column per year, quarter, month, hour or date, so that each row holds one value."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from training.data.tables import timestamps
from training.data.tables.header import Body
from training.data.tables.numbers import is_missing, share

TIME, VALUE = "(time)", "(value)"  # names of the columns of an unpivoted table
MIN_COLUMNS = 3  # smallest number of columns whose names are time stamps; two are enough if the names are years


@dataclass(frozen=True)
class Unpivoted:
    """A table with one row per value and the columns ``labels``, TIME and VALUE.

    ``labels``: columns that name the series. ``timed``: whether TIME holds time stamps.
    """

    body: Body
    labels: list[str]
    timed: bool


def unpivot(body: Body, by_rows: bool, group: Sequence[str] | None = None) -> Unpivoted | None:
    """Unpivot a table whose column names are time stamps; return None for all other tables.

    ``by_rows``: treat each row as a series, whatever the names of the columns are. If these names are not time stamps,
    the first column names the series, and columns of texts directly after it are left out. ``group``: the columns that
    name the series; [] if all rows are one series; None to select these columns.

    Raises:
        DataError: the columns are months or quarters without a year, weekdays, or ambiguous; or ``group`` does not fit.
    """
    names = list(body.frame.columns)
    titles = dict(zip(names, body.header_cells, strict=True))
    years = [name for name in names if _is_year(titles[name])]
    full = [name for name in names if _is_full(titles[name])] or years
    if len(full) >= (2 if full is years or by_rows else MIN_COLUMNS) and len(full) >= len(names) / 3:
        others = [name for name in names if name not in full]
        if full is years and (part := _part_of_year(body, others)):
            return _melt(
                body, group, full, [name for name in others if name != part], lambda c, row: f"{row[part]} {c}", part
            )
        if clash := [name for name in others if _mostly(body.frame[name], timestamps.is_time)]:
            raise body.error(
                f"both the column {clash[0]!r} and the names of other columns are dates; delete one of them"
            )
        return _melt(body, group, full, others, lambda c, row: c)
    for columns, compose, parts in (
        ([n for n in names if timestamps.MONTHS.get(n.strip(". ").lower())], lambda c, year: f"{c} {year}", "months"),
        ([n for n in names if re.fullmatch(r"[Qq][1-4]", n)], lambda c, year: f"{year} {c}", "quarters"),
    ):
        if len(columns) >= MIN_COLUMNS:
            others = [name for name in names if name not in columns]
            year = next((name for name in others if _mostly(body.frame[name], _is_year)), None)
            if year is None:
                raise body.error(
                    f"the columns {columns[0]!r} to {columns[-1]!r} are {parts} without a year; add a column year"
                )
            rest = [name for name in others if name != year]
            return _melt(body, group, columns, rest, lambda c, row, f=compose, y=year: f(c, _plain(row[y])), year)  # type: ignore[misc]
    if hours := _hours(body, group, names):
        return hours
    weekdays = [name for name in names if re.fullmatch(timestamps.WEEKDAYS, name.lower())]
    if len(weekdays) >= 5:
        raise body.error(f"the columns {weekdays[0]!r} to {weekdays[-1]!r} are days of a week; write one row per day")
    if by_rows and group is not None:
        raise body.error("--by-rows names each series by its first cell, so --group needs time stamps as column names")
    if by_rows:
        texts = list(itertools.takewhile(lambda name: _holds_texts(body.frame[name]), names[1:-1]))
        if texts:
            body.remarks.append(f"columns {', '.join(map(repr, texts))} hold no numbers, so they are left out")
        return _melt(body, None, names[1 + len(texts) :], names[:1], lambda c, row: c, timed=False)
    return None


def _hours(body: Body, group: Sequence[str] | None, names: Sequence[str]) -> Unpivoted | None:
    """Unpivot a table with a row per day and a column per hour or quarter of an hour; return None for other tables."""
    clocks = [name for name in names if timestamps.is_clock(name)]
    numbered = {
        name: int(match[1]) for name in names if (match := re.fullmatch(r"[Hh]?(?:our|E)?[ _]?(\d{1,2})h?", name))
    }
    sequence = list(numbered.values())
    dates = [name for name in names if _mostly(body.frame[name], timestamps.is_time)]
    if len(sequence) >= 5 and sequence == list(range(sequence[0], sequence[0] + len(sequence))) and dates:
        if sequence not in (list(range(24)), list(range(1, 25))):
            columns = f"{next(iter(numbered))!r} to {list(numbered)[-1]!r}"
            raise body.error(f"the columns {columns} may be parts of a day or a month; write one row per value")
        hour = {name: f"{number - sequence[0]:02}:00" for name, number in numbered.items()}
        if sequence[0]:
            body.remarks.append("the columns of the hours 1 to 24 are read as 0 to 23")
    elif len(clocks) >= 4 and dates:
        hour = {name: name for name in clocks}
    else:
        return None
    rest = [name for name in names if name not in hour and name not in dates[:1]]
    return _melt(body, group, list(hour), rest, lambda c, row: f"{_plain(row[dates[0]])} {hour[c]}", dates[0])


def _plain(cell: Any) -> str:
    return str(cell).removesuffix(" 00:00:00").removesuffix(".0")


def _holds_texts(cells: pd.Series) -> bool:
    """Return whether a column has cells, but no numbers."""
    return bool(share(cells) == 0 and not cells.map(is_missing).all())


def _are_counts(cells: pd.Series) -> bool:
    """Return whether all cells are whole numbers, such as store numbers."""
    return all(re.fullmatch(r"\d+(\.0)?", str(cell)) for cell in cells)


def _is_year(cell: Any) -> bool:
    text = str(cell).removesuffix(".0")
    return re.fullmatch(r"\d{4}", text) is not None and timestamps.YEARS[0] <= int(text) <= timestamps.YEARS[1]


def _is_full(title: Any) -> bool:
    return title is not None and timestamps.is_time(title)


def _mostly(cells: pd.Series, fits: Callable[[Any], bool]) -> bool:
    known = [cell for cell in cells if not is_missing(cell)]
    return bool(known) and sum(fits(cell) for cell in known) > 0.8 * len(known)


def _part_of_year(body: Body, others: Sequence[str]) -> str | None:
    """Return the column with the month, quarter or day of each row, for a table with one column per year.

    Return None if there is no such column.

    Raises:
        DataError: a column holds numbers of months, quarters or days instead of their names.
    """

    def names_part(cell: Any) -> bool:
        text = str(cell).strip(". ").lower()
        return text in timestamps.MONTHS or re.fullmatch(r"q[1-4]|\d{1,2}[-/. ]+[a-z]{3,}", text) is not None

    for name in others:
        if _mostly(body.frame[name], names_part):
            return name
        if (
            re.search(r"month|monat|week|woche|quarter|day|tag|mois|mes", name, re.IGNORECASE)
            and share(body.frame[name]) > 0.8
        ):
            raise body.error(
                f"column {name!r} holds numbers of months, quarters, weeks or days; write names such as Jan or Q1"
            )
    return None


def _melt(
    body: Body,
    group: Sequence[str] | None,
    columns: Sequence[str],
    others: Sequence[str],
    compose: Callable[[str, dict[Any, Any]], str],
    part: str | None = None,
    timed: bool = True,
) -> Unpivoted:
    """Return a table with one row for each cell of ``columns``.

    ``group``: see ``unpivot``. ``others``: all other columns, which may name the series. ``compose``: returns the time
    stamp for the name of a column and the cells of a row. ``part``: the column with a part of the time stamp.
    ``timed``: see ``Unpivoted``.

    Raises:
        DataError: a column of ``group`` is not one of ``others``, or a row has no name.
    """
    frame, remarks = body.frame, list(body.remarks)
    frame = frame[~frame.map(is_missing).all(axis=1)]  # a row without a name and without values is no series
    texts = [name for name in others if share(frame[name]) <= 0.5 and frame[name].notna().any()]
    counts = [name for name in others if name not in texts and _are_counts(frame[name])]
    labels = [*texts, *counts]
    keys = [] if part is None else [part]

    def names_rows(names: list[str]) -> bool:
        blank = bool(names) and frame[names].isna().all(axis=1).any()
        return bool(keys + names) and not blank and not frame.duplicated(keys + names).any()

    if group is None:
        count = next((n for n in range(len(labels) + 1) if names_rows(labels[:n])), len(texts))
        selected = labels[:count] if timed else list(others)
    else:
        selected = _checked(body, group, others)
    if left_out := [name for name in others if name not in selected]:
        remarks.append(f"columns {', '.join(map(repr, left_out))} are left out: they are not needed to name the series")
    if timed:
        one = f"each value of {', '.join(group)}" if group else "each row" if group is None else "the whole table"
        remarks.append(f"the columns {columns[0]!r} to {columns[-1]!r} are time stamps, and {one} is a series")
    titles = dict(zip(frame.columns, body.header_cells, strict=True))
    records = {}
    for row, cells in zip(frame.index, frame.to_dict("records"), strict=True):
        own = [cells[name] for name in selected]
        for name in columns:
            title = titles[name] if isinstance(titles[name], pd.Timestamp) else name
            records[f"{row}, column {name}"] = [*own, compose(title, cells), cells[name]]
    melted = pd.DataFrame.from_dict(records, orient="index", columns=[*selected, TIME, VALUE], dtype=object)
    return Unpivoted(Body(body.path, melted, [*selected, TIME, VALUE], body.delimiter, remarks), selected, timed)


def _checked(body: Body, group: Sequence[str], others: Sequence[str]) -> list[str]:
    """Return the columns ``group`` if they can name the series. Raises DataError if they cannot."""
    if wrong := [name for name in group if name not in others]:
        raise body.error(f"column {wrong[0]!r} holds values or a part of the time, so --group cannot name it")
    blank = body.frame[list(group)].isna().all(axis=1)
    if group and blank.any():
        raise body.error(f"row {blank.idxmax()} has no {', '.join(group)}; write it into every row")
    return list(group)
