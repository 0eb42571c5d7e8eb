"""Read all series of a file: cells, header, layout, time stamps, values, groups, and the grid of time steps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from app.tables import TableError, grid, header, layout, time_columns
from app.tables import columns as roles
from app.tables.files import read_sheet
from app.tables.header import Body, text_of
from app.tables.layout import TIME, VALUE, Melted
from app.tables.time_columns import TimeColumn
from app.tables.times import Reading

AGGREGATES = ("sum", "mean", "last")
MAX_VALUE = 1e150  # largest value of a series or covariate, because squares of larger values overflow


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a table. None means that the value is detected or not needed.

    Attributes:
        columns: columns to forecast.
        time: column of time stamps, or several columns joined by commas, or "none".
        format: format of the time stamps for strptime.
        group: columns that name the series, joined by commas, or "none".
        aggregate: how to combine rows with the same time stamp, one of AGGREGATES.
        resample: longer time step, such as "D". All rows of a series in such a step are combined into one row.
        by_rows: whether each row holds one series.
        season: season length in steps. The reader ignores it.
        sheet, encoding: the sheet of an Excel file; the encoding of a text file.
        decimal: decimal separator, "." or ",".
        header: row number of the column names; 0 if the file has no column names.
        missing: further cells that stand for a missing value. With "none", every other number is a value.
        known_covariates: columns whose future values are known, joined by commas.
        holidays: country whose public holidays become a known covariate. The reader only reports how days are counted.
    """

    columns: Sequence[str] | None = None
    time: str | None = None
    format: str | None = None
    group: str | None = None
    aggregate: str | None = None
    resample: str | None = None
    by_rows: bool = False
    season: int | None = None
    sheet: str | None = None
    encoding: str | None = None
    decimal: str | None = None
    header: int | None = None
    missing: Sequence[str] | None = None
    known_covariates: str | None = None
    holidays: str | None = None


@dataclass(frozen=True)
class TidyTable:
    """The series of a file.

    Attributes:
        frame: the columns ``unique_id``, ``ds`` and ``y``, and the known covariates. Each series is evenly spaced, from
            its first to its last value. ``y`` is NaN where the table has no value. ``ds`` holds times or, if the table
            has no time stamps, numbers of rows or steps.
        step: name of the time step, such as "hour", or "step".
        after: returns the value of ``ds`` that is a number of steps after another one.
        covariates: names of the columns of known covariates.
        remarks: texts about how the file was read, and about all repairs and omissions.
    """

    frame: pd.DataFrame
    step: str
    after: Callable[[Any, int], Any]
    covariates: list[str]
    remarks: list[str]


def read(content: bytes, name: str, options: ReadOptions) -> TidyTable:
    """Read all series of a CSV, Excel or Parquet file. An ambiguous file is rejected.

    ``name``: the name of the series if no column names it, such as the name of the file.

    Raises:
        TableError: the file cannot be read or is ambiguous. The message names the option that resolves the ambiguity.
    """
    missing = tuple(options.missing or ())
    sheet = read_sheet(content, options.sheet, options.encoding)
    body = header.locate(sheet, options.header, [text for text in missing if text != "none"])
    body.remarks.insert(0, f"read as {sheet.described}")
    given = None if options.group is None else _listed("" if options.group == "none" else options.group, body)
    known = _listed(options.known_covariates or "", body)
    _check_names(body, options, given or [], known)
    columns_only = (options.columns or known) and not options.by_rows
    melted = None if columns_only else layout.melt(body, options.by_rows, given)
    if known and melted:
        raise TableError(
            "--known-covariates needs a table with one row per time step, so it cannot be used with --by-rows"
        )
    groups = given or []
    time: TimeColumn | None
    after: Callable[[Any, int], Any]
    if melted:
        body, groups = melted.body, melted.labels
        time = time_columns.detect(body, TIME, options.format, ()) if melted.timed else None
    else:
        time = _detect_time(body, options, [*(options.columns or ()), *known], groups)
    if time:
        time = _usable(body, time_columns.in_utc(body, time, options.holidays is not None))
    else:
        _reject_time_options(options)
        if not groups and not melted and not any(roles.numbers_rows(body, own, False) for own in body.frame.columns):
            body.restore_empty_rows()  # rows without names or numbers are time steps
        if not melted and options.time is None:
            body.remarks.append("no column holds time stamps: the rows are read in the order of time")
    names = [VALUE] if melted else list(options.columns or ())
    if not melted:
        groups, names = _roles(body, options, groups, names, known, time)
    values = roles.parse_values(body, names, options.decimal, missing)
    covariates = roles.parse_values(body, known, options.decimal, missing)
    labels, label_names = _labels(body, groups, name if melted else "", melted)
    data = pd.DataFrame({"(series)": labels, **values, **covariates})
    if time is None:
        data["(ds)"] = data.groupby("(series)").cumcount() + 1 if melted else body.rows
        parts = [
            (_named(label_names[label], column, list(values)), _part(part, column, known))
            for label, part in enumerate(own for _, own in data.groupby("(series)"))
            for column in values
        ]
        step, after = "step", operator.add
    else:
        body.remarks.append(f"time stamps: column {', '.join(map(repr, time.names))}, {time.reading.label}")
        parts, step, after = _on_grid(body, options, data, label_names, list(values), known, time.reading)
    return TidyTable(_tidy(body, parts, known), step, after, known, body.remarks)


