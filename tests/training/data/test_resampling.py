"""``--resample``: rows are put into longer time steps, and incomplete time steps are not summed."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest
from support.tables import write_table

from training.data.datasets import DataError
from training.data.tables import TableOptions, read_table


def days_from(first: str, last: str) -> list[datetime]:
    return pd.date_range(first, last).to_pydatetime().tolist()


DAYS = days_from("2024-01-01", "2024-04-30")
LONG = ["day,shop,sold", *(f"{day:%Y-%m-%d},{shop},{day:%j}.5" for shop in ("a", "b") for day in reversed(DAYS))]
SHUFFLED = DAYS[1::2] + DAYS[::2]
WIDE = [",".join([shop, *(f"{day:{form}}" for day in SHUFFLED)])
        for shop, form in (("shop", "%Y-%m-%d"), ("a", "%j.5"), ("b", "%j.5"))]  # fmt: skip


@pytest.mark.parametrize("lines", [LONG, WIDE], ids=["groups", "columns of dates"])
def test_the_last_value_of_a_time_step_is_the_latest_in_any_order_of_rows(tmp_path: Path, lines: list[str]) -> None:
    table = read_table(write_table(tmp_path, lines), TableOptions(resample="M", aggregate="last", group="shop"))
    assert [series.values.tolist() for series in table.series] == [[31.5, 60.5, 91.5, 121.5]] * 2


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
    mean = read_table(path, TableOptions(resample=step, aggregate="mean"))
    assert set(mean.series[0].values) == {10}
    assert len(mean.series[0].values) == len(table.series[0].values) + len(remarks)


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
