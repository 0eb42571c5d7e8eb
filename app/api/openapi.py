"""The OpenAPI document, made from the operations.

Every example request succeeds with the models of this repository. ``examples/responses.json`` has real responses in a
shortened form. It has a response for the ``operationId`` of each operation, and a response for each schema and status
of an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from app.api.middleware.api_keys import is_public
from app.limits import Limits
from app.settings import Settings

if TYPE_CHECKING:
    from app.api.operation import Operation

EXAMPLES = Path(__file__).with_name("examples")
REFERENCE = "#/components/schemas/{model}"
JSON, FORM = "application/json", "multipart/form-data"
TEXT = {"type": "string"}
BINARY = {**TEXT, "format": "binary"}
DESCRIBED = ConfigDict(use_attribute_docstrings=True)

SALES = [20, 35, 50, 30, 22, 37, 51, 32, 23, 39, 54, 33]  # a series with a season of four quarters

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
REQUEST_ID, REQUEST_TIMEOUT = ({"$ref": f"#/components/parameters/{name}"} for name in PARAMETERS)
REQUEST_ID_HEADER = {"x-request-id": {"$ref": "#/components/headers/x-request-id"}}
RETRY_AFTER = {"Retry-After": {"$ref": "#/components/headers/Retry-After"}}
ADMIN_KEY = {"admin_key": {"type": "http", "scheme": "bearer", "description": "the admin key"}}
API_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "an API key"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "an API key"},
}


def json_content(response: Any) -> dict[str, Any]:
    """Return the ``content`` of a JSON response of a type. The document gets the schema of the type."""
    return {JSON: {"schema": response}}


def build_document(app: FastAPI, operations: Sequence[Operation], settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI document of an application with these operations.

    Raises:
        ValueError: two different schemas have the same name.
    """
    examples = json.loads((EXAMPLES / "responses.json").read_bytes())
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {}
    for operation in operations:
        if operation.tag:
            row = _describe(operation, schemas, examples)
            paths.setdefault(operation.path, {})[operation.method.lower()] = row
    schemes = ADMIN_KEY if any(operation.is_admin for operation in operations) else {}
    components = {"schemas": dict(sorted(schemas.items())), "parameters": PARAMETERS, "headers": HEADERS}
    document = {
        "openapi": "3.1.0",
        "info": {name: getattr(app, name) for name in ("title", "summary", "description", "version")},
        "paths": paths,
        "components": components,
        "tags": app.openapi_tags,
    }
    if settings.keys_file:
        document["security"] = [{name: []} for name in API_KEYS]
        schemes = schemes | API_KEYS
        _require_keys(paths)
    if schemes:
        components["securitySchemes"] = schemes
    document = deepcopy(document)  # other applications use parts of it
    _state_limits(document, settings.limits)
    return document


