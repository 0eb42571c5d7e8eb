"""Invalid JSON is rejected on every route, for every field and every kind of wrong value. Later requests succeed."""

from __future__ import annotations

import contextlib
import json
import socket
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.hypothesis_profiles import FUZZ
from support.processes import memory_mib, reset_memory_peak, serving
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
from app.api.request_head import preferred_media_type

VALID: dict[str, dict[str, Any]] = {
    CLASSIFY: {"images": ["eA=="]},
    CONTINUE: {"prompt": "abc", "max_characters": 2, "temperature": 1.0, "top_k": 3, "top_p": 0.5, "stop": "z",
               "seed": 1, "n": 1, "stream": False, "model": "tiny-rnn"},
    FORECAST: {"values": SERIES, "horizon": 2, "levels": [80.0], "seasonality": None, "model": "tiny-lstm"},
    SAMPLE: {"count": 1, "label": None, "seed": 1, "model": "tiny-gan"},
}  # fmt: skip
# The fields of the other protocols. They allow any value in fields that the service ignores.
OTHER_PROTOCOLS: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "tiny-rnn", "prompt": "abc", "max_tokens": 2, "temperature": 1.0, "top_p": 0.5, "top_k": 3, "n": 1, "best_of": 1,
        "echo": False, "logprobs": 1, "logit_bias": {"1": 1}, "presence_penalty": 0, "frequency_penalty": 0, "stop": "z",
        "seed": 1, "stream": False, "stream_options": None, "suffix": None, "user": "u",
    },
    "/v1/images/generations": {
        "prompt": "digits", "model": "tiny-gan", "n": 1, "response_format": "b64_json", "size": "auto", "output_format": "png",
        "quality": "auto", "background": "auto", "moderation": "auto", "stream": False, "seed": 1, "user": "u",
    },
    "/v1/timeseries/forecast": {
        "model": "tiny-lstm", "inputs": [{"type": "univariate_time_series", "series": SERIES, "frequency": "D"}],
        "options": {"horizon": 2, "quantiles": [0.5]}, "metadata": {"from": "me"},
    },
    "/v2/models/tiny-lstm/infer": {
        "id": "a", "parameters": {"horizon": 2, "timeout": 60_000_000}, "outputs": [{"name": "mean"}],
        "inputs": [{"name": "values", "datatype": "FP64", "shape": [1, 20], "data": SERIES}],
    },
    "/v2/models/tiny-rnn/generate": {"id": "a", "text_input": "abc", "parameters": {"max_characters": 2}, "seed": 1},
    "/v2/models/tiny-rnn/generate_stream": {"id": "a", "text_input": "abc", "parameters": {"max_characters": 2}, "seed": 1},
}  # fmt: skip
# Nested objects: the path of the route, and the position of the object in the body
PARTS: list[tuple[str, tuple[str | int, ...]]] = [
    ("/v1/timeseries/forecast", ("inputs", 0)), ("/v1/timeseries/forecast", ("options",)), ("/v1/completions", ("logit_bias",)),
    ("/v2/models/tiny-lstm/infer", ("inputs", 0)), ("/v2/models/tiny-lstm/infer", ("outputs", 0)),
    ("/v2/models/tiny-lstm/infer", ("parameters",)), ("/v2/models/tiny-rnn/generate", ("parameters",)),
]  # fmt: skip
WRONG_VALUES = [
    "true", "[]", "{}", '""', "-1", "1.5", "1e30", "-1e999", "NaN", "9" * 4000, "18446744073709551616", '"\\u0000"',
    '"' + "x" * 10_000 + '"', '["x", 1, null]', "[" * 100 + "]" * 100,
]  # fmt: skip
JSON_TYPE = {"content-type": "application/json"}


@pytest.mark.parametrize(("path", "position"), [*((path, ()) for path in (*VALID, *OTHER_PROTOCOLS)), *PARTS])
def test_any_wrong_value_in_a_field_is_harmless(tiny: httpx.Client, path: str, position: tuple[str | int, ...]) -> None:
    valid = VALID.get(path) or OTHER_PROTOCOLS[path]
    assert path == CLASSIFY or tiny.post(path, json=valid).status_code == 200, path
    body = json.loads(json.dumps(valid))
    part: Any = body
    for key in position:
        part = part[key]
    for field, value in list(part.items()):
        part[field] = "HERE"
        for wrong in WRONG_VALUES:
            assert_harmless(tiny.post(path, content=json.dumps(body).replace('"HERE"', wrong, 1).encode()))
        part[field] = value
    assert_still_serves(tiny)


