"""Decode requests of the Open Inference Protocol V2: JSON, and Triton's binary tensor extension.

The JSON part comes first. The header ``Inference-Header-Content-Length`` contains its length in bytes. The binary data
of all inputs with a ``binary_data_size`` follow, in the order of these inputs. Tensors are little-endian and row-major.
Each string is preceded by its length as a uint32.
"""

from __future__ import annotations

import math
import struct
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from app.api.request_body import parse_object, validate
from app.errors import BadValue, TooLarge, quote_value
from app.settings import Settings
from app.store import Card
from app.tasks.job import Job

DATATYPES = {  # by the data type on the model card
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "string": "BYTES",
}  # fmt: skip
NUMPY = {datatype: np.dtype(name).newbyteorder("<") for name, datatype in DATATYPES.items() if name != "string"}
JSON_LENGTH_HEADER = "inference-header-content-length"
DECOMPRESSORS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's wbits for each content coding (RFC 9110, 8.4.1)
JSON_TYPES: dict[str, set[type]] = {"BOOL": {bool}, "BYTES": {str}, **{name: {int} for name in NUMPY if "INT" in name}}
MAX_TENSORS = 256  # largest number of tensors in a request; scikit-learn models may have one input for each column
MAX_FLOAT = sys.float_info.max  # larger integers cannot be converted to a float
MAX_DIMENSIONS = 8  # largest number of dimensions of a tensor
MAX_ID_LENGTH = 1000  # characters


def _check_parameter(value: object) -> object:
    """Reject a value of a wrong type with a single message. Pydantic would give a message for each allowed type."""
    if type(value) not in (str, int, float, bool):
        raise PydanticCustomError("parameter", "Input should be a string, a number or a boolean")
    return value


Parameters = dict[str, Annotated[str | int | float | bool, BeforeValidator(_check_parameter)]]


