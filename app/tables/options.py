"""Options for reading a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AGGREGATES = ("sum", "mean", "last")


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
        separator: the separator of the cells in a text file; a space stands for one or more spaces.
        decimal: decimal separator, "." or ",".
        header: row numbers of the column names; [0] if the file has no column names.
        missing: further cells that stand for a missing value. With "none", every other number is a value.
        unit: texts that are left out after numbers, such as "kWh".
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
    separator: str | None = None
    decimal: str | None = None
    header: Sequence[int] | None = None
    missing: Sequence[str] | None = None
    unit: Sequence[str] | None = None
    known_covariates: str | None = None
    holidays: str | None = None