def test_a_duplicate_field_is_rejected(tiny: httpx.Client) -> None:
    for path, twice in (
        ("/v2/models/tiny-gan/infer", '{"id": "a", "id": "a", "inputs": []}'),
        ("/v2/models/tiny-rnn/generate", '{"text_input": "a", "text_input": "a"}'),
        (CONTINUE, '{"prompt": "a", "seed": 1, "se\\u0065d": 2}'),
        (CONTINUE, '{"prompt": "a: b", "seed" : 1, "se\\u0065d" : 1}'),
        ("/v1/completions", '{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}'),
        ("/v1/timeseries/forecast", '{"inputs": [], "options": {"horizon": 1, "horizon": 2}}'),
        ("/v1/timeseries/forecast", '{"inputs": [{"series": []}, {"series": [], "series": []}], "options": {}}'),
        ("/v2/models/tiny-lstm/infer", '{"inputs": [{"name": "values", "shape": [1, 12], "shape": [12, 1]}]}'),
        ("/v2/models/tiny-lstm/infer", '{"inputs": [], "parameters": {"horizon": 1, "horizon": 2}}'),
    ):
        answer = tiny.post(path, content=twice)
        assert answer.status_code == 400, answer.text
        assert "was sent more than once" in answer.text
    assert_still_serves(tiny)


def test_a_prompt_that_looks_like_fields_is_accepted(tiny: httpx.Client) -> None:
    body = {"prompt": '"prompt": "seed": "seed"', "max_characters": 1, "seed": 1}
    assert tiny.post(CONTINUE, json=body).status_code == 200
    for text in (r"\"seed\": \"seed\" \"prompt\"", r"\":" * 5000, "," * 5000, r"\\"):
        raw = f'{{"prompt": "{text}", "seed": 2, "max_characters": 1}}'
        assert tiny.post(CONTINUE, content=raw).status_code == 200


def flood(url: str, head: bytes, chunk: bytes, times: int) -> bytes:
    """Send a body that is too large.

    Return the response, or no bytes if the response was lost when the service closed the connection.
    """
    address = httpx.URL(url)
    received = b""
    with socket.create_connection((address.host, address.port or 0), 30) as connection:
        try:
            connection.sendall(head)
            for _ in range(times):
                connection.sendall(chunk)
            received = connection.recv(65536)
        except ConnectionError:
            with contextlib.suppress(ConnectionError):
                received = connection.recv(65536)
    return received


