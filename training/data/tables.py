"""Your own series: a CSV file is read into evenly spaced series, and every repair is reported with its row.

Layouts: wide (one column per series), rows (one row per series, ``--by-rows``) and long (a column names the series,
``--group``). Time stamps are optional and may come in any order.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from app.tasks.forecasting import MAX_SEASON
from training.data import time_index
from training.data.csv_cells import (
    MISSING,
    Row,
    column_cells,
    is_numeric,
    parse_number,
    read_rows,
    uses_decimal_comma,
)
from training.data.datasets import DataError
from training.data.time_index import Frequency
from training.loops import distributed

INDEX_NAME = re.compile(r"index|id|unnamed: 0(\.\d+)?", re.IGNORECASE)  # of columns that may only number the rows
MIN_LENGTH = 30  # values of a series
MAX_GAP = 3  # missing values in a row that are interpolated; one season if that is longer
MAX_PRINTED_REMARKS = 12  # all remarks are in remarks.txt of the run folder


@dataclass(frozen=True)
class Series:
    """An evenly spaced series without gaps: values float64 [T] and the time stamp of the first value, as written.

    ``known`` bool [T]: False for interpolated values.
    """

    name: str
    values: np.ndarray
    start: str
    known: np.ndarray


@dataclass(frozen=True)
class Table:
    """The series of a CSV file.

    ``frequency``: name of the time step. ``season``: season length in steps, 1 without a season. ``remarks``: all
    repairs and omissions.
    """

    name: str
    series: list[Series]
    frequency: str
    season: int
    remarks: list[str]

    @property
    def sha256(self) -> str:
        """Digest of the names and values of all series, in order."""
        digest = hashlib.sha256()
        for series in self.series:
            digest.update(f"{series.name}\0{len(series.values)}\0".encode() + series.values.tobytes())
        return digest.hexdigest()


@dataclass
class Cells:
    """The cells of one series in file order: row number, time stamp, and value (None if missing)."""

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
    """Read all series of a CSV file.

    ``columns``: the value columns; by default all numeric columns, except those that only number the rows. ``time``:
    the column of time stamps; by default the first that holds some. ``group``: the column that names the series of each
    row. ``season``: the season length in steps; by default estimated. ``by_rows``: each row is a series; its first cell
    is the name.

    Raises:
        DataError: the file cannot be read, or holds no series of MIN_LENGTH values.
    """
    if season is not None and not 1 <= season <= MAX_SEASON:
        raise DataError(f"--season is {season}; allowed are 1 (no season) to {MAX_SEASON} steps")
    header, rows, delimiter = read_rows(path)
    remarks: list[str] = []
    if by_rows:
        series = {row[0]: _cells_of_row(path, row, header, delimiter, remarks) for _, row in rows}
        return _to_table(path, series, None, season, remarks)
    for name in [*(columns or ()), *filter(None, (time, group))]:
        if name not in header:
            raise DataError(f"{path} has no column {name!r}; its columns are: {', '.join(header)}")
    used = {*(columns or ()), time, group}
    index_columns = [
        name for at, name in enumerate(header) if name not in used and _only_numbers_rows(at, header, rows)
    ]
    time = _time_column(header, rows, used, index_columns) if time is None else time  # "" is a valid name
    columns = columns or _numeric_columns(path, header, rows, {time, group}, index_columns, remarks)
    commas = {
        name: uses_decimal_comma(path, name, column_cells(header.index(name), header, rows), delimiter, remarks)
        for name in columns
    }
    cells = _cells_by_series(header, rows, commas, time, group, remarks)
    if not cells:
        raise DataError(f"{path}: no row has as many cells as the header, {len(header)}; {remarks[-1]}")
    frequency = time_index.frequency([own.stamps for own in cells.values()], path) if time is not None else None
    return _to_table(path, cells, frequency, season, remarks)


def _to_table(
    path: Path, cells: dict[str, Cells], frequency: Frequency | None, season: int | None, remarks: list[str]
) -> Table:
    """Put the cells of each series on the time grid, fill gaps, and drop short series."""
    grids = {name: _on_grid(name, own, frequency, remarks) for name, own in cells.items()}
    season = season or time_index.season([values for values, _ in grids.values()], frequency)
    table = []
    for name, (values, stamps) in grids.items():
        start, filled = _fill_gaps(name, values, max(season, MAX_GAP), remarks)
        known = ~np.isnan(values[start : start + len(filled)])
        if len(filled) < MIN_LENGTH:
            remarks.append(f"{name}: {len(filled)} values; at least {MIN_LENGTH} are needed, so the series is left out")
            continue
        table.append(Series(name, filled, stamps[start], known))
    if not table:
        raise DataError(f"{path}: no series has {MIN_LENGTH} values or more; {remarks[-1]}")
    return Table(path.name, table, frequency.name if frequency else "step", season, remarks)


def report(table: Table) -> None:
    """Print a summary of the table and its first remarks."""
    lengths = sorted(len(series.values) for series in table.series)
    length = f"{lengths[0]:,}" if lengths[0] == lengths[-1] else f"{lengths[0]:,} to {lengths[-1]:,}"
    names = ", ".join(series.name for series in table.series[:5]) + (", ..." if len(table.series) > 5 else "")
    season = f"season of {table.season} steps" if table.season > 1 else "no season"
    count = f"{len(table.series):,} series ({names})"
    distributed.print_once(f"{count} of {length} values, one per {table.frequency}; {season}")
    for remark in table.remarks[:MAX_PRINTED_REMARKS]:
        distributed.print_once(f"  {remark}")
    if len(table.remarks) > MAX_PRINTED_REMARKS:
        more = len(table.remarks) - MAX_PRINTED_REMARKS
        distributed.print_once(f"  ... and {more:,} more; all are in remarks.txt in the run folder")


def _numeric_columns(
    path: Path,
    header: Sequence[str],
    rows: Sequence[Row],
    used: set[str | None],
    index_columns: Sequence[str],
    remarks: list[str],
) -> list[str]:
    """All numeric columns except ``used`` and ``index_columns``. Raises DataError if there is none."""
    left_out = [name for name in index_columns if name not in used]
    remarks += [f"column {name!r} only numbers the rows: left out; --column {name!r} reads it" for name in left_out]
    candidates = [name for name in header if name not in used and name not in left_out]
    numeric = [name for name in candidates if is_numeric(header.index(name), rows)]
    if not numeric:
        reasons = "; ".join([f"{path} has no column of numbers", *remarks])
        raise DataError(f"{reasons}; its columns are: {', '.join(header)}")
    return numeric


def _only_numbers_rows(at: int, header: Sequence[str], rows: Sequence[Row]) -> bool:
    """Whether a column is a row index, as pandas writes it: consecutive integers under an index name or no name."""
    if not (INDEX_NAME.fullmatch(header[at]) or (at == 0 and not header[at])):
        return False
    cells = [cell for _, cell in column_cells(at, header, rows)]
    if len(cells) < 2 or not all(re.fullmatch(r"-?\d{1,15}", cell) for cell in cells):
        return False
    numbers = sorted(map(int, cells))  # rows may come in any order
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _time_column(
    header: Sequence[str], rows: Sequence[Row], used: set[str | None], index_columns: Sequence[str]
) -> str | None:
    """The first unused column of time stamps, or None.

    Index columns come last, for they may hold years. The only numeric column holds values, not bare years.
    """
    candidates = [name for name in header if name not in used and name not in index_columns]
    numeric = [name for name in candidates if is_numeric(header.index(name), rows)]
    for name in [*candidates, *index_columns]:
        cells = [cell for _, cell in column_cells(header.index(name), header, rows)]
        sample = cells[:50] + cells[-50:]
        stamps = sum(time_index.is_stamp(cell) for cell in sample)
        if stamps > 0.9 * len(sample) and numeric != [name]:
            return name
    return None


def _cells_by_series(
    header: list[str],
    rows: Sequence[Row],
    commas: Mapping[str, bool],
    time: str | None,
    group: str | None,
    remarks: list[str],
) -> dict[str, Cells]:
    """The cells of each series by its name: the group, the column, or both.

    ``commas``: whether each value column uses a decimal comma.
    """
    series: dict[str, Cells] = {}
    for number, row in rows:
        if len(row) != len(header):
            remarks.append(f"row {number} has {len(row)} cells, but the header has {len(header)}: the row is left out")
            continue
        for column, decimal_comma in commas.items():
            cell = row[header.index(column)]
            value = parse_number(cell, decimal_comma)
            if value is None and cell.lower() not in MISSING:
                remarks.append(f"row {number}: {column} is {cell[:40]!r}, not a number: read as missing")
            name = row[header.index(group)] if group else column
            name = f"{name} {column}" if group and len(commas) > 1 else name
            cells = series.setdefault(name, Cells())
            cells.rows.append(number)
            cells.stamps.append(row[header.index(time)] if time is not None else str(number))
            cells.values.append(value)
    return series


def _cells_of_row(path: Path, row: Sequence[str], header: Sequence[str], delimiter: str, remarks: list[str]) -> Cells:
    """The series of one row. It ends at its last value: empty cells after that are padding."""
    cells = list(row[1:])
    while cells and cells[-1].lower() in MISSING:
        cells.pop()
    placed = [(f"column {at}", cell) for at, cell in enumerate(cells, 2)]
    comma = uses_decimal_comma(path, row[0], placed, delimiter, remarks)
    values = [parse_number(cell, comma) for cell in cells]
    return Cells(list(range(len(cells))), list(header[1 : len(cells) + 1]), values)


def _on_grid(name: str, cells: Cells, frequency: Frequency | None, remarks: list[str]) -> tuple[np.ndarray, list[str]]:
    """One value [T] per time step, NaN if missing, and the time stamp of each ("" if missing)."""
    if frequency is None:
        return np.array([np.nan if value is None else value for value in cells.values]), cells.stamps
    grid: dict[int, tuple[int, str, float | None]] = {}
    for row, stamp, value in zip(cells.rows, cells.stamps, cells.values, strict=True):
        position = frequency.position(stamp)
        if position is None:
            between = f"lies between two time steps (one per {frequency.name})"
            reason = between if time_index.is_stamp(stamp) else "is not a time stamp"
            remarks.append(f"row {row}: {stamp!r} {reason}: the row is left out")
            continue
        if position in grid:
            first_row, _, first_value = grid[position]
            result = "equal values" if first_value == value else f"{first_value} and {value}; row {row} is used"
            remarks.append(f"{name}: rows {first_row} and {row} have the same time stamp {stamp}: {result}")
        grid[position] = (row, stamp, value)
    if not grid:
        return np.empty(0), []
    first = min(grid)
    values, stamps = np.full(max(grid) - first + 1, np.nan), [""] * (max(grid) - first + 1)
    previous = first
    for position in sorted(grid):
        if position > previous + 1:
            row, stamp, _ = grid[previous]
            remarks.append(
                f"{name}: {position - previous - 1} time steps (one per {frequency.name}) are missing after row {row} "
                f"({stamp})"
            )
        values[position - first] = np.nan if grid[position][2] is None else grid[position][2]
        stamps[position - first] = grid[position][1]
        previous = position
    return values, stamps


def _fill_gaps(name: str, values: np.ndarray, max_gap: int, remarks: list[str]) -> tuple[int, np.ndarray]:
    """Split values [T] at gaps longer than ``max_gap`` and keep the longest part; interpolate shorter gaps.

    Returns the start of that part and its values.
    """
    known = np.flatnonzero(~np.isnan(values))
    if not len(known):
        return 0, np.empty(0)
    breaks = np.flatnonzero(np.diff(known) > max_gap + 1)
    edges = zip(np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(known) - 1]]), strict=True)
    first, last = max(((int(known[a]), int(known[b])) for a, b in edges), key=lambda edge: edge[1] - edge[0])
    if len(breaks):
        remarks.append(
            f"{name}: {len(breaks)} gaps are longer than {max_gap} steps; only the longest part between them, "
            f"{last - first + 1:,} values, is used"
        )
    part = values[first : last + 1]
    missing = np.isnan(part)
    if missing.any():
        remarks.append(f"{name}: {int(missing.sum())} missing values are interpolated")
        part = np.interp(np.arange(len(part)), np.flatnonzero(~missing), part[~missing])
    return first, part


def to_json_lines(table: Table) -> str:
    """One JSON object per series: name, start and values."""
    records = (
        {"name": series.name, "start": series.start, "values": series.values.tolist()} for series in table.series
    )
    return "".join(json.dumps(record) + "\n" for record in records)
