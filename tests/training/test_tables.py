"""Series from users' tables: values are placed on the grid of time steps, and remarks name repaired rows."""

from __future__ import annotations

import math
import re
import shlex
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.hypothesis_profiles import FUZZ
from support.tables import write_table

from training.data.datasets import DataError
from training.data.tables import TableOptions, read_table, without_gaps

DETECTED = ["read as text (utf-8), comma-separated", "time stamps: column 'day', %Y-%m-%d"]
DAYS = [datetime(2024, 1, 1) + timedelta(days=i) for i in range(60)]


def write_weekly_table(folder: Path, **replaced: str) -> Path:
    """Write a table of sixty days with a weekly pattern. ``r5="..."`` replaces row 5 of the file."""
    lines = ["day,sold"] + [f"{day:%Y-%m-%d},{10 + day.weekday()}" for day in DAYS]
    for row, line in replaced.items():
        lines[int(row[1:]) - 1] = line
    return write_table(folder, [line for line in lines if line != "gone"])


def test_time_step_and_season_are_detected(tmp_path: Path) -> None:
    table = read_table(write_weekly_table(tmp_path))
    (series,) = table.series
    assert (series.name, series.start, table.frequency, table.season) == ("sold", "2024-01-01", "day", 7)
    assert series.values.tolist() == [10 + day.weekday() for day in DAYS]
    assert table.remarks == DETECTED
    assert read_table(write_weekly_table(tmp_path), TableOptions(season=3)).season == 3


def test_gaps_are_reported_and_interpolated(tmp_path: Path) -> None:
    path = write_weekly_table(tmp_path, r4="gone", r9="2024-01-08,n/a", r31="")
    table = read_table(path)
    assert table.remarks == [*DETECTED, "2 time steps (one per day) are missing, the first after 2024-01-02"]
    (series,) = table.series
    assert (len(series.values), int(series.observed.sum())) == (60, 57)
    filled = without_gaps(table)
    assert "sold: 3 missing values are interpolated" in filled.remarks
    assert filled.series[0].values[2] == pytest.approx(12)
    assert not np.isnan(filled.series[0].values).any()


def test_the_longest_part_of_a_series_with_a_long_gap_is_used(tmp_path: Path) -> None:
    table = without_gaps(read_table(write_weekly_table(tmp_path, **{f"r{row}": "gone" for row in range(10, 22)})))
    (series,) = table.series
    assert series.start == "2024-01-21"
    assert len(series.values) == 40
    assert (
        "sold: 1 gaps are longer than 7 steps; only the longest part between them, 40 values, is used" in table.remarks
    )


def test_series_whose_names_would_be_equal_are_rejected(tmp_path: Path) -> None:
    shops = [("New York", "City"), ("New", "York City")]
    rows = [f"{state},{town},{day:%Y-%m-%d},{i}" for i, day in enumerate(DAYS) for state, town in shops]
    path = write_table(tmp_path, ["state,town,day,sold", *rows])
    with pytest.raises(
        DataError, match=r"two series have the name 'New York City', because their cells in the columns state, town"
    ):
        read_table(path, TableOptions(group="state,town", aggregate="sum"))


def test_two_markets_may_close_at_different_times(tmp_path: Path) -> None:
    days = [day for day in DAYS if day.weekday() < 5]
    rows = [
        f"{name},{day:%Y-%m-%d} {clock},{i % 9}"
        for i, day in enumerate(days)
        for name, clock in (("a", "16:00"), ("b", "17:30"))
    ]
    table = read_table(write_table(tmp_path, ["market,time,y", *rows]), TableOptions(group="market"))
    assert table.frequency == "business day"
    assert [(series.start[-8:], len(series.values)) for series in table.series] == [
        ("16:00:00", len(days)),
        ("17:30:00", len(days)),
    ]
    rows = [row.replace("02-06 16:00", "02-06 13:00") for row in rows]
    early = read_table(write_table(tmp_path, ["market,time,y", *rows]), TableOptions(group="market"))
    assert early.frequency == "business day"
    assert [series.values.tolist() for series in early.series] == [series.values.tolist() for series in table.series]


def test_irregular_times_on_working_days_are_rejected(tmp_path: Path) -> None:
    days = [day for day in DAYS if day.weekday() < 5]
    rows = [f"{day:%Y-%m-%d} {7 * i % 24:02}:00,{i % 9}" for i, day in enumerate(days)]
    with pytest.raises(DataError, match="the time stamps are irregular"):
        read_table(write_table(tmp_path, ["time,y", *rows]))


