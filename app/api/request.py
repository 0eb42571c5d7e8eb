"""Reading what a request carries: bounded, and checked against a model whose limits are settings."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response

from app.api.deadline import DEADLINE, run_before_deadline
from app.api.errors import unknown_field, validation_error
from app.engine.executor import INLINE_SIZE, Executor
from app.errors import BadValue, CallerGone, TimedOut, TooLarge, TooSlow, quote_value

BYTES_PER_VALUE = 5  # bytes or pixels that are unpacked in the time of one value
JSON_BYTES = 64 * 1024  # of a body, besides its prompt or values
EXTRA_COMMAS = 64  # commas that a body may have besides those of its values or its prompt
MAX_FIELDS = 2000  # of all objects of a body
MAX_SEED = 2**53  # so that a seed survives every JSON reader
CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")  # of a form; some others take minutes to decode
HEADERS = "quartet.headers"  # key in the ASGI scope: the headers as a dictionary, built on first use

Seed = Annotated[int, Field(ge=0, lt=MAX_SEED)]
ModelName = Annotated[
    str | None, Field(description="`name` or `name@version`; by default the task's own", max_length=200)
]

Model = TypeVar("Model", bound="RequestBody")
Query = TypeVar("Query", bound=BaseModel)


class RequestBody(BaseModel):
    """A JSON body: unknown fields are refused, and no value is made of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def with_limits(model: type[Model], **limits: dict[str, Any]) -> type[Model]:
    """The model with the limits of the settings on its fields, so that they stand in the OpenAPI document too."""
    fields: dict[str, Any] = {}
    for name, limit in limits.items():
        info = model.model_fields[name]
        fields[name] = (Annotated[info.annotation, Field(**limit)], info)
    return create_model(model.__name__, __base__=model, **fields)


def max_json_bytes(most: int, content: int) -> int:
    """How many bytes a JSON body may have, at most ``most``, whose prompt or values take up to ``content``."""
    return min(most, JSON_BYTES + content)


def header(request: Request, name: bytes, default: str = "") -> str:
    """Return the value of a header; ``name`` is in lower case. The last one counts if several have that name."""
    if HEADERS not in request.scope:
        request.scope[HEADERS] = dict(request.scope["headers"])
    value = request.scope[HEADERS].get(name)
    return default if value is None else value.decode("latin-1")


def set_deadline(request: Request, max_seconds: float) -> float:
    """Start the clock of a request. Return its deadline in event-loop time, at most ``max_seconds`` from now.

    The header ``x-request-timeout`` shortens that time. The deadline is stored in the scope: it also bounds the reading
    of the body.

    Raises:
        BadValue: the header is not a positive, finite number.
    """
    text = header(request, b"x-request-timeout", repr(max_seconds))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise BadValue(
            f"x-request-timeout is {quote_value(text)}; it should be a number of seconds greater than 0",
            "x-request-timeout",
        )
    deadline = asyncio.get_running_loop().time() + min(seconds, max_seconds)
    request.scope[DEADLINE] = deadline
    return deadline


async def read_body(request: Request, limit: int, seconds: float, codings: Collection[str] = ()) -> bytes:
    """The whole body, in one of ``codings`` or as it is.

    Raises TooLarge as soon as it is known to be longer than ``limit`` bytes, TooSlow when it pauses for ``seconds`` or
    is not whole when the request's time is over, CallerGone, and BadValue when it is compressed in another way.
    """
    coding = header(request, b"content-encoding", "identity")
    if coding != "identity" and coding.lower() not in codings:
        allowed = f"allowed are {', '.join(codings)}" if codings else "send the body as it is"
        raise BadValue(f"content-encoding is {quote_value(coding)}; {allowed}", "content-encoding")
    announced = header(request, b"content-length")
    if announced.isdigit() and int(announced) > limit:
        raise TooLarge(f"the body has {int(announced):,} bytes; allowed are {limit:,}")
    length, pieces, loop = 0, [], asyncio.get_running_loop()
    until = request.scope.get(DEADLINE, math.inf)
    try:
        async with asyncio.timeout_at(min(loop.time() + seconds, until)) as pause:
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise CallerGone("the caller hung up before the body was whole")
                pieces.append(message.get("body", b""))
                length += len(pieces[-1])
                if length > limit:
                    raise TooLarge(f"the body has more than {limit:,} bytes, which are allowed")
                if not message.get("more_body", False):
                    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
                pause.reschedule(min(loop.time() + seconds, until))
    except TimeoutError as error:
        if pause.when() == until:
            raise TooSlow("the request's time was over before its body was whole") from error
        raise TooSlow(f"no byte of the body came for {seconds:g} seconds") from error