def _listed(names: str, body: Body) -> list[str]:
    """Split names at commas. If a longer text is the name of a column, it is one name, although it has commas."""
    parts, result = names.split(","), []
    while parts:
        texts = {count: ",".join(parts[:count]).strip() for count in range(len(parts), 0, -1)}
        count = next((count for count, text in texts.items() if text in body.frame), 1)
        result.append(texts[count])
        del parts[:count]
    return [name for name in result if name]


def _check_names(body: Body, options: ReadOptions, groups: Sequence[str], known: Sequence[str]) -> None:
    for name in known:
        if name in ("unique_id", "ds", "y"):
            raise TableError(f"a known covariate cannot be called {name!r}; rename the column")
        if name in (options.columns or ()) or name in groups or known.count(name) > 1:
            raise TableError(f"column {name!r} is named twice in --known-covariates, --column and --group")
    for name in [*(options.columns or ()), *groups, *known]:
        if name not in body.frame:
            raise TableError(f"there is no column {name!r}; its columns are: {', '.join(body.frame.columns)}")
    if options.aggregate not in (None, *AGGREGATES):
        raise TableError(f"--aggregate {options.aggregate}; allowed are {', '.join(AGGREGATES)}")
    if "%Z" in (options.format or ""):
        reason = "names of time zones are not supported; use %z for offsets such as +0100, or omit --format"
        raise TableError(f"--format {options.format}: {reason}")


def _detect_time(body: Body, options: ReadOptions, columns: Sequence[str], groups: Sequence[str]) -> TimeColumn | None:
    """Find the time stamps; return None if there are none.

    Raises:
        TableError: the time stamps are ambiguous, or ``columns`` or ``groups`` contain their column.
    """
    for name in columns:
        if time_columns.readings_of(body, name):
            raise TableError(
                f"column {name!r} holds time stamps, not numbers; omit it in --column and --known-covariates"
            )
    time = time_columns.detect(body, options.time, options.format, [*columns, *groups])
    if (time is None and options.time is None) or (time and set(time.names) <= set(groups)):
        for name in groups:
            if time_columns.holds_times(body, name):
                raise TableError(
                    f"column {name!r} holds time stamps; it cannot name the series. Omit it in --group, or use --time "
                    "none if each of its values is a series and the rows are in the order of time"
                )
    return time


def _reject_time_options(options: ReadOptions) -> None:
    """Raise TableError if an option for time stamps is given. The table has none."""
    if options.holidays:
        raise TableError("--holidays needs a column of time stamps")
    by_time = {"--format": options.format, "--resample": options.resample, "--aggregate": options.aggregate}
    if unused := ", ".join(f"{option} {value}" for option, value in by_time.items() if value is not None):
        raise TableError(f"{unused} cannot be used without time stamps; omit it, or name their column with --time")


def _usable(body: Body, time: TimeColumn) -> TimeColumn:
    """Drop the rows without a time stamp. Their other cells must be empty, except in rows of totals.

    Raises:
        TableError: a row without a time stamp has other cells, and is not a row of totals.
    """
    times = time.reading.times
    for at in np.flatnonzero(times.isna()):
        cells = body.frame.loc[at]
        filled = {name: cells[name] for name in body.frame.columns if not body.column(name).missing[at]}
        own = [cell for name, cell in filled.items() if name in time.names]
        others = [cell for name, cell in filled.items() if name not in time.names]
        text = str(own[0])[:40] if own else ""
        total = bool(pd.Series([*own, *others[:1]], dtype="str").str.fullmatch(header.TOTAL).any())
        if others and not total and (own or TIME not in time.names):
            raise TableError(
                f"row {body.rows[at]}: {text!r} in column {', '.join(map(repr, time.names))} is no time stamp "
                f"({time.reading.label}); correct it, or delete the row"
            )
        if own:
            body.remarks.append(f"row {body.rows[at]} is left out: {text!r} is no time stamp")
    body.keep(times.notna())
    return TimeColumn(
        time.names, Reading(time.reading.label, time.reading.period, times.dropna().reset_index(drop=True))
    )