@pytest.mark.parametrize(
    ("step", "name", "season"),
    [("14D", "2 weeks", 26), ("4MS", "4 months", 3)],
)
def test_a_yearly_season_is_detected_for_multiples_of_weeks_and_months(
    tmp_path: Path, step: str, name: str, season: int
) -> None:
    stamps = pd.date_range("2010-01-01", periods=6 * season, freq=step)
    noise = np.random.default_rng(0).normal(0, 0.1, len(stamps))
    values = np.sin(2 * np.pi * np.arange(len(stamps)) / season) + noise
    rows = [f"{stamp:%Y-%m-%d},{value}" for stamp, value in zip(stamps, values, strict=True)]
    table = read_table(write_table(tmp_path, ["day,y", *rows]))
    assert (table.frequency, table.season) == (name, season)


def test_a_season_is_detected_without_time_stamps_if_there_is_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for season, expected in ((24, 24), (0, 1)):
        values = [math.sin(2 * math.pi * i / season) if season else 0 for i in range(240)] + random.normal(0, 0.3, 240)
        assert read_table(write_table(tmp_path, ["y", *map(str, values)])).season == expected


@pytest.mark.parametrize("unit", [1e-9, 1e140])
def test_the_season_does_not_depend_on_the_unit_of_the_values(tmp_path: Path, unit: float) -> None:
    months = np.arange(144)
    stamps = pd.date_range("2010-01-01", periods=144, freq="MS")
    seasonal = 100 + 20 * np.sin(np.pi * months / 6) + np.random.default_rng(0).normal(0, 3, 144)
    for values, season in ((unit * seasonal, 12), (np.full(144, unit), 1)):
        rows = [f"{stamp:%Y-%m},{value}" for stamp, value in zip(stamps, values, strict=True)]
        assert read_table(write_table(tmp_path, ["month,y", *rows])).season == season


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
    path = write_table(tmp_path, ["y,z", *(f'"{cell}","1,234.5"' for cell in cells * 20)])
    assert read_table(path, TableOptions(column=["y"])).series[0].values.tolist() == values * 20
    if float(cells[0].replace(",", "")) == values[0]:
        assert set(read_table(path).series[1].values) == {1234.5}
    else:
        message = r"mixes decimal commas \('.*' in y\) and decimal points \('1,234.5' in z\); .* with --column"
        with pytest.raises(DataError, match=message):
            read_table(path)


@pytest.mark.parametrize(
    ("cell", "delimiter", "values"),
    [("1,234", ",", {".": 1234, ",": 1.234}), ("1.234", ";", {".": 1.234, ",": 1234})],
)
def test_an_ambiguous_decimal_sign_is_rejected(
    tmp_path: Path, cell: str, values: dict[str, float], delimiter: str
) -> None:
    path = write_table(tmp_path, [f"y{delimiter}z", *([f'"{cell}"{delimiter}1'] * 40)])
    with pytest.raises(DataError, match=rf"y: '{re.escape(cell)}' may have decimals .* --decimal \. or --decimal ,"):
        read_table(path)
    for sign, value in values.items():
        assert set(read_table(path, TableOptions(decimal=sign)).series[0].values) == {value}


def test_three_decimals_beside_whole_numbers_are_ambiguous_in_a_comma_separated_file(tmp_path: Path) -> None:
    path = write_table(tmp_path, ["y,z", *(f"{cell},1" for cell in ["1.125", "1.250", "5.500", "3", "12"] * 8)])
    with pytest.raises(DataError, match=r"y: '1\.125' may have decimals .* --decimal \. or --decimal ,"):
        read_table(path)
    values = read_table(path, TableOptions(decimal=".")).series[0].values
    assert values[:5].tolist() == [1.125, 1.25, 5.5, 3, 12]


@pytest.mark.parametrize("pointed", ["1,234,567", "0.5"])
def test_a_column_with_decimal_commas_and_points_is_rejected_by_row(tmp_path: Path, pointed: str) -> None:
    path = write_table(tmp_path, ["y;z", *(["7;1"] * 40), "0,5;1", f"{pointed};1"])
    with pytest.raises(DataError, match=rf"mixes .*'0,5' in y\) and .*'{re.escape(pointed)}' in y\)"):
        read_table(path)
    assert [series.name for series in read_table(path, TableOptions(column=["z"])).series] == ["z"]


