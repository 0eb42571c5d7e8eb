"""Decoding of Open Inference Protocol requests: JSON, binary and compressed tensors; wrong requests are rejected."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest

from app.api.open_inference.decode import (
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
    return decode_request(content + (data or b""), length, model(FLOATS, values=max_values), max_commas)


def decode_raw(content: bytes, *inputs: ModelTensor, has_rows: bool = True) -> DecodedRequest:
    return decode_request(content, "0", model(*inputs, rows=8 * has_rows), 0)


def model(*inputs: ModelTensor, rows: int = 8, values: int = 100) -> TensorModel:
    functions: Any = None
    return TensorModel(inputs, [], rows, values, functions, functions)


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


def test_binary_data_follow_in_the_order_of_their_inputs() -> None:
    inputs = binary(2, "a", "INT8", (2,)), tensor("b", "INT8", (1,), data=[5]), binary(1, "c", "UINT8", (1,))
    tensors = decode(*inputs, data=b"\x01\xff\xfe", id="me").tensors
    assert {name: array.tolist() for name, array in tensors.items()} == {"a": [1, -1], "b": [5], "c": [254]}
    with pytest.raises(BadValue, match=r"inputs.2.shape is \[1\]; all inputs together should have 1 to 3 values"):
        decode(*inputs, data=b"\x01\xff\xfe", max_values=3)


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


def test_a_body_without_json_is_one_row_of_a_model_with_rows() -> None:
    text = decode_raw(b"ab\0", ModelTensor("prompt", ("BYTES",), (-1,)))
    assert text.tensors["prompt"].tolist() == [b"ab\0"]
    for shape, problem in (
        ((-1, 2, 3), "unexpected size for input 'x': 48 bytes, expected 24"),
        ((-1, -1, -1), "only for models with one input that varies in at most one dimension"),
    ):
        with pytest.raises(BadValue, match=problem):
            decode_raw(bytes(48), ModelTensor("x", ("FP32",), shape))
    with pytest.raises(BadValue, match="inference-header-content-length is '\u00b2'"):
        decode_request(b"{}", "\u00b2", model(FLOATS), 0)


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