def test_a_rejected_body_of_64_megabytes_is_never_in_memory(tiny_store: Path) -> None:
    chunk = b" " * 2**20
    with (
        serving(tiny_store, workers=1, max_body_bytes=2**20) as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        assert_still_serves(client)
        process = service.process.pid
        for path in (CLASSIFY, "/v1/completions"):
            post = b"POST %s HTTP/1.1\r\nHost: x\r\n" % path.encode()
            for head, part in (
                (post + b"Content-Length: 67108864\r\n\r\n", chunk),
                (post + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + chunk + b"\r\n"),
            ):
                before = reset_memory_peak(process)
                answer = flood(service.url, head, part, 64)
                assert not answer or answer.startswith(b"HTTP/1.1 413"), answer[:200]
                assert memory_mib(process, "VmHWM") < before + 30
        assert_still_serves(client)


# Fuzz tests: a valid request, in which one thing is wrong. The message names it.

NUMBERS, TEXTS, LISTS = st.integers(-9, 9), st.text(max_size=9), st.lists(st.booleans(), max_size=3)
OBJECTS = st.dictionaries(st.text(max_size=5), st.integers(), max_size=2)
# Values of a wrong type for each field of the native endpoints
NO_NUMBER, NO_INTEGER = TEXTS | LISTS | OBJECTS | st.booleans(), TEXTS | LISTS | OBJECTS | st.booleans() | st.just(1.5)
NO_TEXT = NUMBERS | LISTS | OBJECTS | st.booleans()
WRONG_TYPES: dict[str, dict[str, Any]] = {
    CLASSIFY: {"images": NUMBERS | TEXTS | OBJECTS | st.none()},
    CONTINUE: {
        "prompt": NO_TEXT | st.none(), "max_characters": NO_INTEGER, "temperature": NO_NUMBER, "top_k": NO_INTEGER,
        "top_p": NO_NUMBER, "stop": NUMBERS | OBJECTS | st.booleans(), "seed": NO_INTEGER, "n": NO_INTEGER,
        "stream": NUMBERS | TEXTS | LISTS, "model": NO_TEXT,
    },
    FORECAST: {
        "values": NUMBERS | TEXTS | OBJECTS | st.booleans(), "horizon": NO_INTEGER,
        "levels": NUMBERS | TEXTS | OBJECTS | st.booleans(), "model": NO_TEXT,
    },
    SAMPLE: {"count": NO_INTEGER, "label": NO_TEXT, "seed": NO_INTEGER, "model": NO_TEXT},
}  # fmt: skip


@FUZZ
@given(data=st.data(), path=st.sampled_from(sorted(WRONG_TYPES)))
def test_a_value_of_a_wrong_type_is_rejected_with_the_name_of_its_field(
    tiny: httpx.Client, data: st.DataObject, path: str
) -> None:
    field = data.draw(st.sampled_from(sorted(WRONG_TYPES[path])))
    value = data.draw(WRONG_TYPES[path][field])
    answer = tiny.post(path, json={**VALID[path], field: value})
    assert answer.status_code == 400, (field, value, answer.text)
    error = answer.json()["error"]
    assert error["param"].split(".")[0] == field
    assert error["message"].startswith(f"{error['param']} is ")


@FUZZ
@given(data=st.data(), path=st.sampled_from(sorted(VALID)), name=st.text(min_size=1, max_size=20))
def test_an_unknown_field_is_rejected_with_the_known_ones(
    tiny: httpx.Client, data: st.DataObject, path: str, name: str
) -> None:
    assume(name not in tiny_fields(tiny, path))
    fields = [*VALID[path].items()]
    fields.insert(data.draw(st.integers(0, len(fields))), (name, 1))
    answer = tiny.post(path, content=json.dumps(dict(fields)), headers=JSON_TYPE)
    known = ", ".join(list(tiny_fields(tiny, path))[:2])
    assert_rejected(answer, 400, name, f"; known fields: {known}")


def tiny_fields(client: httpx.Client, path: str) -> list[str]:
    """Return the fields of a body, from the OpenAPI document."""
    document = client.get("/openapi.json").json()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return list(schema["properties"])


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


DATATYPES = {"FP64": "<f8", "FP32": "<f4"}


def tensor_request(values: list[int], datatype: str) -> tuple[dict[str, Any], bytes]:
    """Return the two parts of a request with binary data: its JSON, and the data of its only input."""
    data = np.array(values, DATATYPES[datatype]).tobytes()
    tensor = {"name": "values", "datatype": datatype, "shape": [1, len(values)]}
    return {"inputs": [{**tensor, "parameters": {"binary_data_size": len(data)}}]}, data


def infer(client: httpx.Client, head: Any, data: bytes, coding: str = "", **changes: str) -> httpx.Response:
    text = json.dumps(head).encode()
    content, length = text + data, str(len(text))
    headers = {"inference-header-content-length": length, **changes}
    if coding:
        headers["content-encoding"] = coding
        content = zlib.compress(content, wbits=31 if coding == "gzip" else 15)
    return client.post("/v2/models/tiny-lstm/infer", content=content, headers=headers)


VALUES = st.lists(st.integers(-99, 99), min_size=10, max_size=30)


@FUZZ
@given(
    data=st.data(),
    values=VALUES,
    datatype=st.sampled_from(sorted(DATATYPES)),
    coding=st.sampled_from(["", "gzip", "deflate"]),
)
def test_a_wrong_part_of_a_request_with_binary_tensors_is_named(
    tiny: httpx.Client, data: st.DataObject, values: list[int], datatype: str, coding: str
) -> None:
    head, content = tensor_request(values, datatype)
    assert infer(tiny, head, content, coding).status_code == 200
    other = data.draw(st.integers(1, 7))
    tensor = head["inputs"][0]
    size = f"unexpected size for input 'values': {len(content) - other:,} bytes, expected {len(content):,}"
    too_long = f"unexpected additional input data: {other} bytes follow the last input"
    wrong: dict[str, tuple[Any, bytes, str, str]] = {
        "data missing": (head, content[:-other], "", "unexpected size for input 'values': binary_data_size"),
        "data too long": (head, content + bytes(other), "", too_long),
        "size": ({"inputs": [{**tensor, "parameters": {"binary_data_size": len(content) - other}}]}, content[:-other], "", size),
        "shape": ({"inputs": [{**tensor, "shape": [1, len(values) + other]}]}, content, "", "unexpected size for input 'values'"),
        "name": ({"inputs": [{**tensor, "name": "x" * other}]}, content, "", "values"),
        "no datatype": ({"inputs": [{**tensor, "datatype": "FP"}]}, content, "", "inputs.0.datatype is 'FP'; "),
        "other datatype": (
            {"inputs": [{**tensor, "datatype": "INT64", "parameters": {"binary_data_size": 8 * len(values)}}]},
            bytes(8 * len(values)), "", "input 'values' is of INT64; allowed types: FP64, FP32",
        ),
        "both": ({"inputs": [{**tensor, "data": values}]}, content, "", "inputs.0 should have either data or "),
        "length": (head, content, "9" * other + "x", f"inference-header-content-length is '{'9' * other}x'; "),
    }  # fmt: skip
    wrong_head, wrong_content, length, sentence = wrong[data.draw(st.sampled_from(sorted(wrong)))]
    changes = {"inference-header-content-length": length} if length else {}
    answer = infer(tiny, wrong_head, wrong_content, coding, **changes)
    assert_harmless(answer)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]


