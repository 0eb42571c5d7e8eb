"""JSON responses: the errors, and helpers for all endpoints.

The classes of responses are typed dictionaries. Endpoints send instances of them, and the OpenAPI document has their
schemas, so both have the same fields.
"""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import BaseModel, Field
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.openapi import RETRY_AFTER, json_content
from app.serving.model import Model

MIN_LOG_PROBABILITY = -9999.0  # for an impossible character, as in vLLM, because JSON has no minus infinity
Floats = Annotated[Any, Field(json_schema_extra={"type": "array", "items": {"type": "number"}})]  # also numpy arrays


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    """the field that is wrong, if there is one"""
    code: str
    """the kind of error, for programs"""


class ErrorBody(TypedDict):
    error: ErrorDetail


def error_responses(model: Any, bad_request: str, server_error: str = "") -> dict[int | str, dict[str, Any]]:
    """Return the error responses of an endpoint that runs a model, for the OpenAPI document.

    ``bad_request`` describes the statuses from 400 to 499, and ``server_error`` further ones from 500.
    """
    content = json_content(model)
    return {
        "4XX": {"content": content, "description": bad_request},
        429: {
            "content": content,
            "description": "A queue or the memory for requests is full, or the API key has reached its limit.",
            "headers": RETRY_AFTER,
        },
        "5XX": {"content": content, "description": f"500: internal error. 504: the deadline has passed.{server_error}"},
        503: {
            "content": content,
            "description": "The model or the service is not ready, or there is too little free memory now.",
            "headers": RETRY_AFTER,
        },
    }


BAD_REQUESTS = (
    "400: invalid value. 401: missing or unknown API key. 404: unknown model. 408: the body arrived too slowly. "
)
ERROR_RESPONSES = error_responses(ErrorBody, f"{BAD_REQUESTS} 413: too large.")


class ModelAnswer(TypedDict):
    """The fields of all native responses."""

    model: str
    version: int


def model_fields(model: Model[Any]) -> ModelAnswer:
    """Return the name and version of the model that answers a request."""
    return {"model": model.card.name, "version": model.card.version}


def stream_response(description: str) -> dict[str, Any]:
    """Return the ``content`` of a response that may be a stream of server-sent events.

    The schema has no type, because some tools apply it to the whole stream, and other tools apply it to each event.
    """
    return {"text/event-stream": {"schema": {"description": description}}}


def json_response(content: Any, status: int = 200) -> Response:
    """Return a JSON response. ``content`` may contain numpy arrays and Pydantic objects."""
    encoded = orjson.dumps(content, default=BaseModel.model_dump, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(encoded, status, media_type="application/json")