def _describe(operation: Operation, schemas: dict[str, Any], examples: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of an operation. Add the schemas of its bodies to ``schemas``."""
    name = operation.endpoint.__name__
    row: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": cleandoc(operation.endpoint.__doc__ or ""),
        "operationId": name,
        "parameters": _parameters(operation),
        "responses": {},
    }
    if operation.is_admin:
        row["security"] = [{"admin_key": []}]
    if operation.body or operation.other_bodies:
        row["requestBody"] = _body(operation, schemas)
    answers = {**(json_content(operation.response) if operation.response else {}), **operation.other_answers}
    responses = {200: {"content": answers, "description": operation.answer}, **operation.errors}
    for status, response in responses.items():
        contents = {}
        for kind, part in response["content"].items():
            own = examples["responses"].get(name, {}).get(kind)
            if status != 200:
                own = examples["errors"].get(part["schema"].__name__, {}).get(str(status))
            schema = _reference(part["schema"], schemas, "serialization")
            contents[kind] = {"schema": schema} | ({"example": own} if own else {})
        headers = REQUEST_ID_HEADER | response.get("headers", {})
        row["responses"][str(status)] = {**response, "headers": headers, "content": contents}
    return row


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "description": text, "schema": TEXT, "example": example}
        for name, (text, example) in operation.parameters.items()
    ]
    if operation.query:
        fields = _schemas_in(operation.query, "validation")[operation.query.__name__]["properties"]
        for name, schema in deepcopy(fields).items():
            parameter = {"name": name, "in": "query", "required": False, "description": schema.pop("description", "")}
            if "examples" in schema:
                parameter["example"] = schema.pop("examples")[0]
            # Swagger UI sends a default of false, and a request with JSON has no query parameters.
            shown = {key: value for key, value in schema.items() if value is not None and value is not False}
            parameters.append({**parameter, "schema": shown})
    return [*parameters, *([REQUEST_TIMEOUT] if operation.has_deadline else []), REQUEST_ID]


def _body(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    json_body, others = {}, {**operation.other_bodies}
    if body := operation.body:
        json_body[JSON] = {"schema": _reference(body, schemas, "validation"), "example": operation.example}
    if FORM in others:
        form = others[FORM]["schema"]
        schemas[form["title"]] = form
        others[FORM] = {"schema": {"$ref": REFERENCE.format(model=form["title"])}}
    first = {FORM: others[FORM]} if next(iter(others), "") == FORM else {}  # Swagger UI offers the first media type
    is_optional = body and not any(field.is_required() for field in body.model_fields.values())
    return {"required": not is_optional, "content": {**first, **json_body, **others}}


@cache
def _schemas_in(part: type[Any], mode: JsonSchemaMode) -> dict[str, Any]:
    """Return the schemas of a type and of the types that it contains, by name.

    The strings below the fields of a class describe them. The result is cached, because most operations have the same
    errors; do not change it.
    """
    document = TypeAdapter(list[part], config=DESCRIBED).json_schema(ref_template=REFERENCE, mode=mode)  # type: ignore[valid-type]
    schemas: dict[str, Any] = document["$defs"]
    for schema in schemas.values():
        for field in schema.get("properties", {}).values():
            if "description" in field:
                field["description"] = field["description"].replace("\n", " ")
        if mode == "serialization" and "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return schemas


def _reference(part: Any, schemas: dict[str, Any], mode: JsonSchemaMode) -> Any:
    """Return a reference to the schema of a type, or ``part`` if it is a schema.

    Add the schemas of the type and of the types that it contains. Raises ValueError for a conflict of names.
    """
    if not isinstance(part, type):
        return part
    for name, own in _schemas_in(part, mode).items():
        if schemas.setdefault(name, own) != own:
            raise ValueError(f"two different schemas are named {name}")
    return {"$ref": REFERENCE.format(model=part.__name__)}


def _state_limits(part: Any, limits: Limits) -> None:
    """Replace ``x-limit`` by the value of its limit, and the names of limits in descriptions by their values."""
    if isinstance(part, list):
        for each in part:
            _state_limits(each, limits)
    elif isinstance(part, dict):
        if limit := part.pop("x-limit", None):
            name, value = limit[0], getattr(limits, limit[1])
            target = next((each for each in part.get("anyOf", ()) if each.get("type") != "null"), part)
            target[name] = value
            if isinstance(part.get("default"), int):
                part["default"] = min(part["default"], value)
        if "{max_" in str(part.get("description", "")):
            part["description"] = part["description"].format(**vars(limits))
        for each in part.values():
            _state_limits(each, limits)


def _require_keys(paths: Mapping[str, Mapping[str, Any]]) -> None:
    """Document which operations need no API key, and the errors of the others.

    Every operation that needs an API key may answer 429, because the key may have a rate limit.
    """
    error = {"headers": REQUEST_ID_HEADER, "content": {JSON: {"schema": {"$ref": REFERENCE.format(model="ErrorBody")}}}}
    for path, operations in paths.items():
        for operation in operations.values():
            responses = operation["responses"]
            if is_public(path):
                operation.setdefault("security", [])
                continue
            limited = {"description": "The API key has reached its limit."} | error
            responses.setdefault("429", {**limited, "headers": REQUEST_ID_HEADER | RETRY_AFTER})
            if "4XX" not in responses:
                responses["401"] = {"description": "Missing or unknown API key."} | error