def read_query(request: Request, model: type[Query]) -> Query:
    """The query parameters as a model. Raises BadValue."""
    if not request.scope["query_string"]:
        return model()
    found = request.query_params.multi_items()
    for i, (name, _) in enumerate(found):
        if name not in model.model_fields:
            raise unknown_field(name, model.model_fields)
        if any(name == other for other, _ in found[:i]):
            raise BadValue(f"{name} came more than once", name)
    try:
        return model.model_validate(dict(found))
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False)) from None


@dataclass(frozen=True)
class BodyReader:
    """How bodies are read: ``limit`` bytes and ``fields`` at most, with pauses of so many ``seconds``; large ones are
    parsed in a lane.
    """

    limit: int
    seconds: float
    executor: Executor
    fields: int = MAX_FIELDS


async def read_json(
    request: Request, model: type[Model], reading: BodyReader, most: int, queries: Collection[str] = ()
) -> Model:
    """The body as a model, whatever its Content-Type says; ``queries`` are the query parameters that may stand beside.

    ``most``: how many commas it may have, which bounds what its parsing costs. Raises as ``read`` does, and BadValue.
    """
    for name in request.query_params:
        if name not in queries:
            raise BadValue(f"there is no query parameter {quote_value(name)} here; it belongs into the body", name)
    content = await read_body(request, reading.limit, reading.seconds)
    return await run_before_deadline(
        request, reading.executor, len(content) // BYTES_PER_VALUE, _parsed, content, most, model, reading.fields
    )


async def read_object(request: Request, reading: BodyReader, most: int) -> dict[str, Any]:
    """The body as it is, an object. Raises as ``read_json`` does."""
    content = await read_body(request, reading.limit, reading.seconds)
    return await run_before_deadline(
        request, reading.executor, len(content) // BYTES_PER_VALUE, parse_object, content, most, reading.fields
    )


def _parsed(content: bytes, most: int, model: type[Model], fields: int = MAX_FIELDS) -> Model:
    return validate(parse_object(content, most, fields), model)


def parse_object(content: bytes, most: int, fields: int = MAX_FIELDS) -> dict[str, Any]:
    """A body with at most so many commas and fields as an object; an empty one has nothing in it. Raises BadValue."""
    if (commas := content.count(b",")) > most:
        raise BadValue(f"the body has about {commas + 1:,} values and names; allowed are {most:,}")
    try:
        found = from_json(content or b"{}")
    except ValueError as error:
        raise BadValue(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadValue(f"the body is {quote_value(found)}; it should be an object")
    if (colons := _colons(content)) > fields:  # each of them may be wrong, and would be told of
        raise BadValue(f"the body has {colons:,} fields; allowed are {fields:,}")
    if colons > _fields(found):  # a field that another of its name has replaced has left its colon
        _reject_duplicates(content)
    return found


def _colons(content: bytes) -> int:
    """How many colons JSON has outside of its texts."""
    if b"\\" in content:  # of what is escaped only quotes matter
        content = content.replace(rb"\\", b"").replace(rb"\"", b"")
    return sum(part.count(b":") for part in content.split(b'"')[::2])


def _fields(found: Any) -> int:
    """How many fields the objects in it have. A list that begins with none is not looked through."""
    if isinstance(found, dict):
        return len(found) + sum(map(_fields, found.values()))
    return sum(map(_fields, found)) if isinstance(found, list) and found and isinstance(found[0], dict) else 0


def validate(found: dict[str, Any], model: type[Model]) -> Model:
    """Named values as a model. Raises BadValue."""
    for name in found:  # before pydantic, which would note every one of a million
        if name not in model.model_fields:
            raise unknown_field(name, model.model_fields)
    try:
        return model.model_validate(found)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False)) from None


