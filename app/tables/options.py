"""Options for reading a table: the command-line options of trainings, and the query parameters of requests."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(max_length=200)]
Texts = Annotated[list[Text], Field(max_length=100)]


class ReadOptions(BaseModel):
    """Options for reading a table. None, or an empty list, means that the value is detected or not needed."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid")

    column: Texts = []
    """columns to forecast; by default all numeric columns"""
    time: Text | None = None
    """column of time stamps, or several columns, such as Year,Month, with a format; none: there are no time stamps"""
    format: Text | None = None
    """format of the time stamps, such as %d/%m/%Y"""
    group: Text | None = None
    """columns that name the series of each row: NAME or NAME,NAME; none: all rows are one series"""
    aggregate: Literal["sum", "mean", "last"] | None = None
    """how to combine rows with the same time stamp"""
    resample: Annotated[str, Field(max_length=10)] | None = None
    """combine rows into a longer time step: h, D, W, M, Q, Y or 15min"""
    by_rows: bool = False
    """each row contains one series, with its name in the first cell"""
    sheet: Text | None = None
    """sheet of an Excel file"""
    header: Annotated[int, Field(ge=0)] | None = None
    """number of the row with the column names; 0: the file has no column names"""
    separator: Annotated[str, Field(pattern="^[ -~\\t]$")] | None = None
    """separator of the cells; a space: one or more spaces"""
    encoding: (
        Annotated[str, Field(pattern="(?i)^(utf|cp|iso|windows|latin|mac|koi8|shift|euc|gb|big5|ascii)[\\w-]{0,20}$")]
        | None
    ) = None
    """encoding of a text file, such as cp1250"""
    decimal: Literal[".", ","] | None = None
    """decimal separator"""
    missing: Texts = []
    """cells that stand for a missing value, such as -999; none: every number is a value"""
