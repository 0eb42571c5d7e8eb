"""Read the cells of a file: delimited text in any encoding, Excel, Parquet, and compressed files."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from app.tables.encodings import decode
from app.tables.messages import TableError, choice, option
from app.tables.options import ReadOptions

SEPARATORS = {";": "semicolon", "\t": "tab", "|": "vertical bar", ",": "comma", " ": "spaces"}
REJECTED = {
    b"\xd0\xcf\x11\xe0": "is an old Excel file (.xls) or is encrypted; save it as .xlsx without a password, or as CSV",
    b"\x28\xb5\x2f\xfd": "is compressed with Zstandard; decompress it first",
    b"BZh": "is compressed with bzip2; decompress it first",
    b"\xfd7zXZ": "is compressed with xz; decompress it first",
    b"%PDF": "is a PDF; save the table as CSV",
    b"{": "is JSON; save the table as CSV",
    b"[{": "is JSON; save the table as CSV",
    **dict.fromkeys((b"<!", b"<?", b"<html", b"<HTML", b"<table", b"<TABLE"), "is HTML or XML; save the table as CSV"),
}
SAMPLE_LINES = 300  # number of lines at the beginning of a file from which the separator is detected
MIN_SHEET_ROWS = 3  # a sheet holds a table if it has at least this many rows
MAX_CELL = 200  # characters; longer cells are cut, so that messages with a cell are short
INVISIBLE = {"\r\n": "\n", "\r": "\n", "\xa0": " ", "\u202f": " ", "\u2009": " "}
INVISIBLE |= dict.fromkeys("\ufeff\u200b\u200e\u200f\u2060\0", "")


@dataclass
class Sheet:
    """The cells of a file.

    Attributes:
        cells: texts, or numbers from Excel and Parquet; NaN if empty. The index has the row numbers of the file.
        remarks: texts about how the file was read.
        separator: the separator of a text file; "" for other files.
        names: the column names of a Parquet file; None if the names are among the cells.
        widths: the number of cells in each line of a text file.
    """

    cells: pd.DataFrame
    remarks: list[str]
    separator: str = ""
    names: list[str] | None = None
    widths: Sequence[int] = ()


def read_sheet(content: bytes, options: ReadOptions, max_cells: float = math.inf) -> Sheet:
    """Read the cells of a file; its format is detected from its content.

    Raises:
        TableError: the file cannot be read, an option is missing or does not fit the file, or a sheet has more than
            ``max_cells`` cells.
    """
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        if content.startswith(b"PK\x03\x04"):
            archive = zipfile.ZipFile(io.BytesIO(content))
            members = archive.namelist()
            if "xl/workbook.xml" in members:
                return _read_excel(content, options.sheet, max_cells)
            if len(members) != 1:
                raise TableError(f"is a ZIP archive of {len(members)} files; unpack it, and name one file")
            content = archive.read(members[0])
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise TableError(f"is damaged or encrypted: {error}") from error
    start = content[:4096].lstrip()
    for magic, problem in REJECTED.items():
        if start.startswith(magic):
            raise TableError(problem)
    if content.startswith(b"PAR1"):
        return _read_parquet(content)
    if options.sheet is not None:
        raise TableError(f"is no Excel file, so it has no sheet {options.sheet!r}; omit {option('sheet')}")
    return _read_text(content, options, max_cells)


def _read_parquet(content: bytes) -> Sheet:
    try:
        frame = pd.read_parquet(io.BytesIO(content))
    except (OSError, ValueError) as error:
        raise TableError(f"is a damaged Parquet file: {error}") from error
    # An index of integers without a name only numbers the rows.
    frame = frame.reset_index(drop=frame.index.name is None and pd.api.types.is_integer_dtype(frame.index.dtype))
    names = list(map(str, frame))
    frame.columns, frame.index = pd.RangeIndex(frame.shape[1]), pd.RangeIndex(2, len(frame) + 2)
    return Sheet(_texts(frame), ["read as Parquet"], names=names)


def _read_excel(content: bytes, name: str | None, max_cells: float) -> Sheet:
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
    for sheet in sheets.values():  # one cell in the last row and column makes openpyxl create 10**10 cells
        _check_cells(sheet.max_row, sheet.max_column, max_cells)
    if name is not None and name not in sheets:
        raise TableError(f"has no sheet {name!r}; its sheets are: {', '.join(sheets)}")
    tables = [title for title, sheet in sheets.items()
              if sheet.sheet_state == "visible" and sheet.max_row >= MIN_SHEET_ROWS]  # fmt: skip
    if name is None and len(tables) > 1:
        raise TableError(f"has several sheets with tables; choose one: {choice('sheet', tables)}")
    name = name or next(iter(tables or sheets))
    sheet = sheets[name]
    frame = pd.DataFrame(sheet.values, dtype=object)
    frame.index += 1
    if frame.isna().any(axis=None):
        for cell in (cell for row in load()[name].iter_rows() for cell in row if cell.data_type == "f"):
            stored = sheet.cell(cell.row, cell.column)  # of type "str" if the result is an empty text
            if stored.value is None and stored.data_type != "str":
                raise TableError(
                    f"cell {cell.coordinate} of sheet {name!r} holds the formula {str(cell.value)[:40]!r} without a "
                    "stored value; open the file in Excel and save it"
                )
    others = "".join(f", {title!r}" for title in sheets if title != name)
    return Sheet(_texts(frame), [f"read as Excel, sheet {name!r}" + (f"; left out{others}" if others else "")])


def _check_cells(rows: int, columns: int, most: float) -> None:
    """Raise TableError for too many cells. A table has at least 1,000 rows here, because each column takes long."""
    if max(rows, 1000) * columns > most:
        raise TableError(
            f"has {rows:,} rows of {columns:,} cells; the maximum is {most:,} cells, counting at least 1,000 rows"
        )


def _texts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the cells as numbers and texts without spaces around them. Empty texts become NaN."""

    def text(cell: Any) -> Any:
        is_number = isinstance(cell, int | float) and not isinstance(cell, bool)
        return cell if is_number or cell is None else str(cell).strip()[:MAX_CELL] or None

    for name in frame:
        cells = frame[name]
        if cells.dtype == object:
            frame[name] = cells.map(text)
        elif not pd.api.types.is_numeric_dtype(cells.dtype) or cells.dtype == bool:
            frame[name] = cells.astype("str").str.strip().str.slice(0, MAX_CELL).replace("", None)
    return frame


