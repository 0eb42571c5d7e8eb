"""Melt tables that have one column per date or year, or one row per series, so that each row holds one value."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import pandas as pd

from app.tables import times
from app.tables.header import YEAR, Body, is_time_name
from app.tables.messages import COLUMN, TableError, option

TIME, VALUE = "(time)", "(value)"  # names of the columns of a melted table
PART = (  # of a year, a week or a day
    rf"(?:\d{{1,2}}[-/. ]+)?{times.MONTH}\.?|q[1-4]|\d{{1,2}}:\d\d(?::\d\d)?|(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*"
)
HOUR = r"(?:h|hour|he)?[ _]?\d\d?h?"


def melt(body: Body, group: Sequence[str] | None) -> tuple[Body, list[str]] | None:
    """Melt a table whose column names are time stamps, or whose rows are series; return None for all other tables.

    The result is a table with one row per value, and the columns that name the series. Its other columns are TIME, if
    there are time stamps, and VALUE.

    With --by-rows, each row is a series, whatever the names of the columns are. If these names are not time stamps, the
    first column names the series, and columns of texts directly after it are left out. ``group``: the columns that
    name the series; [] if all rows are one series; None to select these columns.

    Raises:
        TableError: the columns are parts of a year, week or day, or another column has times too; or ``group`` does
            not fit.
    """
    names = list(body.frame.columns)
    dates = list(itertools.compress(names, times.are_times(pd.Series(names, dtype="str"))))
    dates = max([name for name in names if re.fullmatch(YEAR, name)], dates, key=len)
    parts = [name for name in names if re.fullmatch(PART, name.lower())]
    hours = [name for name in names if re.fullmatch(HOUR, name.lower())]
    least = max(2, len(names) / 3)
    across = dates if len(dates) >= least else parts if len(parts) > least else hours if len(hours) > 4 else []
    if across and (across is parts or any(_has_times(body, name) for name in names if name not in across)):
        raise TableError(
            f"the columns {across[0]!r} to {across[-1]!r} are times or parts of a time, and others may complete them; "
            f"write one row per value, or use {COLUMN} if each of them is a series"
        )
    if across is dates:
        return _melt(body, group, dates)
    if not body.options.by_rows:
        return None
    if group is not None:
        raise TableError(
            f"{option('by_rows')} names each series by its first cell, so {option('group')} needs time stamps as "
            "column names"
        )
    words = itertools.takewhile(lambda name: len(body.column(name).others) and not body.column(name).share, names[1:-1])
    if texts := [*words]:
        body.remarks.append(f"columns {', '.join(map(repr, texts))} hold no numbers, so they are left out")
    return _melt(body, names[:1], names[1 + len(texts) :], timed=False)


def _has_times(body: Body, name: str) -> bool:
    """Return whether most cells of a column are times or parts of a time."""
    cells = body.texts(name).dropna().iloc[:200]
    found = times.are_times(cells) | cells.str.fullmatch(PART, case=False)
    return bool((is_time_name(name) and body.column(name).share > 0.8) or (len(cells) and found.mean() > 0.8))


def _melt(
    body: Body, group: Sequence[str] | None, columns: Sequence[str], timed: bool = True
) -> tuple[Body, list[str]]:
    """Return a table with one row for each cell of ``columns``.

    ``group``: see ``melt``. ``timed``: whether the names of ``columns`` are time stamps.

    Raises:
        TableError: a column of ``group`` is not one of the others.
    """
    body.keep(~body.empty() & ~body.totals())
    frame = body.frame
    others = [name for name in frame.columns if name not in columns]
    if wrong := [name for name in group or () if name not in others]:
        raise TableError(f"column {wrong[0]!r} holds values or a part of the time, so it cannot name the series")
    if group is None:
        words = [name for name in others if body.column(name).share <= 0.5 and frame[name].notna().any()] or others[:1]
        fitting = (
            words[:n] for n in range(1, len(words) + 1)
            if not frame.duplicated(words[:n]).any() and frame[words[:n]].notna().any(axis=1).all()
        )  # fmt: skip
        group = next(fitting, words)
    if timed:
        left_out = f"; columns {', '.join(left)} are left out" if (left := sorted({*others} - {*group})) else ""
        one = f"each value of {', '.join(group)}" if group else "the whole table"
        body.remarks.append(
            f"the columns {columns[0]!r} to {columns[-1]!r} are time stamps, and {one} is a series{left_out}"
        )
    melted = frame.melt([*group], [*columns], TIME, VALUE, ignore_index=False)
    rows = body.rows[melted.index]
    melted = melted[[*group, *([TIME] if timed else []), VALUE]].reset_index(drop=True).infer_objects()
    return Body(melted, rows, body.separator, body.remarks, body.options), list(group)