def _reject_duplicates(content: bytes) -> None:
    """Raises BadValue for JSON in which a field of an object comes more than once."""
    try:
        json.loads(content, object_pairs_hook=_unique_fields, parse_int=str, parse_float=str)
    except ValueError as error:  # such as what only the faster parser takes
        raise BadValue(f"the body is not JSON: {error}") from None


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object, each of which may come once: of two values, nobody could say which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise BadValue(f"{quote_value(name)} came more than once", name)
    return found


async def read_form(request: Request, reading: BodyReader, files: int) -> FormData:
    """A multipart body with at most ``files`` files, in memory. Raises as ``read`` does, BadValue and TimedOut."""
    kind = header(request, b"content-type")
    charset = parse_options_header(kind)[1].get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in CHARSETS:
        raise BadValue(
            f"content-type has the charset {quote_value(charset)}; names in a form are in utf-8", "content-type"
        )
    content = await read_body(request, reading.limit, reading.seconds)

    async def whole() -> AsyncGenerator[bytes, None]:
        yield content

    parser = MultiPartParser(Headers({"content-type": kind}), whole(), max_files=files, max_fields=files)
    parser.spool_max_size = reading.limit  # bounded already: no disk is needed
    form, over = None, threading.Event()

    def parse() -> FormData:
        found = asyncio.run(parser.parse())
        if over.is_set():  # nobody waits any more
            _close_rest(parser, None)
        return found

    try:
        if len(content) // BYTES_PER_VALUE <= INLINE_SIZE:
            form = await parser.parse()
        else:
            async with asyncio.timeout_at(request.scope.get(DEADLINE)):
                form = await reading.executor.run(parse)
        return form
    except TimeoutError as error:
        raise TimedOut("the deadline passed before the form was read; x-request-timeout is in seconds") from error
    except (MultiPartException, KeyError, ValueError) as error:
        told = str(getattr(error, "message", error))
        if told.startswith("Too many files"):
            raise BadValue(f"more than {files} files came; allowed are {files}", "file") from error
        raise BadValue(f"the multipart body cannot be read: {told}") from error
    finally:
        over.set()
        _close_rest(parser, form)


def _close_rest(parser: MultiPartParser, form: FormData | None) -> None:
    """Close the files that were begun and are in no form, because it is broken or cut off."""
    kept = {id(value.file) for _, value in form.multi_items() if isinstance(value, UploadFile)} if form else set()
    for file in parser._files_to_close_on_error:
        if id(file) not in kept:
            file.close()


def preferred_media_type(accept: str, offered: Sequence[str]) -> str:
    """Which of the media types an Accept header (RFC 9110, 12.5.1) prefers; the first of those that it likes as much,
    and of all where it likes none.
    """
    ranges = [part.strip().lower().split(";") for part in accept.split(",")]
    weights = []
    for kind in offered:
        fitting = ("*/*", kind.split("/")[0] + "/*", kind)
        found = {name.strip(): parameters for name, *parameters in ranges if name.strip() in fitting}
        weight = 0.0
        for name in fitting:  # the most specific one counts
            if name in found:
                quality = [value[2:] for value in map(str.strip, found[name]) if value.startswith("q=")]
                weight = float(quality[0]) if quality and re.fullmatch(r"[01](\.\d{0,3})?", quality[0]) else 1.0
        weights.append(weight)
    return offered[weights.index(max(weights))]


def json_response(content: Any) -> Response:
    """The answer, numpy arrays included."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