def _read_text(content: bytes, options: ReadOptions, max_cells: float) -> Sheet:
    text, encoding = decode(content, options.encoding)
    for sign, replacement in INVISIBLE.items():
        text = text.replace(sign, replacement)
    if not text.strip():
        raise TableError("is empty")
    lines = text.rstrip("\n").split("\n")
    separator = options.separator or _separator(
        [line for line in lines[: 3 * SAMPLE_LINES] if line.strip()][:SAMPLE_LINES]
    )
    widths = [len(line.split()) if separator == " " else line.count(separator) + 1 for line in lines]
    _check_cells(len(lines), max(widths), max_cells)
    try:
        frame = pd.read_csv(
            io.StringIO("\n".join(lines)), sep=r"\s+" if separator == " " else separator, header=None,
            names=range(max(widths)), dtype=str, keep_default_na=False, na_values=[""], skipinitialspace=True,
            skip_blank_lines=False, index_col=False,
        )  # fmt: skip
    except (pd.errors.ParserError, ValueError) as error:
        raise TableError(f"is not a CSV file with {option('separator', separator)}: {str(error).strip()}") from error
    frame.index += 1
    if len(frame) == len(lines):  # otherwise, a cell has several lines
        frame = frame[[bool(line.strip()) for line in lines]]  # a line of separators is a row, an empty line is none
    remark = f"read as text ({encoding}), {SEPARATORS.get(separator, separator)}-separated"
    return Sheet(_texts(frame), [remark], separator, widths=widths)


def _separator(sample: Sequence[str]) -> str:
    """Return the separator that gives the most rows of the same length.

    Raises:
        TableError: the cells may be separated by spaces.
    """

    def count(separator: str) -> int:
        try:
            widths = Counter(map(len, csv.reader(sample, delimiter=separator, skipinitialspace=True)))
        except csv.Error:
            return 0
        return max((count for width, count in widths.items() if width > 1), default=0)

    counts = {separator: count(separator) for separator in SEPARATORS if separator != " "}
    best = max(counts, key=counts.__getitem__)
    if not counts[best] and sum(re.search(r"\S\s+\S", line) is not None for line in sample) > len(sample) / 2:
        raise TableError(
            f"may have cells that are separated by spaces; use {option('separator', ' ')}, or "
            f"{option('separator', ',')} for one column"
        )
    return best
