"""Check an ONNX file before ``onnxruntime`` reads it.

The check rejects custom operators, loops, sparse tensors, functions that call each other too often, tensors that claim
more values than the file holds, external data outside the folder of the model, and divisions that may overflow. Without
this check, onnxruntime would read external data from any path, or even from an address in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
NATIVE = ("com.microsoft", "com.ms.", "org.pytorch.")  # prefixes of domains with operators of onnxruntime
LOOPS = ("Loop",)  # a Loop may run forever; a Scan ends, because its input has a fixed size
DIVISIONS = ("Div", "Mod")
_NAME = r"(?!\.)[^/\\*\x00-\x1f]+"
FILE_NAME = re.compile(rf"{_NAME}(/{_NAME}){{0,4}}")
MAX_NAME_BYTES = 200  # file systems allow 255
MAX_NODES = 20_000  # after each call of a function is replaced by its nodes; onnxruntime reads them in 10 s
VALUES_PER_BYTE = 4  # largest number of values in a byte, reached by types with 2 bits
SMALL_BYTES = 1024  # constants up to this size may be shapes, which the inference of types reads


@dataclass
class OnnxContent:
    """The content of an ONNX file.

    Attributes:
        external: the name of each file with external data, and the size in bytes that it must have.
        low_precision: whether a tensor in the file or in its external data is float16 or bfloat16.
        unshaped: the inputs whose shapes are not in the file. onnxruntime takes them for scalars.
    """

    external: dict[str, int] = field(default_factory=dict)
    low_precision: bool = False
    unshaped: list[str] = field(default_factory=list)


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
    _check_calls(model)
    result.unshaped = [each.name for each in model.graph.input if not each.type.tensor_type.HasField("shape")]
    _check_divisions(model)
    return result


def _bodies(*roots: Any) -> Iterator[Any]:
    """Yield graphs or functions, and all graphs inside them."""
    bodies = list(roots)
    while bodies:
        yield (body := bodies.pop())
        for attribute in _attributes(body):
            bodies += _graphs(attribute)


def _graphs(attribute: Any) -> list[Any]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


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


def _check_calls(model: Any) -> None:
    """Raise ValueError if functions call each other so often that onnxruntime would never finish reading the model."""
    functions = {(function.domain, function.name): function for function in model.functions}

    @cache
    def size(key: tuple[str, str]) -> int:
        return nodes(functions[key]) if key in functions else 0

    def nodes(root: Any) -> int:
        calls = ((node.domain, node.op_type) for body in _bodies(root) for node in body.node)
        return sum(1 + size(call) for call in calls)

    try:
        total = nodes(model.graph)
    except RecursionError:  # a function calls itself
        total = MAX_NODES + 1
    if functions and total > MAX_NODES:
        raise ValueError(f"with all calls of functions, the model has more than {MAX_NODES:,} nodes")


def _check_divisions(model: Any) -> None:
    """Raise ValueError if a division of integers may overflow. Changes the model.

    If a network divides the smallest integer by -1, the processor raises an exception that ends the process.
    onnxruntime does not check for this. So integers may only be divided by constants other than -1.
    """
    from onnx import inliner, shape_inference

    bodies = list(_bodies(model.graph, *model.functions))
    if not any(node.op_type in DIVISIONS for body in bodies for node in body.node):
        return
    for body in bodies:
        for tensor in _tensors(body):
            if tensor.ByteSize() > SMALL_BYTES:
                tensor.ClearField("raw_data")
    if model.functions:
        model = inliner.inline_local_functions(model)
    _check_graph(shape_inference.infer_shapes(model).graph, {}, {})


def _check_graph(graph: Any, outer_types: Mapping[str, int], outer_constants: Mapping[str, Any]) -> None:
    """Check the divisions in a graph. The types and the constants of the graphs around it are known by name."""
    from onnx import TensorProto

    own = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types = {**outer_types, **own}
    made = {name for node in graph.node for name in node.output} | {value.name for value in graph.input}
    constants = {name: tensor for name, tensor in outer_constants.items() if name not in made}
    constants |= {tensor.name: tensor for tensor in graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    floats = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    for node in graph.node:
        is_float = types.get(node.output[0]) in floats
        if node.op_type in DIVISIONS and not is_float and not _is_safe_divisor(constants.get(node.input[1])):
            raise ValueError(
                f"operator {node.op_type!r} with the result {node.output[0]!r} divides integers by a value that is not "
                "a constant, or is -1; divide floats, or divide by a constant"
            )
        for attribute in node.attribute:
            for inner in _graphs(attribute):
                _check_graph(inner, types, constants)


def _is_safe_divisor(tensor: Any) -> bool:
    from onnx import numpy_helper

    try:
        return tensor is not None and bool((numpy_helper.to_array(tensor) != -1).all())
    except (TypeError, ValueError):  # it has no values in the file
        return False