class LenientModel(BaseModel):
    """A part of a request.

    Unknown fields are ignored, because clients may send fields that only other servers know. A field that is null
    counts as missing, because some clients send all optional fields.
    """

    model_config = ConfigDict(extra="ignore", strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class RequestInput(LenientModel):
    name: str = Field(max_length=200)
    shape: list[Annotated[int, Field(ge=0)]] = Field(max_length=MAX_DIMENSIONS)
    datatype: Literal[tuple(DATATYPES.values())]  # type: ignore[valid-type]
    parameters: Parameters = {}
    data: Any = None


class RequestedOutput(LenientModel):
    name: str = Field(max_length=200)
    parameters: Parameters = {}


class InferenceRequest(LenientModel):
    """The JSON part of a request."""

    id: str = Field(default="", max_length=MAX_ID_LENGTH)
    parameters: Parameters = {}
    inputs: list[RequestInput] = Field(min_length=1, max_length=MAX_TENSORS)
    outputs: list[RequestedOutput] | None = Field(default=None, max_length=MAX_TENSORS)


@dataclass(frozen=True)
class DecodedRequest:
    """The JSON part of a request, and its inputs by name. Inputs of type BYTES are arrays of ``bytes`` objects."""

    body: InferenceRequest
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True)
class ModelTensor:
    """An input or output of a model.

    In ``shape``, -1 marks a dimension that varies. The first dimension counts rows, unless the model is an imported
    network without a batch dimension. Inputs may have any of ``datatypes``. Metadata and responses use the first data
    type. If ``labels`` is not empty, it has one name for each index of the last dimension. If ``has_classes``, a
    request may ask for the largest values of each row also without labels.
    """

    name: str
    datatypes: tuple[str, ...]
    shape: tuple[int, ...]
    labels: Sequence[str] = field(default=(), compare=False)
    has_classes: bool = field(default=False, compare=False)

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether an input with the shape ``shape`` is allowed. [N, 1] is also allowed where [N] is expected."""
        own = (*self.shape, 1)[: max(len(self.shape), min(len(shape), 2))]
        return len(own) == len(shape) and all(size in (-1, other) for size, other in zip(own, shape, strict=True))


@dataclass(frozen=True)
class TensorModel:
    """The tensors of a version, and the conversions between tensors and the jobs and answers of its task.

    Attributes:
        rows: largest number of rows in a request, or 0 for a network without a batch dimension.
        values: largest number of values in all inputs together.
        parameters: names of the parameters that a request may have.
        decode: function ``(card, settings, request)`` that returns the job. Raises BadValue.
        encode: function ``(card, answer)`` that returns the outputs by name.
    """

    inputs: Sequence[ModelTensor]
    outputs: Sequence[ModelTensor]
    rows: int
    values: int
    decode: Callable[[Card, Settings, DecodedRequest], Job]
    encode: Callable[[Card, Any], Mapping[str, np.ndarray]]
    parameters: Sequence[str] = ()


def decompress(content: bytes, coding: str, limit: int) -> bytes:
    """Return the decompressed body if ``coding`` is gzip or deflate. Otherwise return the body unchanged.

    Raises:
        BadValue: the data are not valid in this coding.
        TooLarge: the result is longer than ``limit`` bytes.
    """
    if coding not in DECOMPRESSORS:
        return content
    stream = zlib.decompressobj(DECOMPRESSORS[coding])
    try:
        body = stream.decompress(content, limit + 1)
    except zlib.error as error:
        raise BadValue(f"the body is not {coding}: {error}", "content-encoding") from None
    if len(body) > limit:
        raise TooLarge(f"the decompressed body has more than {limit:,} bytes, the allowed maximum")
    if not stream.eof or stream.unused_data:
        problem = "has data after its end" if stream.eof else "is truncated"
        raise BadValue(f"the {coding} body {problem}", "body")
    return body


def decode_request(content: bytes, json_length: str, model: TensorModel, max_commas: int) -> DecodedRequest:
    """Decode the decompressed body of a request.

    ``json_length`` is the header with the length of the JSON part. If it is empty, the whole body is JSON. If it is 0,
    there is no JSON part, and the body is the data of the only input.

    Raises:
        BadValue: the header, the JSON part or the data of an input are wrong.
    """
    valid = json_length.isascii() and json_length.isdigit() and len(json_length) < 12
    if json_length and not (valid and int(json_length) <= len(content)):
        raise BadValue(
            f"{JSON_LENGTH_HEADER} is {quote_value(json_length)}; the body has {len(content):,} bytes",
            JSON_LENGTH_HEADER,
        )
    if json_length and not int(json_length):
        return _decode_raw(content, model)
    length = int(json_length) if json_length else len(content)
    request = DecodedRequest(validate(parse_object(content[:length], max_commas), InferenceRequest), {})
    rest = memoryview(content)[length:]
    values_left = model.values
    for i, item in enumerate(request.body.inputs):
        count = math.prod(item.shape)
        if not 1 <= count <= values_left:
            allowed = f"all inputs together should have 1 to {model.values:,} values"
            raise BadValue(f"inputs.{i}.shape is {quote_value(item.shape)}; {allowed}", "inputs")
        if item.name in request.tensors:
            raise BadValue(f"inputs.{i}.name is {quote_value(item.name)}, which an earlier input already has", "inputs")
        values_left -= count
        request.tensors[item.name], rest = _decode_input(item, i, rest)
    if rest:
        raise BadValue(f"unexpected additional input data: {len(rest):,} bytes follow the last input", "inputs")
    return request


def _decode_raw(content: bytes, model: TensorModel) -> DecodedRequest:
    """Decode a body without JSON: the model's only input or, if the input has rows, one row. All outputs are binary."""
    only_input = model.inputs[0]
    shape = [1, *only_input.shape[1:]] if model.rows else list(only_input.shape)
    if len(model.inputs) > 1 or shape.count(-1) > 1:
        raise BadValue("a body without JSON is only for models with one input that varies in at most one dimension")
    name, datatype = only_input.name, only_input.datatypes[0]
    if datatype == "BYTES":
        tensor = np.array([content], dtype=object)
    else:
        step_bytes = abs(math.prod(shape)) * NUMPY[datatype].itemsize  # -1 counts as 1
        steps, remainder = divmod(len(content), step_bytes)
        if remainder or (-1 not in shape and steps != 1):
            expected = f"a multiple of {step_bytes:,}" if -1 in shape else f"{step_bytes:,}"
            raise BadValue(f"unexpected size for input {name!r}: {len(content):,} bytes, expected {expected}")
        tensor = np.frombuffer(content, NUMPY[datatype]).reshape(shape)
    request_input = RequestInput(name=name, shape=list(tensor.shape), datatype=datatype)
    return DecodedRequest(
        InferenceRequest(inputs=[request_input], parameters={"binary_data_output": True}), {name: tensor}
    )


