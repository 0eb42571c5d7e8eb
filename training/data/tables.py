"""The caller's own series: a CSV, wide (a column or a row for each series) or long (a column that names the series).

Time stamps become places on a grid, so that what is missing, what comes twice and what lies between is told by row.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from app.tasks.forecasting import LONGEST_SEASON
from training.data import time_index
from training.data.datasets import DataError
from training.data.time_index import Frequency
from training.loops import distributed

MISSING = {"", "-", "?", "na", "n/a", "nan", "null", "none"}
NUMBERING = re.compile(r"index|id|unnamed: 0(\.\d+)?", re.IGNORECASE)  # columns that may only number the rows
LEAST = 30  # values of a series
LONGEST_GAP = 3  # values that are filled in where there is no season to bridge; longer gaps end a stretch
SHOWN = 12  # remarks on the screen; all are in the run's folder


@dataclass(frozen=True)
class Series:
    """A series without gaps: values [T], float64, and the time of the first, as the table writes it.

    ``known`` [T]: whether the table has a value, or it was filled in.
    """

    name: str
    values: np.ndarray
    start: str
    known: np.ndarray


@dataclass(frozen=True)
class Table:
    """What a CSV holds. ``season``: steps after which it repeats, or 1; ``remarks``: what was mended or left out."""

    name: str
    series: list[Series]
    frequency: str
    season: int
    remarks: list[str]

    @property
    def sha256(self) -> str:
        """Of all values in their order, and of the names."""
        digest = hashlib.sha256()
        for one in self.series:
            digest.update(f"{one.name}\0{len(one.values)}\0".encode() + one.values.tobytes())
        return digest.hexdigest()


@dataclass
class Cells:
    """The cells of one series as they come: row of the file, time stamp or None, value or None where it is missing."""

    rows: list[int] = field(default_factory=list)
    stamps: list[str] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)


def read(
    path: Path,
    columns: Sequence[str] | None = None,
    time: str | None = None,
    group: str | None = None,
    season: int | None = None,
    by_rows: bool = False,
) -> Table:
    """All series of a CSV. ``columns``: those with values, by default all of numbers that do not number the rows.

    ``by_rows``: each row is a series, its first cell the name. Raises DataError.
    """
    if season is not None and not 1 <= season <= LONGEST_SEASON:
        raise DataError(f"--season is {season}; the forecaster reads seasons of 1 to {LONGEST_SEASON} values")
    head, rows, delimiter = _rows(path)
    remarks: list[str] = []
    if by_rows:
        series = {row[0]: _of_row(path, row, head, delimiter, remarks) for _, row in rows}
        return _table(path, series, None, season, remarks)
    for name in [*(columns or ()), *filter(None, (time, group))]:
        if name not in head:
            raise DataError(f"{path} has no column {name!r}; there are: {', '.join(head)}")
    taken = {*(columns or ()), time, group}
    numbering = [name for at, name in enumerate(head) if name not in taken and _numbers_rows(at, head, rows)]
    time = _time_column(head, rows, taken, numbering) if time is None else time  # which may be ""
    columns = columns or _of_numbers(path, head, rows, {time, group}, numbering, remarks)
    commas = {
        name: _decimal_comma(path, name, _column(head.index(name), head, rows), delimiter, remarks) for name in columns
    }
    cells = _cells(head, rows, commas, time, group, remarks)
    frequency = time_index.frequency([own.stamps for own in cells.values()], path) if time is not None else None
    return _table(path, cells, frequency, season, remarks)


def _table(
    path: Path, cells: dict[str, Cells], frequency: Frequency | None, season: int | None, remarks: list[str]
) -> Table:
    """The series of all cells, on their grid and without gaps."""
    parts = {name: _on_grid(name, own, frequency, remarks) for name, own in cells.items()}
    season = season or time_index.season([values for values, _ in parts.values()], frequency)
    series = []
    for name, (values, starts) in parts.items():
        begin, whole = _filled(name, values, max(season, LONGEST_GAP), remarks)
        known = ~np.isnan(values[begin : begin + len(whole)])
        if len(whole) < LEAST:
            remarks.append(f"{name}: {len(whole)} values in one stretch; it takes {LEAST}, so the series is left out")
            continue
        series.append(Series(name, whole, starts[begin], known))
    if not series:
        raise DataError(f"{path}: no series of {LEAST} values or more; {remarks[-1] if remarks else 'it has no rows'}")
    return Table(path.name, series, frequency.name if frequency else "step", season, remarks)


def report(table: Table) -> None:
    """Print what was read, and the first of what was mended or left out."""
    lengths = sorted(len(one.values) for one in table.series)
    long = f"{lengths[0]:,}" if lengths[0] == lengths[-1] else f"{lengths[0]:,} to {lengths[-1]:,}"
    names = ", ".join(one.name for one in table.series[:5]) + (", ..." if len(table.series) > 5 else "")
    season = f"repeats after {table.season}" if table.season > 1 else "no season"
    distributed.say(f"{len(table.series):,} series ({names}) of {long} values, one each {table.frequency}; {season}")
    for remark in table.remarks[:SHOWN]:
        distributed.say(f"  {remark}")
    if len(table.remarks) > SHOWN:
        distributed.say(f"  ... and {len(table.remarks) - SHOWN:,} more, all in remarks.txt of the run's folder")


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], str]:
    """The head, each row with its number in the file, counted from 1, and the delimiter, which is found."""
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start:,}") from error
    lines = text.splitlines()
    if not lines:
        raise DataError(f"{path} is empty")
    delimiter = max(",;\t|", key=lines[0].count)
    try:
        found = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    except csv.Error as error:  # such as a cell of more than 131,072 characters
        raise DataError(f"{path} is no CSV: {error}") from error
    head = found[0]
    if all(_is_number(cell) for cell in head):
        raise DataError(f"{path}: its first row must name the columns, and is {', '.join(head)[:80]}")
    if len(set(head)) < len(head):
        raise DataError(f"{path}: two columns have the same name: {', '.join(head)[:80]}")
    return head, [(number, row) for number, row in enumerate(found[1:], 2) if any(row)], delimiter


def _column(at: int, head: Sequence[str], rows: Sequence[tuple[int, list[str]]]) -> list[tuple[str, str]]:
    """The cells of a column with their places, of all rows that are as long as the head."""
    return [(f"row {number}", row[at]) for number, row in rows if len(row) == len(head)]


def _number(cell: str, comma: bool) -> float | None:
    """A finite number; else None. ``comma``: it stands before decimals and points between thousands, or else reversed.

    Between thousands are none but groups of three digits after one to three others, the first no zero.
    """
    mark, between = (",", ".") if comma else (".", ",")
    if re.fullmatch(rf"[+-]?[1-9]\d{{0,2}}([{between}]\d{{3}})+([{mark}]\d*)?", cell):
        cell = cell.replace(between, "")
    elif between in cell:
        return None
    try:
        number = float(cell.replace(mark, "."))
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _is_number(cell: str) -> bool:
    return _number(cell, False) is not None or _number(cell, True) is not None


def _decimal_comma(path: Path, name: str, cells: Sequence[tuple[str, str]], delimiter: str, remarks: list[str]) -> bool:
    """Whether the comma of a series' cells, each with its place, is decimal: decided by those that read one way only.

    Where all are like 1,234 it is so between semicolons. Raises DataError when cells differ.
    """
    marked = [(place, cell) for place, cell in cells if ("," in cell or "." in cell) and _is_number(cell)]
    decimal = [(place, cell) for place, cell in marked if _number(cell, False) is None]
    pointed = [(place, cell) for place, cell in marked if _number(cell, True) is None]
    if decimal and pointed:
        (place, cell), (other, second) = decimal[0], pointed[0]
        raise DataError(
            f"{path}: {name} is {cell!r} in {place}, which is a number with a decimal comma only, and {second!r} in "
            f"{other}, which is one with a decimal point only: write all in one way"
        )
    if decimal or pointed:
        return bool(decimal)
    commas = [(place, cell) for place, cell in marked if "," in cell]
    comma = bool(commas) and delimiter == ";"
    if commas or (marked and delimiter == ";"):
        place, cell = (commas or marked)[0]
        told = f"nothing tells whether {cell!r} in {place} has decimals or thousands"
        remarks.append(f"{name}: {told}: read as {_number(cell, comma)}")
    return comma


def _is_numeric(at: int, rows: Sequence[tuple[int, list[str]]]) -> bool:
    cells = [row[at] for _, row in rows if len(row) > at and row[at].lower() not in MISSING]
    return bool(cells) and sum(map(_is_number, cells)) > 0.9 * len(cells)


def _of_numbers(
    path: Path,
    head: Sequence[str],
    rows: Sequence[tuple[int, list[str]]],
    taken: set[str | None],
    numbering: Sequence[str],
    remarks: list[str],
) -> list[str]:
    """All columns of numbers but those taken and those that number the rows. Raises DataError when there is none."""
    aside = [name for name in numbering if name not in taken]
    remarks += [f"column {name!r} only numbers the rows: left out, unless --column names it" for name in aside]
    others = [name for name in head if name not in taken and name not in aside]
    found = [name for name in others if _is_numeric(head.index(name), rows)]
    if not found:
        told = "; ".join([f"{path} has no column of numbers", *remarks])
        raise DataError(f"{told}; its columns are: {', '.join(head)}")
    return found


def _numbers_rows(at: int, head: Sequence[str], rows: Sequence[tuple[int, list[str]]]) -> bool:
    """Whether a column is an index, as pandas writes one: its name says so, or it has none, and it counts."""
    if not (NUMBERING.fullmatch(head[at]) or (at == 0 and not head[at])):
        return False
    cells = [cell for _, cell in _column(at, head, rows)]
    if len(cells) < 2 or not all(re.fullmatch(r"-?\d{1,15}", cell) for cell in cells):
        return False
    numbers = sorted(map(int, cells))  # rows may come in any order
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _time_column(
    head: Sequence[str], rows: Sequence[tuple[int, list[str]]], taken: set[str | None], numbering: Sequence[str]
) -> str | None:
    """The first column of time stamps not asked for as something else; one of bare years only beside numbers.

    What numbers the rows may be years, where no other column has time stamps.
    """
    others = [name for name in head if name not in taken and name not in numbering]
    numeric = [name for name in others if _is_numeric(head.index(name), rows)]
    for name in [*others, *numbering]:
        cells = [cell for _, cell in _column(head.index(name), head, rows)]
        some = cells[:50] + cells[-50:]
        stamps = sum(time_index.is_stamp(cell) for cell in some)
        if stamps > 0.9 * len(some) and numeric != [name]:
            return name
    return None


def _cells(
    head: list[str],
    rows: Sequence[tuple[int, list[str]]],
    commas: Mapping[str, bool],
    time: str | None,
    group: str | None,
    remarks: list[str],
) -> dict[str, Cells]:
    """The cells of each series, by its name: the column's, the group's, or both. ``commas``: decimal, by column."""
    found: dict[str, Cells] = {}
    for number, row in rows:
        if len(row) != len(head):
            remarks.append(f"row {number} has {len(row)} cells, the head has {len(head)}: left out")
            continue
        for column, comma in commas.items():
            cell = row[head.index(column)]
            value = _number(cell, comma)
            if value is None and cell.lower() not in MISSING:
                remarks.append(f"row {number}: {column} is {cell[:40]!r}, which is not a number: taken as missing")
            own = row[head.index(group)] if group else column
            own = f"{own} {column}" if group and len(commas) > 1 else own
            cells = found.setdefault(own, Cells())
            cells.rows.append(number)
            cells.stamps.append(row[head.index(time)] if time is not None else str(number))
            cells.values.append(value)
    return found


def _of_row(path: Path, row: Sequence[str], head: Sequence[str], delimiter: str, remarks: list[str]) -> Cells:
    """A series that is a row: what is empty at its end is not missing, but beyond it."""
    cells = list(row[1:])
    while cells and cells[-1].lower() in MISSING:
        cells.pop()
    placed = [(f"column {at}", cell) for at, cell in enumerate(cells, 2)]
    comma = _decimal_comma(path, row[0], placed, delimiter, remarks)
    return Cells(list(range(len(cells))), list(head[1 : len(cells) + 1]), [_number(cell, comma) for cell in cells])


def _on_grid(name: str, cells: Cells, frequency: Frequency | None, remarks: list[str]) -> tuple[np.ndarray, list[str]]:
    """Values [T] at every step, NaN where there are none, and the stamp of each step that has one."""
    if frequency is None:
        return np.array([np.nan if value is None else value for value in cells.values]), cells.stamps
    places: dict[int, tuple[int, str, float | None]] = {}
    for row, stamp, value in zip(cells.rows, cells.stamps, cells.values, strict=True):
        place = frequency.place(stamp)
        if place is None:
            remarks.append(
                f"row {row}: {stamp!r} lies between two steps of a {frequency.name}, or is no time: left out"
            )
            continue
        if place in places:
            other, _, before = places[place]
            told = "both are the same" if before == value else f"{before} and {value}, the later row counts"
            remarks.append(f"{name}: rows {other} and {row} are both of {stamp}: {told}")
        places[place] = (row, stamp, value)
    if not places:
        return np.empty(0), []
    first = min(places)
    values, stamps = np.full(max(places) - first + 1, np.nan), [""] * (max(places) - first + 1)
    before = first
    for place in sorted(places):
        if place > before + 1:
            row, stamp, _ = places[before]
            remarks.append(
                f"{name}: after row {row} ({stamp}) {place - before - 1} steps of a {frequency.name} are missing"
            )
        values[place - first] = np.nan if places[place][2] is None else places[place][2]
        stamps[place - first] = places[place][1]
        before = place
    return values, stamps


def _filled(name: str, values: np.ndarray, longest: int, remarks: list[str]) -> tuple[int, np.ndarray]:
    """The longest stretch without a gap of more than ``longest``, smaller ones filled in straight lines; its begin."""
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return 0, np.empty(0)
    breaks = np.flatnonzero(np.diff(known) > longest + 1)
    edges = zip(np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(known) - 1]]), strict=True)
    first, last = max(((int(known[a]), int(known[b])) for a, b in edges), key=lambda edge: edge[1] - edge[0])
    if len(breaks):
        remarks.append(
            f"{name}: {len(breaks)} gaps of more than {longest} steps; of its stretches the longest, "
            f"{last - first + 1:,} values, is kept"
        )
    part = values[first : last + 1]
    holes = np.isnan(part)
    if holes.any():
        remarks.append(f"{name}: {int(holes.sum())} missing values are filled in straight lines")
        part = np.interp(np.arange(len(part)), np.flatnonzero(~holes), part[~holes])
    return first, part


def lines(table: Table) -> str:
    """The series as they are learnt from, a line of JSON for each."""
    rows = ({"name": one.name, "start": one.start, "values": one.values.tolist()} for one in table.series)
    return "".join(json.dumps(row) + "\n" for row in rows)
