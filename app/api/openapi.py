"""The OpenAPI document, made from the operations.

FastAPI builds the document from routes that it never serves. This module adds the schemas and examples. Every example
request succeeds with the models of this repository. ``examples/responses.json`` has real responses in a shortened form.
It has a response for the ``operationId`` of each operation, and a response for each schema and status of an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import deepcopy
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from starlette.responses import Response

from app.api.middleware.api_keys import is_public
from app.settings import Settings

if TYPE_CHECKING:
    from app.api.operation import Operation

EXAMPLES = Path(__file__).with_name("examples")
REFERENCE = "#/components/schemas/{model}"
JSON = "application/json"
TEXT = {"type": "string"}
BINARY = {**TEXT, "format": "binary"}

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
DESCRIBED = ConfigDict(use_attribute_docstrings=True)
bearer = HTTPBearer(scheme_name="admin_key", auto_error=False, description="the admin key")

_responses: dict[str, Any] = {}  # the types that were passed to ``json_content``, by name


def json_content(response: Any) -> dict[str, Any]:
    """Return the ``content`` of a JSON response of a type. The document gets the schema of the type.

    Raises:
        ValueError: another type has the same name.
    """
    if _responses.setdefault(response.__name__, response) is not response:
        raise ValueError(f"two different schemas are named {response.__name__}")
    return {JSON: {"schema": {"$ref": REFERENCE.format(model=response.__name__)}}}


def error_document(description: str, headers: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the description of an error response, to add to a complete document."""
    content = {JSON: {"schema": {"$ref": REFERENCE.format(model="ErrorBody")}}}
    return {"description": description, "headers": REQUEST_ID_HEADER | (headers or {}), "content": content}


def build_document(app: FastAPI, operations: Iterable[Operation], settings: Settings) -> dict[str, Any]:
    """Return the OpenAPI document of an application with these operations.

    Raises:
        ValueError: two different schemas have the same name.
    """
    schemas: dict[str, Any] = {}
    routes = [_route(operation, schemas) for operation in operations if operation.tag]
    about = {name: getattr(app, name) for name in ("title", "version", "summary", "description")}
    document = get_openapi(**about, routes=routes, tags=app.openapi_tags)
    for name, response in _responses.items():
        if f'"{REFERENCE.format(model=name)}"' in json.dumps(document):
            _add_schemas(schemas, response, "serialization")
    document.setdefault("components", {}).update(
        schemas=dict(sorted(schemas.items())), parameters=PARAMETERS, headers=HEADERS
    )
    document = deepcopy(document)  # other applications use parts of it
    _add_examples(document)
    _state_limits(document, settings)
    return document


def _route(operation: Operation, schemas: dict[str, Any]) -> APIRoute:
    """Return a route that describes an operation to FastAPI. Add the schemas of its body to ``schemas``."""
    parameters: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": text,
            "schema": {"type": "string"},
            "example": example,
        }
        for name, (text, example) in operation.parameters.items()
    ]
    if operation.query:
        for name, schema in _schemas_in(operation.query, "validation")[operation.query.__name__]["properties"].items():
            description = {"description": schema.pop("description", "")}
            example = {"example": schema.pop("examples")[0]} if "examples" in schema else {}
            parameters.append(
                {"name": name, "in": "query", "required": False, **description, "schema": schema, **example}
            )
    parameters += [REQUEST_TIMEOUT] if operation.has_timeout else []
    extra: dict[str, Any] = {"parameters": [*parameters, REQUEST_ID]}
    if content := _body_content(operation, schemas):
        fields = operation.body.model_fields.values() if operation.body else ()
        required = any(field.is_required() for field in fields) or not operation.body
        extra["requestBody"] = {"required": required, "content": content}
    answers = {**(json_content(operation.response) if operation.response else {}), **operation.other_answers}
    responses = {200: {"content": answers, "description": operation.answer}, **operation.errors}
    return APIRoute(
        operation.path,
        _nothing,
        methods=[operation.method],
        operation_id=operation.endpoint.__name__,
        summary=operation.summary,
        description=cleandoc(operation.endpoint.__doc__ or ""),
        tags=[operation.tag],
        responses={status: {**response} for status, response in responses.items()},
        response_model=None,
        response_class=Response,
        dependencies=[Depends(bearer)] if operation.is_admin else [],
        openapi_extra=extra,
    )


