"""Melt tables that have one column per year, quarter, month, hour or date, so that each row holds one value."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from app.tables import TableError, times
from app.tables.header import YEAR, Body, as_texts, role

TIME, VALUE = "(time)", "(value)"  # names of the columns of a melted table
PART = (  # of a year, a week or a day
    rf"(?:\d{{1,2}}[-/. ]+)?(?:{'|'.join(times.MONTHS)})[a-zä]*\.?|q[1-4]|\d{{1,2}}:\d\d(?::\d\d)?|"
    "(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*"
)


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
        TableError: the columns are parts of a year, week or day, but no column completes them; or ``group`` does not
        fit.
    """
    names = list(body.frame.columns)
    parts = [name for name in names if re.fullmatch(PART, name.lower())]
    years = [name for name in names if re.fullmatch(YEAR, name)]
    full = years if len(years) > 1 else list(itertools.compress(names, times.are_times(pd.Series(names, dtype="str"))))
    columns = parts if len(parts) > 2 else full if len(full) > 2 - (full is years or by_rows) else []
    counted = [name for name in names if re.fullmatch(r"(?:h|hour|he)?[ _]?\d\d?h?", name.lower())]
    others = [name for name in names if name not in (columns or counted)]
    if len(columns) >= len(names) / 3 or len(counted) > 4:
        dated = [name for name in others if _are_times(body.texts(name)) or _is_part(body, name)]
    if len(columns) >= len(names) / 3:
        key = None
        if columns is not full or full is years:
            key = next((name for name in others if _are_times(body.texts(name) + " " + columns[0])), None)
        if (key is None and columns is parts) or [name for name in dated if name != key]:
            raise TableError(
                f"the columns {columns[0]!r} to {columns[-1]!r} are times or parts of a time, and a column that "
                f"completes "
                "them is missing, or another column has times too; use --column if each of them is a series"
            )
        return _melt(body, group, columns, key)
    if len(counted) > 4 and dated:
        raise TableError(
            f"the columns {counted[0]!r} to {counted[-1]!r} may be parts of a day or a month; write one row per "
            f"value, or "
            "use --column if each of them is a series"
        )
    if not by_rows:
        return None
    if group is not None:
        raise TableError("--by-rows names each series by its first cell, so --group needs time stamps as column names")
    texts = list(
        itertools.takewhile(lambda name: body.column(name).others and not body.column(name).share, names[1:-1])
    )
    if texts:
        body.remarks.append(f"columns {', '.join(map(repr, texts))} hold no numbers, so they are left out")
    return _melt(body, names[:1], names[1 + len(texts) :], None, timed=False)


def _are_times(cells: pd.Series) -> bool:
    known = cells.dropna().iloc[:200]
    return bool(len(known)) and bool(times.are_times(known).mean() > 0.8)


def _is_part(body: Body, name: str) -> bool:
    return role(name) in ("month", "week", "quarter", "day") and body.column(name).share > 0.8


def _melt(
    body: Body, group: Sequence[str] | None, columns: Sequence[str], key: str | None, timed: bool = True
) -> Melted:
    """Return a table with one row for each cell of ``columns``.

    ``group``: see ``melt``. ``key``: the column that completes the time stamps. ``timed``: see ``Melted``.

    Raises:
        TableError: a column of ``group`` is not one of the others.
    """
    body.keep(~body.frame.apply(lambda cells: body.column(str(cells.name)).missing).all(axis=1) & ~body.totals())
    frame = body.frame
    others = [name for name in frame.columns if name not in columns and name != key]
    if wrong := [name for name in group or () if name not in others]:
        raise TableError(f"column {wrong[0]!r} holds values or a part of the time, so --group cannot name it")
    if group is None:
        words = [name for name in others if body.column(name).share <= 0.5 and frame[name].notna().any()]
        labels = [*words, *(name for name in others if name not in words and body.column(name).integers)]
        keys = [] if key is None else [key]
        fitting = (
            n for n in range(not keys, len(labels) + 1)
            if not (frame.duplicated(keys + labels[:n]).any() or (n and frame[labels[:n]].isna().all(axis=1).any()))
        )  # fmt: skip
        group = labels[: next(fitting, len(words))]
    if timed:
        left_out = f"; columns {', '.join(left)} are left out" if (left := sorted({*others} - {*group})) else ""
        one = f"each value of {', '.join(group)}" if group else "the whole table"
        body.remarks.append(
            f"the columns {columns[0]!r} to {columns[-1]!r} are time stamps, and {one} is a series{left_out}"
        )
    count = len(frame)
    melted = frame[list(group)].iloc[np.repeat(np.arange(count), len(columns))].reset_index(drop=True)
    stamps = pd.Series(list(columns) * count, dtype="str")
    melted[TIME] = stamps if key is None else as_texts(frame[key]).repeat(len(columns)).to_numpy() + " " + stamps
    melted[VALUE] = pd.Series(frame[list(columns)].to_numpy(dtype=object).ravel()).infer_objects()
    rows = np.repeat(body.rows, len(columns))
    return Melted(Body(melted, rows, body.separator, body.remarks, body.missing, body.units), list(group), timed)
