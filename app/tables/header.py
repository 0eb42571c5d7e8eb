"""Find the column names and the rows below them in a sheet that may also have titles, notes, units and totals."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from app.tables import TableError, times
from app.tables.files import Sheet
from app.tables.numbers import Column

MAX_HEADER_ROWS = 3
MAX_TITLE_ROWS = 30  # largest number of rows above the header
SAMPLE_ROWS = 60  # number of rows that are compared with the first row, to decide whether the first row holds names
MAX_NOTES = 1000
MAX_TOTALS = 0.1  # largest share of rows with totals; if more rows look like totals, they are kept as values
TOTAL = (
    r"(?i)(?:(?:grand|sub)[- ]?)?(?:totals?|sums?|summen?|gesamt(?:summe)?|insgesamt|zwischensumme|averages?|avg\.?|"
    r"mean|mittelwert|durchschnitt|ytd|count|min(?:imum)?|max(?:imum)?)(?:\W.*)?"
)
# Words in the names of columns that hold time stamps or parts of them.
WORDS = {
    "year": "year years yr yyyy jahr année año anno ano rok",
    "month": "yearmonth yyyymm month months mm mon monat mois mes mese mês month_num",
    "quarter": "quarter qtr quartal trimestre",
    "week": "yearweek yyyyww week weeks wk kw woche semaine semana settimana isoweek weekno",
    "day": "day dd tag jour día dia giorno dom",
    "hour": "hour hr stunde heure hora ora hh",
    "minute": "minute minut minuto minuta",
    "second": "second sekunde seconde segundo secondo",
    "clock": "time uhrzeit zeit",
    "time": "date dates datum datetime timestamp timestamps ts ds period periode epoch unix t step fecha horodatage "
    "when zeitpunkt zeitstempel",
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
        missing: the words of --missing.
        empty: the row numbers of rows without a filled cell; they are left out.
    """

    frame: pd.DataFrame
    rows: np.ndarray
    separator: str
    remarks: list[str]
    missing: Collection[str] = ()
    empty: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    columns: dict[str, Column] = field(default_factory=dict)

    def column(self, name: str) -> Column:
        """Return the parsed cells of a column."""
        if name not in self.columns:
            self.columns[name] = Column(self.frame[name], self.missing)
        return self.columns[name]

    def keep(self, rows: pd.Series) -> None:
        """Drop all rows for which ``rows`` is false."""
        if not rows.all():
            self.frame, self.rows = self.frame[rows].reset_index(drop=True), self.rows[rows.to_numpy()]
            self.columns = {}

    def restore_empty_rows(self) -> None:
        """Insert the rows without a filled cell among the other rows. Blank lines have no cell and stay left out."""
        between = self.empty[(self.empty > self.rows.min()) & (self.empty < self.rows.max())]
        if len(between):
            rows = np.sort(np.concatenate([self.rows, between]))
            self.frame = self.frame.set_index(self.rows).reindex(rows).reset_index(drop=True)
            self.rows, self.columns = rows, {}
            self.remarks.append(f"{len(between)} empty rows are missing values, the first is row {between[0]}")

    def example(self, name: str) -> str:
        """Return the first filled cell of a column."""
        cells = self.frame[name][~self.column(name).missing]
        return str(cells.iloc[0]) if len(cells) else ""


