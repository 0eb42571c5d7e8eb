"""Forecasts of tables at ``/v1/series/forecast``: CSV and Excel files in, JSON with dates or CSV out."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openpyxl
import pandas as pd
import pytest
from support.networks import TINY, publish_network, publish_tiny
from support.service import ROOT, TEST, address, serving
from support.tables import PRODUCTS, shop_table

from app.settings import Settings
from training.data.tables import TableOptions, describe, read_table
from training.prediction import main as predict

URL = "/v1/series/forecast"
CSV = {"content-type": "text/csv"}
EXCEL = {"content-type": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"}
SHOP = {"column": "Umsatz", "horizon": 28}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables") / "store"
    for name in (*TINY, "tiny-forecaster"):
        publish_tiny(folder, name)
    column = {"name": "Aktion", "mean": 0.2, "scale": 0.4, "coefficient": 0.3}
    traits = {"season": 7, "known": {"columns": [column]}}
    publish_network(folder, "promotions", series=traits)
    return folder


@pytest.fixture(scope="module")
def service(store: Path) -> Iterator[httpx.Client]:
    with serving(Settings(store=store, **TEST)) as client:
        client.params = {"model": "tiny-forecaster"}
        yield client


def post(service: httpx.Client, content: bytes, headers: dict[str, str] = CSV, **query: Any) -> httpx.Response:
    return service.post(URL, content=content, headers=headers, params=query)


def excel(rows: list[list[Any]]) -> bytes:
    book, file = openpyxl.Workbook(), io.BytesIO()
    for row in rows:
        book.active.append(row)
    book.save(file)
    return file.getvalue()


@pytest.mark.parametrize("column", [[], ["Umsatz"]])
def test_the_series_are_those_of_the_training(service: httpx.Client, tmp_path: Path, column: list[str]) -> None:
    answer = post(service, shop_table(), horizon=28, column=column, history=True).raise_for_status().json()
    path = tmp_path / "shop.csv"
    path.write_bytes(shop_table())
    table = read_table(path, TableOptions(column=column))
    assert [result["series"] for result in answer["results"]] == list(PRODUCTS)
    for result, series, described in zip(answer["results"], table.series, describe(table)["series"], strict=True):
        values = [None if pd.isna(value) else value for value in series.values.tolist()]
        assert result["history"] == {"times": [str(time)[:10] for time in series.times], "values": values}
        read = {"start": described["start"], "length": described["length"], "missing": described["missing"]}
        assert result["read"] == {**read, "end": "2023-04-23"}
        assert result["times"][::27] == ["2023-04-24", "2023-05-21"]
        assert {len(result[name]) for name in ("mean", "median", "times")} == {28}
    remarks = [remark.replace("--column ", "column=") for remark in table.remarks]
    assert answer["table"] == {"step": "day", "remarks": remarks}
    assert {"read as text (cp1252), semicolon-separated", "the decimal separator is ','"} < set(table.remarks)


def test_the_answer_in_csv_is_the_file_that_predict_writes(service: httpx.Client, tmp_path: Path) -> None:
    path, out = tmp_path / "shop.csv", tmp_path / "out.csv"
    path.write_bytes(shop_table())
    predict(["tiny-forecaster", str(path), "--out", str(out), "--column", "Umsatz", "--horizon", "28", "--url",
             f"http://{address(service)}"])  # fmt: skip
    answer = post(service, shop_table(), {**CSV, "accept": "text/csv, */*;q=0.1"}, **SHOP)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    header = "series,time,mean,median,lower_80,upper_80,lower_95,upper_95"
    assert answer.text.startswith(f"{header}\nÄpfel,2023-04-24,")
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(answer.text)), pd.read_csv(out), rtol=1e-5)
    other = post(service, shop_table(), {**CSV, "accept": "text/csv"}, **SHOP, levels=["50", "99.9"])
    assert other.text.splitlines()[0] == "series,time,mean,median,lower_50,upper_50,lower_99.9,upper_99.9"


def test_excel_files_and_forms_are_read(service: httpx.Client) -> None:
    rows = [[text.strip() for text in line.split(";")] for line in shop_table().decode("cp1252").split("\r\n") if line]
    expected = post(service, shop_table(), **SHOP).json()["results"]
    as_form = service.post(URL, files={"file": ("Umsätze.csv", shop_table())}, params=SHOP)
    for answer in (post(service, excel(rows), EXCEL, **SHOP), as_form):
        assert answer.raise_for_status().json()["results"] == expected


def test_future_values_of_known_covariates_come_from_the_last_rows_or_from_a_second_file(
    service: httpx.Client,
) -> None:
    def medians(last: str, promotion: int, horizon: int = 2, **files: str) -> Any:
        days = [f"{9 + i:02}.01.2023;;{promotion}\n" for i in range(horizon)]
        rows = [f"{day:02}.01.2023;{100 + day % 3},5;{day % 2}\n" for day in range(1, 9)]
        content = {"file": "".join(["Tag;Umsatz;Aktion\n", *rows, *(days if last == "file" else [])])}
        if last == "future":
            content["future"] = "".join(["Tag;Aktion\n", *[day.replace(";;", ";") for day in days]])
        form = {name: (f"{name}.csv", text) for name, text in content.items()}
        return service.post(URL, files=form, params={"model": "promotions"})

    usual, promoted = (medians("file", promotion).json()["results"][0] for promotion in (0, 1))
    assert usual["times"] == ["2023-01-09", "2023-01-10"]
    assert all(more > less for more, less in zip(promoted["median"], usual["median"], strict=True))
    assert medians("future", 1).json()["results"][0] == promoted
    error = medians("none", 1).json()["error"]
    assert error["message"] == "file file.csv: future needs Aktion of 'Umsatz' for each of the 1 steps from 2023-01-09"
    assert error["param"] == "future"


LINES = "".join(f"2024-01-{day:02},{day}\n" for day in range(1, 31))
WRONG: list[tuple[str, bytes | str, dict[str, Any], str, str]] = [
    ("dates", "d,x\n3/4/2024,1\n4/4/2024,2\n5/4/2024,4\n", {}, "format",
     "body: column 'd': the time stamp '3/4/2024' is ambiguous: %d/%m/%Y, %m/%d/%Y; choose format=%d/%m/%Y or "
     "format=%m/%d/%Y"),
    ("codes", "d,id,x\n" + "".join(f"2024-01-{day:02},{day * day},{day}\n" for day in range(1, 31)), {}, "column",
     "name the columns to read with column=x, or all columns of the time, such as time=Year,Month format=%Y %m"),
    ("missing", f"d,x\n{LINES}2024-01-31,-999\n", {"missing": ["a", "b"]}, "missing",
     "use missing=a&missing=b&missing=-999, or missing=a&missing=b&missing=none to"),
    ("two series", f"d,x\n{LINES}{LINES}", {}, "aggregate", "use aggregate=sum, mean or last to combine such rows"),
    ("empty", "", {}, "file", "body: is empty"),
    ("gzip", b"\x1f\x8b\x08", {}, "file", "the file is compressed or Parquet; send CSV or .xlsx"),
    ("damaged Excel", excel([["d", "x"], [1, 2]])[:900], {}, "file", "the .xlsx file is damaged or encrypted"),
    ("encoding", f"d,x\n{LINES}", {"encoding": "punycode"}, "encoding", "encoding is 'punycode'"),
    ("resample", f"d,x\n{LINES}", {"resample": "9" * 9 + "D"}, "resample", "resample=999999999D"),
    ("separator", f"d,x\n{LINES}", {"separator": "(a+)+b"}, "separator", "it should match pattern"),
    ("65 series", "d," + ",".join(f"s{i}" for i in range(65)) + "\n" + "".join(
        f"2024-01-{day:02}{',1' * 65}\n" for day in range(1, 31)), {}, "file",
     "the table has 65 series; the maximum is 64"),
    ("short series", "d,x,y\n2024-01-01,1,\n2024-01-02,2,4\n2024-01-03,3,5\n", {}, "file.y",
     "file.y has 2 values; tiny-forecaster needs at least 3"),
    ("a line of a million commas", f"d,x\n{LINES}" + "," * 10**6, {}, "file", "; the maximum is 1,000,000 cells, "),
]  # fmt: skip


@pytest.mark.parametrize("row", WRONG, ids=[row[0] for row in WRONG])
def test_a_table_that_cannot_be_read_is_rejected_with_the_parameter_that_decides(
    service: httpx.Client, row: Any
) -> None:
    _, content, query, param, sentence = row
    answer = post(service, content.encode() if isinstance(content, str) else content, **query)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert sentence in error["message"]


def test_one_cell_far_away_and_a_small_file_of_many_zeros_are_rejected(service: httpx.Client) -> None:
    book, file = openpyxl.Workbook(), io.BytesIO()
    book.active.cell(1_048_576, 16_384).value = 1
    book.save(file)
    message = post(service, file.getvalue(), EXCEL).json()["error"]["message"]
    assert message.startswith("body: has 1,048,576 rows of 16,384 cells; the maximum is 1,000,000 cells, ")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/workbook.xml", bytes(20 * 10**6))
    answer = post(service, file.getvalue(), EXCEL)
    assert (answer.status_code, answer.json()["error"]["message"]) == (413, "the .xlsx file has too many cells")


def test_a_message_about_a_long_cell_is_short(service: httpx.Client) -> None:
    answer = post(service, f"t,x\n{LINES}{'1' * 100_000}x,1\n".encode())
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) < 1000


def test_without_pandas_the_service_starts_and_names_the_extra(
    service: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("app.tables.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pandas", None)  # makes the import fail
    code = "import sys; sys.modules['pandas'] = None; import app.main; app.main.create_app()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    answer = post(service, shop_table(), **SHOP)
    assert answer.status_code == 415
    assert answer.json()["error"] == {
        "message": "this service cannot read tables; install the reader with pip install '.[tables]'",
        "type": "invalid_request_error", "param": None, "code": "not_installed",
    }  # fmt: skip
