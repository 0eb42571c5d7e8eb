"""Invalid JSON is rejected on every route, for every field and every kind of wrong value. Later requests succeed."""

from __future__ import annotations

import contextlib
import json
import socket
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hypothesis_profiles import FUZZ
from support.processes import memory_mib, reset_memory_peak, serving
from support.responses import (
    CLASSIFY,
    CONTINUE,
    FORECAST,
    HOSTILE_NAMES,
    SAMPLE,
    SERIES,
    assert_harmless,
    assert_rejected,
    assert_still_serves,
    send_raw,
)
from support.service import ROOT

from app import store
from app.api.open_inference import decode
from app.api.open_inference.decode import DECOMPRESSORS, TensorSpec
from app.api.request_body import _parse_model, with_limits
from app.api.request_head import preferred_media_type
from app.api.routes.classify import ClassifyRequest
from app.api.routes.forecast import ForecastRequest
from app.api.routes.generate_images import GenerateImagesRequest
from app.api.routes.generate_text import GenerateTextRequest
from app.errors import BadValue, TooLarge

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
    "true", "[]", "{}", '""', '"x"', "-1", "1.5", "-0.0", "1e30", "1e999", "-1e999", "NaN", "Infinity", "-Infinity",
    "1" * 5000, "9" * 4000, "18446744073709551616", '"\\u0000"', '"' + "x" * 10_000 + '"', '["x", 1, null]', "[[[[1]]]]", '{"a": {"b": 1}}', "[" * 100 + "]" * 100,
    '"\\ud83d\\ude00"', '"’; DROP TABLE models; --"', '"{{7*7}}${7*7}%n%s"',
]  # fmt: skip
JSON_TYPE = {"content-type": "application/json"}


@pytest.mark.parametrize("path", VALID)
def test_any_wrong_value_in_a_native_field_is_harmless(tiny: httpx.Client, path: str) -> None:
    for field in VALID[path]:
        for wrong in WRONG_VALUES:
            rest = json.dumps({name: value for name, value in VALID[path].items() if name != field})
            body = rest[:-1] + (", " if len(rest) > 2 else "") + f'"{field}": {wrong}}}'
            answer = tiny.post(path, content=body.encode(), headers=JSON_TYPE)
            assert_harmless(answer)
            if any(constant in wrong for constant in ("NaN", "Infinity", "1e999")):
                assert answer.status_code == 400, (field, wrong)
    assert_still_serves(tiny)


def test_any_wrong_value_in_a_field_of_another_protocol_is_harmless(tiny: httpx.Client) -> None:
    parts = [*((path, ()) for path in OTHER_PROTOCOLS), *PARTS]
    for path, position in parts:
        assert tiny.post(path, json=OTHER_PROTOCOLS[path]).status_code == 200, path
        body = json.loads(json.dumps(OTHER_PROTOCOLS[path]))
        part: Any = body
        for key in position:
            part = part[key]
        for field, value in list(part.items()):
            part[field] = "HERE"
            for wrong in WRONG_VALUES:
                assert_harmless(tiny.post(path, content=json.dumps(body).replace('"HERE"', wrong, 1).encode()))
            part[field] = value
    assert_still_serves(tiny)


@pytest.mark.parametrize("path", VALID)
def test_a_duplicate_field_is_rejected(tiny: httpx.Client, path: str) -> None:
    for field, value in VALID[path].items():
        twice = json.dumps(VALID[path])[:-1] + f', "{field}": {json.dumps(value)}}}'
        assert_rejected(
            tiny.post(path, content=twice, headers=JSON_TYPE), 400, field, f"'{field}' was sent more than once"
        )
    assert_still_serves(tiny)


