"""Encoding of Open Inference Protocol responses: values that are not finite."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from app.api.open_inference.decode import NUMPY, InferenceRequest, ModelTensor
from app.api.open_inference.encode import encode_response
from app.errors import BadValue


def encode(values: list[float], datatype: str, **parameters: Any) -> tuple[dict[str, Any], bytes]:
    """Return two values: the description of the output ``y`` in a response, and the binary data."""
    request = InferenceRequest.model_validate(
        {
            "inputs": [{"name": "x", "shape": [1], "datatype": "FP32"}],
            "outputs": [{"name": "y", "parameters": parameters}],
        }
    )
    outputs = {"y": np.array(values, NUMPY[datatype])}
    response = encode_response({}, request, outputs, {"y": ModelTensor("y", (datatype,), (-1,))})
    length = int(response.headers.get("inference-header-content-length", len(response.body)))
    return json.loads(bytes(response.body[:length]))["outputs"][0], bytes(response.body[length:])


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_json_has_null_for_nan_and_no_infinite_values(datatype: str) -> None:
    assert encode([1, np.nan], datatype)[0]["data"] == [1.0, None]
    for value in (np.inf, -np.inf):
        with pytest.raises(BadValue) as raised:
            encode([1, np.nan, value], datatype)
        assert (raised.value.message, raised.value.param) == (
            f"output 'y' has {value}, and JSON has no infinite values; set its parameter binary_data to true",
            "outputs",
        )
        values = np.array([1, np.nan, value], NUMPY[datatype])
        assert encode([1, np.nan, value], datatype, binary_data=True)[1] == values.tobytes()
