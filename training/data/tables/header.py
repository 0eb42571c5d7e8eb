"""Find the column names and the rows below them in a sheet that may also have titles, notes, units and totals."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from training.data.datasets import DataError
from training.data.tables import numbers, timestamps
from training.data.tables.files import Sheet
from training.data.tables.numbers import is_missing

MAX_HEADER_ROWS = 3
MAX_TITLE_ROWS = 30  # largest number of rows above the header
MAX_TOTALS = 0.1  # largest share of rows with totals; if more rows look like totals, they are kept as values
UNIT_NAME = re.compile(
    r"[\[(].{1,12}[\])]|%|°.?|(k|M|G|m|c|µ)?(W|Wh|g|l|L|m|s|Pa|V|A|Hz|bar|t)\b.{0,4}|[A-Z]{3}|yyyy.*|dd.*|[€$£]"
)
SAMPLE_ROWS = 60  # number of rows that are compared with the first row, to decide whether the first row holds names
TOTAL = re.compile(
    r"(?:(?:grand|sub)[- ]?)?(?:totals?|sums?|summen?|gesamt(?:summe)?|insgesamt|zwischensumme|averages?|avg\.?|mean|"
    r"mittelwert|durchschnitt|moyenne|somme|suma|ytd|count|min(?:imum)?|max(?:imum)?)\b.*",
    re.IGNORECASE,
)
# Words in the names of columns that hold time stamps or parts of them.
WORDS = {
    "year": "year years yr yyyy jahr année annee año anio anno ano rok",
    "month": "yearmonth yyyymm month months mm mon monat mois mes mese mês miesiąc month_num",
    "quarter": "quarter qtr quartal trimestre",
    "week": "yearweek yyyyww week weeks wk kw woche semaine semana settimana isoweek weekno",
    "day": "day dd tag jour día dia giorno dom",
    "hour": "hour hr stunde heure hora ora hh",
    "minute": "minute minut minuto minuta",
    "second": "second sekunde seconde segundo secondo",
    "clock": "time uhrzeit zeit heure hora",
    "time": "date dates datum datetime timestamp timestamps ts ds period periode epoch unix t step fecha horodatage "
    "dato päivä when wann zeitpunkt zeitstempel",
}
ROLE = {word: role for role, words in WORDS.items() for word in words.split()}
INDEX_NAME = re.compile(
    r"index|id|no\.?|nr\.?|#|obs|observation|rownames|unnamed: 0(\.\d+)?", re.IGNORECASE
)  # names of columns that may number the rows


@dataclass
class Body:
    """The rows of a table below its header.

    ``frame``: the cells; None if a cell is empty. Its columns have the names of the header. Its index states the place
    of each row in the file. Rows without a filled cell are left out; ``empty`` has their numbers.
    ``header_cells``: the cells of the header as read from the file. They may be dates.
    """

    path: Path
    frame: pd.DataFrame
    header_cells: list[Any]
    delimiter: str
    remarks: list[str]
    empty: Sequence[int] = ()

    def restore_empty_rows(self) -> None:
        """Insert the rows without a filled cell among the other rows. Blank lines have no cell and stay left out."""
        first, last = self.frame.index.min(), self.frame.index.max()
        if between := [row for row in self.empty if first < row < last]:
            self.frame = self.frame.reindex(sorted([*self.frame.index, *between]))
            self.remarks.append(f"{len(between)} empty rows are missing values, the first is row {between[0]}")

    def error(self, problem: str) -> DataError:
        """Return an error whose message has the path of the file and the problem."""
        return DataError(f"{self.path}{' ' if problem.startswith('has ') else ': '}{problem}")


def kind(cell: Any) -> str:
    """Return the kind of a cell: ``.`` if missing, ``n`` for a number, ``t`` for a time, ``s`` for anything else."""
    if is_missing(cell):
        return "."
    return "t" if timestamps.is_time(cell) or timestamps.is_clock(cell) else "n" if numbers.is_number(cell) else "s"


def locate(path: Path, sheet: Sheet, header: int | None = None) -> Body:
    """Split a sheet into header and body.

    ``header``: row number of the column names; 0 if there are no names; None to detect the row.

    Raises:
        DataError: there is no header, or it is ambiguous.
    """
    numbered = zip(sheet.numbers, sheet.rows, strict=True)
    rows = [(number, row) for number, row in numbered if any(cell is not None for cell in row)]
    remarks = list(sheet.remarks)
    if not rows:
        raise DataError(f"{path} has no cells with values")
    if header is None:
        names, titles, below = _detect(path, rows, remarks)
    else:
        names, titles, below = _given(path, rows, header)
    if not below:
        raise DataError(f"{path} has no rows below its column names: {', '.join(names)[:80]}")
    below, names, titles = _aligned(path, below, names, titles, sheet.delimiter)
    frame = pd.DataFrame([row for _, row in below], index=[number for number, _ in below], columns=names, dtype=object)
    keep = [at for at, name in enumerate(names) if name or frame.iloc[:, at].notna().any()]
    frame, titles = frame.iloc[:, keep], [titles[at] for at in keep]
    repeated = [name for name, count in Counter(frame.columns).items() if count > 1]
    if repeated:
        shown = ", ".join(map(repr, repeated))[:80]
        raise DataError(f"{path}: column names must be unique; {shown} occurs more than once; rename or delete one")
    copies = (frame == pd.Series(titles, index=frame.columns, dtype=object)).all(axis=1)
    if copies.any():
        remarks.append(f"row {copies.idxmax()} repeats the header: {int(copies.sum())} such rows are left out")
    frame = frame[~copies]
    empty = sorted(
        {number for number, row in zip(sheet.numbers, sheet.rows, strict=True) if row} - {n for n, _ in rows}
    )
    return Body(path, _without_notes(frame, remarks), titles, sheet.delimiter, remarks, empty)


def _given(path: Path, rows: Sequence[tuple[int, list[Any]]], header: int) -> tuple[list[str], list[Any], Any]:
    if header == 0:
        width = max(len(row) for _, row in rows)
        names = [f"column {at}" for at in range(1, width + 1)]
        return names, list(names), rows
    for at, (number, row) in enumerate(rows):
        if number == header:
            return [name_of(cell) for cell in row], list(row), rows[at + 1 :]
    raise DataError(f"{path}: --header {header}: the file has no such row with cells")


def _detect(
    path: Path, rows: Sequence[tuple[int, list[Any]]], remarks: list[str]
) -> tuple[list[str], list[Any], list[tuple[int, list[Any]]]]:
    """Return the names of the columns, the cells of the header as read, and the rows below the header."""
    kinds = [[kind(cell) for cell in row] for _, row in rows[: MAX_TITLE_ROWS + SAMPLE_ROWS]]
    filled = [_filled(row) for _, row in rows]
    longest = max(filled)
    long = sorted(count for count in filled if count >= longest / 2)
    typical = long[len(long) // 2]
    needed = max(min(2, typical), math.ceil(typical / 2))
    first = next((at for at, count in enumerate(filled[:MAX_TITLE_ROWS]) if count >= needed), 0)
    above = [max([0, *filled[:at]]) for at in range(len(kinds))]  # a row of texts below a longer row is not a header
    texts = [
        at
        for at in range(first, min(MAX_TITLE_ROWS, len(kinds)))
        if filled[at] >= needed and not _is_data(kinds[at]) and (at == first or filled[at] >= above[at])
    ]
    if _is_data(kinds[first]) and not texts:
        return _with_numbers(path, rows[first:], kinds[first:], remarks)
    data = next((at for at in range(texts[0] + 1, len(kinds)) if _is_data(kinds[at])), None)
    if data is None:
        shown = ", ".join(name_of(cell) for cell in rows[texts[0]][1])
        problem = (
            "has no column of numbers; its columns are"
            if len(rows) > first + 1
            else "has no rows below its column names"
        )
        raise DataError(f"{path} {problem}: {shown[:80]}")
    first = header = data - 1
    while (
        first > 0
        and data - first < MAX_HEADER_ROWS
        and _are_names(rows[first - 1][1])
        and _continues(rows, filled, first, typical)
    ):
        first -= 1
    if first:
        remarks.append(f"{first} rows before the header are left out, the first in row {rows[0][0]}")
    names = _joined([row for _, row in rows[first:data]])
    return names, list(rows[header][1]) if first == header else list(names), list(rows[data:])


def _filled(row: Sequence[Any]) -> int:
    """Return the number of filled cells.

    If only the first cell is empty, it counts as filled, because the first column may have no name. If at least
    three cells are filled and all hold the same text, such as a merged title, they count as one.
    """
    texts = [str(cell) for cell in row if not is_missing(cell)]
    if len(texts) >= 3 and len(set(texts)) == 1:
        return 1
    return len(row) if len(texts) == len(row) - 1 and is_missing(row[0]) else len(texts)


def _continues(rows: Sequence[tuple[int, list[Any]]], filled: Sequence[int], at: int, typical: int) -> bool:
    """Return whether the row above row ``at`` also holds names.

    The row above holds names if row ``at`` has repeated names, mostly units, or fewer cells than a typical row. It also
    holds names if it has at least as many cells as a typical row. If it has a single cell, it is a title instead.
    """
    names = [name_of(cell) for cell in rows[at][1]]
    known = [name for name in names if name]
    if filled[at - 1] < 2 and filled[at] > 1:
        return False
    units = sum(bool(UNIT_NAME.fullmatch(name)) for name in known)
    return (
        len(set(known)) < len(known) or filled[at] < typical or units > len(known) / 2 or 3 <= typical <= filled[at - 1]
    )


def _are_names(row: Sequence[Any]) -> bool:
    """Return whether each cell is empty, a text or a year. For example, a header may have years above quarters."""
    return all(kind(cell) in ".s" or re.fullmatch(r"(19|20)\d\d", name_of(cell)) for cell in row)


def _is_data(kinds: Sequence[str]) -> bool:
    return "n" in kinds or "t" in kinds


def _with_numbers(
    path: Path, rows: Sequence[tuple[int, list[Any]]], kinds: Sequence[Sequence[str]], remarks: list[str]
) -> tuple[list[str], list[Any], list[tuple[int, list[Any]]]]:
    """Decide whether the first row, which has numbers or dates, holds names (such as years) or values.

    Return the same as ``_detect``. Raises DataError if it is unclear whether the row holds names or values.
    """
    first, below = kinds[0], kinds[1 : 1 + SAMPLE_ROWS]
    numbers_in_first = [cell for cell, own in zip(rows[0][1], first, strict=True) if own == "n"]
    columns = range(len(first))
    usual = [Counter(row[at] for row in below if at < len(row) and row[at] != ".").most_common(1) for at in columns]
    agrees = [not one or own == "." or own == one[0][0] for own, one in zip(first, usual, strict=True)]
    sequence = len(numbers_in_first) >= 2 and _is_sequence(numbers_in_first)
    if len(numbers_in_first) == 2:  # two numbers count as a sequence only if they are years
        sequence = sequence and _are_years(numbers_in_first) and first[0] == "s"
    names = [name_of(cell) for cell in rows[0][1]]
    if "t" in first and first.count("t") >= 2 and not all(agrees):
        return names, list(rows[0][1]), list(rows[1:])
    if sequence and (not all(agrees) or _are_years(numbers_in_first)):
        return names, list(rows[0][1]), list(rows[1:])
    if not all(agrees) and first.count("s") >= len(first) / 2:  # then 2024 is a name, too
        return names, list(rows[0][1]), list(rows[1:])
    if all(agrees) and "t" in first and below:
        remarks.append("the first row holds values: the columns are named by their numbers")
        return *_given(path, rows, 0)[:2], list(rows)
    shown = ", ".join(names)[:80]
    raise DataError(
        f"{path}: the first row must hold column names, but holds numbers: {shown}; use --header 0 if the file has no "
        f"names, or --header {rows[0][0]} if these are the names"
    )


def _is_sequence(cells: Sequence[Any]) -> bool:
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        return False
    return len({later - earlier for earlier, later in itertools.pairwise(values)}) == 1 and values[0] != values[1]


def _are_years(cells: Sequence[Any]) -> bool:
    low, high = timestamps.YEARS
    return all(low <= float(cell) <= high and float(cell).is_integer() for cell in cells)


def name_of(cell: Any) -> str:
    """Return the name of a column as text, from a header cell that may be a date or a number."""
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    text = str(cell)
    return text.removesuffix(" 00:00:00")


def role(name: str) -> str:
    """Return the role of a column by its name: a key of WORDS, or an empty string."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-zà-ÿ])(?=[A-Z])", " ", name).lower())
    if not all(word in ROLE for word in words):
        words = [word for word in words if len(word) > 2]  # in rain_mm, mm is not the month
    roles = [ROLE[word] for word in words if word in ROLE]
    return next((own for own in roles if own in ("time", "clock")), roles[0] if roles else "")


