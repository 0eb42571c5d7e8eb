"""What comes in the tensor wire format of the Open Inference Protocol V2: JSON, and Triton's binary tensor extension.

The JSON part comes first, ``Inference-Header-Content-Length`` bytes of it; the binary tensors lie behind it in the
order of the inputs that have a ``binary_data_size``, little-endian, row-major, each string after its length (uint32).
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from app.api.errors import validation_error
from app.api.request import parse_object
from app.errors import BadValue, TooLarge, quote_value

NUMPY = {
    "BOOL": "?", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "<i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
JSON_LENGTH_HEADER = b"inference-header-content-length"
DECOMPRESSORS = {"gzip": 31, "deflate": 15}  # zlib's wbits for each coding (RFC 9110, 8.4.1)
ALLOWED: dict[str, set[type]] = {"BOOL": {bool}, "BYTES": {str}, **{name: {int} for name in NUMPY if "INT" in name}}
MOST = 8  # tensors in a request, and dimensions of a tensor
LONGEST_ID = 1000  # characters

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"
]


def _plain(value: object) -> object:
    """Refuses what is no parameter before the kinds of them are tried one by one, and told as fields."""
    if type(value) not in (str, int, float, bool):
        raise PydanticCustomError("parameter", "Input should be a text, a number or a boolean")
    return value


Parameters = dict[str, Annotated[str | int | float | bool, BeforeValidator(_plain)]]


class OpenModel(BaseModel):
    """Part of a request. Fields of other servers, which clients send unasked, are not looked at."""

    model_config = ConfigDict(extra="ignore", strict=True)


class RequestInput(OpenModel):
    name: str = Field(max_length=200)
    shape: list[Annotated[int, Field(ge=0)]] = Field(max_length=MOST)
    datatype: Datatype
    parameters: Parameters = {}
    data: Any = None


class RequestedOutput(OpenModel):
    name: str = Field(max_length=200)
    parameters: Parameters = {}


class InferenceRequest(OpenModel):
    """The JSON part of a request."""

    id: str = Field("", max_length=LONGEST_ID)
    parameters: Parameters = {}
    inputs: list[RequestInput] = Field(min_length=1, max_length=MOST)
    outputs: list[RequestedOutput] | None = Field(None, max_length=MOST)


@dataclass(frozen=True)
class DecodedRequest:
    """A request, and its inputs by name: arrays, of BYTES with objects in them."""

    body: InferenceRequest
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model: the datatypes it is taken in, the first of which is told, and its shape.

    -1 varies; the first dimension counts the rows of the request.
    """

    name: str
    datatypes: tuple[str, ...]
    shape: tuple[int, ...]
    labels: Sequence[str] = field(default=(), compare=False)  # of its last dimension

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it may have such a shape; one value in each row may be a dimension of its own."""
        own = (*self.shape, 1)[: max(len(self.shape), min(len(shape), 2))]
        return len(own) == len(shape) and all(mine in (-1, theirs) for mine, theirs in zip(own, shape, strict=True))


def decompress(content: bytes, coding: str, limit: int) -> bytes:
    """A body as it was before it was compressed. Raises BadValue, and TooLarge past ``limit`` bytes."""
    if coding not in DECOMPRESSORS:
        return content
    stream = zlib.decompressobj(DECOMPRESSORS[coding])
    try:
        found = stream.decompress(content, limit + 1)
    except zlib.error as error:
        raise BadValue(f"the body is not {coding}: {error}", "content-encoding") from None
    if len(found) > limit:
        raise TooLarge(f"the body has more than {limit:,} bytes when it is unpacked, which are allowed")
    if not stream.eof or stream.unused_data:
        raise BadValue(f"the {coding} body {'goes on after its end' if stream.eof else 'is cut short'}", "body")
    return found


def decode_request(content: bytes, head: str, most: int, commas: int, only: TensorSpec | None) -> DecodedRequest:
    """A body whose JSON part is ``head`` bytes long; empty: all of it, 0: none, the body is the input ``only``.

    ``most``: how many values all inputs may have; ``commas``: how many the JSON part may have. Raises BadValue.
    """
    if head and not (head.isascii() and head.isdigit() and len(head) < 12 and int(head) <= len(content)):
        told = f"inference-header-content-length is {quote_value(head)}; the body has {len(content):,} bytes"
        raise BadValue(told, JSON_LENGTH_HEADER.decode())
    if head and not int(head):
        return _raw(content, only)
    length = int(head) if head else len(content)
    found = DecodedRequest(_head(content[:length], commas), {})
    rest = memoryview(content)[length:]
    left = most
    for i, given in enumerate(found.body.inputs):
        count = math.prod(given.shape)
        if not 1 <= count <= left:
            raise BadValue(
                f"inputs.{i}.shape is {quote_value(given.shape)}; allowed are 1 to {most:,} values in all", "inputs"
            )
        if given.name in found.tensors:
            raise BadValue(f"inputs.{i}.name is {quote_value(given.name)}, which came before", "inputs")
        left -= count
        found.tensors[given.name], rest = _tensor(given, i, rest)
    if rest:
        raise BadValue(f"unexpected additional input data: {len(rest):,} bytes follow the last input", "inputs")
    return found


def _head(content: bytes, most: int) -> InferenceRequest:
    try:
        return InferenceRequest.model_validate(parse_object(content, most))
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False)) from None


def _raw(content: bytes, only: TensorSpec | None) -> DecodedRequest:
    """A body that is one input and nothing else: one row, all outputs binary."""
    if only is None or only.shape.count(-1) > 2:  # the rows, and one more
        raise BadValue("a body without JSON is for models with one input that varies in no more than one dimension")
    datatype, inner = only.datatypes[0], list(only.shape[1:])
    if datatype == "BYTES":
        tensor = np.array([content], dtype=object)
    else:
        known = abs(math.prod(inner)) * np.dtype(NUMPY[datatype]).itemsize  # bytes, of each step where one varies
        count, odd = divmod(len(content), known)
        if odd or (-1 not in inner and count != 1):
            expected = f"a multiple of {known:,}" if -1 in inner else f"{known:,}"
            raise BadValue(f"unexpected size for input {only.name!r}: {len(content):,} bytes, expected {expected}")
        shape = [1, *(count if size == -1 else size for size in inner)]
        tensor = np.frombuffer(content, NUMPY[datatype]).reshape(shape)
    given = RequestInput(name=only.name, shape=list(tensor.shape), datatype=datatype)  # type: ignore[arg-type]
    return DecodedRequest(
        InferenceRequest(id="", outputs=None, inputs=[given], parameters={"binary_data_output": True}),
        {only.name: tensor},
    )


def _tensor(given: RequestInput, i: int, rest: memoryview) -> tuple[np.ndarray, memoryview]:
    """An input as an array, and the binary data behind it."""
    size = given.parameters.get("binary_data_size")
    if "shared_memory_region" in given.parameters:
        raise BadValue(f"inputs.{i} is in shared memory, which is not served here", "inputs")
    if (size is None) == (given.data is None):
        raise BadValue(f"inputs.{i} should have either data or parameters.binary_data_size", "inputs")
    if size is None:
        return _of_json(given, i), rest
    if type(size) is not int or not 0 <= size <= len(rest):
        raise BadValue(
            f"unexpected size for input {quote_value(given.name)}: binary_data_size {quote_value(size)}, "
            f"left are {len(rest):,} bytes",
            "inputs",
        )
    return _of_bytes(given, rest[:size]), rest[size:]


def _of_json(given: RequestInput, i: int) -> np.ndarray:
    """Data flat or nested, row-major. Raises BadValue for what is no such value, and for a wrong count."""
    name, datatype, shape = f"inputs.{i}.data", given.datatype, given.shape
    if datatype == "FP16":
        raise BadValue("receiving FP16 data via JSON is not supported; use the binary data format", "inputs")
    values = _flat(given.data, name, shape)
    allowed = ALLOWED.get(datatype, {int, float, type(None)})  # null is a missing value, as NaN is in binary data
    for kind in set(map(type, values)) - allowed:
        odd = next(value for value in values if type(value) is kind)
        raise BadValue(f"{name} has {quote_value(odd)}; it should be {datatype} only", "inputs")
    if len(values) != math.prod(shape):
        raise BadValue(
            f"{name} has {len(values):,} values; its shape {quote_value(shape)} has {math.prod(shape):,}", "inputs"
        )
    try:
        if datatype == "BYTES":
            return np.array([value.encode() for value in values], dtype=object).reshape(shape)
        with np.errstate(over="ignore"):  # what becomes infinite is refused by the model
            return np.array(values, dtype=NUMPY[datatype]).reshape(shape)
    except OverflowError:
        raise BadValue(f"{name} has a value that is no {datatype}", "inputs") from None


def _flat(data: Any, name: str, shape: Sequence[int]) -> list[Any]:
    """A list flat or nested as ``shape`` is -> a flat one."""
    if not isinstance(data, list):
        raise BadValue(f"{name} is {quote_value(data)}; it should be a list", "inputs")
    sizes, values = [len(data)], data
    while values and isinstance(values[0], list):
        if set(map(type, values)) != {list} or len(set(map(len, values))) != 1:
            raise BadValue(f"{name} is nested unevenly", "inputs")
        sizes.append(len(values[0]))
        if len(sizes) > len(shape):
            break
        values = list(chain.from_iterable(values))
    if len(sizes) > 1 and sizes != list(shape):
        raise BadValue(f"{name} is nested as {quote_value(sizes)}; its shape is {quote_value(list(shape))}", "inputs")
    return values


def _of_bytes(given: RequestInput, content: memoryview) -> np.ndarray:
    """Binary data. Raises BadValue for a wrong size."""
    count = math.prod(given.shape)
    if given.datatype == "BYTES":
        return np.array(_strings(given, content, count), dtype=object).reshape(given.shape)
    expected = count * np.dtype(NUMPY[given.datatype]).itemsize
    if len(content) != expected:
        raise BadValue(
            f"unexpected size for input {quote_value(given.name)}: {len(content):,} bytes, expected {expected:,}",
            "inputs",
        )
    return np.frombuffer(content, NUMPY[given.datatype]).reshape(given.shape)


def _strings(given: RequestInput, content: memoryview, count: int) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(content) and len(found) < count:
        length = struct.unpack_from("<I", content, at)[0] if at + 4 <= len(content) else len(content)
        found.append(bytes(content[at + 4 : at + 4 + length]))
        at += 4 + length
    if at != len(content) or len(found) != count:
        raise BadValue(
            f"unexpected size for input {quote_value(given.name)}: its data are not {count:,} strings", "inputs"
        )
    return found
