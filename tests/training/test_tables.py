"""Tables whose values are computed: seasons, decimal signs, incomplete time steps. Others are in table_files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.tables import write_table

from training.data.datasets import DataError
from training.data.tables import TableOptions, read_table


def with_stamps(folder: Path, stamps: pd.DatetimeIndex, values: np.ndarray) -> Path:
    rows = (f"{stamp},{value}" for stamp, value in zip(stamps, values, strict=True))
    return write_table(folder, "\n".join(["time,y", *rows]))


@pytest.mark.parametrize(("step", "name", "season"), [("14D", "2 weeks", 26), ("4MS", "4 months", 3)])
def test_a_yearly_season_is_detected_for_multiples_of_weeks_and_months(
    tmp_path: Path, step: str, name: str, season: int
) -> None:
    stamps = pd.date_range("2010-01-01", periods=6 * season, freq=step)
    noise = np.random.default_rng(0).normal(0, 0.1, len(stamps))
    values = np.sin(2 * np.pi * np.arange(len(stamps)) / season) + noise
    table = read_table(with_stamps(tmp_path, stamps, values))
    assert (table.frequency, table.season) == (name, season)


def test_a_season_is_detected_without_time_stamps_if_there_is_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for season, expected in ((24, 24), (0, 1)):
        values = [math.sin(2 * math.pi * i / season) if season else 0 for i in range(240)] + random.normal(0, 0.3, 240)
        path = write_table(tmp_path, "\n".join(["y", *map(str, values)]))
        assert read_table(path).season == expected
        assert read_table(path, TableOptions(season=3)).season == 3


@pytest.mark.parametrize("unit", [1e-9, 1e140])
def test_the_season_does_not_depend_on_the_unit_of_the_values(tmp_path: Path, unit: float) -> None:
    stamps = pd.date_range("2010-01-01", periods=144, freq="MS")
    seasonal = 100 + 20 * np.sin(np.pi * np.arange(144) / 6) + np.random.default_rng(0).normal(0, 3, 144)
    for values, season in ((unit * seasonal, 12), (np.full(144, unit), 1)):
        assert read_table(with_stamps(tmp_path, stamps, values)).season == season


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["0,5", "0,125", "0,12", "12,345"], [0.5, 0.125, 0.12, 12.345]),
        (["1,234", "1234,567"], [1.234, 1234.567]),
        (["1.234,56", "1.234", "2,345", "7"], [1234.56, 1234, 2.345, 7]),
        (["1,234", "1,5e-05"], [1.234, 1.5e-05]),
        (["1,234", "1,234,567", "999"], [1234, 1234567, 999]),
        (["1,234", "1,234.5"], [1234, 1234.5]),
        (["1,234", "999"], [1234, 999]),
    ],
)
def test_one_unambiguous_number_decides_the_decimal_sign_of_all_columns(
    tmp_path: Path, cells: list[str], values: list[float]
) -> None:
    path = write_table(tmp_path, "\n".join(["y,z", *(f'"{cell}","1,234.5"' for cell in cells * 20)]))
    assert read_table(path, TableOptions(column=["y"])).series[0].values.tolist() == values * 20
    if float(cells[0].replace(",", "")) == values[0]:
        assert set(read_table(path).series[1].values) == {1234.5}
    else:
        message = r"mixes decimal commas \('.*' in y\) and decimal points \('1,234.5' in z\); .* with --column"
        with pytest.raises(DataError, match=message):
            read_table(path)


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
    stamps = pd.date_range(first, last, freq=frequency)
    path = with_stamps(tmp_path, stamps, np.full(len(stamps), 10))
    table = read_table(path, TableOptions(resample=step, aggregate="sum"))
    remarks = [remark for remark in table.remarks if "is left out: its rows" in remark]
    assert [remark.split(" step, ")[1][:10] for remark in remarks] == ([left_out] if left_out else [])
    mean = read_table(path, TableOptions(resample=step, aggregate="mean"))
    assert set(mean.series[0].values) == {10}
    assert len(mean.series[0].values) == len(table.series[0].values) + len(remarks)
