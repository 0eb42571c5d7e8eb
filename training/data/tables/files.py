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
from pathlib import Path
from typing import Any

import pandas as pd

from training.data import encodings
from training.data.datasets import DataError
from training.data.tables import numbers, timestamps
from training.data.tables.numbers import is_missing

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
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
# Letters and signs of Western European texts. Other letters suggest that the encoding is not cp1252.
WESTERN = set("ÄÖÜäöüßÀÂÇÈÉÊËÎÏÔÙÛàâçèéêëîïôùûŒœÆæÑñÁÍÓÚáíóúÃÕãõÅåØøìòÌÒ€£¥°§µ·–—‘’“”„…²³½¼¾×±«»©®º\xa0")
COMMENT = re.compile(r'\s*"?\s*(#(?![A-Z]{1,5}/|[,;\t|])|//)')  # the beginning of a comment
NUMBERED_ROW = re.compile(r'\s*"?\s*#\d+"?\s*[,;\t|]')  # the beginning of a row whose first cell is # and a number
SAMPLE_LINES = 300  # number of lines at the beginning of a file from which the delimiter is detected
MIN_SHEET_ROWS = 3  # a sheet holds a table if it has at least this many rows with numbers or dates
INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u200e\u200f\u2060\0"))


@dataclass(frozen=True)
class Sheet:
    """The cells of a table.

    Attributes:
        rows: the cells of each row. A cell is a text, a typed value from Excel or Parquet, or None if it is empty.
        numbers: for each row, its number in the file, from 1.
        delimiter: the delimiter of a text file; "" for other files.
        described: how the file was read, such as "text (utf-8), comma-separated".
        remarks: texts that tell the user what was left out.
    """

    rows: list[list[Any]]
    numbers: list[int]
    delimiter: str
    described: str
    remarks: list[str]


