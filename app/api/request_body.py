"""Read request bodies: JSON, forms and raw bytes. The sizes of all bodies are limited."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from typing import IO, Annotated, Any, NamedTuple, TypeVar

import fastapi
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from app.api.connection import connection
from app.api.deadline import DEADLINE, run_before_deadline
from app.api.errors import MANY, ONE, unknown_field, validation_error
from app.api.middleware.body_memory import hold_memory
from app.api.openapi import DESCRIBED
from app.api.operation import Request
from app.errors import BadValue, CallerGone, TimedOut, TooLarge, TooSlow, quote_value
from app.tasks.text_generation import MAX_SEED

BYTES_PER_VALUE = 5  # processing this many bytes or pixels takes as long as processing one value
JSON_BYTES = 64 * 1024  # largest size of a JSON body, not counting its prompt or values
JSON_COMMAS = 4096  # largest number of commas in a JSON body, not counting those in its prompt or between its values
CHARACTER_BYTES = 12  # largest size of a character in JSON
VALUE_BYTES = 26  # largest size of a value in JSON
MAX_FIELDS = 2000  # largest number of fields in all objects of a JSON body together
CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")  # allowed charsets of forms; some other codecs take minutes
SPOOL_PART_BYTES = 2**20  # bytes that are written at a time, because each write costs a switch to another thread

Seed = Annotated[int, Field(ge=0, lt=MAX_SEED)]
ModelName = Annotated[
    str | None, Field(description="`name` or `name@version`; by default the default model of the task", max_length=200)
]

Model = TypeVar("Model", bound=BaseModel)


class Described(BaseModel):
    """A class whose fields are described by the strings below them."""

    model_config = DESCRIBED


class RequestBody(Described):
    """A JSON body. Unknown fields are rejected. Values are not converted, for example from text to number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def text_or_list(value: Any) -> str:
    """Return the union tag for ``value``, for a field that is a text or a list of texts."""
    return MANY if isinstance(value, list) else ONE


def limited(limit: str, size: str = "maximum") -> dict[str, Any]:
    """Return ``json_schema_extra`` for a field whose largest value, or ``maxLength``, is a field of ``Limits``.

    The OpenAPI document states the value of the limit. The job of the request checks it.
    """
    return {"x-limit": [size, limit]}


def max_bytes(request: Request, content_bytes: int) -> int:
    """Return the largest allowed size of a body, of which ``content_bytes`` are for its prompt or values."""
    return min(request.settings.max_body_bytes, JSON_BYTES + content_bytes)


def max_commas(request: Request) -> int:
    """Return the largest allowed number of commas in JSON, with those of the largest prompt or series."""
    limits = request.limits
    return JSON_COMMAS + max(limits.max_prompt_characters, limits.max_series_values)


async def read_body(request: Request, limit: int, codings: Collection[str] = ()) -> bytes:
    """Return the body. The body is still compressed if the client sent it in one of the content codings ``codings``.

    Raises:
        BadValue: the body has another content coding.
        MemoryFull: all requests together would hold too much memory.
        TooLarge, TooSlow, TimedOut, CallerGone: as in ``body_chunks``.
    """
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() not in ("identity", *codings):
        allowed = f"allowed values: {', '.join(codings)}" if codings else "send the body as it is"
        raise BadValue(f"content-encoding is {quote_value(coding)}; {allowed}", "content-encoding")
    server = connection(request)
    if server and (body := server.take_body()) is not None:
        _check_length(len(body), limit)
        hold_memory(request, len(body))
        return body
    return b"".join([chunk async for chunk in body_chunks(request, limit, request.limits.body_seconds)])


async def body_chunks(request: fastapi.Request, limit: int, pause_seconds: float) -> AsyncIterator[bytes]:
    """Yield the chunks of the body as they arrive.

    Raises:
        TooLarge: the body is longer than ``limit`` bytes. Raised as soon as this is known.
        TooSlow: no byte arrived for ``pause_seconds``.
        TimedOut: the deadline passed.
        CallerGone: the client disconnected.
    """
    content_length = request.headers.get("content-length", "")
    if content_length.isdigit():
        _check_length(int(content_length), limit)
    length, more_body, loop = 0, True, asyncio.get_running_loop()
    deadline = request.scope.get(DEADLINE, math.inf)
    while more_body:
        end = min(loop.time() + pause_seconds, deadline)
        try:
            async with asyncio.timeout_at(end):
                message = await request.receive()
        except TimeoutError:
            if end == deadline:
                raise TimedOut("the deadline passed before the body was complete") from None
            raise TooSlow(f"no byte of the body arrived for {pause_seconds:g} seconds") from None
        if message["type"] == "http.disconnect":
            raise CallerGone("the client disconnected before the body was complete")
        chunk, more_body = message.get("body", b""), message.get("more_body", False)
        length += len(chunk)
        if length > limit:
            raise TooLarge(f"the body has more than {limit:,} bytes, the allowed maximum")
        yield chunk


