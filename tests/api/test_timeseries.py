"""KServe's time series protocol, and Nixtla's field names in the native endpoint."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

URL = "/v1/timeseries/forecast"
SERIES = [float(i % 7) for i in range(20)]


def request_body(**changes: Any) -> dict[str, Any]:
    series = {"type": "univariate_time_series", "name": "a", "series": SERIES, "frequency": "day"}
    series |= {key: changes.pop(key) for key in list(changes) if key not in ("model", "inputs", "options", "metadata")}
    return {"model": "tiny-lstm", "inputs": [series], "options": {"horizon": 5}, **changes}


def test_quantiles_near_0_and_near_1_and_near_a_half_are_accepted(tiny: httpx.Client) -> None:
    quantiles = [1e-12, 0.5 - 1e-14, 0.5, 1 - 1e-12]
    answer = tiny.post(URL, json=request_body(options={"horizon": 5, "quantiles": quantiles})).json()
    lowest, lower, middle, highest = answer["outputs"][0]["content"][0]["quantiles"].values()
    assert lower == middle
    assert lowest[0] < middle[0] < highest[0]


@pytest.mark.parametrize(
    ("begin", "frequency", "start"),
    [
        ("2026-01-01", "day", "2026-01-21T00:00:00"),
        ("2026-01-01T00:00:00+02:00", "H", "2026-01-01T20:00:00+02:00"),
        ("2026-01-01T00:00:00Z", "week", "2026-05-21T00:00:00Z"),
        ("2024-06-30", "M", "2026-02-28T00:00:00"),
        ("2026-01-31", "quarter", "2031-01-31T00:00:00"),
        ("2023-04-30", "M", "2024-12-31T00:00:00"),  # the series starts at the end of a month
        ("2023-04-29", "M", "2024-12-29T00:00:00"),
        ("2024-02-29", "Y", "2044-02-29T00:00:00"),
    ],
)
def test_the_forecast_starts_one_step_after_the_series_ends(
    tiny: httpx.Client, begin: str, frequency: str, start: str
) -> None:
    answer = tiny.post(URL, json=request_body(start_timestamp=begin, frequency=frequency)).json()
    assert answer["outputs"][0]["content"][0]["start_timestamp"] == start


def test_optional_fields_of_the_request_may_be_null(tiny: httpx.Client) -> None:
    body = request_body(options={"horizon": 5, "quantiles": None}, start_timestamp=None, metadata=None)
    (output,) = tiny.post(URL, json=body).raise_for_status().json()["outputs"]
    (content,) = output["content"]
    assert output["type"] == "time_series_forecast"
    assert (content["quantiles"], content["start_timestamp"]) == ({}, "")  # KServe's client requires a string
