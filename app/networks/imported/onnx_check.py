"""Check an ONNX file before ``onnxruntime`` reads it.

The check rejects custom operators, loops, sparse tensors, tensors that claim more values than the file holds, and
external data outside the folder of the model. Without this check, onnxruntime would read external data from any path,
or even from an address in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
NATIVE = ("com.microsoft", "com.ms.", "org.pytorch.")  # prefixes of domains with operators of onnxruntime
LOOPS = ("Loop",)  # a Loop may run forever; a Scan ends, because its input has a fixed size
_NAME = r"(?!\.)[^/\\*\x00-\x1f]+"
FILE_NAME = re.compile(rf"{_NAME}(/{_NAME}){{0,4}}")
MAX_NAME_BYTES = 200  # file systems allow 255
VALUES_PER_BYTE = 4  # largest number of values in a byte, reached by types with 2 bits


@dataclass
class OnnxContent:
    """The content of an ONNX file.

    Attributes:
        external: the name of each file with external data, and the size in bytes that it must have.
        low_precision: whether a tensor in the file or in its external data is float16 or bfloat16.
    """

    external: dict[str, int] = field(default_factory=dict)
    low_precision: bool = False


def check_onnx(content: bytes) -> OnnxContent:
    """Check an ONNX file, and return what it contains. Raises ValueError with a message that says what is wrong."""
    try:
        from google.protobuf.message import DecodeError
        from onnx import ModelProto
    except ImportError:
        raise ValueError("ONNX models need the package 'onnx', which the extra [onnx] installs") from None
    try:
        model = ModelProto.FromString(content)
    except DecodeError as error:  # it is also raised if memory runs out
        raise ValueError(f"the file is not an ONNX model, or too large: {error}") from None
    if not model.HasField("graph") or not model.opset_import:
        raise ValueError("the file is not an ONNX model")
    result = OnnxContent()
    defined = {(function.domain, function.name) for function in model.functions}
    for domain, name in defined:
        if domain.startswith(NATIVE):  # onnxruntime might prefer its own operator of the same name
            raise ValueError(f"function {name!r} has the domain {domain!r}, which is reserved for onnxruntime")
    for body in _bodies(model.graph, *model.functions):
        for node in body.node:
            if node.domain not in DOMAINS and (node.domain, node.op_type) not in defined:
                raise ValueError(f"operator {node.op_type!r} of the domain {node.domain!r} is a custom operator")
            if node.op_type in LOOPS:
                raise ValueError(f"operator {node.op_type!r} is not allowed: it may run forever")
        for tensor in _tensors(body):
            _check_tensor(tensor, result)
    for each in model.graph.input:
        if each.type.HasField("tensor_type") and not each.type.tensor_type.HasField("shape"):
            raise ValueError(f"input {each.name!r} has no shape; state it in the file")  # onnxruntime assumes a scalar
    return result


def _bodies(*roots: Any) -> Iterator[Any]:
    """Yield graphs or functions, and all graphs inside them."""
    bodies = list(roots)
    while bodies:
        yield (body := bodies.pop())
        for attribute in _attributes(body):
            bodies += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _attributes(body: Any) -> Iterator[Any]:
    for node in body.node:
        yield from node.attribute
    yield from getattr(body, "attribute_proto", ())  # the default values of a function


def _tensors(body: Any) -> Iterator[Any]:
    """Yield the tensors of a graph or function. Raises ValueError if one is sparse."""
    if getattr(body, "sparse_initializer", ()):
        raise ValueError("an initializer is sparse, which is not supported")
    yield from getattr(body, "initializer", ())
    for attribute in _attributes(body):
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise ValueError(f"attribute {attribute.name!r} is a sparse tensor, which is not supported")
        yield from ([attribute.t] if attribute.HasField("t") else [])
        yield from attribute.tensors


def _check_tensor(tensor: Any, result: OnnxContent) -> None:
    """Raise ValueError if a tensor claims more values than the file holds, or if its external data is not allowed."""
    from onnx import TensorProto

    result.low_precision |= tensor.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    count, available = math.prod(tensor.dims), tensor.ByteSize()
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location, start = entries.get("location", ""), entries.get("offset", "0")
        length = entries.get("length", "")
        if not FILE_NAME.fullmatch(location) or max(map(len, location.encode().split(b"/"))) > MAX_NAME_BYTES:
            raise ValueError(
                f"external data is in {location[:80]!r}, which is not below the folder of the model, or has a name "
                "that is longer than 200 bytes, begins with a dot, or contains *, a backslash or a control character"
            )
        if not all(text.isascii() and text.isdigit() and len(text) < 16 for text in (start, length)):
            numbers = f"the offset {start[:80]!r} and the length {length[:80]!r}"
            raise ValueError(f"external data in {location!r} has {numbers}; both should have 1 to 15 digits")
        available = int(length)
        result.external[location] = max(result.external.get(location, 0), int(start) + available)
    if count > VALUES_PER_BYTE * available or min(tensor.dims, default=0) < 0:
        raise ValueError(f"a tensor claims {count:,} values; the file holds {available:,} bytes of it")
