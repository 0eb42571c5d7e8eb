"""Invalid JSON is rejected on every route, for every field and every kind of wrong value. Later requests succeed."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hypothesis_profiles import FUZZ
from support.responses import (
    CLASSIFY,
    CONTINUE,
    FORECAST,
    SAMPLE,
    SERIES,
    assert_harmless,
    assert_rejected,
    assert_still_serves,
)
from support.service import ROOT

from app import store

VALID: dict[str, dict[str, Any]] = {
    CONTINUE: {"prompt": "abc", "max_characters": 2, "temperature": 1.0, "stop": "z", "stream": False},
    FORECAST: {"values": SERIES, "horizon": 2, "levels": [80.0], "seasonality": None, "model": "tiny-lstm"},
    SAMPLE: {"count": 1, "label": None, "seed": 1, "model": "tiny-gan"},
}
PATHS = (
    CLASSIFY, CONTINUE, FORECAST, SAMPLE, "/v1/completions", "/v1/images/generations", "/v1/timeseries/forecast",
    "/v2/models/tiny-lstm/infer", "/v2/models/tiny-rnn/generate", "/v2/models/tiny-rnn/generate_stream",
)  # fmt: skip
WRONG_VALUES = [
    "true", "[]", "{}", '""', "-1", "1.5", "1e30", "-1e999", "NaN", "9" * 4000, "18446744073709551616", '"\\u0000"',
    '"' + "x" * 10_000 + '"', '["x", 1, null]', "[" * 100 + "]" * 100,
]  # fmt: skip
JSON_TYPE = {"content-type": "application/json"}


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a JSON object and all objects in it."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(part)


@pytest.mark.parametrize("path", PATHS)
def test_any_wrong_value_in_a_field_is_harmless(tiny: httpx.Client, path: str) -> None:
    """The fields are those of the schema, and those of each object in the example."""
    document = tiny.get("/openapi.json").json()
    operation = document["paths"][re.sub(r"tiny-\w+", "{name}", path)]["post"]
    content = operation["requestBody"]["content"]["application/json"]
    body = content["example"]
    body.pop("model", None)  # the examples name networks that are not tiny
    assert tiny.post(path, json=body).status_code == 200
    schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    for part in list(objects(body)):
        valid = dict(part)
        for field in [*part, *(schema["properties"].keys() - part.keys() if part is body else ())]:
            part[field] = "HERE"
            for wrong in WRONG_VALUES:
                assert_harmless(tiny.post(path, content=json.dumps(body).replace('"HERE"', wrong, 1).encode()))
            part.clear()
            part.update(valid)
    assert_still_serves(tiny)


def test_a_duplicate_field_is_rejected(tiny: httpx.Client) -> None:
    for path, twice in (
        (CONTINUE, '{"prompt": "a: b", "seed" : 1, "se\\u0065d" : 1}'),
        ("/v1/completions", '{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}'),
        ("/v1/timeseries/forecast", '{"inputs": [{"series": []}, {"series": [], "series": []}], "options": {}}'),
        ("/v2/models/tiny-lstm/infer", '{"inputs": [{"name": "values", "shape": [1, 12], "shape": [12, 1]}]}'),
        ("/v2/models/tiny-lstm/infer", '{"inputs": [], "parameters": {"horizon": 1, "horizon": 2}}'),
    ):
        answer = tiny.post(path, content=twice)
        assert answer.status_code == 400, answer.text
        assert "was sent more than once" in answer.text
    assert_still_serves(tiny)


def test_a_prompt_that_looks_like_fields_is_accepted(tiny: httpx.Client) -> None:
    for text in (r"\"seed\": \"seed\" \"prompt\"", r"\":" * 5000, "," * 5000, r"\\"):
        raw = f'{{"prompt": "{text}", "seed": 2, "max_characters": 1}}'
        assert tiny.post(CONTINUE, content=raw).status_code == 200


@pytest.mark.parametrize(
    ("path", "content", "param", "sentence"),
    [
        (CONTINUE, b'{"max_characters": 1%s}' % (b"0" * 400), "max_characters", ""),
        (CONTINUE, b'{"prompt": "\\ud800"}', None, "the body is not JSON"),
        (CONTINUE, b'{"%s": 1}' % (b"a" * 10**5), "a" * 100, "(100,000 characters)"),
        (CONTINUE, b"[" * 250_000, None, "the body is not JSON"),
        (CONTINUE, b"{%s}" % b",".join(b'"a%d":1' % i for i in range(10**5 + 5000)), None, "104,999 commas, which separate values and names"),
        (FORECAST, b'{"values":[%s]}' % b",".join([b"true"] * 500_000), None, "499,999 commas"),
        (FORECAST, b'{"values":[%s]}' % b",".join([b"true"] * 99_000), "values.0", ""),
        (FORECAST, b'{"values":[%s]}' % b",".join([b"[]"] * 99_000), "values", ""),
        (FORECAST, b"{%s}" % b",".join(b'"k%d":1' % i for i in range(1900)), "k0", "unknown field 'k0'"),
    ],
    ids=range(9),
)  # fmt: skip
def test_invalid_json_is_rejected_quickly(
    tiny: httpx.Client, path: str, content: bytes, param: str | None, sentence: str
) -> None:
    started = time.process_time()  # the service runs in this process
    assert_rejected(tiny.post(path, content=content), 400, param, sentence)
    assert time.process_time() - started < 5  # below 0.5 s on an idle machine
    assert_still_serves(tiny)


@FUZZ
@given(
    path=st.sampled_from([CONTINUE, FORECAST, SAMPLE]), position=st.floats(0, 1), cut=st.integers(0, 2),
    inserted=st.sampled_from([b"", b'"', b"{", b"}", b",", b"0", b"\\", b"\xff", b"\n", b"e9"]),
)  # fmt: skip
def test_a_changed_body_is_answered_or_its_error_says_what_is_wrong(
    tiny: httpx.Client, path: str, position: float, cut: int, inserted: bytes
) -> None:
    valid = json.dumps(VALID[path]).encode()
    start = int(position * len(valid))
    content = valid[:start] + inserted + valid[start + cut :]
    answer = tiny.post(path, content=content, headers=JSON_TYPE)
    assert_harmless(answer)
    try:
        json.loads(content.decode())
    except ValueError:
        assert_rejected(answer, 400, None, "the body is not JSON: ")
    else:
        assert answer.status_code in (200, 400, 404)
        if answer.status_code != 200:
            error = answer.json()["error"]
            named = "the body" if error["param"] is None else error["param"]
            assert repr(named)[1:-1] in error["message"]  # the message escapes line breaks


@FUZZ
@given(data=st.data(), cut=st.integers(1, 3))
def test_a_damaged_model_card_is_rejected_or_read(data: st.DataObject, cut: int) -> None:
    content = (ROOT / "models_store" / "sine-lstm" / "1" / "card.json").read_bytes()
    position = data.draw(st.integers(0, len(content)))
    with contextlib.suppress(store.StoreError):  # any other exception fails the test
        store.parse_card(content[:position] + content[position + cut :], "card.json")