def _roles(
    body: Body, options: ReadOptions, groups: list[str], names: list[str], known: list[str], time: TimeColumn | None
) -> tuple[list[str], list[str]]:
    """Return the columns that name the series, and the columns of values."""
    times = time.reading.times if time else None
    used = [*known, *(time.names if time else ())]
    names = names or roles.value_columns(body, [*groups, *used], times)
    if time and not groups and options.group != "none":
        groups = roles.group_columns(body, used, names, time.reading, options.aggregate is not None)
        names = [name for name in names if name not in groups]
        if options.aggregate and not options.resample:
            groups = []  # without --group, rows of all groups are combined
        codes = tuple(f"column {name!r} holds codes" for name in groups)
        body.remarks[:] = [remark for remark in body.remarks if not codes or not remark.startswith(codes)]
        if groups:
            body.remarks.append(f"each value of {', '.join(groups)} is a series ({roles.group_option(groups)})")
    if groups and not options.columns:
        names = roles.varying(body, names, groups)
    return groups, names


def _labels(body: Body, groups: list[str], default: str, melted: Melted | None) -> tuple[np.ndarray, list[str]]:
    """Return the number of the series of each row, and the names of the series, in the order of the file.

    A name is the cells in the columns ``groups``, joined by spaces, or ``default`` without such columns.

    Raises:
        TableError: a row has no name, or two series with different cells have the same name.
    """
    if not groups:
        return np.zeros(len(body.frame), int), [default]
    frame = body.frame[groups]
    blank = frame.isna().any(axis=1)
    if blank.any() and not melted:
        raise TableError(f"row {body.rows[blank.argmax()]} has no {', '.join(groups)}; write it into every row")
    labels = frame.groupby(groups, sort=False, dropna=False).ngroup().to_numpy()
    first = np.unique(labels, return_index=True)[1]
    cells: dict[str, tuple[str, ...]] = {}
    for row in frame.iloc[first].itertuples(index=False, name=None):
        own = tuple(map(text_of, row))
        name = " ".join(filter(None, own))
        if name in cells:
            raise TableError(
                f"two series have the name {name!r}, because their cells {cells[name]} and {own} in the columns "
                f"{', '.join(groups)} are joined by spaces; change the cells of one of them"
            )
        cells[name] = own
    return labels, list(cells)


def _named(label: str, column: str, columns: Sequence[str]) -> str:
    return label if column == VALUE or (label and len(columns) == 1) else f"{label} {column}".strip()


def _part(part: pd.DataFrame, column: str, known: list[str]) -> pd.DataFrame:
    """Return the columns ds, y and the known covariates of one series."""
    return part[["(ds)", column, *known]].set_axis(["ds", "y", *known], axis=1)


def _on_grid(
    body: Body,
    options: ReadOptions,
    data: pd.DataFrame,
    names: Sequence[str],
    columns: list[str],
    known: list[str],
    reading: Reading,
) -> tuple[list[tuple[str, pd.DataFrame]], str, Callable[[Any, int], Any]]:
    """Return the series on the grid of time steps, the name of the time step, and ``TidyTable.after``.

    Raises:
        TableError: time stamps occur twice, or are irregular.
    """
    times, period = reading.times, reading.period
    if options.resample:
        times, period = grid.resample(options.resample, reading.times)
        there = data[columns].notna().any(axis=1)
        if options.aggregate == "sum" and there.any():
            left_out = grid.incomplete(options.resample, reading.times[there], times[there])
            data.loc[times.isin(list(left_out)), columns] = np.nan
            body.remarks += left_out.values()
    data["(ds)"], data["(row)"] = times, body.rows
    data = data.iloc[np.lexsort((reading.times.to_numpy(), data["(series)"].to_numpy()))]
    data, combined = _combined(body, data, options, columns, known)
    own = grid.find(data["(ds)"].to_numpy(), data["(series)"].to_numpy(), period)
    if own is None:
        raise TableError(_irregular(data, options.resample))
    if own.jitter:
        body.remarks.append(f"time stamps with jitter are moved to the nearest step of one {own.step}")
    fill = 0.0 if options.aggregate == "sum" and combined else np.nan
    effect = "count as 0" if fill == 0 else "are missing"
    parts = []
    indices: dict[Any, Any] = data.reset_index(drop=True).groupby("(series)").indices
    for label, rows in indices.items():
        at, name = own.positions[rows], names[label]
        part = data.iloc[rows].set_index(at).reindex(range(at[-1] + 1))
        holes = np.flatnonzero(part["(ds)"].isna())
        for hole in holes.tolist():
            part.loc[hole, "(ds)"] = own.after(part["(ds)"].iloc[0], hole)
        filled = np.flatnonzero(part[columns].notna().any(axis=1))
        inner = holes[(holes > filled[0]) & (holes < filled[-1])] if len(filled) else filled
        if len(inner):
            first = _shown(part["(ds)"].iloc[inner[0] - 1], data["(ds)"], period)
            body.remarks.append(
                f"{name + ': ' if name else ''}{len(inner)} time steps (one per {own.step}) {effect}, the first after "
                f"{first}"
            )
        if period == "step":
            part["(ds)"] = part["(ds)"].astype("int64") // grid.SECOND
        for column in columns:
            one = _part(part, column, known)
            valued = np.flatnonzero(one["y"].notna())
            if len(valued) and fill == 0:
                one.loc[holes[(holes > valued[0]) & (holes < valued[-1])], "y"] = 0.0
            parts.append((_named(name, column, columns), one))
    return parts, own.step, operator.add if period == "step" else own.after