@pytest.mark.parametrize(("name", "order"), [("", 1), ("id", -1)])
def test_a_column_of_row_numbers_is_not_read_as_a_series(tmp_path: Path, name: str, order: int) -> None:
    lines = [f"{number},{day:%Y-%m-%d},{10 + day.weekday()}" for number, day in enumerate(DAYS)][::order]
    table = read_table(write_table(tmp_path, [f"{name},day,sold", *lines]))
    assert [series.name for series in table.series] == ["sold"]
    assert (table.frequency, table.season) == ("day", 7)
    remark = f"column {name!r} only numbers the rows, so it is left out; --column {shlex.quote(name)} reads it"
    assert table.remarks == [DETECTED[0], remark, DETECTED[1]]
    named = read_table(tmp_path / "table.csv", TableOptions(column=[name, "sold"]))
    assert [series.name for series in named.series] == [name, "sold"]


def test_zeros_and_ones_are_series_only_if_they_are_named_or_there_are_no_other_values(tmp_path: Path) -> None:
    rows = [f"{day:%Y-%m-%d},{i % 5},{int(i % 3 == 0)},{int(i % 4 == 0)}" for i, day in enumerate(DAYS)]
    path = write_table(tmp_path, ["day,sold,promo,holi day", *rows])
    table = read_table(path)
    assert [series.name for series in table.series] == ["sold"]
    remark = "column 'holi day' holds only zeros and ones, so it is left out; --column 'holi day' reads it"
    assert remark in table.remarks
    named = read_table(path, TableOptions(column=["sold", "promo"]))
    assert [series.name for series in named.series] == ["sold", "promo"]
    flags = write_table(tmp_path, ["day,promo,holiday", *(row[:10] + row[12:] for row in rows)])
    assert [series.name for series in read_table(flags).series] == ["promo", "holiday"]


@pytest.mark.parametrize(
    ("lines", "options", "sentence"),
    [
        ([], {}, "is empty"),
        (["1,2", "3,4"], {}, "row 1 must hold column names, but holds numbers: 1, 2; use --header 0"),
        (["a,a", "3,4"], {}, "column names must be unique"),
        (["a,b", "x,y"], {}, "has no column of numbers; its columns are: a, b"),
        (["a,b"], {}, "has no rows below its column names: a, b"),
        (["a,b", "1,2"], {"column": ["c"]}, "there is no column 'c'; its columns are: a, b"),
        (["a,b", "1,2"], {"sheet": "c"}, "is no Excel file, so it has no sheet 'c'"),
        (["a,b", "1,2"], {"encoding": "cp1"}, "--encoding cp1: Python knows no such encoding"),
        (["t,y", *(f"2024-01-0{i},1" for i in range(1, 9))], {"format": "%H"}, "--format %H does not fit the cells"),
        (["t,y", *(f"2024-01-0{i} UTC,1" for i in range(1, 9))], {"format": "%Y-%m-%d %Z"},
         "--format '%Y-%m-%d %Z': names of time zones are not supported; use %z for offsets such as .0100, or omit"),
        (["t,y", *(f"2024-01-0{i},1" for i in range(1, 9))], {"resample": "x"}, "--resample x: "),
        (["y", *"12345678"], {"resample": "M", "aggregate": "sum"}, "--resample M cannot be used without time stamps"),
        (["y", "1", "-1e308", "1"], {}, r"y has the value -1e\+308; allowed are -1e\+150 to 1e\+150"),
        (["y,x", "1,2", "2,1e151", "1,3"], {"known_covariates": "x"}, r"x has the value 1e\+151; allowed are"),
    ],
)  # fmt: skip
def test_an_unusable_table_is_rejected(
    tmp_path: Path, lines: list[str], options: dict[str, Any], sentence: str
) -> None:
    path = write_table(tmp_path, lines)
    with pytest.raises(DataError, match=sentence):
        read_table(path, TableOptions(**options))


@pytest.mark.slow
@settings(FUZZ, max_examples=40, phases=[Phase.generate])
@given(
    cut=st.integers(0, 900),
    at=st.integers(0, 900),
    inserted=st.sampled_from(
        [
            *(b"", b"\0", b"\xff", b'"', b",", b";", b"\t", b"\n", b"\r", b"-", b"nan"),
            *(b"9" * 400, b"1e999", b"2024-02-30", b"x" * 140_000),
        ]
    ),
    times=st.integers(1, 3),
)
def test_damaged_tables_are_read_or_rejected_with_a_message(
    tmp_path: Path, cut: int, at: int, inserted: bytes, times: int
) -> None:
    path = write_weekly_table(tmp_path)
    content = path.read_bytes()
    content = content[: len(content) - cut]
    path.write_bytes(content[:at] + inserted * times + content[at:])
    for more_options in ({}, {"by_rows": True}, {"group": "day"}):
        with suppress(DataError):
            table = without_gaps(read_table(path, TableOptions(**more_options)))  # type: ignore[arg-type]
            assert all(np.isfinite(series.values).all() for series in table.series)
