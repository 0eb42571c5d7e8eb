"""The series of a table, and their preparation for training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from app.store import HolidayCalendar

# Longest gap that is interpolated, in values. If a season is longer, gaps of up to a season are interpolated.
MAX_GAP = 3


@dataclass(frozen=True)
class Series:
    """An evenly spaced series.

    Attributes:
        name: name of the series.
        values: float64 [T]; NaN where the table has no value, until ``without_gaps`` interpolates.
        start: time of the first value, in ISO 8601 if the table has time stamps.
        observed: bool [T]; False where the table has no value.
        covariates: values [T, K] of the columns whose future values are known.
    """

    name: str
    values: np.ndarray
    start: str
    observed: np.ndarray
    covariates: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))


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


def without_gaps(table: Table) -> Table:
    """Split each series at long gaps, keep the longest part, and interpolate short gaps.

    Append a remark for each change.
    """
    remarks = list(table.remarks)
    series = [_without_gaps(one, max(table.season, MAX_GAP), remarks) for one in table.series]
    return replace(table, series=series, remarks=remarks)


def _without_gaps(series: Series, max_gap: int, remarks: list[str]) -> Series:
    name, values = series.name, series.values
    observed = np.flatnonzero(series.observed)
    breaks = np.flatnonzero(np.diff(observed) > max_gap + 1)
    edges = zip(np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(observed) - 1]]), strict=True)
    first, last = max(((int(observed[a]), int(observed[b])) for a, b in edges), key=lambda edge: edge[1] - edge[0])
    if len(breaks):
        remarks.append(
            f"{name}: {len(breaks)} gaps are longer than {max_gap} steps; only the longest part between them, "
            f"{last - first + 1:,} values, is used"
        )
    part, there = values[first : last + 1], series.observed[first : last + 1]
    if not there.all():
        remarks.append(f"{name}: {int((~there).sum())} missing values are interpolated")
        part = np.interp(np.arange(len(part)), np.flatnonzero(there), part[there])
    start = series.start if first == 0 else f"{series.start} + {first} steps"
    return Series(name, part, start, there, series.covariates[first : last + 1])


def summary(table: Table) -> str:
    """Return one line on the size of the table, its time step and its season."""
    lengths = sorted(len(series.values) for series in table.series)
    length = f"{lengths[0]:,}" if lengths[0] == lengths[-1] else f"{lengths[0]:,} to {lengths[-1]:,}"
    names = ", ".join(series.name for series in table.series[:5]) + (", ..." if len(table.series) > 5 else "")
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


def to_json_lines(table: Table) -> str:
    """Return lines with a JSON object for each series: name, start and values."""
    records = (
        {"name": series.name, "start": series.start, "values": series.values.tolist()} for series in table.series
    )
    return "".join(json.dumps(record) + "\n" for record in records)