def test_a_duplicate_field_is_rejected_by_the_other_protocols(tiny: httpx.Client) -> None:
    for path, twice in (
        ("/v1/completions", '{"model": "tiny-rnn", "prompt": "a", "seed": 1, "seed": 1}'),
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
    raw = '{"prompt": "\\"seed\\": \\"seed\\" \\"prompt\\"", "seed": 2, "max_characters": 1}'
    assert tiny.post(CONTINUE, content=raw).status_code == 200


@pytest.mark.parametrize("path", [*VALID, *OTHER_PROTOCOLS])
def test_a_body_that_is_no_json_object_in_utf_8_is_rejected(tiny: httpx.Client, path: str) -> None:
    valid = json.dumps({**VALID, **OTHER_PROTOCOLS}[path])
    bodies = [
        valid.encode("utf-16"), valid.encode("utf-32"), b"\xef\xbb\xbf" + valid.encode(), valid.encode() + b"\0", b"\0",
        valid.encode() + valid.encode(), valid[:-1].encode(), valid.replace('"', "'").encode(), b"\xff\xfe", b'{"a":\xc0\xaf}',
        b"null", b"true", b"3", b'"x"', b"[]", b"{,}", b'{"a":}', b"{]", b"// x\n{}", b"{} x", b"a=b&c=d", b"<x/>",
        b"[" * 250_000, b"[" * 30_000 + b"]" * 30_000, b'{"x":' * 30_000, b'{"values":' + b"[" * 30_000, b"\x80\x04\x95",
    ]  # fmt: skip
    for body in bodies:
        answer = tiny.post(path, content=body, headers=JSON_TYPE)
        assert_harmless(answer)
        assert answer.status_code in (400, 413), body[:40]
    assert_still_serves(tiny)


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
def test_a_hostile_model_name_gives_400_or_404(tiny: httpx.Client, name: str) -> None:
    for path, fields in VALID.items():
        if path == CLASSIFY:
            answer = tiny.post(path, params={"model": name}, content=b"x")
        else:
            answer = tiny.post(path, json={**fields, "model": name})
        assert_harmless(answer)
        assert answer.status_code in (400, 404)
    assert_harmless(tiny.get(f"/v1/models/{quote(name, safe='')}"))
    assert_still_serves(tiny)


def test_a_body_of_65_537_chunks_is_accepted(tiny: httpx.Client) -> None:
    body = b'{"prompt": "abc", "max_characters": 1' + b" " * 65_499 + b"}"
    assert len(body) == 65_537
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    head = b"POST /v1/text/continue HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert send_raw(tiny, head + chunks).startswith(b"HTTP/1.1 200")
    assert_still_serves(tiny)


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(
    model=st.sampled_from([ClassifyRequest, GenerateTextRequest, ForecastRequest, GenerateImagesRequest]),
    fields=st.dictionaries(
        st.sampled_from([*GenerateTextRequest.model_fields, *ForecastRequest.model_fields, "images", "count", "x"]),
        JSON,
    ),
)
def test_any_json_is_parsed_or_rejected_with_a_message(model: Any, fields: dict[str, Any]) -> None:
    content = json.dumps(fields).encode("utf-8", "surrogatepass")
    with contextlib.suppress(BadValue):  # any other exception fails the test
        _parse_model(content, 100, with_limits(model))


@FUZZ
@given(content=st.binary(max_size=60))
def test_any_bytes_are_parsed_or_rejected_with_a_message(content: bytes) -> None:
    for text in (content, b'{"values": ' + content + b"}"):
        with contextlib.suppress(BadValue):
            _parse_model(text, 100, ForecastRequest)


TENSORS = json.dumps({"inputs": [
    {"name": "a", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": 24}},
    {"name": "b", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 11}},
    {"name": "c", "datatype": "INT8", "shape": [1, 2], "data": [[1, -2]]},
]}).encode()  # fmt: skip
BINARY = TENSORS + bytes(24) + b"\1\0\0\0x\2\0\0\0yz"
LENGTHS = [
    str(len(TENSORS)),
    str(len(TENSORS) - 1),
    str(len(BINARY)),
    "",
    "0",
    "1",
    "-1",
    "9" * 11,
    "9" * 5000,
    "\u00b2",
    " 3",
    "x",
]
SPECS = [
    None,
    TensorSpec("a", ("FP64", "FP32"), (-1, -1)),
    TensorSpec("b", ("BYTES",), (-1,)),
    TensorSpec("c", ("UINT8",), (-1, 3, 4, 4)),
]


@FUZZ
@given(
    position=st.integers(0, len(BINARY)), cut=st.integers(0, 60), inserted=st.binary(max_size=12),
    length=st.sampled_from(LENGTHS), spec=st.sampled_from(SPECS), coding=st.sampled_from(["", "gzip", "deflate"]),
)  # fmt: skip
def test_changed_binary_tensors_are_parsed_or_rejected_with_a_message(
    position: int, cut: int, inserted: bytes, length: str, spec: TensorSpec | None, coding: str
) -> None:
    content = BINARY[:position] + inserted + BINARY[position + cut :]
    for each in (content, zlib.compress(content, wbits=DECOMPRESSORS.get(coding, 15))[: -cut or None]):
        with contextlib.suppress(BadValue, TooLarge):  # any other exception fails the test
            tensors = decode.decode_request(decode.decompress(each, coding, 10_000), length, 1000, 1000, spec).tensors
            assert sum(tensor.size for tensor in tensors.values()) <= max(1000, len(each))


CARD = (ROOT / "models_store" / "sine-lstm" / "1" / "card.json").read_bytes()


@FUZZ
@given(position=st.integers(0, len(CARD)), cut=st.integers(0, 300), inserted=st.binary(max_size=20))
def test_a_changed_model_card_is_parsed_or_rejected_with_a_message(position: int, cut: int, inserted: bytes) -> None:
    with contextlib.suppress(store.StoreError):
        store.parse_card(CARD[:position] + inserted + CARD[position + cut :], "card.json")


@FUZZ
@given(field=st.sampled_from(sorted(json.loads(CARD))), value=JSON)
def test_any_value_on_a_model_card_is_parsed_or_rejected_with_a_message(field: str, value: Any) -> None:
    content = json.dumps({**json.loads(CARD), field: value}).encode("utf-8", "surrogatepass")
    with contextlib.suppress(store.StoreError):
        store.parse_card(content, "card.json")


@FUZZ
@given(
    accept=st.text(max_size=40)
    | st.lists(st.sampled_from(["image/png", "*/*", ";q=", ",", "0.5", "nan", " ", "/"])).map("".join)
)
def test_any_accept_header_gives_an_offered_media_type(accept: str) -> None:
    offered = ("application/json", "image/png", "image/webp")
    assert preferred_media_type(accept, offered) in offered
