"""Find the column names and the rows below them in a sheet that may also have lines above the names, and totals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from app.tables import TableError
from app.tables.files import Sheet
from app.tables.numbers import MISSING, UNIT, Column, written
from app.tables.times import are_times

SAMPLE_ROWS = 90  # number of rows among which the names and the first row of values must be
TOTAL = (
    r"(?:(?:grand|sub)[- ]?)?(?:totals?|sums?|summen?|gesamt(?:summe)?|insgesamt|zwischensumme|averages?|avg\.?|mean|"
    r"mittelwert|durchschnitt|ytd|count|min(?:imum)?|max(?:imum)?)(?:\W.*)?"
)
YEAR = r"(1[6-9]|2[01])\d\d"
# Words in the names of columns that hold time stamps or parts of them.
WORDS = {
    "year": "year years yr yyyy jahr",
    "month": "yearmonth yyyymm month months mm mon monat month_num",
    "quarter": "quarter qtr quartal",
    "week": "yearweek yyyyww week weeks wk kw woche isoweek weekno",
    "day": "day dd tag",
    "hour": "hour hr stunde hh",
    "minute": "minute",
    "second": "second sekunde",
    "clock": "time uhrzeit zeit",
    "time": "date dates datum datetime timestamp timestamps ts ds period epoch unix t step when zeitstempel",
}
ROLE = {word: role for role, words in WORDS.items() for word in words.split()}


@dataclass
class Body:
    """The rows of a table below its header.

    Attributes:
        frame: the cells, numbered from 0; NaN if a cell is empty. Its columns have the names of the header.
        rows: the row numbers of the file.
        separator: the separator of a text file; "" for other files.
        remarks: texts about how the file was read.
        missing, units: the texts of --missing and --unit.
    """

    frame: pd.DataFrame
    rows: np.ndarray
    separator: str
    remarks: list[str]
    missing: Collection[str] = ()
    units: Collection[str] = ()
    columns: dict[str, Column] = field(default_factory=dict)

    def column(self, name: str) -> Column:
        """Return the parsed cells of a column."""
        if name not in self.columns:
            self.columns[name] = Column(self.frame[name], self.missing, self.units)
        return self.columns[name]

    def texts(self, name: str) -> pd.Series:
        """Return the cells of a column as texts; NaN for missing cells."""
        return as_texts(self.frame[name].mask(self.column(name).missing))

    def keep(self, rows: pd.Series) -> None:
        """Drop all rows for which ``rows`` is false."""
        if not rows.all():
            self.frame, self.rows = self.frame[rows].reset_index(drop=True), self.rows[rows.to_numpy()]
            self.columns = {}

    def totals(self) -> pd.Series:
        """Return whether the first or second cell of each row is a word such as Total."""
        texts = self.frame.iloc[:, :2].astype("str")
        return texts.apply(lambda cells: cells.str.fullmatch(TOTAL, case=False)).any(axis=1)


def role(name: str) -> str:
    """Return the role of a column by its name: a key of WORDS, or an empty string."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-zà-ÿ])(?=[A-Z])", " ", name).lower())
    if not all(word in ROLE for word in words):
        words = [word for word in words if len(word) > 2]  # in rain_mm, mm is not the month
    roles = [ROLE[word] for word in words if word in ROLE]
    return next((own for own in roles if own in ("time", "clock")), roles[0] if roles else "")


def as_texts(cells: pd.Series) -> pd.Series:
    """Return cells as texts: whole numbers without decimals, dates at midnight without the time of day."""
    if cells.dtype.kind == "f" and (cells.dropna() % 1 == 0).all():
        cells = cells.astype("Int64")
    texts = cells.astype("str").where(cells.notna())
    return texts.str.replace(r"^(\d{4}-\d\d-\d\d) 00:00:00$|^(-?\d+)\.0$", r"\1\2", regex=True)


