"""Check an ONNX file before ``onnxruntime`` reads it. The check parses the file as a protocol buffer (onnx.proto).

The check rejects custom operators, loops, sparse tensors, tensors that claim more values than the file holds, and
external data outside the folder of the model. Without this check, onnxruntime would read external data from any path,
or even from an address in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

MODEL_GRAPH, MODEL_FUNCTIONS, MODEL_OPSETS = 7, 25, 8
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_SPARSE = 1, 5, 11, 12, 15
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_SHAPE = 1, 2, 1, 2
NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 4, 5, 7
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS, ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
TENSOR_DIMS, TENSOR_TYPE, TENSOR_EXTERNAL, TENSOR_LOCATION = 1, 2, 13, 14
BITS = {  # of one value, by ``TENSOR_TYPE``
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),  # uint8, int8, bool, float8
    **dict.fromkeys((4, 5, 10, 16), 16),  # uint16, int16, float16, bfloat16
    **dict.fromkeys((1, 6, 12), 32),  # float32, int32, uint32
    **dict.fromkeys((7, 11, 13, 14), 64),  # int64, float64, uint64, complex64
    15: 128,  # complex128
    **dict.fromkeys((21, 22, 23), 4),  # uint4, int4, float4
    **dict.fromkeys((25, 26), 2),  # uint2, int2
}
LOW_PRECISION = (10, 16)  # values of ``TENSOR_TYPE`` for float16 and bfloat16
FUNCTION_NAME, FUNCTION_NODE, FUNCTION_DOMAIN, FUNCTION_DEFAULT = 1, 7, 10, 11
DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
NATIVE = ("com.microsoft", "com.ms.", "org.pytorch.")  # prefixes of domains with operators of onnxruntime
LOOPS = ("Loop",)  # a Loop may run forever; a Scan ends, because its input has a fixed size
_NAME = rb"(?!\.)[^/\\*\x00-\x1f]{1,200}"  # at most 200 bytes, because file systems allow 255
FILE_NAME = re.compile(rb"%b(/%b){0,4}" % (_NAME, _NAME))
MAX_DEPTH = 32  # largest nesting depth of graphs
VALUES_PER_BYTE = 4  # largest number of values in a byte, reached by types with 2 bits

# Matches 1 to 1,000 values that ``_check_attributes`` does not read: numbers in fields 1 to 15, and texts of up to 31
# bytes in ``strings``. An attribute repeats the field for each value, and a tree ensemble has many values.
_INTEGER = rb"[\x08\x10\x18\x20\x28\x30\x38\x40\x48\x50\x58\x60\x68\x70\x78][\x80-\xff]{0,9}[\x00-\x7f]"
_FLOAT = rb"[\x0d\x15\x1d\x25\x2d\x35\x3d\x45\x4d\x55\x5d\x65\x6d\x75\x7d].{4}"
_TEXT = rb"\x4a(?:%b)" % b"|".join(b"\\x%02x.{%d}" % (length, length) for length in range(32))  # field 9, ``strings``
IGNORED = re.compile(rb"(?:%b|%b|%b){1,1000}" % (_FLOAT, _INTEGER, _TEXT), re.DOTALL)

Field = tuple[int, int | memoryview]
Operator = tuple[str, str]  # domain and name


@dataclass
class OnnxContent:
    """The content of an ONNX file.

    Attributes:
        external: the name of each file with external data, and the size in bytes that it must have.
        low_precision: whether a tensor in the file or in its external data is float16 or bfloat16.
    """

    external: dict[str, int] = field(default_factory=dict)
    low_precision: bool = False


def read_onnx(content: memoryview) -> OnnxContent:
    """Check an ONNX file, and return what it contains. Raises ValueError with a message that says what is wrong."""
    result = OnnxContent()
    try:
        fields = list(_fields(content))
        functions = [value for number, value in fields if number == MODEL_FUNCTIONS and isinstance(value, memoryview)]
        defined = {(last_text(each, FUNCTION_DOMAIN), last_text(each, FUNCTION_NAME)) for each in functions}
        graphs = [value for number, value in fields if number == MODEL_GRAPH and isinstance(value, memoryview)]
        if len(graphs) != 1 or not any(number == MODEL_OPSETS for number, _ in fields):
            raise ValueError("the file is not an ONNX model")
        for domain, name in defined:
            if domain.startswith(NATIVE):  # onnxruntime might prefer its own operator of the same name
                raise ValueError(f"function {name!r} has the domain {domain!r}, which is reserved for onnxruntime")
        for function in functions:
            for node in messages(function, FUNCTION_NODE):
                _check_node(node, defined, result, 0)
            # A node in the function may refer to such a value, and is then computed with it.
            _check_attributes("function", messages(function, FUNCTION_DEFAULT), defined, result, 0)
        _check_graph(graphs[0], defined, result, 0)
    except (IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"the file is not an ONNX model: {error}") from error
    return result


def inputs_without_shape(content: memoryview) -> list[str]:
    """Return the names of the input tensors whose shapes are not in the file. onnxruntime takes them for scalars."""
    return [
        last_text(value, VALUE_NAME)
        for graph in messages(content, MODEL_GRAPH)
        for value in messages(graph, GRAPH_INPUT)
        for kind in messages(value, VALUE_TYPE)
        for tensor in messages(kind, TYPE_TENSOR)
        if not any(True for _ in messages(tensor, TENSOR_SHAPE))
    ]


def _check_graph(graph: memoryview, defined: set[Operator], result: OnnxContent, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"graphs are nested more than {MAX_DEPTH} times")
    for number, value in _fields(graph):
        if not isinstance(value, memoryview):
            continue
        if number == GRAPH_NODE:
            _check_node(value, defined, result, depth)
        elif number == GRAPH_INITIALIZER:
            _check_tensor(value, result)
        elif number == GRAPH_SPARSE:
            raise ValueError("an initializer is sparse, which is not supported")


def _check_node(node: memoryview, defined: set[Operator], result: OnnxContent, depth: int) -> None:
    operator, domain, attributes = "", "", []
    for number, value in _fields(node):
        if isinstance(value, memoryview):
            if number == NODE_OPERATOR:
                operator = _text(value)
            elif number == NODE_DOMAIN:
                domain = _text(value)
            elif number == NODE_ATTRIBUTE:
                attributes.append(value)
    if domain not in DOMAINS and (domain, operator) not in defined:
        raise ValueError(f"operator {operator!r} of the domain {domain!r} is not allowed: it is a custom operator")
    if operator in LOOPS:
        raise ValueError(f"operator {operator!r} is not allowed: it may run forever")
    _check_attributes(f"operator {operator!r}", attributes, defined, result, depth)


def _check_attributes(
    owner: str, attributes: Iterable[memoryview], defined: set[Operator], result: OnnxContent, depth: int
) -> None:
    for attribute in attributes:
        for number, value in _fields(attribute, IGNORED):
            if number in ATTRIBUTE_SPARSE:
                raise ValueError(f"{owner} has a sparse tensor, which is not supported")
            if isinstance(value, memoryview) and number in ATTRIBUTE_TENSORS:
                _check_tensor(value, result)
            elif isinstance(value, memoryview) and number in ATTRIBUTE_GRAPHS:
                _check_graph(value, defined, result, depth + 1)


def _check_tensor(tensor: memoryview, result: OnnxContent) -> None:
    """Raise ValueError if a tensor claims more values than the file holds, or if its external data is not allowed."""
    dims: list[int] = []
    external: dict[str, str] = {}
    is_external, kind = False, 0
    for number, value in _fields(tensor):
        if number == TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _varints(value)
        elif number == TENSOR_TYPE:
            kind = value if isinstance(value, int) else 0
            result.low_precision |= kind in LOW_PRECISION
        elif number == TENSOR_LOCATION:
            is_external = value == 1
        elif number == TENSOR_EXTERNAL and isinstance(value, memoryview):
            entry = {key: _text(text) for key, text in _fields(value) if isinstance(text, memoryview)}
            external[entry.get(1, "")] = entry.get(2, "")
    available = len(tensor)
    if is_external or external:
        location, start = external.get("location", ""), external.get("offset", "0")
        whole = str(-(math.prod(dims) * BITS[kind] // -8)) if kind in BITS else ""  # without a length
        length = external.get("length", whole)
        if not FILE_NAME.fullmatch(location.encode()):
            raise ValueError(
                f"external data is in {location[:80]!r}, which is not below the folder of the model, or has a name "
                "that is longer than 200 bytes, begins with a dot, or contains *, a backslash or a control character"
            )
        if not all(text.isascii() and text.isdigit() and len(text) < 16 for text in (start, length)):
            numbers = f"the offset {start[:80]!r} and the length {length[:80]!r}"
            raise ValueError(f"external data in {location!r} has {numbers}; both should have 1 to 15 digits")
        available = int(length)
        result.external[location] = max(result.external.get(location, 0), int(start) + int(length))
    if (count := math.prod(dims)) > VALUES_PER_BYTE * available:
        raise ValueError(f"a tensor claims {count:,} values; the file holds {available:,} bytes of it")


def messages(message: memoryview, number: int) -> Iterator[memoryview]:
    return (
        value for field_number, value in _fields(message) if field_number == number and isinstance(value, memoryview)
    )


def last_text(message: memoryview, number: int) -> str:
    """Return a text field. Like a protocol buffer, a message that repeats the field has its last value."""
    return _text([memoryview(b""), *messages(message, number)][-1])


def _text(value: memoryview) -> str:
    return bytes(value).decode()


def _fields(message: memoryview, ignored: re.Pattern[bytes] | None = None) -> Iterator[Field]:
    """Yield the number and the value of each field: an integer, or the bytes of a text or message.

    Fields that match ``ignored`` are left out.

    Raises IndexError for a truncated message, and ValueError for a wire type that onnx.proto does not use.
    """
    position, end = 0, len(message)
    while position < end:
        if ignored and (match := ignored.match(message, position)):
            position = match.end()
            continue
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == 2:
            length, position = _varint(message, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"the file is not an ONNX model: wire type {kind}")
        if length > end - position:
            raise IndexError("it is truncated")
        if kind == 2:
            yield key >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    result = shift = 0
    while shift < 70:
        byte = message[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise OverflowError("an integer is too long")


def _varints(packed: memoryview) -> list[int]:
    values, position = [], 0
    while position < len(packed):
        value, position = _varint(packed, position)
        values.append(value)
    return values