async def spool_body(request: Request, file: IO[bytes]) -> None:
    """Write the body to ``file`` as it arrives. Use this for archives, which are too large for memory.

    Raises:
        TooLarge, TooSlow, TimedOut, CallerGone: as in ``body_chunks``.
        OSError: the file cannot be written, for example because the disk is full.
    """
    part, disk = bytearray(), request.models.disk
    async for chunk in body_chunks(request, request.limits.max_import_bytes, request.limits.body_seconds):
        part += chunk
        if len(part) >= SPOOL_PART_BYTES:
            await disk.run(file.write, bytes(part))
            part.clear()
    await disk.run(file.write, part)


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise TooLarge(f"the body has {length:,} bytes; the maximum is {limit:,}")


async def read_json(request: Request, model: type[Model]) -> Model:
    """Return a JSON body as an instance of the Pydantic class ``model``. The Content-Type header is ignored.

    Raises:
        BadValue: the body does not fit ``model``.
        TooLarge, TooSlow, CallerGone, Overloaded, MemoryFull, TimedOut: as in ``read_body`` or ``run_before_deadline``.
    """
    limits = request.limits
    size = max(CHARACTER_BYTES * limits.max_prompt_characters, VALUE_BYTES * limits.max_series_values)
    return await parse_json(request, await read_body(request, max_bytes(request, size)), model)


