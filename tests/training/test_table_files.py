"""Files as users have them. Each file is read correctly, or rejected with a message that names the missing option.

The files are in ``table_files``, and ``cases.toml`` says what each of them holds. To add a case, add a file and an entry.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tables import write_table
from support.tables.random_files import write_random_file

from training import lstm
from training.data.datasets import DataError
from training.data.tables import Table, TableOptions, describe, read_table, without_gaps

FOLDER = Path(__file__).with_name("table_files")
CASES: list[dict[str, Any]] = tomllib.loads((FOLDER / "cases.toml").read_text("utf-8"))["case"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.get("file", "text"))
def test_a_file_is_read_correctly_or_rejected(case: dict[str, Any], tmp_path: Path) -> None:
    path, options = FOLDER / case.get("file", ""), case.get("options", {})
    if "text" in case:
        path = write_table(tmp_path, case["text"])
    if "error" in case:
        with pytest.raises(DataError) as rejected:
            read_table(path, TableOptions(**options))
        parts = [case["error"]] if isinstance(case["error"], str) else case["error"]
        assert [part for part in parts if part not in str(rejected.value)] == [], rejected.value
        options = options | case.get("solution", {})
    if "series" in case:
        table = read_table(path, TableOptions(**options))
        check_table(case, without_gaps(table) if case.get("filled") else table)


def check_table(case: dict[str, Any], table: Table) -> None:
    assert [one.name for one in table.series] == list(case["series"])
    for one in table.series:
        start, step, values = case["series"][one.name].values()
        assert (one.start, table.frequency) == (start, step)
        assert one.values.tolist() == pytest.approx(values, nan_ok=True)
    assert table.season == case.get("season", table.season)
    assert [remark for remark in case.get("remarks", []) if remark not in table.remarks] == []


# --- the same series in many formats

OPTIONS = r"--(column|format|decimal|time|resample|aggregate|group|header|by-rows|separator)"


def is_accepted(folder: Path, seed: int) -> bool:
    """Return whether a random file is accepted; fail if it is read wrongly or rejected without advice."""
    file = write_random_file(folder, seed)
    try:
        table = read_table(file.path, TableOptions(**file.options))
    except DataError as rejected:
        message = str(rejected)
    else:
        assert (table.frequency, {one.name for one in table.series}) == (file.step, {*file.series}), seed
        for one in table.series:
            values = [np.nan if x is None else x for x in file.series[one.name]]
            assert one.values.tolist() == pytest.approx(values, nan_ok=True), seed
            assert one.start.startswith(file.start), seed
        return True
    assert re.search(OPTIONS, message), (seed, message)
    return False


@pytest.mark.slow
def test_random_files_are_read_correctly_or_rejected_with_an_option(tmp_path: Path) -> None:
    seed = random.randrange(10**9)
    print(f"seeds from {seed}")  # pytest shows it if the test fails
    for number in range(60):
        is_accepted(tmp_path, seed + number)


@pytest.mark.parametrize(("files", "accepted"), [(40, 31), pytest.param(100, 80, marks=pytest.mark.slow)])
def test_most_random_files_are_accepted(tmp_path: Path, files: int, accepted: int) -> None:
    """The rejected files have ambiguous dates, ambiguous decimals or units."""
    assert sum(is_accepted(tmp_path, seed) for seed in range(files)) >= accepted


@pytest.mark.parametrize("name", ["day-first", "iso-weeks", "one-group-column", "missing-values", "duplicate-dates"])
def test_the_order_of_the_rows_changes_nothing(tmp_path: Path, name: str) -> None:
    header, *rows = (FOLDER / f"{name}.csv").read_text("utf-8").splitlines()
    path, results = tmp_path / "file.csv", list[Any]()
    for order in (range(len(rows)), np.random.default_rng(0).permutation(len(rows))):
        path.write_text("\n".join([header, *(rows[i] for i in order)]), "utf-8")
        try:
            shown = describe(read_table(path, TableOptions()))
            results.append({one["name"]: one for one in shown["series"]})
        except DataError:
            results.append("rejected")
    assert results[0] == results[1]
    assert (results[0] == "rejected") == (name == "duplicate-dates")


def test_rows_without_time_stamps_are_reported() -> None:
    remark = "no column holds time stamps: the rows are read in the order of time"
    path = FOLDER / "an-empty-line-in-one-column.csv"
    assert remark in read_table(path, TableOptions()).remarks
    assert remark not in read_table(path, TableOptions(time="none")).remarks


def test_look_prints_json_or_rejects_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(FOLDER / "gzip.csv.gz")
    lstm.main(["--csv", path, "--preview", "--json"])
    shown = json.loads(capsys.readouterr().out)
    (one,) = shown["series"]
    assert (one["start"], one["step"], one["length"], one["missing"]) == ("2024-01-01", "day", 40, 0)
    assert (one["first"], one["last"]) == ([10, 11, 14], [19, 26, 18])
    assert "time stamps: column 'd', %Y-%m-%d" in shown["remarks"]
    lstm.main(["--csv", path, "--preview"])
    assert "1 series (y) of 40 values, one per day" in capsys.readouterr().out
    rejected = str(FOLDER / "day-or-month-first-one-year.csv")
    with pytest.raises(SystemExit) as stopped:
        lstm.main(["--csv", rejected, "--preview", "--json"])
    assert stopped.value.code == 2
    assert "--format %d/%m/%Y" in capsys.readouterr().err
    for arguments in (["--preview"], ["--csv", rejected, "--name", "x", "--json"]):
        with pytest.raises(SystemExit, match="2"):
            lstm.main(arguments)