async def _nothing() -> None:
    raise NotImplementedError  # the route is never served


def _body_content(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    content = {}
    for kind, part in operation.other_bodies.items():
        if kind == "multipart/form-data":  # Swagger UI offers the first media type
            schemas[part["schema"]["title"]] = part["schema"]
            content[kind] = {"schema": {"$ref": REFERENCE.format(model=part["schema"]["title"])}}
    if operation.body:
        _add_schemas(schemas, operation.body, "validation")
        reference = {"$ref": REFERENCE.format(model=operation.body.__name__)}
        content[JSON] = {"schema": reference, "example": operation.example}
    return content | {kind: part for kind, part in operation.other_bodies.items() if kind not in content}


def _schemas_in(part: type[Any], mode: JsonSchemaMode) -> dict[str, Any]:
    """Return the schemas of a type and of the types that it contains, by name.

    The strings below the fields of a class describe them.
    """
    document = TypeAdapter(list[part], config=DESCRIBED).json_schema(ref_template=REFERENCE, mode=mode)  # type: ignore[valid-type]
    schemas: dict[str, Any] = document["$defs"]
    for schema in schemas.values():
        for field in schema.get("properties", {}).values():
            if "description" in field:
                field["description"] = field["description"].replace("\n", " ")
    return schemas


def _add_schemas(schemas: dict[str, Any], part: type[Any], mode: JsonSchemaMode) -> None:
    """Add the schemas of a type and of the types that it contains. Raises ValueError for a conflict of names."""
    for name, own in _schemas_in(part, mode).items():
        if mode == "serialization" and "properties" in own:
            own.setdefault("additionalProperties", False)
        if schemas.setdefault(name, own) != own:
            raise ValueError(f"two different schemas are named {name}")


def _add_examples(document: dict[str, Any]) -> None:
    """Add examples and shared headers to all responses."""
    examples = json.loads((EXAMPLES / "responses.json").read_bytes())
    for operations in document["paths"].values():
        for operation in operations.values():
            own = examples["responses"].get(operation["operationId"], {})
            for status, response in operation["responses"].items():
                response["headers"] = REQUEST_ID_HEADER | response.get("headers", {})
                response["content"] = {kind: {**part} for kind, part in response.get("content", {}).items()}
                for kind, content in response["content"].items():
                    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
                    example = own.get(kind) if status == "200" else examples["errors"].get(name, {}).get(status)
                    if example:
                        content["example"] = example


def _state_limits(part: Any, settings: Settings) -> None:
    """Replace ``x-limit`` by the value of its setting, and the names of settings in descriptions by their values."""
    if isinstance(part, list):
        for each in part:
            _state_limits(each, settings)
    elif isinstance(part, dict):
        if limit := part.pop("x-limit", None):
            name, value = limit[0], getattr(settings, limit[1])
            target = next((each for each in part.get("anyOf", ()) if each.get("type") != "null"), part)
            target[name] = value
            if isinstance(part.get("default"), int):
                part["default"] = min(part["default"], value)
        if "{max_" in str(part.get("description", "")):
            part["description"] = part["description"].format(**settings.model_dump())
        for each in part.values():
            _state_limits(each, settings)


def document_security(document: dict[str, Any]) -> None:
    """Document in OpenAPI how clients send an API key, and which operations need no API key.

    Every operation that needs an API key may answer 429, because the key may have a rate limit.
    """
    schemes = document["components"].setdefault("securitySchemes", {})
    schemes["bearer"] = {"type": "http", "scheme": "bearer", "description": "an API key"}
    schemes["key"] = {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "an API key"}
    document["security"] = [{"bearer": []}, {"key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if is_public(path):
                operation.setdefault("security", [])
                continue
            responses = operation["responses"]
            responses.setdefault("429", error_document("The API key has reached its limit.", RETRY_AFTER))
            if "4XX" not in responses:
                responses["401"] = error_document("Missing or unknown API key.")
