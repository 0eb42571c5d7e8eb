"""Columns of time stamps in users' tables: how their cells are read, and which columns cannot hold values or names."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from training.data.tables.read import ReadOptions, read_table
from training.data.tables.table import Table

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
