"""Decoding of Open Inference Protocol requests: JSON, binary and compressed tensors; wrong requests are rejected."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest

from app.api.open_inference.decode import (
    DECOMPRESSORS,
    NUMPY,
    DecodedRequest,
    ModelTensor,
    TensorModel,
    decode_request,
    decompress,
)
from app.errors import BadValue, TooLarge

FLOATS = ModelTensor("x", ("FP32",), (-1, 2, 3))


def tensor(name: str = "x", datatype: str = "FP32", shape: Any = (2,), **fields: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape), **fields}


def binary(size: Any, *arguments: Any) -> dict[str, Any]:
    return tensor(*arguments, parameters={"binary_data_size": size})


def decode(
    *inputs: dict[str, Any],
    data: bytes | None = None,
    max_values: int = 100,
    max_commas: int = 100,
    length: str | None = None,
    **fields: Any,
) -> DecodedRequest:
    """Decode a request with ``inputs`` in JSON, followed by binary ``data``."""
    content = json.dumps({**fields, "inputs": inputs}).encode()
    if length is None:
        length = "" if data is None else str(len(content))
    return decode_request(content + (data or b""), length, model(FLOATS, values=max_values, commas=max_commas))


def decode_raw(content: bytes, *inputs: ModelTensor, has_rows: bool = True) -> DecodedRequest:
    return decode_request(content, "0", model(*inputs, rows=8 * has_rows))


def model(*inputs: ModelTensor, rows: int = 8, values: int = 100, commas: int = 100) -> TensorModel:
    functions: Any = None
    return TensorModel(inputs, [], rows, values, functions, functions, commas)


def test_json_data_may_be_flat_or_nested() -> None:
    for data in ([1, 2, 3, 4], [[1, 2], [3, 4]]):
        array = decode(tensor(shape=(2, 2), data=data)).tensors["x"]
        assert array.dtype == np.dtype("<f4")
        assert array.tolist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize("datatype", [name for name in NUMPY if name != "FP16"])
def test_json_and_binary_data_of_a_type_give_the_same_tensor(datatype: str) -> None:
    values = [True, False, True] if datatype == "BOOL" else [1, 0, 7]
    content = np.array(values, NUMPY[datatype]).tobytes()
    from_json = decode(tensor("x", datatype, (3,), data=values)).tensors["x"]
    from_binary = decode(binary(len(content), "x", datatype, (3,)), data=content).tensors["x"]
    assert from_json.dtype == from_binary.dtype == np.dtype(NUMPY[datatype])
    assert from_json.tolist() == from_binary.tolist() == values


def test_texts_are_arrays_of_bytes() -> None:
    content = b"\2\0\0\0ab\0\0\0\0\2\0\0\0\xc3\xa9\0\0\0\0"
    from_json = decode(tensor("x", "BYTES", (4, 1), data=["ab", "", "é", ""])).tensors["x"]
    from_binary = decode(binary(len(content), "x", "BYTES", (4, 1)), data=content).tensors["x"]
    for array in (from_json, from_binary):
        assert array.dtype == object
        assert array.tolist() == [[b"ab"], [b""], ["é".encode()], [b""]]


def test_null_is_a_missing_value() -> None:
    assert np.isnan(decode(tensor(data=[None, None])).tensors["x"]).all()


def test_binary_data_follow_in_the_order_of_their_inputs() -> None:
    inputs = binary(2, "a", "INT8", (2,)), tensor("b", "INT8", (1,), data=[5]), binary(1, "c", "UINT8", (1,))
    tensors = decode(*inputs, data=b"\x01\xff\xfe", id="me").tensors
    assert {name: array.tolist() for name, array in tensors.items()} == {"a": [1, -1], "b": [5], "c": [254]}


def test_binary_data_have_the_stated_shape() -> None:
    array = decode(binary(6, "x", "INT8", (2, 3)), data=bytes(range(6))).tensors["x"]
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_json_part_may_be_the_whole_body() -> None:
    assert decode(tensor(data=[1, 2]), data=b"").tensors["x"].tolist() == [1, 2]


def test_unknown_fields_are_ignored_and_known_ones_are_kept() -> None:
    outputs = [{"name": "y", "parameters": {"classification": 3}, "other": 1}]
    decoded = decode(
        tensor(data=[1, 2], other=1), id="me", parameters={"a": True, "b": 1.5}, outputs=outputs, other=[1]
    )
    body = decoded.body
    assert (body.id, body.parameters) == ("me", {"a": True, "b": 1.5})
    assert body.outputs is not None
    assert [(output.name, output.parameters) for output in body.outputs] == [("y", {"classification": 3})]


def test_a_field_that_is_null_counts_as_missing() -> None:
    inputs = tensor(data=None, parameters={"binary_data_size": 8}), tensor("y", parameters=None, data=[1, 2])
    outputs = [{"name": "z", "parameters": None}]
    body = decode(*inputs, data=bytes(8), id=None, parameters=None, outputs=outputs).body
    assert (body.id, body.parameters) == ("", {})
    assert [part.parameters for part in body.inputs] == [{"binary_data_size": 8}, {}]
    assert body.outputs is not None
    assert body.outputs[0].parameters == {}
    assert decode(tensor(data=[1, 2]), outputs=None).body.outputs is None


def test_a_body_without_json_is_one_row_of_the_only_input() -> None:
    decoded = decode_raw(np.arange(6, dtype="<f4").tobytes(), FLOATS)
    assert decoded.tensors["x"].tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert decoded.body.parameters == {"binary_data_output": True}
    assert (decoded.body.id, decoded.body.outputs) == ("", None)
    (item,) = decoded.body.inputs
    assert (item.name, item.datatype, item.shape) == ("x", "FP32", [1, 2, 3])
    steps = decode_raw(np.arange(6, dtype="<f4").tobytes(), ModelTensor("x", ("FP32", "FP64"), (-1, -1, 2)))
    assert steps.tensors["x"].shape == (1, 3, 2)
    text = decode_raw(b"ab\0", ModelTensor("prompt", ("BYTES",), (-1,)))
    assert text.tensors["prompt"].tolist() == [b"ab\0"]


@pytest.mark.parametrize(("shape", "expected"), [((2, 3), (2, 3)), ((6,), (6,)), ((-1, 3), (2, 3)), ((3, -1), (3, 2))])
def test_a_body_without_json_is_the_whole_input_if_there_are_no_rows(
    shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    content = np.arange(6, dtype="<f4").tobytes()
    decoded = decode_raw(content, ModelTensor("x", ("FP32",), shape), has_rows=False)
    assert decoded.tensors["x"].shape == expected
    assert decoded.tensors["x"].reshape(-1).tolist() == [0, 1, 2, 3, 4, 5]
    scalar = decode_raw(content[4:8], ModelTensor("x", ("FP32",), ()), has_rows=False)
    assert scalar.tensors["x"] == 1
    with pytest.raises(BadValue, match="unexpected size for input 'x': 20 bytes, expected"):
        decode_raw(content[4:], ModelTensor("x", ("FP32",), shape), has_rows=False)


@pytest.mark.parametrize(
    ("size", "shape", "sentence"),
    [
        (23, (-1, 2, 3), "unexpected size for input 'x': 23 bytes, expected 24"),
        (48, (-1, 2, 3), "unexpected size for input 'x': 48 bytes, expected 24"),
        (9, (-1, -1, 2), "unexpected size for input 'x': 9 bytes, expected a multiple of 8"),
        (4800, (-1, 1000, 2), "unexpected size for input 'x': 4,800 bytes, expected 8,000"),
    ],
)
def test_a_body_without_json_of_another_size_is_rejected(size: int, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(BadValue) as raised:
        decode_raw(bytes(size), ModelTensor("x", ("FP32",), shape))
    assert raised.value.message == sentence


@pytest.mark.parametrize("inputs", [(FLOATS, FLOATS), (ModelTensor("x", ("FP32",), (-1, -1, -1)),)])
def test_a_body_without_json_is_for_models_with_one_simple_input(inputs: tuple[ModelTensor, ...]) -> None:
    with pytest.raises(BadValue) as raised:
        decode_raw(bytes(8), *inputs)
    assert raised.value.message == (
        "a body without JSON is only for models with one input that varies in at most one dimension"
    )


def test_the_values_of_all_inputs_are_limited_together() -> None:
    inputs = tensor("a", data=[1, 2]), tensor("b", shape=(3,), data=[1, 2, 3])
    assert len(decode(*inputs, max_values=5).tensors) == 2
    assert decode(tensor(shape=(1,), data=[1]), max_values=1).tensors["x"].tolist() == [1]
    with pytest.raises(BadValue) as raised:
        decode(*inputs, max_values=4)
    assert raised.value.message == "inputs.1.shape is [3]; all inputs together should have 1 to 4 values"
    assert raised.value.param == "inputs"


INVALID: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("no values", {"inputs": [tensor(shape=(0, 2), data=[])]}, "inputs.0.shape is [0, 2]; all inputs together should have 1 to 100 values", "inputs"),
    ("both", {"inputs": [{**binary(8), "data": [1, 2]}], "data": bytes(8)},
     "inputs.0 should have either data or parameters.binary_data_size", "inputs"),
    ("more bytes than left", {"inputs": [binary(9)], "data": bytes(8)},
     "unexpected size for input 'x': binary_data_size 9, left are 8 bytes", "inputs"),
    ("a negative size", {"inputs": [binary(-1)], "data": bytes(8)},
     "unexpected size for input 'x': binary_data_size -1, left are 8 bytes", "inputs"),
    ("a size that is no integer", {"inputs": [binary(8.0)], "data": bytes(8)},
     "unexpected size for input 'x': binary_data_size 8.0, left are 8 bytes", "inputs"),
    ("no bytes", {"inputs": [binary(0)], "data": bytes(8)}, "unexpected size for input 'x': 0 bytes, expected 8", "inputs"),
    ("a fraction", {"inputs": [tensor("x", "INT8", data=[1, 1.5])]}, "inputs.0.data has 1.5; all values should be INT8", "inputs"),
    ("null for an integer", {"inputs": [tensor("x", "UINT8", data=[1, None])]}, "inputs.0.data has null; all values should be UINT8", "inputs"),
    ("a number for a text", {"inputs": [tensor("x", "BYTES", data=["a", 1])]}, "inputs.0.data has 1; all values should be BYTES", "inputs"),
    ("beyond the type", {"inputs": [tensor("x", "INT8", data=[1, 128])]}, "inputs.0.data has 128, which no INT8 can hold", "inputs"),
    ("too large for the type", {"inputs": [tensor(data=[1, -1e300])]}, "inputs.0.data has -1e+300, which no FP32 can hold", "inputs"),
    ("infinite", {"inputs": [tensor(data=[1, -float("inf")])]},
     "inputs.0.data has -inf, and JSON has no infinite values; send them as binary data", "inputs"),
    ("uneven", {"inputs": [tensor(shape=(2, 2), data=[[1, 2], [3]])]}, "inputs.0.data is nested unevenly", "inputs"),
    ("another nesting", {"inputs": [tensor(shape=(2, 3), data=[[1, 2], [3, 4], [5, 6]])]},
     "inputs.0.data is nested as [3, 2]; its shape is [2, 3]", "inputs"),
    ("too deep", {"inputs": [tensor(data=[[[1]], [[2]]])]}, "inputs.0.data is nested as [2, 1]; its shape is [2]", "inputs"),
    ("an object as parameter", {"inputs": [tensor(data=[1, 2])], "parameters": {"a": {}}},
     "parameters.a is {}; it should be a string, a number or a boolean", "parameters.a"),
    ("commas", {"inputs": [tensor(data=[1, 2])], "max_commas": 1}, "the body has 4 commas, which separate values and names; the maximum is 1", None),
    ("a length of twelve digits", {"inputs": [tensor(data=[1, 2])], "length": "000000000077"},
     "inference-header-content-length is '000000000077'; the body has 77 bytes", "inference-header-content-length"),
    ("a length that is no number", {"inputs": [tensor(data=[1, 2])], "length": "\u00b2"},
     "inference-header-content-length is '\u00b2'; the body has 77 bytes", "inference-header-content-length"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_fields", "sentence", "param"), [row[1:] for row in INVALID], ids=[row[0] for row in INVALID]
)
def test_an_invalid_request_is_rejected_with_one_message(
    request_fields: dict[str, Any], sentence: str, param: str | None
) -> None:
    fields = dict(request_fields)
    with pytest.raises(BadValue) as raised:
        decode(*fields.pop("inputs"), **fields)
    assert (raised.value.message, raised.value.param) == (sentence, param)


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (b"\1\0\0\0a", 2),  # too few strings
        (b"\1\0\0\0a\1\0\0\0b\1\0\0\0c", 2),  # too many strings
        (b"\1\0\0\0a\2\0\0\0b", 2),  # the second string is incomplete
        (b"\1\0\0\0a\1\0\0", 2),  # the length of the second string is incomplete
        (b"\xff\xff\xff\xff\0\0\0" + b"x" * 255, 2),  # two strings if the length could be -1
    ],
)
def test_other_data_than_the_stated_strings_are_rejected(content: bytes, count: int) -> None:
    with pytest.raises(BadValue) as raised:
        decode(binary(len(content), "x", "BYTES", (count,)), data=content)
    assert raised.value.message == f"unexpected size for input 'x': its data are not {count} strings"
    assert raised.value.param == "inputs"


@pytest.mark.parametrize("coding", DECOMPRESSORS)
def test_a_body_is_decompressed_up_to_the_limit(coding: str) -> None:
    body = bytes(1000)
    content = zlib.compress(body, wbits=DECOMPRESSORS[coding])
    assert decompress(content, coding, 1000) == body
    with pytest.raises(TooLarge, match=r"^the decompressed body has more than 999 bytes, the allowed maximum$"):
        decompress(content, coding, 999)
    with pytest.raises(BadValue, match=rf"^the body is not {coding}: Error -3") as raised:
        decompress(b"x" * 99, coding, 1000)
    assert raised.value.param == "content-encoding"
    for wrong, problem in ((content[:-1], "is truncated"), (content + b"x", "has data after its end")):
        with pytest.raises(BadValue, match=f"^the {coding} body {problem}$") as raised:
            decompress(wrong, coding, 1000)
        assert raised.value.param == "body"
    assert decompress(content, "identity", 1) == content


def test_little_more_than_the_limit_is_decompressed() -> None:
    """Without this limit, a small compressed body could fill the memory."""
    body = zlib.compress(bytes(10**8))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decompress(body, "deflate", 999)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10**6


def test_a_shape_fits_a_tensor_also_without_a_last_dimension_of_1() -> None:
    for own, fitting, others in (
        ((-1,), [(1,), (7,), (7, 1)], [(7, 2), (), (7, 1, 1)]),
        ((-1, 3), [(1, 3), (2, 3)], [(2, 4), (3,), (2, 3, 1)]),
        ((-1, 2, -1), [(1, 2, 9)], [(1, 3, 9), (1, 2)]),
    ):
        spec = ModelTensor("x", ("FP32",), own)
        assert all(spec.fits(shape) for shape in fitting), own
        assert not any(spec.fits(shape) for shape in others), own
