"""Columns of time stamps in users' tables: how their cells are read, and which columns cannot hold values or names."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from training.data.datasets import DataError
from training.data.tables import Table, TableOptions, read_table

VALUES = [10 + (i * i) % 17 for i in range(400)]  # neighbours differ, and the values are in no order
DAYS = [date(2023, 1, 2) + timedelta(days=i) for i in range(60)]


def read(folder: Path, header: str, rows: Sequence[str], **options: Any) -> Table:
    path = folder / "table.csv"
    path.write_text("\n".join([header, *rows]) + "\n", "utf-8")
    return read_table(path, TableOptions(**options))


def with_values(stamps: Sequence[str]) -> list[str]:
    return [f"{stamp},{value}" for stamp, value in zip(stamps, VALUES, strict=False)]


CLOCK = [datetime(2024, 1, 1, 22) + timedelta(minutes=10 * i) for i in range(300)]
PARTS = [f"{x.year},{x.month},{x.day},{x.hour},{x.minute},{value}" for x, value in zip(CLOCK, VALUES, strict=False)]


def test_time_stamps_in_several_columns_need_a_format(tmp_path: Path) -> None:
    header = "Year,Month,Day,Hour,Min,y"
    with pytest.raises(DataError, match="or all columns of the time, such as --time Year,Month --format"):
        read(tmp_path, header, PARTS)
    table = read(tmp_path, header, PARTS, time="Year,Month,Day,Hour,Min", format="%Y %m %d %H %M")
    assert (table.frequency, table.series[0].start) == ("10 minutes", "2024-01-01T22:00:00")
    assert [series.values.tolist() for series in table.series] == [VALUES[:300]]


@pytest.mark.parametrize("pattern", ["%G-W%V-%u", "%Y, %j"])
def test_a_format_may_have_a_week_and_a_weekday_or_a_day_of_the_year(tmp_path: Path, pattern: str) -> None:
    rows = [f'"{day.strftime(pattern)}",{value}' for day, value in zip(DAYS, VALUES, strict=False)]
    table = read(tmp_path, "date,y", rows, format=pattern)
    assert (table.frequency, table.series[0].start) == ("day", "2023-01-02")
    assert table.series[0].values.tolist() == VALUES[:60]


@pytest.mark.parametrize(("code", "step", "index"), [("W", "week", False), ("M", "month", True)])
def test_periods_of_pandas_are_time_stamps(tmp_path: Path, code: str, step: str, index: bool) -> None:
    frame = pd.DataFrame({"period": pd.period_range("2020-01-06", periods=40, freq=code), "y": VALUES[:40]})
    (frame.set_index("period") if index else frame).to_parquet(tmp_path / "table.parquet")
    table = read_table(tmp_path / "table.parquet")
    assert (table.frequency, table.series[0].start) == (step, "2020-01-06" if code in "DW" else "2020-01-01")
    assert table.series[0].values.tolist() == VALUES[:40]


def test_a_column_that_mixes_times_with_and_without_a_zone_is_rejected(tmp_path: Path) -> None:
    stamps = [f"{stamp:%Y-%m-%dT%H:%M}{'+02:00' if i != 7 else ''}" for i, stamp in enumerate(CLOCK[:40])]
    message = "row 9: '2024-01-01T23:10' in column 'time' is no time stamp"
    with pytest.raises(DataError, match=message):
        read(tmp_path, "time,y", with_values(stamps))


@pytest.mark.parametrize(
    "options",
    [{"group": "date"}, {"group": "date", "time": "date"}, {"column": ["date", "y"]}],
)
def test_the_column_of_time_stamps_has_no_other_role(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="column 'date' holds time stamps; it cannot"):
        read(tmp_path, "date,y", with_values([str(day) for day in DAYS]), **options)


def test_years_name_series_only_beside_another_column_of_time_stamps(tmp_path: Path) -> None:
    rows = [f"{year},{year}-{month:02},{VALUES[month]}" for year in range(1990, 2020) for month in range(1, 13)]
    with pytest.raises(DataError, match=r"column 'Year' holds time stamps; it cannot .* with --time"):
        read(tmp_path, "Year,Month,y", rows, group="Year")
    table = read(tmp_path, "Year,Month,y", rows, group="Year", time="Month")
    assert [series.name for series in table.series] == [str(year) for year in range(1990, 2020)]
    assert {tuple(series.values) for series in table.series} == {tuple(VALUES[1:13])}


def test_dates_may_name_series_if_the_rows_are_in_the_order_of_time(tmp_path: Path) -> None:
    rows = [f"{day},{hour},{VALUES[hour]}" for day in DAYS[:3] for hour in range(24)]
    table = read(tmp_path, "date,hour,y", rows, group="date", time="none", column=["y"])
    assert [series.name for series in table.series] == [str(day) for day in DAYS[:3]]


def test_a_day_has_no_hour_25(tmp_path: Path) -> None:
    rows = [f"{day},{at + 1},{(7 * at + number) % 48}" for number, day in enumerate(DAYS) for at in range(48)]
    for options in ({}, {"time": "Date,Hour"}, {"time": "Date,Hour", "format": "%Y-%m-%d %H"}):
        with pytest.raises(DataError, match=r"all columns of the time|holds no time stamps|does not fit the cells"):
            read(tmp_path, "Date,Hour,demand", rows, **options)