def role(name: str) -> str:
    """Return the role of a column by its name: a key of WORDS, or an empty string."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-zà-ÿ])(?=[A-Z])", " ", name).lower())
    if not all(word in ROLE for word in words):
        words = [word for word in words if len(word) > 2]  # in rain_mm, mm is not the month
    roles = [ROLE[word] for word in words if word in ROLE]
    return next((own for own in roles if own in ("time", "clock")), roles[0] if roles else "")


def text_of(cell: Any) -> str:
    """Return a cell as text: whole numbers without decimals, dates at midnight without the time of day."""
    if pd.isna(cell):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).removesuffix(" 00:00:00")


def locate(sheet: Sheet, header: int | None = None, missing: Collection[str] = ()) -> Body:
    """Split a sheet into header and body.

    ``header``: row number of the column names; 0 if there are no names; None to detect the row.

    Raises:
        TableError: there is no header, or it is ambiguous.
    """
    cells, remarks = sheet.cells, list(sheet.remarks)
    counts = sheet.counts
    filled_rows = cells.notna().any(axis=1)
    if sheet.names is not None:
        names, start = sheet.names, 0
    else:
        if not filled_rows.any():
            raise TableError("has no cells with values")
        if header is None:
            names, start = _detect(sheet, remarks)
        elif header == 0:
            names, start = [f"column {at}" for at in range(1, cells.shape[1] + 1)], 0
        elif header in cells.index[filled_rows]:
            start = int(cells.index.get_indexer(pd.Index([header]))[0]) + 1
            names = [text_of(cell) for cell in cells.loc[header]]
        else:
            raise TableError(f"--header {header}: the file has no such row with cells")
    cells = cells.iloc[start:]
    if not filled_rows.iloc[start:].any():
        raise TableError(f"has no rows below its column names: {', '.join(filter(None, names))[:80]}")
    names = _aligned(cells, names, sheet.separator, None if counts is None else counts[start:])
    cells.columns = names
    cells = cells.loc[:, [bool(name) or bool(cells.iloc[:, at].notna().any()) for at, name in enumerate(names)]]
    if repeated := [name for name, count in Counter(cells.columns).items() if count > 1]:
        shown = ", ".join(map(repr, repeated))[:80]
        raise TableError(f"column names must be unique; {shown} occurs more than once; rename or delete one")
    body = Body(cells.reset_index(drop=True), cells.index.to_numpy(), sheet.separator, remarks, missing)
    filled = body.frame.notna().any(axis=1)
    body.empty = body.rows[~filled]
    body.keep(filled)
    copies = body.frame.iloc[:, 0].isin([body.frame.columns[0]])
    for at in np.flatnonzero(copies).tolist():
        copies.iloc[at] = list(map(text_of, body.frame.loc[at])) == list(body.frame.columns)
    if copies.any():
        remarks.append(
            f"row {body.rows[copies.argmax()]} repeats the header: {int(copies.sum())} such rows are left out"
        )
        body.keep(~copies)
    _drop_notes(body)
    return body


def _aligned(cells: pd.DataFrame, names: list[str], separator: str, counts: np.ndarray | None) -> list[str]:
    """Return one name for each column.

    The language R writes a column of row numbers that has no name in the header. Such a header gets an empty first
    name.

    Raises:
        TableError: a row has a filled cell beyond the header, or all rows are shorter than the header.
    """
    width = max((at + 1 for at, name in enumerate(names) if name), default=len(names))
    if counts is not None and separator.strip() and counts.max() < width and all(names[counts.max() : width]):
        raise TableError(
            f"the header has {width} names, but no row has more than {counts.max()} cells; put quotes around names "
            "that contain the separator, or delete the names without cells"
        )
    beyond = cells.iloc[:, width:].notna().any(axis=1)
    if counts is not None and (counts == width + 1).all() and beyond.any() and _counts(cells.iloc[:, 0]):
        return ["", *names[:-1]]
    if beyond.any():
        hint = "; if the extra comma is a decimal comma, save the file with semicolons" if separator == "," else ""
        row = cells.index[int(beyond.argmax())]
        count = int(np.flatnonzero(cells.loc[row].notna())[-1]) + 1
        raise TableError(
            f"row {row} has {count} cells, but the header has {width}; put quotes around cells that contain the "
            f"separator{hint}"
        )
    return names


def _counts(cells: pd.Series) -> bool:
    return bool((pd.to_numeric(cells, errors="coerce").diff().iloc[1:] == 1).all())


def _detect(sheet: Sheet, remarks: list[str]) -> tuple[list[str], int]:
    """Return the names of the columns, and the position of the first row below them."""
    head = sheet.cells[sheet.cells.notna().any(axis=1)].iloc[: MAX_TITLE_ROWS + SAMPLE_ROWS]
    position = sheet.cells.index.get_indexer(head.index).tolist()
    rows = head.astype(object).where(head.notna(), None).to_numpy().tolist()
    kind = times.kinds(cell for row in rows for cell in row)
    kinds = [[kind[cell] for cell in row] for row in rows]
    filled = [_filled(row, own) for row, own in zip(rows, kinds, strict=True)]
    long = sorted(count for count in filled if count >= max(filled) / 2)
    typical = long[len(long) // 2]
    needed = max(min(2, typical), math.ceil(typical / 2))
    first = next((at for at, count in enumerate(filled[:MAX_TITLE_ROWS]) if count >= needed), 0)
    texts = [  # a row of texts below a longer row is not a header
        at
        for at in range(first, min(MAX_TITLE_ROWS, len(rows)))
        if filled[at] >= needed and not _is_data(kinds[at]) and (at == first or filled[at] >= max(filled[:at]))
    ]
    if not texts:
        names, below = _without_texts(sheet, rows[first:], kinds[first:], head.index[first], remarks)
        return names, position[first] + below
    data = next((at for at in range(texts[0] + 1, len(rows)) if _is_data(kinds[at])), None)
    if data is None:
        problem = "no column of numbers; its columns are" if len(rows) > first + 1 else "no rows below its column names"
        raise TableError(f"has {problem}: {', '.join(filter(None, map(text_of, rows[texts[0]])))[:80]}")
    first = data - 1
    while first > 0 and data - first < MAX_HEADER_ROWS and _continues(rows, kinds, filled, first, typical):
        first -= 1
    if first:
        remarks.append(f"{first} rows before the header are left out, the first in row {head.index[0]}")
    return _joined(rows[first:data]), position[data]


def _is_data(kinds: Sequence[str]) -> bool:
    return any(kind in kinds for kind in "ntc")


def _filled(row: Sequence[Any], kinds: Sequence[str]) -> int:
    """Return the number of filled cells. The first column may have no name, so its cell counts if all others do."""
    filled = sum(kind != "." for kind in kinds)
    last = max((at + 1 for at, kind in enumerate(kinds) if kind != "."), default=0)
    return last if kinds[0] == "." and filled == last - 1 else filled


def _continues(rows: Sequence[Any], kinds: Sequence[Any], filled: Sequence[int], at: int, typical: int) -> bool:
    """Return whether the row above row ``at`` also holds names: row ``at`` alone has repeated or missing names."""
    if filled[at - 1] < min(2, filled[at]):  # a title
        return False
    if any(
        kind in "tc" or (kind == "n" and not _is_year(cell))
        for cell, kind in zip(rows[at - 1], kinds[at - 1], strict=True)
    ):
        return False
    names = [text_of(cell) for cell in rows[at] if not pd.isna(cell)]
    units = sum(
        re.fullmatch(r"[\[(].{1,12}[\])]|%|°.?|[kMm]?[A-Za-z]{1,2}|[A-Z]{3}|yyyy.*", name) is not None for name in names
    )
    above = 3 <= typical <= filled[at - 1]
    return len(set(names)) < len(names) or filled[at] < typical or above or units > len(names) / 2


def _joined(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Join several header rows into one name per column. A blank in an upper row repeats the cell to its left."""
    frame = pd.DataFrame(rows, dtype=object).map(text_of).replace("", None)
    frame.iloc[:-1] = frame.iloc[:-1].ffill(axis=1)
    return [" ".join(dict.fromkeys(frame[at].dropna())) for at in frame]


