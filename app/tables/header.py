"""Find the column names and the rows below them in a sheet that may also have lines above the names, and totals."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from app.tables.files import Sheet
from app.tables.messages import TableError, option
from app.tables.numbers import Column, written
from app.tables.options import ReadOptions
from app.tables.times import Reading, are_times

SAMPLE_ROWS = 90  # number of rows among which the names and the first row of values must be
TOTAL = (
    r"(?:(?:grand|sub)[- ]?)?(?:totals?|sums?|summen?|gesamt(?:summe)?|insgesamt|zwischensumme|averages?|avg\.?|mean|"
    r"mittelwert|durchschnitt|ytd|count|min(?:imum)?|max(?:imum)?)(?:\W.*)?"
)
YEAR = r"(1[6-9]|2[01])\d\d"
# A name of a column that holds time stamps or parts of them. Short words must be the whole name.
TIME_NAME = (
    r"(?:t|ts|ds|yr|mm|mo|wk|kw|dd|hr|hh)|(?:.*[\W\d_])?(?:(?:year|month|week|day|hour|date|period|timestamp)s?|yyyy|"
    r"year(?:month|week)|yyyy(?:mm|ww)|mon|monat|jahr|quarter|qtr|quartal|woche|isoweek|weekno|tag|stunde|time|uhrzeit|"
    r"zeit|datum|datetime|epoch|unix|step|when|zeitstempel)(?:[\W\d_].*)?"
)


WORDS = {"yes": 1, "ja": 1, "true": 1, "wahr": 1, "no": 0, "nein": 0, "false": 0, "falsch": 0}


@dataclass
class Body:
    """The rows of a table below its header.

    Attributes:
        frame: the cells, numbered from 0; NaN if a cell is empty. Its columns have the names of the header.
        rows: the row numbers of the file.
        separator: the separator of a text file; "" for other files.
        remarks: texts about how the file was read.
        options: the options for reading the table.
    """

    frame: pd.DataFrame
    rows: np.ndarray
    separator: str
    remarks: list[str]
    options: ReadOptions
    columns: dict[str, Column] = field(default_factory=dict)
    readings: dict[str, list[Reading]] = field(default_factory=dict)

    def column(self, name: str) -> Column:
        """Return the parsed cells of a column."""
        if name not in self.columns:
            missing = [text for text in self.options.missing if text != "none"]
            self.columns[name] = Column(self.frame[name], missing)
        return self.columns[name]

    def read_words(self, name: str) -> None:
        """Replace yes by 1 and no by 0 in a column that has only such words."""
        words = self.frame[name].dropna().astype("str").str.lower()
        if len(words) and words.isin(list(WORDS)).all():
            self.frame[name] = words.map(WORDS)
            self.columns.pop(name, None)
            self.remarks.append(f"column {name!r}: {words.iloc[0]} is {WORDS[words.iloc[0]]}")

    def texts(self, name: str) -> pd.Series:
        """Return the cells of a column as texts; NaN for missing cells."""
        return as_texts(self.frame[name].mask(self.column(name).missing))

    def keep(self, rows: pd.Series) -> None:
        """Drop all rows for which ``rows`` is false."""
        if not rows.all():
            self.frame, self.rows = self.frame[rows].reset_index(drop=True), self.rows[rows.to_numpy()]
            self.columns, self.readings = {}, {}

    def leave_out(self, name: str, reason: str) -> None:
        """Say why a column of numbers is not read."""
        self.remarks.append(f"column {name!r} {reason}, so it is left out; {option('column', name)} reads it")

    def empty(self, names: Collection[str] = ()) -> pd.Series:
        """Return whether all cells of each row are missing, except those in the columns ``names``."""
        missing = {name: self.column(name).missing for name in map(str, self.frame) if name not in names}
        return pd.DataFrame(missing, self.frame.index).all(axis=1)

    def totals(self) -> pd.Series:
        """Return whether the first or second cell of each row is a word such as Total."""
        texts = self.frame.iloc[:, :2].astype("str")
        return texts.apply(lambda cells: cells.str.fullmatch(TOTAL, case=False)).any(axis=1)


def is_time_name(name: str) -> bool:
    """Return whether the name of a column says that it holds time stamps or parts of them."""
    return re.fullmatch(TIME_NAME, re.sub(r"(?<=[a-zà-ÿ])(?=[A-Z])", " ", name), re.IGNORECASE) is not None


def as_texts(cells: pd.Series) -> pd.Series:
    """Return cells as texts: whole numbers without decimals, dates at midnight without the time of day."""
    if cells.dtype.kind == "f" and (cells.dropna() % 1 == 0).all():
        cells = cells.astype("Int64")
    texts = cells.astype("str").where(cells.notna())
    return texts.str.replace(r"^(\d{4}-\d\d-\d\d) 00:00:00$|^(-?\d+)\.0$", r"\1\2", regex=True)


def locate(sheet: Sheet, options: ReadOptions) -> Body:
    """Split a sheet into header and body.

    Raises:
        TableError: there is no header, or it is ambiguous.
    """
    cells = sheet.cells
    filled = cells.notna().any(axis=1)
    if not filled.any():
        raise TableError("has no cells with values")
    names, start = sheet.names or [f"column {at}" for at in range(1, cells.shape[1] + 1)], 0
    if sheet.names is None and options.header != 0:
        row = options.header or _detect(cells[filled].iloc[:SAMPLE_ROWS])
        if row not in cells.index[filled]:
            raise TableError(f"{option('header', str(row))}: the file has no such row with cells")
        start = int(cells.index.get_indexer(pd.Index([row]))[0]) + 1
        names = as_texts(cells.iloc[start - 1]).fillna("").tolist()
        if above := int(filled.iloc[: start - 1].sum()):
            sheet.remarks.append(f"{above} rows before the header are left out, the first in row {filled.idxmax()}")
    cells = cells.iloc[start:]
    if not filled.iloc[start:].any():
        raise TableError(f"has no rows below its column names: {', '.join(filter(None, names))[:80]}")
    width = max((at + 1 for at, name in enumerate(names) if name), default=0)
    reach = _reach(cells)
    if reach.max() > width or max(sheet.widths[cells.index[0] - 1 :], default=width) < width:
        raise TableError(
            f"row {reach.idxmax()} has {reach.max()} cells, but the header has {width}; put quotes around cells and "
            f"names that contain the separator, or choose another {option('separator')} or {option('header')}; if the "
            "extra comma is a decimal comma, save the file with semicolons"
        )
    cells.columns = names
    cells = cells.loc[:, [bool(name) or bool(cells.iloc[:, at].notna().any()) for at, name in enumerate(names)]]
    if repeated := sorted({*cells.columns[cells.columns.duplicated()]}):
        shown = ", ".join(map(repr, repeated))[:80]
        raise TableError(
            f"column names must be unique; {shown} occurs more than once; rename or delete one, or write the names of "
            "several rows into one row"
        )
    frame = cells.reset_index(drop=True).infer_objects()
    return Body(frame, cells.index.to_numpy(), sheet.separator, sheet.remarks, options)


def _reach(cells: pd.DataFrame) -> pd.Series:
    """Return the position of the last cell with a value in each row, from 1; 0 for empty rows."""
    return (cells.notna() * np.arange(1, cells.shape[1] + 1)).max(axis=1)


def _detect(head: pd.DataFrame) -> int:
    """Return the number of the row with the column names: the first row that reaches beyond half of the widest row.

    It has only texts, or a text and a sequence of years or times, such as 2020, 2021, 2022.

    Raises:
        TableError: the row holds numbers, or only time stamps.
    """
    width = _reach(head)
    row = (width > width.max() / 2).idxmax()
    names = as_texts(head.loc[row]).astype("str")
    stamps = are_times(names) | names.str.fullmatch(YEAR).eq(True)
    is_number = names.isin([name for name in names.dropna() if written(name)]) & ~stamps
    if is_number.any() or stamps.sum() == 1 or stamps.iloc[0]:
        raise TableError(
            f"row {row} must hold column names, but holds numbers: {', '.join(names.dropna())[:80]}; use "
            f"{option('header', '0')} if the file has no names, or {option('header', 'N')} if row N has the names"
        )
    return int(row)