def _joined(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Join several header rows into one name per column. A blank in an upper row repeats the cell to its left."""
    width = max(map(len, rows))
    parts: list[list[str]] = [[] for _ in range(width)]
    for depth, row in enumerate(rows):
        last = ""
        for at in range(width):
            name = name_of(row[at]) if at < len(row) else ""
            last = name or (last if depth < len(rows) - 1 else "")
            if last and last not in parts[at]:
                parts[at].append(last)
    return [" ".join(part) for part in parts]


def _aligned(
    path: Path, below: Sequence[tuple[int, list[Any]]], names: list[str], titles: list[Any], delimiter: str
) -> tuple[list[tuple[int, list[Any]]], list[str], list[Any]]:
    """Return the rows, the names and the titles, all with the same length. Only empty cells at the end are cut.

    The language R writes a column of row numbers that has no name in the header. Such a header gets an empty first
    name.

    Raises:
        DataError: a row has a filled cell beyond the header, or all rows are shorter than the header.
    """
    while names and not names[-1] and all(len(row) < len(names) or row[len(names) - 1] is None for _, row in below):
        names, titles = names[:-1], titles[:-1]
    widest = max(len(row) for _, row in below)
    if delimiter.strip() and widest < len(names) and all(names[widest:]):
        raise DataError(
            f"{path}: the header has {len(names)} names, but no row has more than {widest} cells; put quotes around "
            "names that contain the separator, or delete the names without cells"
        )
    longer = [(number, row) for number, row in below if any(cell is not None for cell in row[len(names) :])]
    if longer and len(longer) == len(below):
        index = [row[0] for _, row in below]
        counted = all(isinstance(cell, str) and re.fullmatch(r"\d+", cell) for cell in index)
        extra = {sum(cell is not None for cell in row[len(names) :]) for _, row in below}
        if (
            counted
            and extra == {1}
            and [int(cell) for cell in index] == list(range(int(index[0]), int(index[0]) + len(index)))
        ):
            names, titles, longer = ["", *names], [None, *titles], []
    if longer:
        number, row = longer[0]
        hint = "; if the extra comma is a decimal comma, save the file with semicolons" if delimiter == "," else ""
        raise DataError(
            f"{path}: row {number} has {len(row)} cells, but the header has {len(names)}; put quotes around cells that "
            f"contain the separator{hint}"
        )
    width = len(names)
    return [(number, [*row[:width], *[None] * (width - len(row))]) for number, row in below], names, titles[:width]


def _without_notes(frame: pd.DataFrame, remarks: list[str]) -> pd.DataFrame:
    """Drop rows of notes (a single filled cell, with text), rows of totals, and lines such as ``---,---``.

    Other rows of missing values, such as ``NA,NA``, are kept, because each row may be a time step. A table with only
    one column keeps all its rows.
    """
    if frame.shape[1] < 2:
        return frame
    dropped = []
    for row, cells in zip(frame.index, frame.itertuples(index=False, name=None), strict=True):
        texts = [cell for cell in cells if isinstance(cell, str) and not is_missing(cell)]
        filled = sum(not is_missing(cell) for cell in cells)
        noted = texts and (filled == 1 or (any(map(TOTAL.fullmatch, texts[:2])) and "t" not in map(kind, cells)))
        if noted and kind(next(cell for cell in cells if not is_missing(cell))) == "s":
            dropped.append((row, texts[0]))
        elif filled == 0 and all(cell in (None, "---") for cell in cells):
            dropped.append((row, ""))
    totals = [row for row, text in dropped if TOTAL.fullmatch(text)]
    if len(totals) > max(3, MAX_TOTALS * len(frame)):  # so many rows are no totals, but a series with such a name
        dropped = [(row, text) for row, text in dropped if row not in set(totals)]
    for row, text in dropped:
        if text:
            remarks.append(f"row {row} is left out: {text[:60]!r}")
    return frame.drop(index=[row for row, _ in dropped])