def read_sheet(path: Path, sheet: str | None = None, encoding: str | None = None) -> Sheet:
    """Read the cells of a file; its format is detected from its content.

    Raises:
        DataError: the file cannot be read, or ``sheet`` or ``encoding`` is missing or does not fit the file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    try:
        for magic, decompress in COMPRESSED.items():
            content = decompress(content) if content.startswith(magic) else content
    except DAMAGED as error:
        raise DataError(f"{path} is compressed but damaged: {error}") from error
    for magic, problem in REJECTED.items():
        if content.lstrip().startswith(magic) and not BRACKETED.match(content.lstrip()):
            raise DataError(f"{path} {problem}")
    if content.startswith(b"PAR1"):
        return _read_parquet(path, content)
    if content.startswith(b"PK\x03\x04"):
        return _read_zip(path, content, sheet, encoding)
    if sheet is not None:
        raise DataError(f"{path} is no Excel file, so it has no sheet {sheet!r}; omit --sheet")
    return _read_text(path, content, encoding)


def _read_zip(path: Path, content: bytes, sheet: str | None, encoding: str | None) -> Sheet:
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if "xl/workbook.xml" in names:
            return _read_excel(path, content, sheet)
        if len(names) == 1:
            return _read_text(path, archive.read(names[0]), encoding)
    except (zipfile.BadZipFile, KeyError, RuntimeError, *DAMAGED) as error:  # RuntimeError: the archive is encrypted
        raise DataError(f"{path} is a damaged or encrypted ZIP or Excel file: {error}") from error
    raise DataError(f"{path} is a ZIP archive of {len(names)} files; unpack it and name one file (Excel: .xlsx only)")


def _read_parquet(path: Path, content: bytes) -> Sheet:
    try:
        frame = pd.read_parquet(io.BytesIO(content))
    except ImportError as error:
        raise DataError(f"{path} is a Parquet file: install pyarrow, or save the table as CSV") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is a damaged Parquet file: {error}") from error
    # An index of integers without a name only numbers the rows.
    frame = frame.reset_index(drop=frame.index.name is None and pd.api.types.is_integer_dtype(frame.index.dtype))
    nested = [
        name for name in frame if frame[name].dtype == object and frame[name].map(pd.api.types.is_list_like).any()
    ]
    frame = frame.drop(columns=nested)
    for name in [name for name in frame if isinstance(frame[name].dtype, pd.PeriodDtype)]:
        frame[name] = frame[name].dt.to_timestamp()
    remarks = [f"column {str(name)!r} holds lists, so it is left out" for name in nested]
    cells = frame.astype(object).where(frame.notna(), None)
    rows = [[str(name) for name in frame.columns], *map(list, cells.itertuples(index=False, name=None))]
    return Sheet(rows, list(range(1, len(rows) + 1)), "", "Parquet", remarks)


# --- Excel


def _read_excel(path: Path, content: bytes, name: str | None) -> Sheet:
    import openpyxl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # openpyxl warns about styles and extensions
        try:
            book = openpyxl.load_workbook(io.BytesIO(content), data_only=True)
        except Exception as error:  # openpyxl does not document its errors; damaged files raise many kinds
            raise DataError(f"{path} is a damaged Excel file: {error}; save it again, or as CSV") from error
    sheets = {sheet.title: sheet for sheet in book.worksheets}
    if name is not None and name not in sheets:
        raise DataError(f"{path} has no sheet {name!r}; its sheets are: {', '.join(sheets)}")
    tables = [title for title, sheet in sheets.items() if sheet.sheet_state == "visible" and _holds_table(sheet)]
    if name is None and len(tables) > 1:
        options = " or ".join(f"--sheet {title!r}" for title in tables)
        raise DataError(f"{path} has several sheets with tables; choose one: {options}")
    name = name or next(iter(tables or sheets))
    sheet = sheets[name]
    rows = _cells(sheet)
    if any(cell is None for row in rows for cell in row):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            formulas = openpyxl.load_workbook(io.BytesIO(content))[name]
        for row, values in zip(formulas.iter_rows(), rows, strict=False):
            for cell, value in zip(row, values, strict=False):
                stored = sheet.cell(cell.row, cell.column)  # of type "str" if the result is an empty text
                if cell.data_type == "f" and value is None and stored.value is None and stored.data_type != "str":
                    raise DataError(
                        f"{path}: cell {cell.coordinate} of sheet {name!r} holds the formula {str(cell.value)[:40]!r} "
                        "without a stored value; open the file in Excel and save it"
                    )
    others = [title for title in sheets if title != name]
    remarks = [f"sheet {name!r} is read; left out: {', '.join(map(repr, others))}"] if others else []
    return Sheet(rows, list(range(1, len(rows) + 1)), "", f"Excel, sheet {name!r}", remarks)


def _cells(sheet: Any) -> list[list[Any]]:
    """Return the values of a worksheet.

    The value of a merged cell is repeated in all cells that were merged. If the merged cell spans all columns, as a
    title does, only the first cell has the value.
    """
    rows = [[_cleaned(value) for value in row] for row in sheet.iter_rows(values_only=True)]
    for merged in sheet.merged_cells.ranges:
        if merged.max_col - merged.min_col + 1 < sheet.max_column or sheet.max_column == 1:
            value = rows[merged.min_row - 1][merged.min_col - 1]
            for row, column in ((r, c) for r, c, *_ in merged.cells):
                rows[row - 1][column - 1] = value
    return rows


def _holds_table(sheet: Any) -> bool:
    rows = (row for row in sheet.iter_rows(values_only=True))
    filled = sum(any(value is not None and not isinstance(value, str) for value in row) for row in rows)
    texts = (value for row in sheet.iter_rows(values_only=True) for value in row if isinstance(value, str))
    return filled >= MIN_SHEET_ROWS or sum(numbers.is_number(value) for value in texts) >= 2 * MIN_SHEET_ROWS


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.translate(INVISIBLE).split()) or None
    return value


# --- text


def _read_text(path: Path, content: bytes, encoding: str | None) -> Sheet:
    text, encoding = decode(path, content, encoding)
    if not text.strip():
        raise DataError(f"{path} is empty")
    lines = text.splitlines(keepends=True)
    remarks: list[str] = []
    if match := re.match(r"sep=(.)\s*$", lines[0]):  # a line such as sep=; tells Excel the delimiter
        delimiter: str | None = match[1]
        lines[0] = "\n"
    else:
        delimiter = None
    lines = _without_comments(lines, remarks)
    if delimiter is None:
        delimiter = _delimiter([line for line in lines if line.strip()][:SAMPLE_LINES])
    try:
        numbered = list(_split(lines, delimiter))
    except csv.Error as error:  # for example a cell of more than 131,072 characters
        raise DataError(f"{path} is not a CSV file: {error}") from error
    rows = [[_cleaned(cell) for cell in row] for _, row in numbered]
    described = f"text ({encoding}), {DELIMITERS.get(delimiter, 'spaces' if delimiter == ' ' else delimiter)}-separated"
    return Sheet(rows, [number for number, _ in numbered], delimiter, described, remarks)


def decode(path: Path, content: bytes, encoding: str | None = None) -> tuple[str, str]:
    """Return the text of a file, and its encoding.

    If ``encoding`` is None, it is detected: UTF-8, UTF-16, UTF-32, or cp1252 if the text is Western European.

    Raises:
        DataError: the given encoding is unknown or does not fit, or the encoding cannot be detected.
    """
    detected = encodings.detected(content)
    chosen = encoding or detected or "utf-8"
    try:
        return content.decode(chosen), chosen.removesuffix("-sig")
    except LookupError as error:
        raise DataError(f"--encoding {encoding}: Python knows no such encoding") from error
    except UnicodeDecodeError as error:
        place = f"byte 0x{content[error.start]:02x} at byte offset {error.start:,}"
        if encoding or detected:
            raise DataError(f"{path} is not {chosen}: {place}; choose another --encoding") from error
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            text = None
        if text is None or not {character for character in text if character > "\x7f"} <= WESTERN or _foreign(text):
            raise DataError(
                f"{path} is not UTF-8: {place}; give its encoding, for example --encoding cp1250, cp1251, cp437, "
                "mac_roman or shift_jis"
            ) from error
        return text, "cp1252"


def _foreign(text: str) -> bool:
    """Return whether three accented letters follow each other, which shows that a text is not Western European."""
    return re.search("[À-ÿ]{3}", text) is not None


def _without_comments(lines: Sequence[str], remarks: list[str]) -> list[str]:
    """Replace comments (lines that begin with ``#`` or ``//``) by empty lines.

    The last comment before the table is kept if it holds the column names. If most lines begin with ``#`` and a whole
    number, such as the number of an order, these lines are no comments.
    """
    comments = [at for at, line in enumerate(lines) if COMMENT.match(line)]
    numbered = [at for at in comments if NUMBERED_ROW.match(lines[at])]
    if 2 * len(numbered) > sum(map(bool, map(str.strip, lines))):
        comments = sorted({*comments} - {*numbered})
    first = next((at for at, line in enumerate(lines) if line.strip() and at not in set(comments)), len(lines))
    result = list(lines)
    before = [at for at in comments if at < first]
    if before and first < len(lines):
        header = re.sub(r"^\s*#+\s*", "", lines[before[-1]])
        delimiter = _delimiter([line for line in lines[first:] if line.strip()][:SAMPLE_LINES])
        header = delimiter.join(header.split()) if delimiter == "  " else header
        cells = [next(iter(_split([line], delimiter)))[1] for line in (header, lines[first])]
        typed = any(numbers.is_number(cell) or timestamps.is_time(cell) for cell in cells[1])
        if len(cells[0]) == len(cells[1]) > 1 and typed:
            result[before[-1]] = header
            comments.remove(before[-1])
    for at in comments:
        result[at] = "\n"
    if comments:
        remarks.append(f"{len(comments)} comment lines are left out, the first in row {comments[0] + 1}")
    return result


def _split(lines: Sequence[str], delimiter: str) -> list[tuple[int, list[str]]]:
    """Return the row number and the cells of each row."""
    if delimiter == " ":
        return [(at, line.split()) for at, line in enumerate(lines, 1)]
    if delimiter == "  ":
        return [(at, re.split(r"\s{2,}", line.strip())) for at, line in enumerate(lines, 1)]
    reader, rows, number = csv.reader(lines, delimiter=delimiter, skipinitialspace=True), [], 1
    for row in reader:
        rows.append((number, row))
        number = reader.line_num + 1
    return rows


def _delimiter(sample: Sequence[str]) -> str:
    """Return the delimiter that gives the most rows of the same length, and the most cells with numbers or dates.

    Spaces are tried only if no other delimiter splits the rows. If spaces do not split the rows well, return a comma.
    """

    def score(delimiter: str) -> float:
        try:
            rows = [row for _, row in _split(sample, delimiter) if any(row)]
        except csv.Error:
            return 0.0
        widths = Counter(len(row) for row in rows)
        width, count = max(widths.items(), key=lambda item: (item[1], item[0]), default=(0, 0))
        if width < 2:
            return 0.0
        cells = [cell.strip() for row in rows if len(row) == width for cell in row]
        typed = sum(is_missing(cell) or numbers.is_number(cell) or timestamps.is_time(cell) for cell in cells)
        return count / len(rows) * (0.5 + typed / len(cells))

    scores = {delimiter: score(delimiter) for delimiter in DELIMITERS}
    best = max(scores, key=scores.__getitem__)
    if scores[best] > 0:
        return best
    spaces = {delimiter: score(delimiter) for delimiter in ("  ", " ")}
    best = max(spaces, key=spaces.__getitem__)
    return best if spaces[best] > 1.2 else ","
