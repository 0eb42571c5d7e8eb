"""Encode responses of the Open Inference Protocol V2 in JSON or binary; see ``decode`` for the format."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response

from app.api.open_inference.decode import JSON_LENGTH_HEADER, NUMPY, InferenceRequest, ModelTensor, Parameters
from app.errors import BadValue, quote_value


def requested_outputs(body: InferenceRequest, specs: Mapping[str, ModelTensor]) -> dict[str, Parameters]:
    """Return a dictionary from the name of each requested output to its parameters.

    If the request has no list of outputs, all outputs are requested.

    Raises:
        BadValue: an output or a parameter is wrong.
    """
    _check_binary("binary_data_output", body.parameters)
    if not body.outputs:
        return {name: {} for name in specs}
    for i, output in enumerate(body.outputs):
        if output.name not in specs:
            raise BadValue(f"unknown output {quote_value(output.name)}; known outputs: {', '.join(specs)}", "outputs")
        if any(output.name == other.name for other in body.outputs[:i]):
            raise BadValue(f"output {output.name!r} was sent more than once", "outputs")
        if "shared_memory_region" in output.parameters:
            raise BadValue(f"output {output.name!r} is for shared memory, which is not supported", "outputs")
        _check_binary("binary_data", output.parameters)
        if (class_count := output.parameters.get("classification")) is not None:
            _check_class_count(class_count, specs[output.name])
    return {output.name: output.parameters for output in body.outputs}


def _check_binary(name: str, parameters: Parameters) -> None:
    """Raise BadValue if the parameter ``name`` is not a boolean."""
    if not isinstance(value := parameters.get(name, False), bool):
        raise BadValue(f"{name} is {quote_value(value)}; it should be a boolean", name)


def _check_class_count(class_count: Any, spec: ModelTensor) -> None:
    """Raise BadValue if the output has no classes, or the number of classes is wrong."""
    if not spec.labels and not spec.has_classes:
        raise BadValue(f"output {spec.name!r} has no classes", "outputs")
    if type(class_count) is not int or class_count < 1:
        raise BadValue(
            f"classification is {quote_value(class_count)}; it should be a number of classes from 1 on", "outputs"
        )


def encode_response(
    head: dict[str, Any], body: InferenceRequest, outputs: Mapping[str, np.ndarray], specs: Mapping[str, ModelTensor]
) -> Response:
    """Return a response with the fields of ``head`` and the outputs that the request ``body`` asks for.

    In JSON, NaN is null, as in requests.

    Raises:
        BadValue: a requested output or its parameters are wrong, or an output in JSON has an infinite value.
    """
    entries, tail = [], []
    for name, parameters in requested_outputs(body, specs).items():
        array, datatype = outputs[name], specs[name].datatypes[0]
        if (class_count := parameters.get("classification")) is not None:
            array, datatype = _top_classes(array, class_count, specs[name]), "BYTES"
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if parameters.get("binary_data", body.parameters.get("binary_data_output", False)):
            content = _encode_binary(array, datatype)
            tail.append(content)
            entry["parameters"] = {"binary_data_size": len(content)}
        elif datatype == "BYTES":
            entry["data"] = [text.decode("utf-8", "replace") for text in array.reshape(-1)]
        elif array.dtype.kind == "f" and (infinite := np.isinf(array)).any():  # would be null, which means NaN
            problem = f"output {name!r} has {array[infinite][0]}, and JSON has no infinite values"
            raise BadValue(f"{problem}; set its parameter binary_data to true", "outputs")
        else:
            entry["data"] = np.ascontiguousarray(array).reshape(-1)
        entries.append(entry)
    json_part = orjson.dumps({**head, "outputs": entries}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not tail:
        return Response(json_part, media_type="application/json")
    headers = {JSON_LENGTH_HEADER: str(len(json_part))}
    return Response(b"".join([json_part, *tail]), 200, headers, "application/octet-stream")


def _encode_binary(array: np.ndarray, datatype: str) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(text)) + text for text in array.reshape(-1))
    return np.ascontiguousarray(array, NUMPY[datatype]).tobytes()


def _top_classes(array: np.ndarray, class_count: Any, spec: ModelTensor) -> np.ndarray:
    """Return the ``class_count`` largest values of each row of ``array`` [N, classes].

    The result [N, class_count] has texts of the form ``value:index:label``, or ``value:index`` without labels.
    """
    order = np.argsort(-array, axis=1, kind="stable")[:, :class_count]
    labels = [f":{label}" for label in spec.labels] or [""] * array.shape[1]
    rows = [
        [f"{row[index]:.6f}:{index}{labels[index]}".encode() for index in ranks]
        for row, ranks in zip(array, order, strict=True)
    ]
    return np.array(rows, dtype=object)