def locate(
    sheet: Sheet, header: Sequence[int] | None, missing: Collection[str] = (), units: Collection[str] = ()
) -> Body:
    """Split a sheet into header and body.

    ``header``: row numbers of the column names; [0] if there are no names; None to detect the row.

    Raises:
        TableError: there is no header, or it is ambiguous.
    """
    cells = sheet.cells
    filled = cells.notna().any(axis=1)
    if not filled.any():
        raise TableError("has no cells with values")
    if sheet.names is not None:
        names, start = sheet.names, 0
    elif header == [0]:
        names, start = [f"column {at}" for at in range(1, cells.shape[1] + 1)], 0
    else:
        at = [_detect(cells[filled].iloc[:SAMPLE_ROWS])] if header is None else header
        if not set(at) <= {*cells.index[filled]}:
            raise TableError(f"--header {' '.join(map(str, at))}: the file has no such row with cells")
        texts = cells.loc[list(at)].apply(as_texts)
        texts.iloc[:-1] = texts.iloc[:-1].ffill(axis=1)  # a blank in an upper row repeats the cell to its left
        names = [" ".join(dict.fromkeys(texts[column].dropna())) for column in texts]
        start = int(cells.index.get_indexer(pd.Index(at[-1:]))[0]) + 1
        if above := int(filled.iloc[: start - len(at)].sum()):
            sheet.remarks.append(f"{above} rows before the header are left out, the first in row {filled.idxmax()}")
    cells = cells.iloc[start:]
    if not filled.iloc[start:].any():
        raise TableError(f"has no rows below its column names: {', '.join(filter(None, names))[:80]}")
    width = max((at + 1 for at, name in enumerate(names) if name), default=0)
    beyond = cells.iloc[:, width:].notna().any(axis=1)
    if beyond.any():
        row = cells.index[int(beyond.to_numpy().argmax())]
        count = int(np.flatnonzero(cells.loc[row].notna())[-1]) + 1
        raise TableError(
            f"row {row} has {count} cells, but the header has {width}; put quotes around cells that contain the "
            "separator, or choose another --separator or --header; if the extra comma is a decimal comma, save the "
            "file with semicolons"
        )
    if max(sheet.widths[cells.index[0] - 1 :], default=width) < width:
        raise TableError(
            f"the header has {width} names, but no row has so many cells; put quotes around names that contain the "
            "separator, or delete the names without cells"
        )
    cells.columns = names
    cells = cells.loc[:, [bool(name) or bool(cells.iloc[:, at].notna().any()) for at, name in enumerate(names)]]
    if repeated := [name for name, count in Counter(cells.columns).items() if count > 1]:
        shown = ", ".join(map(repr, repeated))[:80]
        raise TableError(
            f"column names must be unique; {shown} occurs more than once; rename or delete one, or join the names of "
            "several rows, such as --header 1 2"
        )
    cells = cells[~(cells.isna() | (cells == "---")).all(axis=1) | cells.isna().all(axis=1)]  # a line between rows
    frame = cells.reset_index(drop=True)
    return Body(frame.infer_objects(), cells.index.to_numpy(), sheet.separator, sheet.remarks, missing, units)


def kinds(cells: pd.Series) -> pd.Series:
    """Return the kind of each cell: ``.`` for missing, ``n`` for a number, ``t`` for a time, ``s`` for other texts."""
    texts = as_texts(cells)
    result = pd.Series("s", cells.index, dtype="object")
    result[[not isinstance(cell, str) or bool(written(cell) or UNIT.fullmatch(cell)) for cell in cells]] = "n"
    result[are_times(texts)] = "t"
    result[texts.isna() | texts.str.lower().isin(MISSING)] = "."
    return result


def _detect(head: pd.DataFrame) -> int:
    """Return the number of the row with the column names.

    It is the row above the first row that has a number or a time stamp in a column of numbers or time stamps. Or it is
    the first row with a text and a sequence of years or times, such as 2020, 2021, 2022.

    Raises:
        TableError: the names may be in several rows, or there may be no names.
    """
    stacked: Any = head.astype(object).stack(future_stack=True)
    kind: pd.DataFrame = kinds(stacked).unstack()
    kind = kind.reindex(index=head.index, columns=head.columns)
    counts = [Counter(kind[at][kind[at] != "."]) for at in kind]
    usual = [max(own, key=lambda one: (own[one], one != "s"), default="s") for own in counts]
    typed = (kind == usual) & kind.isin(["n", "t"])
    data = typed.any(axis=1)
    if not data.any():
        rows = head.index[(kind == "s").sum(axis=1) == (kind == "s").sum(axis=1).max()]
        names = ", ".join(map(str, head.loc[rows[0]].dropna()))[:80]
        problem = "no column of numbers; its columns are" if len(head) > 1 else "no rows below its column names"
        raise TableError(f"has {problem}: {names}")
    position = int(data.to_numpy().argmax())
    first, choice = head.index[position], "--header 0 if the file has no names, or --header N if row N has the names"
    if _are_names(head.iloc[position], kind.iloc[position]):
        return int(first)
    own = head.index[position - 1] if position else 0
    if not own or not _are_names(head.iloc[position - 1], kind.iloc[position - 1]):
        shown = ", ".join(map(str, head.loc[own or first].dropna()))[:80]
        raise TableError(f"row {own or first} must hold column names, but holds numbers: {shown}; use {choice}")
    count = (kind != ".").sum(axis=1)
    above = head.index[position - 2] if position > 1 else -1
    if above == own - 1 and kind.loc[above].isin(["s", "."]).all() and count[above] >= max(2, count[own] / 2):
        raise TableError(
            f"rows {above} and {own} may hold column names; use --header {own}, or --header {above} {own} to join the "
            "names of both rows"
        )
    if count[own] < count[first] / 2:
        raise TableError(f"row {own} has fewer names than row {first} has cells; use {choice}")
    return int(own)


def _are_names(cells: pd.Series, kinds: pd.Series) -> bool:
    """Return whether the cells of a row are names: only texts, or a text and at least three times or two years."""
    numbers = as_texts(cells[kinds == "n"])
    is_text = bool(kinds.iloc[0] in "s.") and len(numbers) + (kinds == "t").sum() > 1 + (not len(numbers))
    years = numbers.str.fullmatch(YEAR).all() and numbers.is_unique
    return is_text and bool(years) if len(numbers) or (kinds == "t").any() else True