def _shown(time: pd.Timestamp, times: pd.Series, period: str) -> str:
    if period == "step":
        return str(int(time.timestamp()))
    return str(time.date()) if (times == times.dt.floor("D")).all() else time.isoformat()


def _combined(
    body: Body, data: pd.DataFrame, options: ReadOptions, columns: list[str], known: list[str]
) -> tuple[pd.DataFrame, bool]:
    """Combine rows of a series that have the same time, by the method of ``--aggregate``. Covariates are averaged.

    Return the rows, and whether any rows were combined.

    Raises:
        TableError: a series has two rows with the same time, but ``--aggregate`` is not given.
    """
    double = data.duplicated(["(series)", "(ds)"])
    if not double.any():
        return data, False
    if options.aggregate is None:
        stamp, label = data.loc[double, ["(ds)", "(series)"]].iloc[0]
        same = sorted(data["(row)"][(data["(ds)"] == stamp) & (data["(series)"] == label)])
        relation = "are in the same time step" if options.resample else f"have the same time stamp {stamp}"
        raise TableError(
            f"rows {same[0]} and {same[1]} {relation}; use --aggregate sum, mean or last to combine such rows"
        )
    grouped = data.groupby(["(series)", "(ds)"])
    sums = {"min_count": 1} if options.aggregate == "sum" else {}
    rows = getattr(grouped[columns], options.aggregate)(**sums)
    if known:
        rows[known] = grouped[known].mean()
    body.remarks.append(f"{int(double.sum())} rows are combined with others (--aggregate {options.aggregate})")
    return rows.reset_index(), True


def _irregular(data: pd.DataFrame, step: str | None) -> str:
    """Return the message for times that are on no grid of time steps, or too few. ``step``: --resample."""
    few = data["(series)"].value_counts().max() < 2
    if step and few:
        return f"with --resample {step}, no series has two time steps; use a shorter step"
    if step:
        holes = f"more than {100 * grid.MAX_HOLES:.0f} % of the time steps have no row"
        return f"with --resample {step}, {holes}; use a longer step, for example the next one of h, D, W, M, Q and Y"
    problem = "no series has two time stamps" if few else "the time stamps are irregular"
    return (
        f"{problem}, for example {', '.join(map(str, data['(ds)'].iloc[:4]))}; use --resample D (or h, 15min, W, M) "
        "and --aggregate sum, mean or last"
    )


def _tidy(body: Body, parts: Sequence[tuple[str, pd.DataFrame]], known: list[str]) -> pd.DataFrame:
    """Return the tidy frame of all series that have values, each cut to its first and last value.

    Missing covariates repeat the value before them or, at the start of a series, the first value.

    Raises:
        TableError: there are no values, or a value is too large; or a column of covariates has no values.
    """
    frames = []
    for name, part in parts:
        there = np.flatnonzero(part["y"].notna())
        if not len(there):
            body.remarks.append(f"{name} has no values, so it is left out")
            continue
        cells = part[["y", *known]].to_numpy(dtype=float)
        if len(wrong := cells[np.abs(cells) > MAX_VALUE]):
            raise TableError(f"{name} has the value {wrong[0]}; allowed are -{MAX_VALUE} to {MAX_VALUE}")
        if known and there[-1] + 1 < len(part):
            body.remarks.append(f"{name}: the last {len(part) - 1 - there[-1]} rows have no value and are not used")
        part = part.iloc[there[0] : there[-1] + 1]
        for covariate, count in part[known].isna().sum().items():
            if count == len(part):
                raise TableError(f"{name}: column {covariate!r} of --known-covariates has no values")
            if count:
                body.remarks.append(f"{name}: {count} missing values of {covariate!r} repeat the value before them")
        frames.append(part.assign(unique_id=name, **part[known].ffill().bfill()))
    if not frames:
        raise TableError("has no values")
    return pd.concat(frames, ignore_index=True)[["unique_id", "ds", "y", *known]]
