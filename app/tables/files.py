"""Read the cells of a file: CSV and other text in any encoding, Excel, Parquet, and compressed files."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from app.tables import TableError
from app.tables.encodings import decode

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
SPACES = {"  ": r"\s{2,}", " ": r"\s+"}  # tried only if no other separator splits the rows
COMPRESSED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
}
REJECTED = {
    b"\xd0\xcf\x11\xe0": "is an old Excel file (.xls) or is encrypted; save it as .xlsx without a password, or as CSV",
    b"\x28\xb5\x2f\xfd": "is compressed with Zstandard; decompress it first",
    b"%PDF": "is a PDF; save the table as CSV",
    b"{": "is JSON; save the table as CSV",
    b"[{": "is JSON; save the table as CSV",
    b"<": "is HTML or XML; save the table as CSV",
}
BRACKETED = re.compile(rb"<[^<>\s/!?]+>[ \t]*[,;\t|]")  # the beginning of a header such as <TICKER>,<DATE>
DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error)  # errors of decompression
COMMENT = re.compile(r'\s*"?\s*(#(?![A-Z]{1,5}/|[,;\t|])|//)')  # the beginning of a comment
TYPED = re.compile(r"\W*[A-Za-z]{0,4}\W*\d[\d\s.,:'/TZ%-]*[A-Za-z]{0,4}\W*\d{0,4}\W*")  # looks like a number or a date
SAMPLE_LINES = 300  # number of lines at the beginning of a file from which the separator is detected
MIN_SHEET_ROWS = 3  # a sheet holds a table if it has at least this many rows with numbers or dates
INVISIBLE = {"\r\n": "\n", "\r": "\n", "\xa0": " ", "\u202f": " ", "\u2009": " "}
INVISIBLE |= dict.fromkeys("\ufeff\u200b\u200e\u200f\u2060\0", "")


@dataclass
class Sheet:
    """The cells of a file.

    Attributes:
        cells: texts, or typed values from Excel and Parquet; NaN if empty. The index has the row numbers of the file.
        described: how the file was read, such as "text (utf-8), comma-separated".
        remarks: texts that tell the user what was left out.
        separator: the separator of a text file; "" for other files.
        counts: for each row of a text file, its number of cells, or more if cells contain the separator.
        comment: the cells of the last comment above the rows; it may hold the column names.
        names: the column names of a Parquet file; None if the names are among the cells.
    """

    cells: pd.DataFrame
    described: str
    remarks: list[str]
    separator: str = ""
    counts: np.ndarray | None = None
    comment: Sequence[str] = ()
    names: list[str] | None = None


def read_sheet(content: bytes, sheet: str | None = None, encoding: str | None = None) -> Sheet:
    """Read the cells of a file; its format is detected from its content.

    Raises:
        TableError: the file cannot be read, or ``sheet`` or ``encoding`` is missing or does not fit the file.
    """
    try:
        for magic, decompress in COMPRESSED.items():
            content = decompress(content) if content.startswith(magic) else content
    except DAMAGED as error:
        raise TableError(f"is compressed but damaged: {error}") from error
    start = content[:4096].lstrip()
    for magic, problem in REJECTED.items():
        if start.startswith(magic) and not BRACKETED.match(start):
            raise TableError(problem)
    if content.startswith(b"PAR1"):
        return _read_parquet(content)
    if content.startswith(b"PK\x03\x04"):
        try:
            archive = zipfile.ZipFile(io.BytesIO(content))
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if "xl/workbook.xml" in names:
                return _read_excel(content, sheet)
            if len(names) == 1:
                return _read_text(archive.read(names[0]), encoding)
        except (zipfile.BadZipFile, KeyError, RuntimeError, *DAMAGED) as error:  # RuntimeError: encrypted
            raise TableError(f"is a damaged or encrypted ZIP or Excel file: {error}") from error
        raise TableError(f"is a ZIP archive of {len(names)} files; unpack it and name one file (Excel: .xlsx only)")
    if sheet is not None:
        raise TableError(f"is no Excel file, so it has no sheet {sheet!r}; omit --sheet")
    return _read_text(content, encoding)


def _read_parquet(content: bytes) -> Sheet:
    try:
        frame = pd.read_parquet(io.BytesIO(content))
    except ImportError as error:
        raise TableError("is a Parquet file: install pyarrow, or save the table as CSV") from error
    except (OSError, ValueError) as error:
        raise TableError(f"is a damaged Parquet file: {error}") from error
    # An index of integers without a name only numbers the rows.
    frame = frame.reset_index(drop=frame.index.name is None and pd.api.types.is_integer_dtype(frame.index.dtype))
    nested = [name for name in frame if frame[name].map(pd.api.types.is_list_like).any()]
    frame = frame.drop(columns=nested)
    for name in [name for name in frame if isinstance(frame[name].dtype, pd.PeriodDtype)]:
        frame[name] = frame[name].dt.to_timestamp()
    remarks = [f"column {str(name)!r} holds lists, so it is left out" for name in nested]
    names = list(map(str, frame))
    frame.columns, frame.index = pd.RangeIndex(frame.shape[1]), pd.RangeIndex(2, len(frame) + 2)
    return Sheet(frame, "Parquet", remarks, names=names)


def _read_excel(content: bytes, name: str | None) -> Sheet:
    import openpyxl

    def load(**options: bool) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # openpyxl warns about styles and extensions
            return openpyxl.load_workbook(io.BytesIO(content), **options)

    try:
        book = load(data_only=True)
    except Exception as error:  # openpyxl does not document its errors; damaged files raise many kinds
        raise TableError(f"is a damaged Excel file: {error}; save it again, or as CSV") from error
    sheets = {sheet.title: sheet for sheet in book.worksheets}
    if name is not None and name not in sheets:
        raise TableError(f"has no sheet {name!r}; its sheets are: {', '.join(sheets)}")
    tables = [title for title, sheet in sheets.items() if sheet.sheet_state == "visible" and _holds_table(sheet)]
    if name is None and len(tables) > 1:
        options = " or ".join(f"--sheet {title!r}" for title in tables)
        raise TableError(f"has several sheets with tables; choose one: {options}")
    name = name or next(iter(tables or sheets))
    sheet = sheets[name]
    frame = _stripped(pd.DataFrame(sheet.values, dtype=object))
    frame.index += 1
    if frame.isna().any(axis=None):
        for cell in (cell for row in load()[name].iter_rows() for cell in row if cell.data_type == "f"):
            stored = sheet.cell(cell.row, cell.column)  # of type "str" if the result is an empty text
            if stored.value is None and stored.data_type != "str":
                raise TableError(
                    f"cell {cell.coordinate} of sheet {name!r} holds the formula {str(cell.value)[:40]!r} without a "
                    "stored value; open the file in Excel and save it"
                )
    others = [title for title in sheets if title != name]
    remarks = [f"sheet {name!r} is read; left out: {', '.join(map(repr, others))}"] if others else []
    return Sheet(frame, f"Excel, sheet {name!r}", remarks)


def _holds_table(sheet: Any) -> bool:
    return sum(any(not isinstance(v, str | None) for v in row) for row in sheet.values) >= MIN_SHEET_ROWS


def _stripped(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the cells without spaces around texts; NaN for cells without text."""
    if all(pd.api.types.is_object_dtype(dtype) for dtype in frame.dtypes):
        return frame.map(lambda cell: (cell.strip() or None) if isinstance(cell, str) else cell)
    return frame.apply(lambda cells: cells.str.strip()).replace("", None)


