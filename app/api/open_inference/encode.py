"""What goes out in the tensor wire format of the Open Inference Protocol V2; see ``wire_in``."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response

from app.api.open_inference.decode import JSON_LENGTH_HEADER, NUMPY, InferenceRequest, Parameters, TensorSpec
from app.errors import BadValue, quote_value


def requested_outputs(head: InferenceRequest, known: Mapping[str, TensorSpec]) -> dict[str, Parameters]:
    """The outputs that a request asks for, each with its parameters; all when it names none. Raises BadValue."""
    _check_binary("binary_data_output", head.parameters)
    if not head.outputs:
        return {name: {} for name in known}
    for i, output in enumerate(head.outputs):
        if output.name not in known:
            raise BadValue(f"there is no output {quote_value(output.name)}; there are: {', '.join(known)}", "outputs")
        if any(output.name == other.name for other in head.outputs[:i]):
            raise BadValue(f"output {output.name!r} came more than once", "outputs")
        _check_binary("binary_data", output.parameters)
        if (best := output.parameters.get("classification")) is not None:
            _check_classes(best, known[output.name])
    return {output.name: output.parameters for output in head.outputs}


def _check_binary(name: str, parameters: Parameters) -> None:
    """Raises BadValue for what neither asks for bytes nor for JSON."""
    if not isinstance(given := parameters.get(name, False), bool):
        raise BadValue(f"{name} is {quote_value(given)}; it should be a boolean", name)


def _check_classes(best: Any, spec: TensorSpec) -> None:
    """Raises BadValue for an output without classes, and for what is no number of them."""
    if not spec.labels:
        raise BadValue(f"output {spec.name!r} has no classes", "outputs")
    if type(best) is not int or best < 1:
        raise BadValue(f"classification is {quote_value(best)}; it should be a number of classes from 1 on", "outputs")


def encode_response(
    answer: dict[str, Any], head: InferenceRequest, outputs: Mapping[str, np.ndarray], specs: Mapping[str, TensorSpec]
) -> Response:
    """The answer with its outputs, in JSON or binary as each is asked for. Raises BadValue."""
    told, tail = [], []
    for name, parameters in requested_outputs(head, specs).items():
        array, datatype = outputs[name], specs[name].datatypes[0]
        if (best := parameters.get("classification")) is not None:
            array, datatype = _classes(array, best, specs[name]), "BYTES"
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if parameters.get("binary_data", head.parameters.get("binary_data_output", False)):
            content = _packed(array, datatype)
            tail.append(content)
            entry["parameters"] = {"binary_data_size": len(content)}
        elif datatype == "BYTES":
            entry["data"] = [text.decode("utf-8", "replace") for text in array.reshape(-1)]
        else:
            entry["data"] = np.ascontiguousarray(array).reshape(-1)
        told.append(entry)
    first = orjson.dumps({**answer, "outputs": told}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not tail:
        return Response(first, media_type="application/json")
    headers = {JSON_LENGTH_HEADER.decode(): str(len(first))}
    return Response(b"".join([first, *tail]), 200, headers, "application/octet-stream")


def _packed(array: np.ndarray, datatype: str) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(text)) + text for text in array.reshape(-1))
    return np.ascontiguousarray(array, NUMPY[datatype]).tobytes()


def _classes(array: np.ndarray, best: Any, spec: TensorSpec) -> np.ndarray:
    """Values [N, classes] -> the ``best`` largest of each row as ``value:index:label``, [N, best]."""
    order = np.argsort(-array, axis=1, kind="stable")[:, :best]
    rows = [
        [f"{row[index]:.6f}:{index}:{spec.labels[index]}".encode() for index in ranks]
        for row, ranks in zip(array, order, strict=True)
    ]
    return np.array(rows, dtype=object)
