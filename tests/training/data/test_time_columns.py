"""Columns of time stamps in users' tables: how their cells are read, and which columns cannot hold values or names."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from training.data.datasets import DataError
from training.data.tables import ReadOptions, Table, read_table

VALUES = [10 + (i * i) % 17 for i in range(400)]  # neighbours differ, and the values are in no order
DAYS = [date(2023, 1, 2) + timedelta(days=i) for i in range(60)]


def read(folder: Path, header: str, rows: Sequence[str], **options: Any) -> Table:
    path = folder / "table.csv"
    path.write_text("\n".join([header, *rows]) + "\n", "utf-8")
    return read_table(path, ReadOptions(**options))


def with_values(stamps: Sequence[str]) -> list[str]:
    return [f"{stamp},{value}" for stamp, value in zip(stamps, VALUES, strict=False)]


def iso(day: date) -> str:
    return "{}-W{:02}-{}".format(*day.isocalendar())


@pytest.mark.parametrize(
    ("stamps", "step"),
    [
        ([iso(day) for day in DAYS], "day"),
        ([iso(DAYS[0] + timedelta(weeks=i)) for i in range(60)], "week"),
        ([iso(DAYS[0] + timedelta(weeks=i)).removesuffix("-1") for i in range(60)], "week"),
        ([f"{iso(day)}T{hour:02}:00" for day in DAYS[:3] for hour in range(24)], "hour"),
    ],
)
def test_iso_week_dates_are_read(tmp_path: Path, stamps: list[str], step: str) -> None:
    table = read(tmp_path, "date,y", with_values(stamps))
    assert (table.frequency, table.series[0].start[:10]) == (step, "2023-01-02")
    assert table.series[0].values.tolist() == VALUES[: len(stamps)]


def test_a_gap_between_iso_week_dates_is_a_gap_of_days(tmp_path: Path) -> None:
    table = read(tmp_path, "date,y", with_values([iso(day) for day in DAYS[:20] + DAYS[36:]]))
    assert table.frequency == "day"
    assert "16 time steps (one per day) are missing, the first after 2023-01-21" in table.remarks


CLOCK = [datetime(2024, 1, 1, 22) + timedelta(minutes=10 * i) for i in range(300)]
PARTS = [f"{x.year},{x.month},{x.day},{x.hour},{x.minute},{value}" for x, value in zip(CLOCK, VALUES, strict=False)]


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("Year,Month,Day,Hour,Minute,y", {}),
        ("Jahr,Monat,Tag,Stunde,minute,y", {}),
        ("Year,Month,Day,Hour,Minute,y", {"time": "Year,Month,Day,Hour,Minute"}),
        ("Year,Month,Day,Hour,Min,y", {"time": "Year,Month,Day,Hour,Min"}),
    ],
)
def test_the_minute_belongs_to_the_time_stamp(tmp_path: Path, header: str, options: dict[str, Any]) -> None:
    table = read(tmp_path, header, PARTS, **options)
    assert (table.frequency, table.series[0].start) == ("10 minutes", "2024-01-01T22:00:00")
    assert [series.values.tolist() for series in table.series] == [VALUES[:300]]


def test_the_minute_and_the_second_may_follow_a_date_and_an_hour(tmp_path: Path) -> None:
    times = [datetime(2024, 1, 1, 22) + timedelta(seconds=30 * i) for i in range(300)]
    rows = [f"{x:%d.%m.%Y},{x.hour},{x.minute},{x.second},{v}" for x, v in zip(times, VALUES, strict=False)]
    table = read(tmp_path, "Date,Hour,Minute,Second,y", rows)
    assert (table.frequency, table.series[0].start) == ("30 seconds", "2024-01-01T22:00:00")
    assert [series.values.tolist() for series in table.series] == [VALUES[:300]]


@pytest.mark.parametrize("name", ["Min", "minute_of_hour"])
def test_a_column_that_may_be_the_minute_does_not_name_the_series(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"column '{name}' may be a part of the time or name the series; .*--time with"):
        read(tmp_path, f"Year,Month,Day,Hour,{name},y", PARTS)


def test_a_column_of_durations_in_minutes_holds_values(tmp_path: Path) -> None:
    rows = [f"{x:%Y,%m,%d,%H},{i % 7},{VALUES[i]}" for i, x in enumerate(CLOCK[:240:6])]
    table = read(tmp_path, "Year,Month,Day,Hour,minutes_used,y", rows)
    assert [series.name for series in table.series] == ["minutes_used", "y"]
    table = read(tmp_path, "minute,y", [f"{3 + i % 3},{VALUES[i]}" for i in range(40)])
    assert [series.name for series in table.series] == ["minute", "y"]


@pytest.mark.parametrize("pattern", ["%G-W%V-%u", "%Y week %W day %w", "%Y, %j"])
def test_a_format_may_have_a_week_and_a_weekday_or_a_day_of_the_year(tmp_path: Path, pattern: str) -> None:
    rows = [f'"{day.strftime(pattern)}",{value}' for day, value in zip(DAYS, VALUES, strict=False)]
    table = read(tmp_path, "date,y", rows, format=pattern)
    assert (table.frequency, table.series[0].start) == ("day", "2023-01-02")
    assert table.series[0].values.tolist() == VALUES[:60]


@pytest.mark.parametrize(("code", "step"), [("D", "day"), ("W", "week"), ("M", "month"), ("Q", "quarter")])
@pytest.mark.parametrize("index", [True, False])
def test_periods_of_pandas_are_time_stamps(tmp_path: Path, code: str, step: str, index: bool) -> None:
    frame = pd.DataFrame({"period": pd.period_range("2020-01-06", periods=40, freq=code), "y": VALUES[:40]})
    (frame.set_index("period") if index else frame).to_parquet(tmp_path / "table.parquet")
    table = read_table(tmp_path / "table.parquet")
    assert (table.frequency, table.series[0].start) == (step, "2020-01-06" if code in "DW" else "2020-01-01")
    assert table.series[0].values.tolist() == VALUES[:40]


def test_a_column_that_mixes_times_with_and_without_a_zone_is_rejected(tmp_path: Path) -> None:
    stamps = [f"{stamp:%Y-%m-%dT%H:%M}{'+02:00' if i != 7 else ''}" for i, stamp in enumerate(CLOCK[:40])]
    message = "row 9: the time in column 'time' has no time zone, but others have one; write the zone into every row"
    with pytest.raises(DataError, match=message):
        read(tmp_path, "time,y", with_values(stamps))


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("date,y", {"group": "date"}, "column 'date' holds time stamps; it cannot name the series"),
        ("date,y", {"group": "date", "time": "date"}, "column 'date' holds time stamps; it cannot name the series"),
        ("Year,y", {"group": "Year"}, "column 'Year' holds time stamps; it cannot name the series"),
        ("date,y", {"columns": ["date", "y"]}, "column 'date' holds time stamps, not numbers; omit it in --column"),
        ("date,y", {"known_covariates": "date"}, "column 'date' holds time stamps, not numbers; omit it in --column"),
    ],
)
def test_the_column_of_time_stamps_has_no_other_role(
    tmp_path: Path, header: str, options: dict[str, Any], message: str
) -> None:
    stamps = [str(1950 + i) for i in range(40)] if header == "Year,y" else [str(day) for day in DAYS]
    with pytest.raises(DataError, match=message):
        read(tmp_path, header, with_values(stamps), **options)


def test_dates_may_name_series_if_the_steps_are_in_another_column_or_in_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [f"{day},{hour},{VALUES[hour]}" for day in DAYS[:3] for hour in range(24)]
    names = [str(day) for day in DAYS[:3]]
    assert [series.name for series in read(tmp_path, "date,hour,y", rows, group="date").series] == names
    table = read(tmp_path, "date,hour,y", rows, group="date", time="none", columns=["y"])
    assert [series.name for series in table.series] == names


@pytest.mark.parametrize("options", [{}, {"time": "Date,Hour"}])
def test_a_day_has_no_hour_25(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = [f"{day},{at + 1},{(7 * at + number) % 48}" for number, day in enumerate(DAYS) for at in range(48)]
    with pytest.raises(DataError, match=r"is no time stamp|--time with all columns|--time none"):
        read(tmp_path, "Date,Hour,demand", rows, **options)


def test_the_only_column_of_values_does_not_name_the_series(tmp_path: Path) -> None:
    rows = [f"{day},{at + 1},{(7 * at + number) % 48}" for number, day in enumerate(DAYS) for at in range(48)]
    with pytest.raises(DataError, match=r"column 'Settlement Period' may be a part of the time or name the series"):
        read(tmp_path, "Settlement Date,Settlement Period,demand", rows)
