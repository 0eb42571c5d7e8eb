"""Read all series of a file: cells, header, layout, time stamps, values, groups, and time steps."""

from __future__ import annotations

import csv
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from app.tables import columns, grid, header, layout
from app.tables.files import read_sheet
from app.tables.grid import SERIES
from app.tables.header import Body
from app.tables.layout import TIME, VALUE
from app.tables.messages import NO_TIME, TableError, option
from app.tables.options import ReadOptions
from app.tables.times import Reading


@dataclass(frozen=True)
class TidyTable:
    """The series of a file.

    Attributes:
        frame: the columns ``unique_id``, ``ds`` and ``y``, and the known covariates. Each series is evenly spaced, from
            its first to its last value. ``y`` is NaN where the table has no value. ``ds`` holds times or, if the table
            has no time stamps, numbers of rows or steps.
        step: name of the time step, such as "hour", or "step".
        after: returns the values of ``ds`` that are numbers of steps after another value.
        covariates: names of the columns of known covariates.
        remarks: texts about how the file was read, and about all repairs and omissions.
    """

    frame: pd.DataFrame
    step: str
    after: Callable[[Any, Any], Any]
    covariates: list[str]
    remarks: list[str]


def read(
    content: bytes, name: str, options: ReadOptions, known: Sequence[str] = (), max_cells: float = math.inf
) -> TidyTable:
    """Read all series of a CSV, Excel or Parquet file. An ambiguous file is rejected.

    ``name``: the name of the series if no column names it, such as the name of the file. ``known``: the columns of
    known covariates, also several names joined by commas. ``max_cells``: the largest number of cells in a sheet.

    Raises:
        TableError: the file cannot be read or is ambiguous. The message names the option that resolves the ambiguity.
    """
    sheet = read_sheet(content, options, max_cells)
    body = header.locate(sheet, options)
    groups, values = _listed(body, options.group, "none"), list(options.column)
    known = [own for names in known for own in _listed(body, names)]
    _check_options(body, values, groups, known)
    for own in [*values, *known]:
        body.read_words(own)
    melted = None
    if options.by_rows or not (values or known):
        melted = layout.melt(body, None if options.group is None else groups)
    if melted:
        body, groups = melted
        values = [VALUE]
        time = columns.read_times(body, [TIME]) if TIME in body.frame else None
    else:
        time = columns.find_times(body, [*values, *known, *groups])
    time = _usable(body, time)
    used = [*known, *(time.names if time else ())]
    values = values or columns.value_columns(body, [*groups, *used])
    if time and not (melted or groups or options.group == "none"):
        groups = columns.group_columns(body, used, values, time.times)
    data = columns.parse_values(body, [*values, *known])
    codes, names = _series(body, groups, name if melted else "")
    if not options.column:
        values = _without_constants(body, data, values, codes)
    titles = [
        own if column == VALUE or (own and len(values) == 1) else f"{own} {column}".strip()
        for own in names
        for column in values
    ]
    rows = data[known].set_axis(pd.Index(body.rows))
    numbers = (rows.groupby(codes).cumcount() + 1).to_numpy() if melted else body.rows
    rows["ds"] = time.times.to_numpy() if time else numbers
    parts = [rows.assign(y=data[own].to_numpy(), **{SERIES: codes * len(values) + at}) for at, own in enumerate(values)]
    data = pd.concat(parts)
    data = data.iloc[np.lexsort((data["ds"], data[SERIES]))]
    if time:
        body.remarks.append(f"time stamps: column {', '.join(map(repr, time.names))}, {time.label}")
    if options.resample:
        data = grid.resample(data, options.resample, options.aggregate == "sum", body.remarks)
    data = grid.cut(data, titles, known, body.remarks)
    step, after = "step", operator.add
    if time:
        data, found = grid.on_grid(data, options, ",".join(time.names), body.remarks)
        step, after = found.step, found.after
    grid.fill_covariates(data, titles, known, body.remarks)
    data["unique_id"] = np.array(titles, object)[data[SERIES]]
    return TidyTable(data[["unique_id", "ds", "y", *known]].reset_index(drop=True), step, after, known, body.remarks)


def _without_constants(body: Body, data: pd.DataFrame, values: list[str], codes: np.ndarray) -> list[str]:
    """Leave out the columns with one value in each series, unless all are such columns, and return the others."""
    varied = [own for own in values if not data[own].nunique() > 1 == data[own].groupby(codes).nunique().max()]
    for own in [own for own in values if own not in varied] if varied else ():
        body.leave_out(own, "has one value in each series")
    return varied or values


def _listed(body: Body, names: str | None, nothing: str = "") -> list[str]:
    """Split names at commas. A name that contains a comma stands alone or in quotation marks."""
    if names is None or names == nothing:
        return []
    return [names] if names in body.frame else next(csv.reader([names], skipinitialspace=True))