def _decode_input(item: RequestInput, i: int, rest: memoryview) -> tuple[np.ndarray, memoryview]:
    """Return two values: input number ``i`` as an array, and the binary data after this input."""
    size = item.parameters.get("binary_data_size")
    if "shared_memory_region" in item.parameters:
        raise BadValue(f"inputs.{i} is in shared memory, which is not supported", "inputs")
    if (size is None) == (item.data is None):
        raise BadValue(f"inputs.{i} should have either data or parameters.binary_data_size", "inputs")
    if size is None:
        return _json_array(item, i), rest
    if type(size) is not int or not 0 <= size <= len(rest):
        raise BadValue(
            f"unexpected size for input {quote_value(item.name)}: binary_data_size {quote_value(size)}, "
            f"left are {len(rest):,} bytes",
            "inputs",
        )
    return _binary_array(item, rest[:size]), rest[size:]


def _json_array(item: RequestInput, i: int) -> np.ndarray:
    """Return the JSON data of input number ``i``, a flat or nested list, as an array.

    Raises BadValue for a wrong value or a wrong number of values.
    """
    param, datatype, shape = f"inputs.{i}.data", item.datatype, item.shape
    if datatype == "FP16":
        raise BadValue("receiving FP16 data via JSON is not supported; use the binary data format", "inputs")
    values = _flatten(item.data, param, shape)
    allowed = JSON_TYPES.get(datatype, {int, float, type(None)})  # null is a missing value, as NaN is in binary data
    for wrong_type in set(map(type, values)) - allowed:
        wrong = next(value for value in values if type(value) is wrong_type)
        raise BadValue(f"{param} has {quote_value(wrong)}; all values should be {datatype}", "inputs")
    if len(values) != math.prod(shape):
        raise BadValue(
            f"{param} has {len(values):,} values; its shape {quote_value(shape)} has {math.prod(shape):,}", "inputs"
        )
    try:
        if datatype == "BYTES":
            return np.array([value.encode() for value in values], dtype=object).reshape(shape)
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=NUMPY[datatype])
    except OverflowError:
        dtype = NUMPY[datatype]
        low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "iu" else (-MAX_FLOAT, MAX_FLOAT)
        wrong = next(value for value in values if value is not None and not low <= value <= high)
        raise BadValue(f"{param} has {quote_value(wrong)}, which no {datatype} can hold", "inputs") from None
    if array.dtype.kind == "f" and (infinite := np.isinf(array)).any():
        value, reason = values[infinite.argmax()], f"which no {datatype} can hold"
        if math.isinf(value):  # Infinity, but also 1e400, which the parser reads as infinity
            reason = "and JSON has no infinite values; send them as binary data"
        raise BadValue(f"{param} has {quote_value(value)}, {reason}", "inputs")
    return array.reshape(shape)


def _flatten(data: Any, param: str, shape: Sequence[int]) -> list[Any]:
    """Return the values of a list that is flat or has the nesting of ``shape``. Raises BadValue for another nesting."""
    if not isinstance(data, list):
        raise BadValue(f"{param} is {quote_value(data)}; it should be a list", "inputs")
    sizes, values = [len(data)], data
    while values and isinstance(values[0], list):
        if set(map(type, values)) != {list} or len(set(map(len, values))) != 1:
            raise BadValue(f"{param} is nested unevenly", "inputs")
        sizes.append(len(values[0]))
        if len(sizes) > len(shape):
            break
        values = list(chain.from_iterable(values))
    if len(sizes) > 1 and sizes != list(shape):
        raise BadValue(f"{param} is nested as {quote_value(sizes)}; its shape is {quote_value(list(shape))}", "inputs")
    return values


def _binary_array(item: RequestInput, content: memoryview) -> np.ndarray:
    """Return the binary data of an input as an array. Raises BadValue for a wrong size."""
    count = math.prod(item.shape)
    if item.datatype == "BYTES":
        return np.array(_strings(item, content, count), dtype=object).reshape(item.shape)
    expected = count * NUMPY[item.datatype].itemsize
    if len(content) != expected:
        raise BadValue(
            f"unexpected size for input {quote_value(item.name)}: {len(content):,} bytes, expected {expected:,}",
            "inputs",
        )
    return np.frombuffer(content, NUMPY[item.datatype]).reshape(item.shape)


def _strings(item: RequestInput, content: memoryview, count: int) -> list[bytes]:
    strings: list[bytes] = []
    start = 0
    while start < len(content) and len(strings) < count:
        length = struct.unpack_from("<I", content, start)[0] if start + 4 <= len(content) else len(content)
        strings.append(bytes(content[start + 4 : start + 4 + length]))
        start += 4 + length
    if start != len(content) or len(strings) != count:
        raise BadValue(
            f"unexpected size for input {quote_value(item.name)}: its data are not {count:,} strings", "inputs"
        )
    return strings
