"""From a failure to what its caller reads: one shape, one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app.engine.watch import ACCOUNT
from app.errors import BadValue, MethodNotAllowed, NotFound, QuartetError, shown


def content(error: QuartetError) -> dict[str, Any]:
    """What is told of a failure, in an answer or in an event; the account of its request keeps the code."""
    param = error.param and error.param[:100]
    if account := ACCOUNT.get():
        account.reason = error.code
    return {"error": {"message": error.message, "type": error.type, "param": param, "code": error.code}}


def response(error: QuartetError) -> Response:
    """The answer to a request that failed."""
    return Response(orjson.dumps(content(error)), error.status, error.headers(), "application/json")


def unknown_field(name: str, known: Iterable[str]) -> BadValue:
    return BadValue(f"there is no field {shown(name)}; there are: {', '.join(known)}", name)


def bad_value(errors: Sequence[Mapping[str, Any]]) -> BadValue:
    """The first of pydantic's findings as a sentence that names the field, what came and what is allowed."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("query", "one", "many")]  # the last two tag unions
    param = ".".join(place) or None
    message = re.sub(r"\d{20,}", lambda digits: f"{float(digits[0]):g}", first["msg"])
    if first["type"] == "missing":
        return BadValue(f"{param} is missing", param)
    return BadValue(
        f"{param} is {shown(first['input'])}; {re.sub(r'^[A-Z][a-z]+ should', 'it should', message)}", param
    )


def install(app: FastAPI) -> None:
    """Have every failure of a request answered in this shape."""

    @app.exception_handler(QuartetError)
    async def of_ours(request: Request, error: QuartetError) -> Response:
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def of_a_query(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] != "extra_forbidden":
            return response(bad_value(error.errors()))
        queries = [field.field_info.annotation for field in request.scope["route"].dependant.query_params]
        known = [name for query in queries for name in getattr(query, "model_fields", {})]
        return response(unknown_field(str(first["loc"][-1]), known))

    @app.exception_handler(HTTPException)
    async def of_starlette(request: Request, error: HTTPException) -> Response:
        path, headers = request.url.path, error.headers or {}
        if error.status_code == HTTPStatus.NOT_FOUND:
            return response(NotFound(f"there is nothing at {shown(path)}; /docs shows what there is"))
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            allow = headers.get("allow") or headers.get("Allow") or ""
            return response(MethodNotAllowed(f"{path} does not take {request.method}; allowed: {allow}", allow))
        return response(BadValue(str(error.detail)))