@FUZZ
@given(position=st.floats(0, 1), values=VALUES)
def test_a_damaged_compressed_body_is_rejected(tiny: httpx.Client, position: float, values: list[int]) -> None:
    content = bytearray(zlib.compress(json.dumps({"inputs": [{"name": "values", "data": values}]}).encode(), wbits=31))
    content[12 + int(position * (len(content) - 21))] ^= 0x55  # a byte between the head and the checksum
    answer = tiny.post("/v2/models/tiny-lstm/infer", content=bytes(content), headers={"content-encoding": "gzip"})
    assert_harmless(answer)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("the ")


CARD = json.loads((ROOT / "models_store" / "sine-lstm" / "1" / "card.json").read_text())
OF_NO_FIELD = st.just(1.5) | st.booleans() | st.lists(st.booleans(), min_size=1, max_size=2)


@FUZZ
@given(field=st.sampled_from(sorted(set(CARD) - {"minutes"})), value=OF_NO_FIELD)
def test_a_wrong_field_of_a_model_card_is_named(field: str, value: Any) -> None:
    with pytest.raises(store.StoreError, match=rf"^card\.json: {field}\b.*, found "):
        store.parse_card(json.dumps({**CARD, field: value}).encode(), "card.json")


@FUZZ
@given(data=st.data(), cut=st.integers(1, 3))
def test_a_damaged_model_card_is_rejected_or_read(data: st.DataObject, cut: int) -> None:
    content = json.dumps(CARD).encode()
    position = data.draw(st.integers(0, len(content)))
    with contextlib.suppress(store.StoreError):  # any other exception fails the test
        store.parse_card(content[:position] + content[position + cut :], "card.json")


@FUZZ
@given(
    accept=st.text(max_size=40)
    | st.lists(st.sampled_from(["image/png", "*/*", ";q=", ",", "0.5", "nan", " ", "/"])).map("".join)
)
def test_any_accept_header_gives_an_offered_media_type(accept: str) -> None:
    offered = ("application/json", "image/png", "image/webp")
    assert preferred_media_type(accept, offered) in offered
