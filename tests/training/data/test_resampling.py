"""``--resample``: rows are put into longer time steps, and incomplete time steps are not summed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.tables import write_table

from training.data.datasets import DataError
from training.data.tables import TableOptions, read_table


def days_from(first: str, last: str, except_for: Sequence[str] = (), weekend: bool = True) -> list[datetime]:
    begin, end = map(datetime.fromisoformat, (first, last))
    days = [begin + timedelta(days=i) for i in range((end - begin).days + 1)]
    return [day for day in days if f"{day:%Y-%m-%d}" not in except_for and (weekend or day.weekday() < 5)]


@pytest.mark.parametrize(
    ("days", "step", "months"),
    [
        (days_from("2024-01-01", "2024-06-30"), "M", (1, 6)),
        (days_from("2024-01-01", "2024-06-03", [f"2024-04-{day}" for day in range(10, 28)]), "M", (1, 5)),
        (days_from("2024-01-01", "2024-06-28", weekend=False), "M", (1, 6)),  # a Friday
        (days_from("2023-01-01", "2024-06-03")[::31], "M", None),  # one row per month
        ([datetime(2023 + i // 12, i % 12 + 1, 1) for i in range(20)], "Q", (1, 18)),
    ],
)
def test_incomplete_time_steps_are_not_summed(
    tmp_path: Path, days: list[datetime], step: str, months: tuple[int, int] | None
) -> None:
    path = write_table(tmp_path, ["day,sold", *(f"{day:%Y-%m-%d},10" for day in days)])
    table = read_table(path, TableOptions(resample=step, aggregate="sum"))
    first, last = months or (1, 18)
    in_range = [day for day in days if first <= 12 * (day.year - days[0].year) + day.month <= last]
    (series,) = table.series
    assert np.nansum(series.values) == 10 * len(in_range)
    assert series.start == f"{in_range[0]:%Y-%m}-01"
    assert sum("is left out: its rows" in remark for remark in table.remarks) == (
        (in_range[0] != days[0]) + (in_range[-1] != days[-1])
    )
    mean = read_table(path, TableOptions(resample=step, aggregate="mean"))
    assert set(mean.series[0].values) == {10}


DAYS = days_from("2024-01-01", "2024-04-30")


@pytest.mark.parametrize(
    ("layout", "days"),
    [("groups", DAYS[::-1]), ("columns of dates", DAYS[1::2] + DAYS[::2])],
)
def test_the_last_value_of_a_time_step_is_the_latest_in_any_order_of_rows(
    tmp_path: Path, layout: str, days: list[datetime]
) -> None:
    shops = ("north",) if layout == "one series" else ("north", "south")
    lines = ["day,shop,sold", *(f"{day:%Y-%m-%d},{shop},{day:%j}.5" for shop in shops for day in days)]
    if layout == "columns of dates":
        lines = ["shop," + ",".join(f"{day:%Y-%m-%d}" for day in days)]
        lines += [f"{shop}," + ",".join(f"{day:%j}.5" for day in days) for shop in shops]
    options = TableOptions(resample="M", aggregate="last", group=None if layout == "one series" else "shop")
    table = read_table(write_table(tmp_path, lines), options)
    assert [series.values.tolist() for series in table.series] == [[31.5, 60.5, 91.5, 121.5]] * len(shops)


@pytest.mark.parametrize("step", ["-1D", "0h"])
def test_a_step_that_is_not_positive_is_rejected(tmp_path: Path, step: str) -> None:
    path = write_table(tmp_path, ["day,sold", *(f"{day:%Y-%m-%d},10" for day in days_from("2024-01-01", "2024-02-29"))])
    with pytest.raises(DataError, match=f"--resample {step}: a time step must be longer than 0; allowed are h, D, W"):
        read_table(path, TableOptions(resample=step))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("D", "with --resample D, more than 40 % of the time steps have no row; use a longer step"),
        ("Y", "with --resample Y, no series has two time steps; use a shorter step"),
    ],
)
def test_a_step_that_does_not_fit_the_rows_is_rejected(tmp_path: Path, step: str, message: str) -> None:
    days = [day for i, day in enumerate(days_from("2024-01-01", "2024-06-30")) if i % 8 in (0, 3)]
    path = write_table(tmp_path, ["day,sold", *(f"{day:%Y-%m-%d},10" for day in days)])
    with pytest.raises(DataError, match=message):
        read_table(path, TableOptions(resample=step, aggregate="mean"))
    assert read_table(path, TableOptions(resample="W", aggregate="mean")).frequency == "week"


def test_rows_of_the_future_do_not_complete_a_time_step(tmp_path: Path) -> None:
    days = days_from("2024-01-01", "2024-08-20")
    rows = [f"{day:%Y-%m-%d},{'' if day > datetime(2024, 6, 3) else 10},{i % 3}" for i, day in enumerate(days)]
    path = write_table(tmp_path, ["day,sold,price", *rows])
    table = read_table(path, TableOptions(resample="M", aggregate="sum", known_covariates="price"))
    assert table.series[0].values.tolist() == [310, 290, 310, 300, 310]
    remark = "the last time step, 2024-06-01 00:00:00, is left out: its rows end at 2024-06-03 00:00:00, so their sum"
    assert any(remark in text for text in table.remarks)
    with pytest.raises(DataError, match=r"--resample Y: the rows from 2024-01-01 .* to 2024-06-03 .* cover no whole"):
        read_table(path, TableOptions(resample="Y", aggregate="sum", known_covariates="price"))


@pytest.mark.parametrize(
    ("frequency", "first", "last", "step", "left_out"),
    [
        ("QE", "2018-03-31", "2024-09-30", "Y", "2024-01-01"),
        ("MS", "2022-02-01", "2024-12-01", "Q", "2022-01-01"),
        ("B", "2024-01-01", "2024-06-27", "W", "2024-06-24"),
        ("h", "2024-01-01 01:00", "2024-02-01 23:00", "D", "2024-01-01"),
        ("W-MON", "2023-01-02", "2024-06-24", "M", None),
        ("B", "2023-07-03", "2024-06-28", "M", None),  # July 2023 begins, and June 2024 ends, with a weekend
    ],
)
def test_a_time_step_that_lacks_one_row_is_incomplete(
    tmp_path: Path, frequency: str, first: str, last: str, step: str, left_out: str | None
) -> None:
    path = write_table(tmp_path, ["time,sold", *(f"{time},10" for time in pd.date_range(first, last, freq=frequency))])
    table = read_table(path, TableOptions(resample=step, aggregate="sum"))
    remarks = [remark for remark in table.remarks if "is left out: its rows" in remark]
    assert [remark.split(" step, ")[1][:10] for remark in remarks] == ([left_out] if left_out else [])


def test_sums_are_0_only_between_the_first_and_the_last_value_of_a_series(tmp_path: Path) -> None:
    days = days_from("2024-01-01", "2024-04-30")
    rows = [
        f"{day:%Y-%m-%d},{10 if 30 <= i < 90 else ''},{10 if i < 90 else ''},{i % 3}"
        for i, day in enumerate(days)
        for _ in range(2)
        if day.weekday() != 6
    ]
    path = write_table(tmp_path, ["day,new,old,promo", *rows])
    new, old = (table := read_table(path, TableOptions(aggregate="sum", known_covariates="promo"))).series
    assert (new.start, old.start) == ("2024-01-31", "2024-01-01")
    assert old.values.tolist() == [20 * (day.weekday() != 6) for day in days[:90]]
    assert new.values.tolist() == old.values[30:].tolist()
    assert old.observed.all()
    assert "12 time steps (one per day) count as 0, the first after 2024-01-06" in table.remarks
