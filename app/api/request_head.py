"""Read the headers and query parameters of a request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from app.api.errors import unknown_field, validation_error
from app.errors import BadValue

HEADERS = "quartet.headers"  # key in the ASGI scope: the headers as a dictionary, built on first use


Query = TypeVar("Query", bound=BaseModel)


def header(request: Request, name: bytes, default: str = "") -> str:
    """Return the value of a header; ``name`` is in lower case. The last one counts if several have that name."""
    if HEADERS not in request.scope:
        request.scope[HEADERS] = dict(request.scope["headers"])
    value = request.scope[HEADERS].get(name)
    return default if value is None else value.decode("latin-1")


def read_query(request: Request, model: type[Query]) -> Query:
    """Return the query parameters as a model. Raises BadValue."""
    if not request.scope["query_string"]:
        return model()
    parameters = request.query_params.multi_items()
    for i, (name, _) in enumerate(parameters):
        if name not in model.model_fields:
            raise unknown_field(name, model.model_fields)
        if any(name == earlier for earlier, _ in parameters[:i]):
            raise BadValue(f"{name} came more than once", name)
    try:
        return model.model_validate(dict(parameters))
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False)) from None


def preferred_media_type(accept: str, offered: Sequence[str]) -> str:
    """Return the offered media type that an Accept header (RFC 9110, 12.5.1) prefers; of equal ones the first."""
    ranges = [part.strip().lower().split(";") for part in accept.split(",")]
    weights = []
    for media_type in offered:
        matching = ("*/*", media_type.split("/")[0] + "/*", media_type)
        parameters = {name.strip(): values for name, *values in ranges if name.strip() in matching}
        weight = 0.0
        for name in matching:  # the most specific range counts
            if name in parameters:
                quality = [value[2:] for value in map(str.strip, parameters[name]) if value.startswith("q=")]
                weight = float(quality[0]) if quality and re.fullmatch(r"[01](\.\d{0,3})?", quality[0]) else 1.0
        weights.append(weight)
    return offered[weights.index(max(weights))]
