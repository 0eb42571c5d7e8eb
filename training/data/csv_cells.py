"""Rows and cells of a CSV file: delimiter, encoding, and numbers with decimal points or commas."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.data.datasets import DataError

MISSING = {"", "-", "?", "na", "n/a", "nan", "null", "none"}  # cells without a value, in any case

Row = tuple[int, list[str]]  # row number in the file, from 1; cells


def read_rows(path: Path) -> tuple[list[str], list[Row], str]:
    """The header, the non-empty rows below it, and the delimiter: the most frequent of ``,`` ``;`` tab ``|``."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at byte offset {error.start:,}; save it as "
            "UTF-8"
        ) from error
    lines = text.splitlines()
    if not text.strip():
        raise DataError(f"{path} is empty")
    delimiter = max(",;\t|", key=lines[0].count)
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    except csv.Error as error:  # for example a cell of more than 131,072 characters
        raise DataError(f"{path} is not a CSV file: {error}") from error
    header = rows[0]
    if not header:
        raise DataError(f"{path}: the first row must hold column names, but is empty")
    if all(is_number(cell) for cell in header):
        raise DataError(f"{path}: the first row must hold column names, but holds numbers: {', '.join(header)[:80]}")
    if len(set(header)) < len(header):
        raise DataError(f"{path}: column names must be unique; the first row is {', '.join(header)[:80]}")
    numbered = [(number, row) for number, row in enumerate(rows[1:], 2) if any(row)]
    if not numbered:
        raise DataError(f"{path} has no rows below its column names: {', '.join(header)[:80]}")
    return header, numbered, delimiter


def column_cells(at: int, header: Sequence[str], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(place, cell) of one column, from all rows as long as the header."""
    return [(f"row {number}", row[at]) for number, row in rows if len(row) == len(header)]


def parse_number(cell: str, decimal_comma: bool) -> float | None:
    """A finite number, or None. ``decimal_comma``: 1.234,5 instead of 1,234.5.

    Thousands separators must separate groups of three digits, and a number with separators must not begin with 0.
    """
    decimal, thousands = (",", ".") if decimal_comma else (".", ",")
    if re.fullmatch(rf"[+-]?[1-9]\d{{0,2}}([{thousands}]\d{{3}})+([{decimal}]\d*)?", cell):
        cell = cell.replace(thousands, "")
    elif thousands in cell:
        return None
    try:
        number = float(cell.replace(decimal, "."))
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def is_number(cell: str) -> bool:
    return parse_number(cell, False) is not None or parse_number(cell, True) is not None


def uses_decimal_comma(
    path: Path, name: str, cells: Sequence[tuple[str, str]], delimiter: str, remarks: list[str]
) -> bool:
    """Whether a series writes 1,5 for one and a half; ``cells``: (place, cell).

    Unambiguous cells decide. If all are like 1,234 the comma is decimal exactly when semicolons separate the columns.

    Raises:
        DataError: some cells need a decimal comma, others a decimal point.
    """
    separated = [(place, cell) for place, cell in cells if ("," in cell or "." in cell) and is_number(cell)]
    with_comma = [(place, cell) for place, cell in separated if parse_number(cell, False) is None]
    with_point = [(place, cell) for place, cell in separated if parse_number(cell, True) is None]
    if with_comma and with_point:
        (comma_place, comma_cell), (point_place, point_cell) = with_comma[0], with_point[0]
        raise DataError(
            f"{path}: {name} mixes decimal commas ({comma_cell!r} in {comma_place}) and decimal points "
            f"({point_cell!r} in {point_place}); use one of them for all its values"
        )
    if with_comma or with_point:
        return bool(with_comma)
    commas = [(place, cell) for place, cell in separated if "," in cell]
    decimal_comma = bool(commas) and delimiter == ";"
    if commas or (separated and delimiter == ";"):
        place, cell = (commas or separated)[0]
        value = parse_number(cell, decimal_comma)
        remarks.append(f"{name}: {cell!r} in {place} may have decimals or thousands separators; read as {value}")
    return decimal_comma


def is_numeric(at: int, rows: Sequence[Row]) -> bool:
    """Whether more than 90 % of a column's non-missing cells are numbers."""
    cells = [row[at] for _, row in rows if len(row) > at and row[at].lower() not in MISSING]
    return bool(cells) and sum(map(is_number, cells)) > 0.9 * len(cells)
