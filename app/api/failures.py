"""From a failure to what its caller reads: one shape, one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app.errors import BadValue, MethodNotAllowed, NotFound, QuartetError, shown


def response(error: QuartetError, path: str) -> Response:
    """The answer to a request for ``path`` that failed."""
    content = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return Response(orjson.dumps({"error": content}), error.status, error.headers(), "application/json")


def bad_value(errors: Sequence[Mapping[str, Any]], known: Sequence[str] = ()) -> BadValue:
    """The first of pydantic's findings as a sentence that names the field, what came and what is allowed."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "one", "many", "str")]
    param = ".".join(part for part in place if "[" not in part) or None
    kind, message = first["type"], re.sub(r"\d{20,}", lambda digits: f"{float(digits[0]):g}", first["msg"])
    if kind == "json_invalid":
        return BadValue(f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}")
    if kind == "extra_forbidden":
        return BadValue(f"there is no field {shown(param)}; there are: {', '.join(known) or 'others'}", param)
    if kind == "missing":
        return BadValue(f"{param} is missing", param)
    if param is None:
        return BadValue(f"the body is {shown(first['input'])}; {message.replace('Input should', 'it should')}")
    return BadValue(f"{param} is {shown(first['input'])}; {message.replace('Input should', 'it should')}", param)


def install(app: FastAPI) -> None:
    """Have every failure of a request answered in this shape."""

    @app.exception_handler(QuartetError)
    async def of_ours(request: Request, error: QuartetError) -> Response:
        return response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def of_a_query(request: Request, error: RequestValidationError) -> Response:
        queries = [field.field_info.annotation for field in request.scope["route"].dependant.query_params]
        known = [name for query in queries for name in getattr(query, "model_fields", {})]
        return response(bad_value(error.errors(), known), request.url.path)

    @app.exception_handler(ValidationError)
    async def of_a_body(request: Request, error: ValidationError) -> Response:
        return response(bad_value(error.errors(include_url=False)), request.url.path)

    @app.exception_handler(HTTPException)
    async def of_starlette(request: Request, error: HTTPException) -> Response:
        path, headers = request.url.path, error.headers or {}
        if error.status_code == HTTPStatus.NOT_FOUND:
            return response(NotFound(f"there is nothing at {shown(path)}; /docs shows what there is"), path)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allow = headers.get("allow") or headers.get("Allow") or ""
            return response(MethodNotAllowed(f"{path} does not take {request.method}; allowed: {allow}", allow), path)
        return response(BadValue(str(error.detail)), path)
