"""The series of users' tables, and their preparation for training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field

from app.store import HolidayCalendar
from app.tables.messages import TableError, spelled
from app.tables.options import ReadOptions
from app.tables.read import TidyTable, read
from app.tasks.covariates import BUSINESS_DAY, UNITS, holiday_counts, step_seconds
from app.tasks.seasonality import MAX_SEASON
from training.data.datasets import DataError, shorten

# Longest gap that is interpolated, in values. If a season is longer, gaps of up to a season are interpolated.
MAX_GAP = 3
CALENDAR_YEARS = 10  # number of years after the last time stamp for which holidays are stored
SEASONS: dict[str, tuple[int, ...]] = {  # usual season lengths of each time step
    "minute": (60, 1440),
    "day": (7, 365),
    "business day": (5,),
    "week": (52,),
    "2 weeks": (26,),
    "4 weeks": (13,),
    "month": (12,),
    "2 months": (6,),
    "quarter": (4,),
    "4 months": (3,),
    "half-year": (2,),
    "second": (60,),
}
MIN_AUTOCORRELATION = 0.3  # smallest autocorrelation between values that are one season apart
MIN_AUTOCORRELATION_OF_TWO = 0.5  # the same limit if all series are shorter than three seasons
# Smallest difference between the autocorrelation at one season and its mean at 0.5 and 1.5 seasons. Random walks do
# not reach this difference.
MIN_PROMINENCE = 0.1


class TableOptions(ReadOptions):
    """The options of a training that say how a table is read."""

    season: Annotated[int, Field(ge=1, le=MAX_SEASON)] | None = None
    """season length in time steps; 1: no season. By default, the season is estimated from the series"""
    known_covariates: str | None = None
    """columns whose future values are known in advance, such as price,promo. Requests then contain their future
    values"""
    holidays: str | None = None
    """use the public holidays of a country, such as DE, or of a subdivision, such as DE-BY"""


@dataclass(frozen=True)
class Series:
    """An evenly spaced series.

    Attributes:
        name: name of the series.
        values: float64 [T]; NaN where the table has no value, until ``without_gaps`` interpolates.
        times: the time of each value, datetime64 [T], or the number of its row or step if the table has no time stamps.
        observed: bool [T]; False where the table has no value.
        covariates: values [T, K] of the columns whose future values are known.
    """

    name: str
    values: np.ndarray
    times: np.ndarray
    observed: np.ndarray
    covariates: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @property
    def dated(self) -> bool:
        """Whether the table has time stamps."""
        return self.times.dtype.kind == "M"

    @property
    def start(self) -> str:
        """The time of the first value, in ISO 8601 if the table has time stamps."""
        if not self.dated:
            return str(self.times[0])
        days = self.times.astype("datetime64[D]")
        return str(days[0]) if (days == self.times).all() else pd.Timestamp(self.times[0]).isoformat()


@dataclass(frozen=True)
class Table:
    """The series of a file.

    Attributes:
        name: name of the file.
        series: the series, in the order of the file.
        frequency: name of the time step.
        season: season length in steps; 1 if there is no season.
        remarks: texts about how the file was read, and about all repairs and omissions.
        covariates: names of the columns whose future values are known. With a calendar, the last column is the number
            of holidays in each time step.
        calendar: the public holidays, if they are used.
    """

    name: str
    series: list[Series]
    frequency: str
    season: int
    remarks: list[str]
    covariates: Sequence[str] = ()
    calendar: HolidayCalendar | None = None

    @property
    def sha256(self) -> str:
        """The digest of the names, values and covariates of all series, in order."""
        digest = hashlib.sha256()
        for series in self.series:
            digest.update(f"{series.name}\0{len(series.values)}\0".encode() + series.values.tobytes())
            digest.update(series.covariates.tobytes())  # adds nothing if there are no known covariates
        return digest.hexdigest()


def reader_options(given: Mapping[str, Any]) -> TableOptions:
    """Return the options of a command that say how a table is read. Missing options have their defaults."""
    named = {name: given.get(name) for name in TableOptions.model_fields}
    return TableOptions(**{name: value for name, value in named.items() if value is not None})


def read_tidy(path: Path, options: ReadOptions, known: Sequence[str] = ()) -> TidyTable:
    """Read all series of a CSV, Excel or Parquet file, with times. Raises DataError as ``read_table`` does.

    ``known``: the columns of known covariates.
    """
    try:
        return read(path.read_bytes(), path.name.split(".")[0], options, known)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except TableError as error:
        raise DataError(f"{path}: {error}") from error


def read_table(path: Path, options: TableOptions | None = None) -> Table:
    """Read all series of a CSV, Excel or Parquet file. An ambiguous file is rejected.

    Raises:
        DataError: the file cannot be read or is ambiguous. The message names the option that resolves the ambiguity.
    """
    options = options or TableOptions()
    tidy = read_tidy(path, options, [options.known_covariates] if options.known_covariates else [])
    frame, names, calendar = tidy.frame, list(tidy.covariates), None
    if options.holidays:
        calendar = _calendar(options.holidays, tidy.step, frame)
        names.append(f"holidays {calendar.country}")
    series = []
    for name, part in frame.groupby("unique_id", sort=False):
        values, known = part["y"].to_numpy(copy=True), part[tidy.covariates].to_numpy(dtype=float)
        if calendar:
            known = np.column_stack([known, holiday_counts(calendar, part["ds"].iloc[0].to_pydatetime(), len(values))])
        series.append(Series(str(name), values, part["ds"].to_numpy(), ~np.isnan(values), known))
    season = options.season or _season([_interpolated(one) for one in series], tidy.step)
    return Table(path.name, series, tidy.step, season, [*map(spelled, tidy.remarks)], names, calendar)


def _calendar(country: str, step: str, frame: pd.DataFrame) -> HolidayCalendar:
    """Return the holidays of a country from the first year of a tidy frame to CALENDAR_YEARS after its last year.

    Raises:
        DataError: the country is unknown or has no holidays, or the time step is longer than a week.
    """
    if not 0 < (step_seconds(step) or (1 if step == BUSINESS_DAY else 0)) <= UNITS["week"]:
        raise DataError(f"--holidays needs time steps of at most a week; this table has one row per {step}")
    import holidays

    code, _, subdivision = country.partition("-")
    first, last = frame["ds"].min().year, frame["ds"].max().year + CALENDAR_YEARS
    try:
        days = holidays.country_holidays(code.upper(), subdiv=subdivision or None, years=range(first, last + 1))
    except NotImplementedError as error:
        raise DataError(f"--holidays {country}: {error}") from error
    dates = [day.isoformat() for day in sorted(days) if first <= day.year <= last]
    if not dates:
        raise DataError(f"--holidays {country}: no holidays are known from {first} to {last}")
    return HolidayCalendar(country=country, step=step, first_year=first, last_year=last, dates=dates)


def _interpolated(series: Series) -> np.ndarray:
    there = np.flatnonzero(series.observed)
    return np.interp(np.arange(len(series.values)), there, series.values[there])


def without_gaps(table: Table) -> Table:
    """Split each series at long gaps, keep the longest part, and interpolate short gaps.

    Append a remark for each change.
    """
    remarks = list(table.remarks)
    series = [_without_gaps(one, max(table.season, MAX_GAP), remarks) for one in table.series]
    return replace(table, series=series, remarks=remarks)


def _without_gaps(series: Series, max_gap: int, remarks: list[str]) -> Series:
    observed = np.flatnonzero(series.observed)
    breaks = np.flatnonzero(np.diff(observed) > max_gap + 1)
    edges = zip(observed[np.append(0, breaks + 1)], observed[np.append(breaks, -1)], strict=True)
    first, last = max(edges, key=lambda edge: edge[1] - edge[0])
    inside = slice(first, last + 1)
    if len(breaks):
        remarks.append(
            f"{series.name}: {len(breaks)} gaps are longer than {max_gap} steps; only the longest part between them, "
            f"{last - first + 1:,} values, is used"
        )
    part = Series(
        series.name, series.values[inside], series.times[inside], series.observed[inside], series.covariates[inside]
    )
    if part.observed.all():
        return part
    remarks.append(f"{series.name}: {int((~part.observed).sum())} missing values are interpolated")
    return replace(part, values=_interpolated(part))


def summary(table: Table) -> str:
    """Return one line on the size of the table, its time step and its season."""
    lengths = sorted(len(series.values) for series in table.series)
    length = f"{lengths[0]:,}" if lengths[0] == lengths[-1] else f"{lengths[0]:,} to {lengths[-1]:,}"
    names = shorten([series.name for series in table.series])
    season = f"season of {table.season} steps" if table.season > 1 else "no season"
    known = f"; known: {', '.join(table.covariates)}" if table.covariates else ""
    return f"{len(table.series):,} series ({names}) of {length} values, one per {table.frequency}; {season}{known}"


def describe(table: Table) -> dict[str, Any]:
    """Return the content for ``--preview --json``: each series with its first and last values, and the remarks."""

    def plain(values: np.ndarray) -> list[float | None]:
        return [None if np.isnan(value) else float(value) for value in values]

    return {
        "series": [
            {
                "name": series.name,
                "start": series.start,
                "step": table.frequency,
                "length": len(series.values),
                "first": plain(series.values[:3]),
                "last": plain(series.values[-3:]),
                "missing": int((~series.observed).sum()),
            }
            for series in table.series
        ],
        **({"known_covariates": list(table.covariates)} if table.covariates else {}),
        "remarks": table.remarks,
    }


def to_json_lines(table: Table) -> list[str]:
    """Return lines with a JSON object for each series: name, start and values."""
    return [
        json.dumps({"name": series.name, "start": series.start, "values": series.values.tolist()})
        for series in table.series
    ]


# --- seasons


def _autocorrelation(values: np.ndarray, lag: int) -> float:
    """Return the autocorrelation of linearly detrended values [T] at a lag; 0 for constant values."""
    values = values / (np.abs(values).max() or 1.0)  # squares of very large or small values leave the range of float64
    steps = np.arange(len(values))
    residual = values - np.polyval(np.polyfit(steps, values, 1), steps)
    variance = float((residual**2).mean())
    if variance <= 1e-12 * float((values**2).mean()):
        return 0.0
    return float((residual[lag:] * residual[:-lag]).mean()) / variance


def _season(series: Sequence[np.ndarray], step: str) -> int:
    """Return the season length of the series in steps; 1 if they have no season.

    Candidates are the usual seasons of the time step or, for an unknown step, all lags, up to MAX_SEASON. A candidate
    is dropped if its autocorrelation, averaged over the first 50 series, is too low. Of the other candidates, only
    those with more than 90 % of the highest autocorrelation are kept. The result is the shortest candidate that is
    kept.
    """
    per_day = UNITS["day"] / (step_seconds(step) or np.inf)
    daily = (int(per_day), int(7 * per_day)) if per_day > 1 and per_day % 1 == 0 else ()
    usual = None if step == "step" else SEASONS.get(step, daily)
    candidates = [lag for lag in (range(2, 401) if usual is None else usual) if lag <= MAX_SEASON]
    longest = max(map(len, series[:50]), default=0)

    def strength(lag: int, candidate: int) -> float:
        correlations = [_autocorrelation(values, lag) for values in series[:50] if len(values) >= 2 * candidate]
        return float(np.mean(correlations)) if correlations else -1.0

    strengths = {lag: strength(lag, lag) for lag in candidates}

    def is_season(lag: int, value: float) -> bool:
        if value <= (MIN_AUTOCORRELATION if longest >= 3 * lag else MIN_AUTOCORRELATION_OF_TWO):
            return False
        if usual is None:  # only local maxima, because slow changes correlate at every short lag
            return value > strengths.get(lag - 1, 1.0) and value >= strengths.get(lag + 1, -1.0)
        beside = (strength(lag - lag // 2, lag) + strength(lag + lag // 2, lag)) / 2
        return value > beside + MIN_PROMINENCE

    kept = {lag: value for lag, value in strengths.items() if is_season(lag, value)}
    best = max(kept.values(), default=0.0)
    return min((lag for lag, value in kept.items() if value > 0.9 * best), default=1)  # multiples correlate too
