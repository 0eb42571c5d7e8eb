"""Complete FastAPI's OpenAPI document.

Some endpoints read their bodies and query parameters themselves, so that FastAPI cannot describe these inputs. This
module adds these descriptions, and also adds shared headers and examples. Every example request succeeds with the
models of this repository. ``examples/responses.json`` has real responses in a shortened form. It has a response for the
``operationId`` of each operation, and a response for each schema and status of an error.
"""

from __future__ import annotations

import base64
import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI, Request
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode
from starlette.responses import Response
from starlette.routing import Route

EXAMPLES = Path(__file__).with_name("examples")
REFERENCE = "#/components/schemas/{model}"
SCHEMAS = "x-schemas"  # key for the schemas of a request; ``complete`` moves them into the document's components
BINARY = {"type": "string", "format": "binary"}

# A test image of CIFAR-10: a horse, 32 x 32 pixels.
CLASSIFY_EXAMPLE = {"images": [base64.b64encode((EXAMPLES / "horse.jpg").read_bytes()).decode()]}

GENERATE_TEXT_EXAMPLE = {"prompt": "ROMEO:", "max_characters": 200, "temperature": 0.8, "seed": 1}

# 80 values like those that sine-lstm was trained on: a sine over [0, 20] at 1,000 points, with noise from N(0, 0.2²).
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

PARAMETERS: dict[str, dict[str, Any]] = {
    "x-request-id": {
        "name": "x-request-id",
        "in": "header",
        "description": "Your own id for the request, which appears in logs and traces. If you send no id, the service "
        "creates one.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:/+=-]{1,128}$"},
    },
    "x-request-timeout": {
        "name": "x-request-timeout",
        "in": "header",
        "description": "The longest time in seconds until the response. After this time, the service responds with "
        "status 504. `QUARTET_REQUEST_SECONDS` is the upper limit and the default.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
}
HEADERS: dict[str, dict[str, Any]] = {
    "x-request-id": {
        "description": "The id of the request, which is your id or a new one. Log lines and error reports contain it.",
        "schema": {"type": "string"},
    },
    "Retry-After": {
        "description": "The estimated number of seconds until a new attempt may succeed.",
        "schema": {"type": "integer", "minimum": 1},
    },
}
REQUEST_ID = {"$ref": "#/components/parameters/x-request-id"}
REQUEST_TIMEOUT = {"$ref": "#/components/parameters/x-request-timeout"}
REQUEST_ID_HEADER = {"x-request-id": {"$ref": "#/components/headers/x-request-id"}}
RETRY_AFTER = {"Retry-After": {"$ref": "#/components/headers/Retry-After"}}
WITH_TIMEOUT = {"parameters": [REQUEST_TIMEOUT]}  # ``openapi_extra`` of an endpoint without a body


_response_models: dict[str, type[BaseModel]] = {}  # the classes that were passed to ``json_content``, by name


def json_content(model: type[BaseModel]) -> dict[str, Any]:
    """Return the ``content`` of a JSON response in the form of a Pydantic class.

    ``complete`` adds the schema of the class to the document. FastAPI would compute a schema for each response of each
    route at start-up, which takes as long as all other steps of building the application.

    Raises:
        ValueError: another class has the same name.
    """
    if _response_models.setdefault(model.__name__, model) is not model:
        raise ValueError(f"two different schemas are named {model.__name__}")
    return {"application/json": {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}}


def schemas_of(model: type[BaseModel], mode: JsonSchemaMode = "validation") -> dict[str, dict[str, Any]]:
    """Return the JSON schemas of a Pydantic class and of the classes it contains, by class name."""
    schema = model.model_json_schema(ref_template=REFERENCE, mode=mode)
    return {**schema.pop("$defs", {}), model.__name__: schema}