def _read_text(content: bytes, encoding: str | None) -> Sheet:
    text, encoding = decode(content, encoding)
    for sign, replacement in INVISIBLE.items():
        text = text.replace(sign, replacement)
    lines = text.split("\n")
    first = re.fullmatch(r"sep=(.)\s*", lines[0])  # a line such as sep=; tells Excel the separator
    filled = [at for at, line in enumerate(lines) if line.strip() and not (at == 0 and first)]
    comments = [at for at in filled if COMMENT.match(lines[at])]
    if 2 * len(comments) > len(filled):  # the first cells are numbers of orders, such as #1001
        comments = []
    left_out = set(comments)
    numbers = [at for at in filled if at not in left_out]
    if not numbers:
        raise TableError("is empty" if not filled else "has no cells with values")
    rows = [lines[at] for at in numbers]
    separator = first[1] if first else _separator(rows[:SAMPLE_LINES])
    above = [re.sub(r"^\W+", "", lines[at]) for at in comments if at < numbers[0]][-1:]
    described = (
        f"text ({encoding}), {SEPARATORS.get(separator, 'spaces' if separator in SPACES else separator)}-separated"
    )
    if separator in SPACES:
        rows = [re.sub(SPACES[separator], "\t", line.strip()) for line in rows]
        above = [re.sub(r"\s+", "\t", line) for line in above]
    split = "\t" if separator in SPACES else separator
    counts = np.array([line.count(split) + 1 for line in rows])
    try:
        frame = pd.read_csv(
            io.StringIO("\n".join(rows)), sep=split, header=None, names=range(counts.max()), dtype=str,
            keep_default_na=False, na_values=[""], skipinitialspace=True, skip_blank_lines=False, index_col=False,
        )  # fmt: skip
    except (pd.errors.ParserError, ValueError) as error:
        raise TableError(f"is not a CSV file: {str(error).strip()}") from error
    if len(frame) == len(numbers):
        frame.index = np.array(numbers) + 1
    else:  # a cell in quotes has several lines
        frame.index, counts = np.arange(1, len(frame) + 1), np.full(len(frame), counts.max())
    remarks = []
    if comments:
        remarks.append(f"{len(comments)} comment lines are left out, the first in row {comments[0] + 1}")
    comment = above[0].split(split) if above else []
    return Sheet(_stripped(frame), described, remarks, separator, counts, comment)


def _separator(sample: Sequence[str]) -> str:
    """Return the separator that gives the most rows of the same length, and the most cells with numbers or dates.

    Spaces are tried only if no other separator splits the rows. If spaces do not split the rows well, return a comma.
    """

    def score(separator: str) -> float:
        try:
            pattern = SPACES.get(separator)
            rows = [re.split(pattern, line.strip()) for line in sample] if pattern else list(
                csv.reader(sample, delimiter=separator, skipinitialspace=True))  # fmt: skip
        except csv.Error:
            return 0.0
        rows = [row for row in rows if any(row)]
        widths = Counter(map(len, rows))
        width, count = max(widths.items(), key=lambda item: (item[1], item[0]), default=(0, 0))
        if width < 2:
            return 0.0
        cells = [cell.strip() for row in rows if len(row) == width for cell in row]
        typed = sum(not cell or TYPED.fullmatch(cell) is not None for cell in cells)
        return count / len(rows) * (0.5 + typed / len(cells))

    scores = {separator: score(separator) for separator in SEPARATORS}
    if not any(scores.values()):
        scores = {",": 1.2} | {separator: score(separator) for separator in SPACES}
    return max(scores, key=scores.__getitem__)