def _check_options(body: Body, values: list[str], groups: list[str], known: list[str]) -> None:
    options = body.options
    for name in (names := [*values, *groups, *known]):
        if name not in body.frame:
            raise TableError(
                f"there is no column {name!r}; its columns are: {', '.join(body.frame.columns)}; "
                "put quotation marks around a name with a comma"
            )
        if name in known and (names.count(name) > 1 or name in ("unique_id", "ds", "y")):
            raise TableError(f"column {name!r} is named twice, or a known covariate is called unique_id, ds or y")
        is_time = options.time is None and (name in groups or body.column(name).share <= 0.8)
        if name == options.time or (is_time and columns.holds_times(body, name)):
            raise TableError(
                f"column {name!r} holds time stamps; it cannot hold values, covariates or names of series. Omit it, or "
                f"name the column of time stamps with {option('time')}, or use {NO_TIME} if the rows are in the order "
                "of time"
            )
    if known and options.by_rows:
        raise TableError(f"known covariates need a table with one row per time step; omit {option('by_rows')}")


def _usable(body: Body, time: Reading | None) -> Reading | None:
    """Drop the rows without a time stamp: rows of totals, rows without other cells, and rows of --missing.

    Raises:
        TableError: another row has no time stamp, or as ``_use_order_of_rows``.
    """
    if time is None:
        _use_order_of_rows(body)
        return None
    cells, without = body.frame[time.names[0]], time.times.isna()
    wrong = without & ~body.empty(time.names) & ~cells.isin(body.options.missing) & ~body.totals()
    if wrong.any():
        at = int(np.argmax(wrong))
        text, column = str(body.frame.loc[at].dropna().iloc[0]), ", ".join(map(repr, time.names))
        problem = f"has {text!r}, but no time stamp in column {column}"
        if pd.notna(cells[at]):
            text = str(cells[at])
            problem = f"{text!r} in column {column} is no time stamp"
        raise TableError(
            f"row {body.rows[at]}: {problem} ({time.label}); correct it, or use "
            f"{option('missing', *body.options.missing, text)} to leave the row out, or {option('header', 'N')} if row "
            "N has the column names"
        )
    for at in np.flatnonzero(without & cells.notna()).tolist():
        body.remarks.append(f"row {body.rows[at]} is left out: {cells[at]!r} is no time stamp")
    body.keep(~without)
    if time.remark:
        body.remarks.append(time.remark)
    return replace(time, times=time.times.dropna().reset_index(drop=True))


def _use_order_of_rows(body: Body) -> None:
    """Drop rows of totals. With --time none, empty rows between other rows are time steps without values.

    Raises:
        TableError: an option for time stamps is given, or a row is empty.
    """
    options = body.options
    for name in ("format", "resample", "aggregate"):
        if value := getattr(options, name):
            raise TableError(
                f"{option(name, value)} cannot be used without time stamps; omit it, or name their column with "
                f"{option('time')}"
            )
    totals = body.totals()
    body.remarks += [f"row {row} is left out, because it may be a total" for row in body.rows[totals]]
    body.keep(~totals)
    empty = body.frame.isna().all(axis=1)
    inner = empty & ~empty[::-1].cummin()[::-1]
    if options.time is None and not options.by_rows:
        if inner.any():
            row = body.rows[int(np.argmax(inner))]
            raise TableError(f"row {row} is empty; delete it, or use {NO_TIME} if it is a time step without values")
        body.remarks.append("no column holds time stamps: the rows are read in the order of time")
    body.keep(~empty | inner)


def _series(body: Body, groups: list[str], default: str) -> tuple[np.ndarray, list[str]]:
    """Return the number of the series of each row, and the names of the series, in the order of the file.

    A name is the cells in the columns ``groups``, joined by spaces, or ``default`` without such columns.

    Raises:
        TableError: a row has no name, or two series with different cells have the same name.
    """
    if not groups:
        return np.zeros(len(body.frame), int), [default]
    frame = body.frame[groups]
    if frame.empty:
        raise TableError("has no values")
    blank = frame.isna().all(axis=1) if VALUE in body.frame else frame.isna().any(axis=1)
    if blank.any():
        raise TableError(f"row {body.rows[blank.argmax()]} has no {', '.join(groups)}; write it into every row")
    codes = frame.groupby(groups, sort=False, dropna=False).ngroup().to_numpy()
    texts = frame.iloc[np.unique(codes, return_index=True)[1]].apply(header.as_texts).fillna("")
    names = texts.agg(" ".join, axis=1).str.split().str.join(" ")
    if names.duplicated().any():
        raise TableError(
            f"two series have the name {names[names.duplicated()].iloc[0]!r}, because their cells in the columns "
            f"{', '.join(groups)} are joined by spaces; change the cells of one of them"
        )
    return codes, names.tolist()