def _without_texts(
    sheet: Sheet, rows: Sequence[Sequence[Any]], kinds: Sequence[Sequence[str]], number: int, remarks: list[str]
) -> tuple[list[str], int]:
    """Return names for a table whose first row has numbers or dates, and the number of header rows, 0 or 1.

    Raises:
        TableError: it is unclear whether the first row holds names, such as years, or values.
    """
    first, names = kinds[0], [text_of(cell) for cell in rows[0]]
    below = kinds[1 : 1 + SAMPLE_ROWS]
    usual = [Counter(row[at] for row in below if row[at] != ".").most_common(1) for at in range(len(first))]
    agrees = all(not one or own == "." or own == one[0][0] for own, one in zip(first, usual, strict=True))
    values = pd.to_numeric(
        pd.Series([cell for cell, own in zip(rows[0], first, strict=True) if own == "n"]), errors="coerce"
    )
    years = all(map(_is_year, values))
    sequence = len(values) > 1 and values.diff().iloc[1:].nunique() == 1 and values.iloc[0] != values.iloc[1]
    sequence = sequence and (years and first[0] in "s." if len(values) == 2 else years or not agrees)
    if sequence or (not agrees and (first.count("t") + first.count("c") >= 2 or first.count("s") >= len(first) / 2)):
        return names, 1
    width = sum(1 for _ in itertools.dropwhile(lambda own: own == ".", reversed(first)))
    if len(sheet.comment) == width > 1 and agrees:
        return [*sheet.comment, *[""] * (len(first) - width)], 0
    if agrees and "t" in first and below:
        remarks.append("the first row holds values: the columns are named by their numbers")
        return [f"column {at}" for at in range(1, len(first) + 1)], 0
    raise TableError(
        f"the first row must hold column names, but holds numbers: {', '.join(names)[:80]}; use --header 0 if the "
        f"file has no names, or --header {number} if these are the names"
    )


def _is_year(cell: Any) -> bool:
    return re.fullmatch(r"(1[6-9]|2[01])\d\d(\.0)?", str(cell)) is not None


def _drop_notes(body: Body) -> None:
    """Drop rows of notes (a single filled cell, with text), rows of totals, and lines such as ``---,---``.

    Other rows of missing values, such as ``NA,NA``, are kept, because each row may be a time step. A table with only
    one column keeps all its rows.
    """
    frame = body.frame
    if frame.shape[1] < 2:
        return
    count = frame.notna().sum(axis=1)
    lines = count.gt(0) & (frame.isna() | frame.isin(["---"])).all(axis=1)
    dropped = count == 1
    if dropped.sum() > MAX_NOTES:  # these rows have a time stamp and no value
        dropped[:] = False
    total = pd.Series(False, frame.index)
    for cells in (frame[name] for name in frame.columns[:2]):
        if isinstance(cells.dtype, pd.StringDtype) or cells.dtype == object:
            total |= cells.astype("str").str.fullmatch(TOTAL).fillna(False).astype(bool)
    if total.sum() <= max(3, MAX_TOTALS * len(frame)):
        dropped |= total
    rows = frame[dropped & ~lines]
    rows = rows.astype(object).where(rows.notna(), None)
    kind = times.kinds(cell for row in rows.itertuples(index=False) for cell in row)
    for at, *row in rows.itertuples(name=None):
        texts = [cell for cell in row if kind[cell] == "s"]
        first = next((kind[cell] for cell in row if kind[cell] != "."), "")
        if first == "s" and "t" not in map(kind.get, row):  # the rows of a series called Total have time stamps
            body.remarks.append(f"row {body.rows[at]} is left out: {texts[0][:60]!r}")
        else:
            dropped[at] = False
    body.keep(~(dropped | lines))
