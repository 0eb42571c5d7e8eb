"""Read the query parameters and the Accept header of a request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeVar, cast, get_origin

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams

from app.api.errors import unknown_field, validation_error
from app.errors import BadValue, quote_value

CACHED_QUERIES = 64  # clients send the same few query strings, and parsing one takes up to 20 us

Query = TypeVar("Query", bound=BaseModel)


def read_query(request: Request, model: type[Query]) -> Query:
    """Return the query parameters as an instance of the Pydantic class ``model``. Raises BadValue.

    Other requests may get the same instance, so do not change it.
    """
    return cast(Query, _parse_query(request.scope["query_string"], model))


@lru_cache(CACHED_QUERIES)
def _parse_query(query_string: bytes, model: type[Query]) -> Query:
    values: dict[str, Any] = {}
    for name, value in QueryParams(query_string).multi_items():
        if name not in model.model_fields:
            raise unknown_field(name, model.model_fields)
        if get_origin(model.model_fields[name].annotation) is list:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise BadValue(f"{name} was sent more than once", name)
        else:
            values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise validation_error(error.errors()) from None


def reject_query(request: Request, in_body: bool) -> None:
    """Raise BadValue if there is a query parameter. ``in_body``: the request sends its parameters in its body."""
    for name in QueryParams(request.scope["query_string"]):
        advice = "here; send it in the body" if in_body else "here"
        raise BadValue(f"there is no query parameter {quote_value(name)} {advice}", name)


def preferred_media_type(accept: str, offered: Sequence[str]) -> str:
    """Return the media type in ``offered`` that an Accept header prefers (RFC 9110, 12.5.1).

    If the header prefers several types equally, return the first of these.
    """
    weights = {}
    for part in accept.lower().split(","):
        name, *parameters = map(str.strip, part.split(";"))
        quality = [each[2:] for each in parameters if each.startswith("q=")]
        is_number = quality and re.fullmatch(r"[01](\.\d{0,3})?", quality[0])
        weights[name] = float(quality[0]) if is_number else 1.0

    def weight(media_type: str) -> float:
        names = (media_type, media_type.split("/")[0] + "/*", "*/*")
        return next((weights[name] for name in names if name in weights), 0.0)  # the most specific range counts

    return max(offered, key=weight)