def request_body(
    model: type[BaseModel],
    example: Any,
    *,
    query: type[BaseModel] | None = None,
    form: dict[str, Any] | None = None,
    others: dict[str, Any] | None = None,
    timeout: bool = True,
) -> dict[str, Any]:
    """Return ``openapi_extra`` for an endpoint that reads its JSON body itself.

    An empty body counts as ``{}``, so the body is required only if ``model`` has required fields.

    Args:
        model: the Pydantic class of the JSON body.
        example: a JSON body with which a request succeeds.
        query: the Pydantic class of the query parameters.
        form: the schema of a multipart form, with a title. The document lists the form before the JSON body.
        others: further media types with their schemas.
        timeout: whether ``x-request-timeout`` limits the time until the response.
    """
    schemas, content = schemas_of(model), {}
    if form:
        schemas[form["title"]] = form
        content["multipart/form-data"] = {"schema": {"$ref": REFERENCE.format(model=form["title"])}}
    content["application/json"] = {"schema": {"$ref": REFERENCE.format(model=model.__name__)}, "example": example}
    required = any(field.is_required() for field in model.model_fields.values())
    parameters = query_parameters(query)["parameters"] if query else []
    return {
        "requestBody": {"required": required, "content": content | (others or {})},
        "parameters": [*parameters, REQUEST_TIMEOUT] if timeout else parameters,
        SCHEMAS: schemas,
    }


def query_parameters(model: type[BaseModel]) -> dict[str, Any]:
    """Return ``openapi_extra`` for an endpoint that reads its query parameters itself."""
    schemas = model.model_json_schema()["properties"]
    parameters = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema.pop("description", ""),
            "schema": schema,
        }
        for name, schema in schemas.items()
    ]
    return {"parameters": parameters}


def error_document(description: str, headers: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the description of an error response, to add to a document that ``complete`` has already changed."""
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model="ErrorBody")}}}
    return {"description": description, "headers": REQUEST_ID_HEADER | (headers or {}), "content": content}


def install(app: FastAPI) -> None:
    """Replace FastAPI's OpenAPI document by the result of ``complete``, and encode it as JSON only once."""
    build = app.openapi
    app.openapi = cache(lambda: complete(build()))  # type: ignore[method-assign]  # as FastAPI documents it
    content = cache(lambda: orjson.dumps(app.openapi()))  # FastAPI would encode it again for each request
    routes = app.router.routes
    index = next(i for i, route in enumerate(routes) if getattr(route, "path", "") == app.openapi_url)
    original: Any = routes[index]

    async def document(request: Request) -> Response:
        if request.scope.get("root_path"):  # the document contains this path, so it differs between requests
            response: Response = await original.endpoint(request)
            return response
        return Response(content(), media_type="application/json")

    routes[index] = Route(original.path, document, include_in_schema=False)


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Add named schemas, shared headers and examples to the document, in place.

    Raises:
        ValueError: two different schemas have the same name.
    """

    def add(named: dict[str, dict[str, Any]]) -> None:
        for name, schema in named.items():
            if schemas.setdefault(name, schema) != schema:
                raise ValueError(f"two different schemas are named {name}")

    components = document.setdefault("components", {})
    components |= {"parameters": PARAMETERS, "headers": HEADERS}
    schemas, examples = components.setdefault("schemas", {}), json.loads((EXAMPLES / "responses.json").read_bytes())
    for operations in document["paths"].values():
        for operation in operations.values():
            add(operation.pop(SCHEMAS, {}))
            for parameter in operation.get("parameters", []):
                if "examples" in parameter.get("schema", {}):  # Swagger UI fills in only the parameter's own example
                    parameter["example"] = parameter["schema"].pop("examples")[0]
            operation["parameters"] = [*operation.get("parameters", []), REQUEST_ID]
            for status, response in operation["responses"].items():
                response["headers"] = REQUEST_ID_HEADER | response.get("headers", {})
                _add_examples(response, status, examples["responses"].get(operation["operationId"], {}), examples)
                for content in response.get("content", {}).values():
                    name = _schema_name(content)
                    if name in _response_models and name not in schemas:
                        add(schemas_of(_response_models[name], "serialization"))
    components["schemas"] = dict(sorted(schemas.items()))
    return document


def _add_examples(response: dict[str, Any], status: str, own: dict[str, Any], examples: dict[str, Any]) -> None:
    """Add the examples of a response here, because FastAPI would drop null values in examples."""
    for kind, content in response.get("content", {}).items():
        failures = examples["errors"].get(_schema_name(content), {})
        if example := own.get(kind) if status == "200" else failures.get(status):
            content["example"] = example


def _schema_name(content: dict[str, Any]) -> str:
    """Return the name of the schema to which the ``content`` of a response refers, or an empty string."""
    return content.get("schema", {}).get("$ref", "").rpartition("/")[2]
