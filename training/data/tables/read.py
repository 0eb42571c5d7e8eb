"""Read all series of a file: cells, header, unpivoting, time stamps, values, groups, and the grid of time steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from app.store import HolidayCalendar
from app.tasks.covariates import BUSINESS_DAY, UNITS, holiday_counts, step_seconds
from app.tasks.forecasting import MAX_SEASON
from training.data.datasets import DataError
from training.data.tables import columns as roles
from training.data.tables import frequency, header, resampling, time_column
from training.data.tables.files import read_sheet
from training.data.tables.header import Body
from training.data.tables.numbers import is_missing
from training.data.tables.table import Series, Table
from training.data.tables.time_column import TimeColumn
from training.data.tables.timestamps import Reading
from training.data.tables.unpivot import TIME, VALUE, unpivot

AGGREGATES = ("sum", "mean", "last")
CALENDAR_YEARS = 10  # number of years after the last time stamp for which holidays are stored
MAX_VALUE = 1e150  # largest value of a series or covariate, because squares of larger values overflow
NO_COLUMNS = np.empty((0, 0))


class Rows(NamedTuple):
    """One series as read: its name, its values [T], their times or their places in the file, its covariates [T, K]."""

    name: str
    values: np.ndarray
    starts: list[str]
    covariates: np.ndarray


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
        season: season length in steps.
        sheet, encoding: the sheet of an Excel file; the encoding of a text file.
        decimal: decimal separator, "." or ",".
        header: row number of the column names; 0 if the file has no column names.
        missing: further cells that stand for a missing value. With "none", every other number is a value.
        known_covariates: columns whose future values are known, joined by commas.
        holidays: country whose public holidays become a known covariate, such as "DE", or "DE-BY" with a subdivision.
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


def read_table(path: Path, options: ReadOptions | None = None) -> Table:
    """Read all series of a CSV, Excel or Parquet file. An ambiguous file is rejected.

    Raises:
        DataError: the file cannot be read or is ambiguous. The message names the option that resolves the ambiguity.
    """
    options = options or ReadOptions()
    if options.season is not None and not 1 <= options.season <= MAX_SEASON:
        raise DataError(f"--season is {options.season}; allowed are 1 (no season) to {MAX_SEASON} steps")
    sheet = read_sheet(path, options.sheet, options.encoding)
    body = header.locate(path, sheet, options.header)
    body.frame = roles.without_missing(body.frame, options.missing or ())
    body.remarks.insert(0, f"read as {sheet.described}")
    _check_names(body, options)
    known = _listed(options.known_covariates, body)
    columns_only = (options.columns or known) and not options.by_rows
    given = None if options.group is None else _given_groups(body, options)
    unpivoted = None if columns_only else unpivot(body, options.by_rows, given)
    if known and unpivoted:
        raise body.error(
            "--known-covariates needs a table with one row per time step, so it cannot be used with --by-rows"
        )
    names = [VALUE] if unpivoted else []
    time: TimeColumn | None
    if unpivoted:
        body, groups = unpivoted.body, unpivoted.labels
        time = time_column.detect(body, TIME, options.format, ()) if unpivoted.timed else None
    else:
        groups = _given_groups(body, options)
        time = roles.detect_time(body, options.time, options.format, [*(options.columns or ()), *known], groups)
    if time:
        time = _usable(body, time_column.in_utc(body, time, options.holidays is not None), names)
    else:
        _reject_time_options(body, options)
        roles.restore_empty_rows(body, bool(unpivoted or groups))
    used = [*groups, *known, *(time.names if time else ())]
    times = time.reading.times if time else None
    if not unpivoted:
        names = roles.value_columns(body, used, options.columns, times)
        if time and not groups and options.group != "none":
            others = [*time.names, *known]
            groups = roles.group_columns(body, others, names, time.reading, options.aggregate is not None)
            names = [name for name in names if name not in groups]
            if options.aggregate and not options.resample:
                groups = []  # without --group, rows of all groups are combined
            codes = tuple(f"column {name!r} holds codes" for name in groups)
            body.remarks[:] = [remark for remark in body.remarks if not remark.startswith(codes)]
            if groups:
                body.remarks.append(f"each value of {', '.join(groups)} is a series ({roles.group_option(groups)})")
        if groups and not options.columns:
            names = roles.varying(body, names, groups)
    values = roles.parse_values(body, names, options.decimal, options.missing or ())
    covariates = roles.parse_values(body, known, options.decimal, options.missing or ())
    labels = _labels(body, groups, unpivoted is not None)
    if time is None:
        if not unpivoted and options.time is None:
            body.remarks.append("no column holds time stamps: the rows are read in the order of time")
        return _table(body, options, _in_order(labels, values, covariates, padded=unpivoted is not None), "step", None)
    body.remarks.append(f"time stamps: column {', '.join(map(repr, time.names))}, {time.reading.label}")
    return _on_grid(body, options, labels, values, covariates, time)


def _reject_time_options(body: Body, options: ReadOptions) -> None:
    """Raise DataError if an option for time stamps is given. The table has none."""
    if options.holidays:
        raise body.error("--holidays needs a column of time stamps")
    by_time = {"--format": options.format, "--resample": options.resample, "--aggregate": options.aggregate}
    if unused := ", ".join(f"{option} {value}" for option, value in by_time.items() if value is not None):
        raise body.error(f"{unused} cannot be used without time stamps; omit it, or name their column with --time")


def _given_groups(body: Body, options: ReadOptions) -> list[str]:
    return [] if options.group == "none" else _listed(options.group, body)


def _listed(names: str | None, body: Body) -> list[str]:
    """Split names at commas. If a longer text is the name of a column, it is one name, although it has commas."""
    parts, result = (names or "").split(","), []
    while parts:
        texts = {count: ",".join(parts[:count]).strip() for count in range(len(parts), 0, -1)}
        count = next((count for count, text in texts.items() if text in body.frame), 1)
        result.append(texts[count])
        del parts[:count]
    return [name for name in result if name]


def _check_names(body: Body, options: ReadOptions) -> None:
    groups = _given_groups(body, options)
    known = _listed(options.known_covariates, body)
    for name in known:
        if name in (options.columns or ()) or name in groups or known.count(name) > 1:
            raise body.error(f"column {name!r} is named twice in --known-covariates, --column and --group")
    for name in [*(options.columns or ()), *groups, *known]:
        if name not in body.frame:
            raise body.error(f"has no column {name!r}; its columns are: {', '.join(map(str, body.frame.columns))}")
    if options.aggregate not in (None, *AGGREGATES):
        raise body.error(f"--aggregate {options.aggregate}; allowed are {', '.join(AGGREGATES)}")
    if "%Z" in (options.format or ""):
        reason = "names of time zones are not supported; use %z for offsets such as +0100, or omit --format"
        raise body.error(f"--format {options.format}: {reason}")


def _usable(body: Body, time: TimeColumn, values: Sequence[str]) -> TimeColumn:
    """Drop the rows without a time stamp. Their other cells must be empty, except in rows of totals.

    Raises:
        DataError: a row without a time stamp has other cells, and is not a row of totals.
    """
    times = time.reading.times
    for row in body.frame.index[times.isna()]:
        cells = body.frame.loc[row]
        own = [cell for name, cell in cells.items() if name in time.names and not is_missing(cell)]
        others = [cell for name, cell in cells.items() if name not in time.names and not is_missing(cell)]
        text = str(own[0])[:40] if own else ""
        total = any(isinstance(cell, str) and header.TOTAL.fullmatch(cell) for cell in [*own, *others[:1]])
        if others and not total and (own or TIME not in time.names):
            raise body.error(
                f"row {row}: {text!r} in column {', '.join(map(repr, time.names))} is no time stamp "
                f"({time.reading.label}); correct it, or delete the row"
            )
        body.remarks.append(f"row {row} is left out: {text!r} is no time stamp")
    has_time = times.notna()
    body.frame = body.frame[has_time]
    reading = Reading(time.reading.label, time.reading.period, times[has_time])
    return TimeColumn(time.names, reading)


def _labels(body: Body, groups: Sequence[str], unpivoted: bool) -> pd.Series:
    """Return the name of the series of each row: its cells in the columns ``groups``, joined by spaces.

    Without ``groups``, the name of the series is the name of the file if the table was unpivoted, otherwise "".

    Raises:
        DataError: a row has no name, or two series with different cells have the same name.
    """
    if not groups:
        return pd.Series(body.path.name.split(".")[0] if unpivoted else "", index=body.frame.index, dtype=object)
    frame = body.frame[list(groups)]
    blank = frame.isna().any(axis=1)
    if blank.any() and not unpivoted:
        raise body.error(f"row {blank.idxmax()} has no {', '.join(groups)}; write it into every row")
    texts = [tuple(map(header.name_of, row)) for row in frame.itertuples(index=False, name=None)]
    cells: dict[str, tuple[str, ...]] = {}  # of the first series with each name
    for own in dict.fromkeys(texts):
        name = _joined(own)
        if cells.setdefault(name, own) != own:
            raise body.error(
                f"two series have the name {name!r}, because their cells {cells[name]} and {own} in the columns "
                f"{', '.join(groups)} are joined by spaces; change the cells of one of them"
            )
    return pd.Series(list(map(_joined, texts)), index=frame.index, dtype=object)


def _joined(texts: Sequence[str]) -> str:
    return " ".join(filter(None, texts))


def _named(label: str, column: str, values: dict[str, pd.Series]) -> str:
    if column == VALUE or (label and len(values) == 1):
        return label
    return f"{label} {column}".strip()


def _in_order(
    labels: pd.Series, values: dict[str, pd.Series], covariates: dict[str, pd.Series], padded: bool
) -> list[Rows]:
    """Return the series of a table without time stamps. ``padded``: drop empty cells at the end of each series."""
    result = []
    indices = labels.groupby(labels, sort=False).indices
    for label in dict.fromkeys(labels):
        for column, own in values.items():
            part = own.iloc[indices[label]]
            if padded:  # empty cells at the end of a row are padding
                part = part.loc[: part.last_valid_index()] if part.notna().any() else part.iloc[:0]
            starts = [str(row).partition("column ")[2] or str(row) for row in part.index]
            known = np.stack([own[part.index] for own in covariates.values()], axis=1) if covariates else NO_COLUMNS
            result.append(Rows(_named(label, column, values), np.array(part), starts, known))
    return result


def _on_grid(
    body: Body,
    options: ReadOptions,
    labels: pd.Series,
    values: dict[str, pd.Series],
    covariates: dict[str, pd.Series],
    time: TimeColumn,
) -> Table:
    """Put the values of each series on the grid of time steps.

    Raises:
        DataError: time stamps occur twice, or are irregular.
    """
    times, period = time.reading.times, time.reading.period
    if options.resample:
        times, period = resampling.resample(body, options.resample, times)
        if options.aggregate == "sum":
            values = resampling.without_incomplete(body, options.resample, time.reading.times, times, values)
    frame = pd.DataFrame({"(series)": labels, "(time)": times, **values, **covariates})
    frame = frame.iloc[np.argsort(time.reading.times.to_numpy(), kind="stable")]  # by time also within a longer step
    frame, combined = resampling.combine(body, frame, options.aggregate, list(covariates), bool(options.resample))
    groups = {str(label): part for label, part in frame.groupby("(series)", sort=False)}
    time_grid = frequency.grid([part["(time)"].to_numpy() for part in groups.values()], period)
    if time_grid is None:
        few = max(len(part) for part in groups.values()) < 2
        raise body.error(resampling.irregular(frame["(time)"], options.resample, few))
    if time_grid.jitter:
        body.remarks.append(f"time stamps with jitter are moved to the nearest step of one {time_grid.name}")
    calendar = _calendar(body, options.holidays, time_grid.name, frame["(time)"]) if options.holidays else None
    order = dict.fromkeys(str(label) for label in labels)
    positions = dict(zip(groups, time_grid.positions, strict=True))
    midnight = bool((frame["(time)"] == frame["(time)"].dt.floor("D")).all())
    fill = 0.0 if options.aggregate == "sum" and combined else np.nan
    series = []
    for label in order:
        part, at = groups[label], positions[label] - positions[label][0]
        there = at[part[list(values)].notna().any(axis=1).to_numpy()]
        holes = np.setdiff1d(np.arange(there[0], there[-1]), at) if len(there) else there
        if len(holes):
            before = part["(time)"].iloc[np.searchsorted(at, holes[0]) - 1]
            effect = "count as 0" if fill == 0 else "are missing"
            body.remarks.append(
                f"{label + ': ' if label else ''}{len(holes)} time steps (one per {time_grid.name}) {effect}, "
                f"the first after {_iso(before, midnight, period)}"
            )
        starts = np.full(int(at[-1]) + 1, "", dtype=object)
        starts[at] = [_iso(stamp, midnight, period) for stamp in part["(time)"]]
        known = np.full((int(at[-1]) + 1, len(covariates)), np.nan)
        known[at] = part[list(covariates)].to_numpy()
        if calendar:
            counts = holiday_counts(calendar, part["(time)"].iloc[0].to_pydatetime(), len(known))
            known = np.column_stack([known, counts])
        for column in values:
            grid = resampling.spread(part[column].to_numpy(), at, fill)
            series.append(Rows(_named(label, column, values), grid, list(starts), known))
    return _table(body, options, series, time_grid.name, time_grid.seasons, calendar)


def _calendar(body: Body, country: str, step: str, times: pd.Series) -> HolidayCalendar:
    """Return the holidays of a country from the first year of the table to CALENDAR_YEARS after its last year.

    Raises:
        DataError: the country is unknown or has no holidays, or the time step is longer than a week.
    """
    if step_seconds(step) is None and step != BUSINESS_DAY:
        raise body.error(f"--holidays needs time steps of at most a week; this table has one row per {step}")
    if (step_seconds(step) or 0) > UNITS["week"]:
        raise body.error(f"--holidays needs time steps of at most a week; this table has one row per {step}")
    import holidays

    code, _, subdivision = country.partition("-")
    first, last = times.min().year, times.max().year + CALENDAR_YEARS
    try:
        days = holidays.country_holidays(code.upper(), subdiv=subdivision or None, years=range(first, last + 1))
    except NotImplementedError as error:
        raise body.error(f"--holidays {country}: {error}") from error
    if not days:
        raise body.error(f"--holidays {country}: no holidays are known from {first} to {last}")
    dates = [day.isoformat() for day in sorted(days) if first <= day.year <= last]
    return HolidayCalendar(country=country, step=step, first_year=first, last_year=last, dates=dates)


def _iso(stamp: pd.Timestamp, midnight: bool, period: str) -> str:
    if period == "step":
        return str(int(stamp.timestamp()))
    return stamp.date().isoformat() if midnight else stamp.isoformat()


def _table(
    body: Body,
    options: ReadOptions,
    arrays: Sequence[Rows],
    step: str,
    seasons: Sequence[int] | None,
    calendar: HolidayCalendar | None = None,
) -> Table:
    """Return the table of all series that have values. Each series is cut to its first and last value."""
    series = []
    names = [*_listed(options.known_covariates, body), *([f"holidays {calendar.country}"] if calendar else [])]
    for name, values, starts, known in arrays:
        there = np.flatnonzero(~np.isnan(values))
        if not len(there):
            body.remarks.append(f"{name} has no values, so it is left out")
            continue
        for cells in (values, known):
            if len(wrong := cells[np.abs(cells) > MAX_VALUE]):
                raise body.error(f"{name} has the value {wrong[0]}; allowed are -{MAX_VALUE} to {MAX_VALUE}")
        part = values[there[0] : there[-1] + 1]
        if names and there[-1] + 1 < len(values):
            body.remarks.append(f"{name}: the last {len(values) - 1 - there[-1]} rows have no value and are not used")
        covariates = _filled(body, name, names, known[there[0] : there[-1] + 1] if names else np.empty((len(part), 0)))
        series.append(Series(name, part, starts[there[0]], ~np.isnan(part), covariates))
    if not series:
        raise body.error("has no values")
    filled = [np.interp(np.arange(len(s.values)), np.flatnonzero(s.observed), s.values[s.observed]) for s in series]
    season = options.season or frequency.season(filled, seasons)
    return Table(body.path.name, series, step, season, body.remarks, names, calendar)


def _filled(body: Body, series: str, names: Sequence[str], covariates: np.ndarray) -> np.ndarray:
    """Replace missing covariates [T, K] by the last value before them or, at the start, the first value; add remarks.

    Raises:
        DataError: a column has no values.
    """
    frame = pd.DataFrame(covariates)
    for column, name in enumerate(names):
        missing = int(frame[column].isna().sum())
        if missing == len(frame):
            raise body.error(f"{series}: column {name!r} of --known-covariates has no values")
        if missing:
            body.remarks.append(f"{series}: {missing} missing values of {name!r} repeat the value before them")
    return frame.ffill().bfill().to_numpy()