async def parse_json(request: Request, content: bytes, model: type[Model]) -> Model:
    """Return the JSON body ``content`` as ``read_json`` does. A large body is parsed on a thread."""

    def parse() -> Model:
        return validate(parse_object(content, max_commas(request)), model)

    return await run_before_deadline(request, request.models.parse_executor, len(content) // BYTES_PER_VALUE, parse)


def parse_object(content: bytes, max_commas: int) -> dict[str, Any]:
    """Return the fields of a JSON object. An empty body counts as an empty object.

    ``max_commas`` limits the cost of parsing.

    Raises:
        BadValue: the body is not a JSON object, has too many commas or fields, or has a field more than once.
    """
    if (commas := content.count(b",")) > max_commas:
        raise BadValue(
            f"the body has {commas:,} commas, which separate values and names; the maximum is {max_commas:,}"
        )
    try:
        body = from_json(content or b"{}")
    except ValueError as error:
        raise BadValue(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadValue(f"the body is {quote_value(body)}; it should be an object")
    if (colons := _count_colons(content)) > MAX_FIELDS:  # limited, because validation reports each wrong field
        raise BadValue(f"the body has {colons:,} fields; the maximum is {MAX_FIELDS:,}")
    if colons > _count_fields(body):  # the parser keeps the last of several fields with the same name
        _reject_duplicates(content)
    return body


def _count_colons(content: bytes) -> int:
    """Count the colons in JSON, except those inside strings."""
    if b"\\" in content:  # remove escaped backslashes, then escaped quotes
        content = content.replace(rb"\\", b"").replace(rb"\"", b"")
    return sum(part.count(b":") for part in content.split(b'"')[::2])


def _count_fields(value: Any) -> int:
    """Count the fields of all objects in ``value``. Lists that do not begin with an object are skipped."""
    if isinstance(value, dict):
        return len(value) + sum(map(_count_fields, value.values()))
    return sum(map(_count_fields, value)) if isinstance(value, list) and value and isinstance(value[0], dict) else 0


def validate(fields: dict[str, Any], model: type[Model]) -> Model:
    """Return ``fields`` as an instance of the Pydantic class ``model``. Raises BadValue."""
    if model.model_config.get("extra") == "forbid":
        for name in fields:  # checked before pydantic, which would report each of a million unknown fields
            if name not in model.model_fields:
                raise unknown_field(name, model.model_fields)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error.errors()) from None


def _reject_duplicates(content: bytes) -> None:
    """Raise BadValue for JSON with two fields of the same name in one object."""
    try:
        json.loads(content, object_pairs_hook=_unique_fields, parse_int=str, parse_float=str)
    except ValueError as error:  # pydantic's parser accepts some JSON that this one does not
        raise BadValue(f"the body is not JSON: {error}") from None


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names: set[str] = set()
        name = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise BadValue(f"{quote_value(name)} was sent more than once", name)
    return fields


class FormField(NamedTuple):
    """A field of a form. ``content`` is the bytes of a file or, for a text field, a string."""

    name: str
    filename: str | None
    content: bytes | str


async def read_form(request: Request, limit: int, max_files: int) -> list[FormField]:
    """Return the fields of a multipart body: at most ``max_files`` files, and as many texts. Files stay in memory.

    Raises:
        BadValue: the body is no complete form, its charset is not UTF-8 or ASCII, or it has too many files or texts.
        TooLarge, TooSlow, CallerGone, Overloaded, MemoryFull, TimedOut: as in ``read_json``.
    """
    content_type = request.headers.get("content-type", "")
    if not content_type.lower().startswith("multipart/form-data"):
        raise BadValue(f"content-type is {quote_value(content_type)}; send a form, multipart/form-data", "content-type")
    boundary = PLAIN_TYPE.fullmatch(content_type)
    if not boundary:
        charset = parse_options_header(content_type)[1].get(b"charset", b"utf-8").decode("latin-1")
        if charset.lower() not in CHARSETS:
            raise BadValue(
                f"content-type has the charset {quote_value(charset)}; names in a form are in utf-8", "content-type"
            )
    content = await read_body(request, limit)

    def parse() -> list[FormField]:
        files = _plain_files(content, boundary[1], max_files) if boundary else []
        return files or _parse_form(content, content_type, max_files)

    size = len(content) // BYTES_PER_VALUE
    try:
        return await run_before_deadline(request, request.models.parse_executor, size, parse)
    except (MultiPartException, KeyError, ValueError) as error:
        reason = str(error)
        if reason.startswith("Too many files"):
            raise BadValue(f"too many files were sent; the maximum is {max_files}", "file") from error
        raise BadValue(f"the multipart body cannot be read: {reason}") from error


# A form as browsers, curl and httpx send it: without quoted or non-ASCII characters in names, and with files only
PLAIN_TYPE = re.compile(r"multipart/form-data; boundary=([\w'()+,./:=?-]{1,70})", re.ASCII)
PLAIN_PART = re.compile(
    rb"\r\nContent-Disposition: form-data; name=\"([ !#-:<-\[\]-~]{1,100})\"; "
    rb"filename=\"([ !#-:<-\[\]-~]{0,255})\"(?:\r\nContent-Type: [\w/.+-]+)?\r\n\r\n",
    re.ASCII,
)


def _plain_files(content: bytes, boundary: str, max_files: int) -> list[FormField]:
    """Return the files of a usual form. Return an empty list for all other forms, which the library reads.

    For a small form, the library takes more than ten times as long.
    """
    delimiter = b"--" + boundary.encode()
    first, *others = content.split(b"\r\n" + delimiter)
    if not others or others.pop() not in (b"--", b"--\r\n") or not first.startswith(delimiter):
        return []
    parts = [first[len(delimiter) :], *others]
    files = []
    for part in parts:
        if not (head := PLAIN_PART.match(part)):
            return []
        files.append(FormField(head[1].decode(), head[2].decode(), part[head.end() :]))
    return files if len(files) <= max_files else []


class _FormParser(MultiPartParser):
    """Records whether the body has its closing boundary. Without it, Starlette leaves out the last part silently."""

    is_complete = False

    def on_end(self) -> None:
        self.is_complete = True


def _parse_form(content: bytes, content_type: str, max_files: int) -> list[FormField]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield content

    headers = Headers({"content-type": content_type})
    parser = _FormParser(headers, stream(), max_files=max_files, max_fields=max_files)
    parser.spool_max_size = len(content)  # no file is written to disk
    try:
        parser.parse().send(None)
        raise AssertionError  # the coroutine never waits, because the whole body is there
    except StopIteration as end:
        if not parser.is_complete:
            raise MultiPartException("the closing boundary is missing") from None
        return [
            FormField(name, None, value)
            if isinstance(value, str)
            else FormField(name, value.filename, value.file.read())
            for name, value in end.value.multi_items()
        ]
    finally:
        for file in parser._files_to_close_on_error:  # files of a broken form, which are not in ``form``
            file.close()
