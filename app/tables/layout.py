"""Melt tables that have one column per year, quarter, month, hour or date, so that each row holds one value."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import pandas as pd

from app.tables import TableError, times
from app.tables.header import YEAR, Body, as_texts, is_time_name

TIME, VALUE = "(time)", "(value)"  # names of the columns of a melted table
PART = (  # of a year, a week or a day
    rf"(?:\d{{1,2}}[-/. ]+)?(?:{'|'.join(times.MONTHS)})[a-zä]*\.?|q[1-4]|\d{{1,2}}:\d\d(?::\d\d)?|"
    "(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*"
)


def melt(body: Body, group: Sequence[str] | None) -> tuple[Body, list[str]] | None:
    """Melt a table whose column names are time stamps; return None for all other tables.

    The result is a table with one row per value, and the columns that name the series. Its other columns are TIME, if
    there are time stamps, and VALUE.

    With --by-rows, each row is a series, whatever the names of the columns are. If these names are not time stamps, the
    first column names the series, and columns of texts directly after it are left out. ``group``: the columns that
    name the series; [] if all rows are one series; None to select these columns.

    Raises:
        TableError: the columns are parts of a year, week or day, but no column completes them; or ``group`` does not
        fit.
    """
    names = list(body.frame.columns)
    parts = [name for name in names if re.fullmatch(PART, name.lower())]
    years = [name for name in names if re.fullmatch(YEAR, name)]
    dates = list(itertools.compress(names, times.are_times(pd.Series(names, dtype="str"))))
    columns = parts if len(parts) > 2 else max(years, dates, key=len)
    counted = [name for name in names if re.fullmatch(r"(?:h|hour|he)?[ _]?\d\d?h?", name.lower())]
    is_wide = len(columns) >= max(2, len(names) / 3)
    if is_wide or len(counted) > 4:
        others = [name for name in names if name not in (columns if is_wide else counted)]
        completed = (name for name in others if columns != dates and _are_times(body.texts(name) + " " + columns[0]))
        key = next(completed, None) if is_wide else None
        dated = [name for name in others if name != key and (_are_times(body.texts(name)) or _is_part(body, name))]
        if dated or (is_wide and key is None and columns == parts):
            first, *_, last = columns if is_wide else counted
            raise TableError(
                f"the columns {first!r} to {last!r} are times or parts of a time, and a column that completes them is "
                "missing, or another column has times too; write one row per value, or use --column if each of them "
                "is a series"
            )
    if is_wide:
        return _melt(body, group, columns, key)
    if not body.options.by_rows:
        return None
    if group is not None:
        raise TableError("--by-rows names each series by its first cell, so --group needs time stamps as column names")
    texts = list(
        itertools.takewhile(lambda name: len(body.column(name).others) and not body.column(name).share, names[1:-1])
    )
    if texts:
        body.remarks.append(f"columns {', '.join(map(repr, texts))} hold no numbers, so they are left out")
    return _melt(body, names[:1], names[1 + len(texts) :], None, timed=False)


def _are_times(cells: pd.Series) -> bool:
    known = cells.dropna().iloc[:200]
    return bool(len(known)) and bool(times.are_times(known).mean() > 0.8)


def _is_part(body: Body, name: str) -> bool:
    return is_time_name(name) and body.column(name).share > 0.8


def _melt(
    body: Body, group: Sequence[str] | None, columns: Sequence[str], key: str | None, timed: bool = True
) -> tuple[Body, list[str]]:
    """Return a table with one row for each cell of ``columns``.

    ``group``: see ``melt``. ``key``: the column that completes the time stamps. ``timed``: whether the names of
    ``columns`` are time stamps.

    Raises:
        TableError: a column of ``group`` is not one of the others.
    """
    body.keep(~body.empty() & ~body.totals())
    frame = body.frame
    others = [name for name in frame.columns if name not in columns and name != key]
    if wrong := [name for name in group or () if name not in others]:
        raise TableError(f"column {wrong[0]!r} holds values or a part of the time, so --group cannot name it")
    keys = [] if key is None else [key]
    if group is None:
        words = [name for name in others if body.column(name).share <= 0.5 and frame[name].notna().any()] or others[:1]
        fitting = (
            words[:n] for n in range(not keys, len(words) + 1)
            if not (frame.duplicated([*keys, *words[:n]]).any() or (n and frame[words[:n]].isna().all(axis=1).any()))
        )  # fmt: skip
        group = next(fitting, words)
    if timed:
        left_out = f"; columns {', '.join(left)} are left out" if (left := sorted({*others} - {*group})) else ""
        one = f"each value of {', '.join(group)}" if group else "the whole table"
        body.remarks.append(
            f"the columns {columns[0]!r} to {columns[-1]!r} are time stamps, and {one} is a series{left_out}"
        )
    melted = frame.melt([*group, *keys], list(columns), TIME, VALUE, ignore_index=False)
    if key is not None:
        melted[TIME] = as_texts(melted[key]) + " " + melted[TIME]
    rows = body.rows[melted.index]
    melted = melted[[*group, *([TIME] if timed else []), VALUE]].reset_index(drop=True).infer_objects()
    return Body(melted, rows, body.separator, body.remarks, body.options), list(group)
