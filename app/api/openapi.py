"""What OpenAPI says of bodies and queries that are read by hand, and the example of each: it succeeds as it stands."""

from __future__ import annotations

import base64
import math
import random
from pathlib import Path
from typing import Any

from pydantic import BaseModel

# A test image of CIFAR-10: a horse, 32 x 32 pixels.
CLASSIFY_EXAMPLE = {"images": [base64.b64encode(Path(__file__).with_name("example.jpg").read_bytes()).decode()]}

GENERATE_TEXT_EXAMPLE = {"prompt": "ROMEO:", "max_characters": 200, "temperature": 0.8, "seed": 1}

# Eighty values of the workshop's series: a sine over [0, 20] at 1,000 points, and Gaussian noise of 0.2.
_noise = random.Random(0)
_values = [round(math.sin(20 / 999 * i) + _noise.gauss(0, 0.2), 3) for i in range(200, 280)]
FORECAST_EXAMPLE = {"values": _values, "horizon": 12, "levels": [80, 95]}

INFER_EXAMPLE = {
    "parameters": {"horizon": 3, "levels": "80,95"},
    "inputs": [{"name": "values", "datatype": "FP64", "shape": [1, 80], "data": _values}],
    "outputs": [{"name": "mean"}],
}

V2_GENERATE_EXAMPLE = {"text_input": "ROMEO:", "parameters": {"max_characters": 200, "temperature": 0.8, "seed": 1}}

GENERATE_IMAGES_EXAMPLE = {"count": 4, "seed": 1}

COMPLETION_EXAMPLE = {"model": "shakespeare-rnn", "prompt": "ROMEO:", "max_tokens": 100, "temperature": 0.8, "seed": 1}

IMAGE_GENERATION_EXAMPLE = {"prompt": "digits", "n": 4, "response_format": "b64_json", "seed": 1}

TIMESERIES_EXAMPLE = {
    "model": "sine-lstm",
    "inputs": [{"type": "univariate_time_series", "name": "sine", "series": _values, "frequency": "hour"}],
    "options": {"horizon": 12, "quantiles": [0.1, 0.5, 0.9]},
}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a body, with its parts where they are used: a reference means the whole document, not it."""
    whole = model.model_json_schema()
    parts = whole.pop("$defs", {})

    def placed(found: Any) -> Any:
        if isinstance(found, list):
            return [placed(one) for one in found]
        if not isinstance(found, dict):
            return found
        own = {key: placed(value) for key, value in found.items() if key != "$ref"}
        return placed(parts[found["$ref"].removeprefix("#/$defs/")]) | own if "$ref" in found else own

    schema: dict[str, Any] = placed(whole)
    return schema


def request_body(model: type[BaseModel], example: Any, **others: Any) -> dict[str, Any]:
    """What OpenAPI says of a body that is read by hand; ``example`` must work as it stands."""
    content = {"application/json": {"schema": schema_of(model), "example": example}, **others}
    return {"requestBody": {"required": True, "content": content}}


def query_parameters(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of query parameters that are read by hand."""
    fields = schema_of(model)["properties"]
    told = {name: schema.pop("description", "") for name, schema in fields.items()}
    parameters = [
        {"name": name, "in": "query", "required": False, "description": told[name], "schema": schema}
        for name, schema in fields.items()
    ]
    return {"parameters": parameters}
