"""Reading what a request carries: bounded, and checked against a model whose limits are settings."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response

from app.api.failures import bad_value
from app.errors import BadValue, TooLarge

Model = TypeVar("Model", bound="Body")


class Body(BaseModel):
    """A JSON body: unknown fields are refused, and no value is made of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def limited(model: type[Model], **limits: dict[str, Any]) -> type[Model]:
    """The model with the limits of the settings on its fields, so that they stand in the OpenAPI document too."""
    fields: dict[str, Any] = {}
    for name, limit in limits.items():
        info = model.model_fields[name]
        fields[name] = (Annotated[info.annotation, Field(**limit)], info)
    return create_model(model.__name__, __base__=model, **fields)


async def stream(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body piece by piece. Raises TooLarge as soon as it is known to be longer than ``limit`` bytes."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise TooLarge(f"the body has {int(announced):,} bytes; allowed are {limit:,}")
    length = 0
    async for piece in request.stream():
        length += len(piece)
        if length > limit:
            raise TooLarge(f"the body has more than {limit:,} bytes, which are allowed")
        yield piece


async def read(request: Request, limit: int) -> bytes:
    """The whole body. Raises TooLarge."""
    return b"".join([piece async for piece in stream(request, limit)])


async def read_json(request: Request, model: type[Model], limit: int) -> Model:
    """The body as a model, whatever its Content-Type says. Raises TooLarge and BadValue."""
    content = await read(request, limit)
    try:
        return model.model_validate_json(content or b"{}")
    except ValidationError as error:
        raise bad_value(error.errors(include_url=False), list(model.model_fields)) from None


async def read_form(request: Request, limit: int, files: int) -> FormData:
    """A multipart body with at most ``files`` files. Raises TooLarge and BadValue."""
    try:
        return await MultiPartParser(request.headers, stream(request, limit), max_files=files, max_fields=files).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise BadValue(f"the multipart body cannot be read: {getattr(error, 'message', error)}") from error


def json_response(content: Any) -> Response:
    """The answer, numpy arrays included."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def described(model: type[BaseModel], example: Any, **others: Any) -> dict[str, Any]:
    """What OpenAPI says of a body that is read by hand; ``example`` must work as it stands."""
    content = {"application/json": {"schema": model.model_json_schema(), "example": example}, **others}
    return {"requestBody": {"required": True, "content": content}}
