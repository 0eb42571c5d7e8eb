"""Build error responses. Each protocol has its own format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response

from app.engine.observer import current_trace
from app.errors import BadValue, QuartetError, quote_value

MAX_PARAM_LENGTH = 100  # characters
ONE, MANY = "(one)", "(many)"  # tags of unions of a value and a list of values, which are no names of fields


def error_content(error: QuartetError, path: str) -> dict[str, Any]:
    """Return the JSON content of an error response or error event, in the format of the protocol at ``path``.

    Also stores the error code in the request's trace.
    """
    if trace := current_trace.get():
        trace.error_code = error.code
    if path == "/v2" or path.startswith("/v2/"):
        return {"error": error.message}
    param = error.param and error.param[:MAX_PARAM_LENGTH]
    return {"error": {"message": error.message, "type": error.type, "param": param, "code": error.code}}


def error_response(error: QuartetError, path: str) -> Response:
    """Return the response to a failed request, in the format of the protocol at ``path``."""
    content = orjson.dumps(error_content(error.without_frames(), path))
    return Response(content, error.status, error.headers(), "application/json")


def unknown_field(name: str, known: Iterable[str]) -> BadValue:
    return BadValue(f"unknown field {quote_value(name)}; known fields: {', '.join(known)}", name)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> BadValue:
    """Return the first of pydantic's errors as a ``BadValue`` with the field, its value and the allowed values."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part not in (ONE, MANY)]
    param = ".".join(path)[:MAX_PARAM_LENGTH] or None  # a client may have sent a field name of any length
    message = re.sub(r"\d{20,}", lambda digits: f"{float(digits[0]):g}", first["msg"].replace(" after validation", ""))
    if first["type"] == "literal_error":
        message = message.replace("False", "false")  # as in JSON
    if first["type"] == "missing":
        return BadValue(f"{param} is missing", param)
    return BadValue(
        f"{param} is {quote_value(first['input'])}; {re.sub(r'^[A-Z][a-z]+ should', 'it should', message)}", param
    )
