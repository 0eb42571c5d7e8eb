"""Own series from CSV files: values are placed on the time grid, and repairs are reported with their rows."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data import tables, time_index
from training.data.datasets import DataError

DAYS = [datetime(2024, 1, 1) + timedelta(days=i) for i in range(60)]


def written(folder: Path, lines: list[str]) -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def weekly(folder: Path, **replaced: str) -> Path:
    """Sixty days that repeat each week, each row numbered; ``r5="..."`` replaces row 5 of the file."""
    lines = ["day,sold"] + [f"{day:%Y-%m-%d},{10 + day.weekday()}" for day in DAYS]
    for row, line in replaced.items():
        lines[int(row[1:]) - 1] = line
    return written(folder, [line for line in lines if line != "gone"])


def test_time_step_and_season_are_detected(tmp_path: Path) -> None:
    table = tables.read(weekly(tmp_path))
    (series,) = table.series
    assert (series.name, series.start, table.frequency, table.season) == ("sold", "2024-01-01", "day", 7)
    assert series.values.tolist() == [10 + day.weekday() for day in DAYS]
    assert table.remarks == []
    assert tables.read(weekly(tmp_path), season=3).season == 3


def test_gaps_and_duplicates_are_repaired_and_reported_by_row(tmp_path: Path) -> None:
    path = weekly(tmp_path, r4="gone", r9="2024-01-08,n/a", r12="2024-01-11,many", r21="2024-01-19,77", r31="1,2,3")
    table = tables.read(path)
    assert sorted(table.remarks) == sorted(
        [
            "row 11: sold is 'many', not a number: read as missing",
            "row 30 has 3 cells, but the header has 2: the row is left out",
            "sold: rows 19 and 20 have the same time stamp 2024-01-19: 14.0 and 77.0; row 20 is used",
            "sold: 1 time steps (one per day) are missing after row 3 (2024-01-02)",
            "sold: 1 time steps (one per day) are missing after row 20 (2024-01-19)",
            "sold: 1 time steps (one per day) are missing after row 29 (2024-01-29)",
            "sold: 5 missing values are interpolated",
        ]
    )
    (series,) = table.series
    assert len(series.values) == 60
    assert series.values[2] == pytest.approx(12)
    assert series.values[18] == 77
    assert not np.isnan(series.values).any()


def test_of_a_series_with_a_long_gap_the_longest_part_is_used(tmp_path: Path) -> None:
    table = tables.read(weekly(tmp_path, **{f"r{row}": "gone" for row in range(10, 22)}))
    (series,) = table.series
    assert series.start == "2024-01-21"
    assert len(series.values) == 40
    assert (
        "sold: 1 gaps are longer than 7 steps; only the longest part between them, 40 values, is used" in table.remarks
    )


def test_rows_may_come_in_any_order(tmp_path: Path) -> None:
    lines = weekly(tmp_path).read_text().splitlines()
    ordered = tables.read(tmp_path / "table.csv")
    shuffled = tables.read(written(tmp_path, [lines[0], *reversed(lines[1:])]))
    assert shuffled.sha256 == ordered.sha256


def test_wide_and_long_tables_hold_the_same_series(tmp_path: Path) -> None:
    wide = written(tmp_path, ["ts;a;b", *(f"{day:%d.%m.%Y};{i},5;{i * i}" for i, day in enumerate(DAYS))])
    first = tables.read(wide)
    long = written(
        tmp_path,
        ["shop,ts,sold", *(f"{name},{day:%Y-%m-%d},{value}" for i, day in enumerate(DAYS) for name, value in
                           (("a", i + 0.5), ("b", i * i)))],
    )  # fmt: skip
    second = tables.read(long, group="shop")
    assert [one.name for one in first.series] == ["a", "b"]
    assert first.sha256 == second.sha256
    rows = {"a": [i + 0.5 for i in range(60)], "b": [i * i for i in range(60)]}
    head = ",".join(["id", *(f"V{i}" for i in range(70))])
    by_rows = written(
        tmp_path, [head, *(f"{name}," + ",".join(map(str, row)) + "," * 10 for name, row in rows.items())]
    )
    assert tables.read(by_rows, by_rows=True).sha256 == first.sha256


@pytest.mark.parametrize(
    ("stamps", "name"),
    [
        ([f"{1990 + i // 12}-{i % 12 + 1:02}" for i in range(40)], "month"),
        ([f"{1990 + i // 4}Q{i % 4 + 1}" for i in range(40)], "quarter"),
        ([str(1950 + i) for i in range(40)], "year"),
        ([f"{i % 12 + 1}/1/{2000 + i // 12}" for i in range(40)], "month"),
        ([f"{day:%m/%d/%Y}" for day in DAYS], "day"),
        ([f"{day:%d/%m/%Y}" for day in DAYS], "day"),
        ([str(1700000000 + 3600 * i) for i in range(40)], "hour"),
        ([f"{datetime(2024, 1, 1) + timedelta(minutes=15 * i):%Y-%m-%dT%H:%M:%S}Z" for i in range(40)], "15 minutes"),
        ([f"{day:%Y-%m-%d}" for day in DAYS if day.weekday() < 5], "business day"),
        ([f"{datetime(2024, 1, 7) + timedelta(weeks=i):%Y%m%d}" for i in range(40)], "week"),
    ],
)
def test_the_time_step_is_detected(tmp_path: Path, stamps: list[str], name: str) -> None:
    table = tables.read(written(tmp_path, ["when,y", *(f"{stamp},{i % 9}" for i, stamp in enumerate(stamps))]))
    assert table.frequency == name
    assert len(table.series[0].values) == len(stamps)
    assert table.remarks == []


def test_a_stamp_between_two_steps_is_left_out_by_row(tmp_path: Path) -> None:
    table = tables.read(weekly(tmp_path, r9="2024-01-08 00:07,5"))
    assert "row 9: '2024-01-08 00:07' lies between two time steps (one per day): the row is left out" in table.remarks


def test_a_season_is_detected_without_time_stamps_if_there_is_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for season, expected in ((24, 24), (0, 1)):
        values = [math.sin(2 * math.pi * i / season) if season else 0 for i in range(240)] + random.normal(0, 0.3, 240)
        assert tables.read(written(tmp_path, ["y", *map(str, values)])).season == expected


def test_thousands_separators_signs_and_exponents_are_read(tmp_path: Path) -> None:
    cells = ["1,234.5", "-2", "1e3", "7"] * 10
    path = written(tmp_path, ["y;z", *(f"{cell};1" for cell in cells)])
    (series, _) = tables.read(path).series
    assert series.values[:4].tolist() == [1234.5, -2, 1000, 7]


@pytest.mark.parametrize("delimiter", [";", ","])
@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["0,5", "0,125", "0,12", "12,345"], [0.5, 0.125, 0.12, 12.345]),
        (["12,345", "-0,125"], [12.345, -0.125]),
        (["1,234", "1234,567"], [1.234, 1234.567]),
        (["1.234,56", "1.234", "2,345", "7"], [1234.56, 1234, 2.345, 7]),
        (["1,234", "1,5e-05"], [1.234, 1.5e-05]),
        (["1,234", "1,234,567", "999"], [1234, 1234567, 999]),
        (["1,234", "1,234.5"], [1234, 1234.5]),
        (["1,234", "12.5"], [1234, 12.5]),
    ],
)
def test_one_unambiguous_number_decides_the_decimal_sign_of_its_column(
    tmp_path: Path, cells: list[str], values: list[float], delimiter: str
) -> None:
    rows = [f'"{cell}"{delimiter}"1,234.5"' for cell in cells * 20]
    table = tables.read(written(tmp_path, [f"y{delimiter}z", *rows]))
    assert table.series[0].values.tolist() == values * 20
    assert set(table.series[1].values) == {1234.5}
    assert table.remarks == []


def test_an_ambiguous_comma_is_decimal_in_files_with_semicolons(tmp_path: Path) -> None:
    for delimiter, value in ((";", 1.234), (",", 1234.0)):
        path = written(tmp_path, [f"y{delimiter}z", *([f'"1,234"{delimiter}1', f"999{delimiter}1"] * 20)])
        table = tables.read(path)
        assert table.series[0].values[:2].tolist() == [value, 999]
        remark = f"y: '1,234' in row 2 may have decimals or thousands separators; read as {value}"
        assert table.remarks == [remark]


def test_each_series_of_a_row_has_its_own_decimal_sign(tmp_path: Path) -> None:
    cells = {"a": ["0,5", "0,125", "12,345"], "b": ["1,234", "1,234,567", "7"]}
    lines = [";".join([name, *own * 20]) for name, own in cells.items()]
    table = tables.read(written(tmp_path, [";".join(["id", *(f"V{i}" for i in range(60))]), *lines]), by_rows=True)
    assert [one.values[:3].tolist() for one in table.series] == [[0.5, 0.125, 12.345], [1234, 1234567, 7]]


@pytest.mark.parametrize("pointed", ["1,234.5", "1,234,567", "0.5"])
def test_a_column_with_decimal_commas_and_points_is_refused_by_row(tmp_path: Path, pointed: str) -> None:
    path = written(tmp_path, ["y;z", *(["7;1"] * 40), "0,5;1", f"{pointed};1"])
    with pytest.raises(DataError, match=rf"y mixes .*'0,5' in row 42\) and .*'{re.escape(pointed)}' in row 43\)"):
        tables.read(path)
    assert [one.name for one in tables.read(path, columns=["z"]).series] == ["z"]


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "index", "id"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_column_that_only_numbers_the_rows_is_no_series(tmp_path: Path, name: str, order: int) -> None:
    lines = [f"{number},{day:%Y-%m-%d},{10 + day.weekday()}" for number, day in enumerate(DAYS)][::order]
    table = tables.read(written(tmp_path, [f"{name},day,sold", *lines]))
    assert [one.name for one in table.series] == ["sold"]
    assert (table.frequency, table.season) == ("day", 7)
    assert table.remarks == [f"column {name!r} only numbers the rows: left out; --column {name!r} reads it"]
    named = tables.read(tmp_path / "table.csv", columns=[name, "sold"])
    assert [one.name for one in named.series] == [name, "sold"]
    assert named.remarks == []


def test_a_column_called_id_that_does_not_count_is_a_series(tmp_path: Path) -> None:
    table = tables.read(written(tmp_path, ["id,sold", *(f"{i * i},{i}" for i in range(40))]))
    assert [one.name for one in table.series] == ["id", "sold"]


@pytest.mark.parametrize("name", ["", "index"])
def test_the_index_column_may_hold_the_time_stamps(tmp_path: Path, name: str) -> None:
    for stamps, step in (([f"{day:%Y-%m-%d}" for day in DAYS], "day"), ([str(1950 + i) for i in range(40)], "year")):
        lines = [f"{name},sold", *(f"{stamp},{i % 7}" for i, stamp in enumerate(stamps))]
        table = tables.read(written(tmp_path, lines))
        assert [(one.name, one.start) for one in table.series] == [("sold", stamps[0])]
        assert (table.frequency, table.remarks) == (step, [])


@pytest.mark.parametrize(
    ("lines", "options", "sentence"),
    [
        ([], {}, "is empty"),
        (["", "a", "1"], {}, "the first row must hold column names, but is empty"),
        (["1,2", "3,4"], {}, "the first row must hold column names, but holds numbers: 1, 2"),
        (["a,a", "3,4"], {}, "column names must be unique"),
        (["a,b", "x,y"], {}, "has no column of numbers; its columns are: a, b"),
        (["id,b", "1,x", "2,y"], {}, "has no column of numbers; column 'id' only numbers the rows"),
        (["a,b"], {}, "has no rows below its column names: a, b"),
        (["t,y", "1", "2"], {"time": "t", "columns": ["y"]}, "no row has as many cells as the header, 2; row 3 has 1"),
        (["a,b", "1,2"], {"columns": ["c"]}, "has no column 'c'; its columns are: a, b"),
        (["a", "1", "2"], {}, "no series has 30 values or more; a: 2 values; at least 30"),
        (["t,y", *(f"{i}/{i}/2020,{i}" for i in range(1, 10))], {}, "'1/1/2020' is ambiguous"),
    ],
)  # fmt: skip
def test_an_unusable_table_is_refused(tmp_path: Path, lines: list[str], options: dict[str, Any], sentence: str) -> None:
    path = written(tmp_path, lines)
    with pytest.raises(DataError, match=sentence):
        tables.read(path, **options)


def test_month_ends_are_one_month_apart() -> None:
    ends = ["2024-01-31", "2024-02-29", "2024-03-31", "2024-04-30"]
    frequency = time_index.frequency([ends], Path("x"))
    assert frequency.name == "month"
    assert np.diff([frequency.position(stamp) or 0 for stamp in ends]).tolist() == [1, 1, 1]


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    cut=st.integers(0, 900),
    at=st.integers(0, 900),
    more=st.sampled_from(
        [
            *(b"", b"\0", b"\xff", b'"', b",", b";", b"\t", b"\n", b"\r", b"-", b"nan"),
            *(b"9" * 400, b"1e999", b"2024-02-30", b"x" * 140_000),
        ]
    ),
    times=st.integers(1, 3),
)
def test_damaged_tables_are_read_or_refused_with_a_message(
    tmp_path: Path, cut: int, at: int, more: bytes, times: int
) -> None:
    path = weekly(tmp_path)
    content = path.read_bytes()
    content = content[: len(content) - cut]
    path.write_bytes(content[:at] + more * times + content[at:])
    for more_options in ({}, {"by_rows": True}, {"group": "day"}):
        with suppress(DataError):
            table = tables.read(path, **more_options)  # type: ignore[arg-type]
            assert all(np.isfinite(series.values).all() for series in table.series)
