"""Reading request bodies: limits of size and time, JSON and forms.

The requests are stubs. The tests of the routes send real requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from support.engine import start_tasks
from support.hypothesis_profiles import FUZZ
from support.service import make_settings

from app.api.connection import CONNECTION
from app.api.deadline import DEADLINE, INLINE_SIZE, Deadline
from app.api.middleware.body_memory import HOLD
from app.api.operation import Request, Service
from app.api.request_body import (
    BYTES_PER_VALUE,
    CHARACTER_BYTES,
    JSON_BYTES,
    JSON_COMMAS,
    VALUE_BYTES,
    FormField,
    RequestBody,
    parse_object,
    read_form,
    read_json,
    spool_body,
    validate,
)
from app.errors import BadValue, CallerGone, QuartetError, TimedOut, TooLarge, TooSlow

pytestmark = pytest.mark.anyio

PAUSE = 60.0


def request(
    *chunks: bytes,
    gone: bool = False,
    hang: bool = False,
    query: str = "",
    deadline: float | None = None,
    service: Service | None = None,
    **headers: str,
) -> Request:
    """Return a request whose body arrives in chunks. After them, the client is ``gone`` or sends nothing (``hang``)."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    if gone:
        messages.append({"type": "http.disconnect"})
    elif not hang:
        messages.append({"type": "http.request"})  # ASGI allows a message without body and more_body

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else await asyncio.Event().wait() or {}

    scope: dict[str, Any] = {
        "type": "http",
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    scope[DEADLINE] = asyncio.get_running_loop().time() + PAUSE if deadline is None else deadline
    result = Request(scope, receive)
    result.service = service or make_service()
    return result


class Threads:
    """Runs the parsing of large bodies on a thread, as the service's executor does."""

    def admit(self) -> None: ...

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(function, *arguments)


class BusyThreads(Threads):
    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.Event().wait()


def make_service(pause: float = PAUSE, executor: Any = Threads(), **settings: int) -> Service:
    settings = {"max_body_bytes": 2**22, "max_prompt_characters": 1000, "max_series_values": 1000, **settings}
    models: Any = SimpleNamespace(settings=make_settings(body_seconds=pause, **settings))
    models.parse_executor = models.disk = executor
    return Service(models, Mock())


async def rejection(body: Any) -> tuple[type[Exception], str, str | None]:
    with pytest.raises(QuartetError) as raised:
        await body
    return type(raised.value), raised.value.message, raised.value.param


# Raw bodies


async def test_a_body_is_the_sum_of_its_chunks() -> None:
    assert await read_body(request(b"ab", b"", b"cd"), 4) == b"abcd"
    assert await read_body(request(), 0) == b""
    assert await read_body(request(b"abcd", content_length="4"), 4) == b"abcd"


async def test_a_body_over_the_limit_is_rejected_as_soon_as_this_is_known() -> None:
    more = "the body has more than 3,000 bytes, the allowed maximum"
    assert await rejection(read_body(request(b"x" * 1500, b"x" * 1501, hang=True), 3000)) == (
        TooLarge,
        more,
        None,
    )
    stated = request(hang=True, content_length="3001")
    assert await rejection(read_body(stated, 3000)) == (
        TooLarge,
        "the body has 3,001 bytes; the maximum is 3,000",
        None,
    )
    assert await read_body(request(b"x", content_length="nonsense"), 3000) == b"x"


class StubConnection:
    """A connection that may already have received the body."""

    def __init__(self, body: bytes | None) -> None:
        self.body = body

    def take_body(self) -> bytes | None:
        return self.body

    def watch_disconnect(self, on_disconnect: Callable[[], None] | None) -> None:
        raise AssertionError("a request without a deadline watches no disconnect")


async def test_a_body_that_the_server_has_received_is_taken_from_the_connection() -> None:
    held: list[int] = []

    def on_connection(body: bytes | None, *chunks: bytes) -> Request:
        sent = request(*chunks)
        sent.scope.update({CONNECTION: StubConnection(body), HOLD: held.append})
        return sent

    assert await read_body(on_connection(b"abcd", b"of the next request"), 4) == b"abcd"
    assert held == [4]
    assert await rejection(read_body(on_connection(b"abcd"), 3)) == (
        TooLarge,
        "the body has 4 bytes; the maximum is 3",
        None,
    )
    assert held == [4]
    assert await read_body(on_connection(None, b"ab", b"c"), 4) == b"abc"


async def test_a_body_that_stops_arriving_is_rejected() -> None:
    assert await rejection(read_body(request(b"ab", hang=True, service=make_service(SHORT_PAUSE)), 9)) == (
        TooSlow,
        "no byte of the body arrived for 0.01 seconds",
        None,
    )
    assert await rejection(read_body(request(b"ab", gone=True), 9)) == (
        CallerGone,
        "the client disconnected before the body was complete",
        None,
    )


async def test_the_deadline_also_bounds_the_reading_of_a_body() -> None:
    late = request(b"ab", hang=True, deadline=asyncio.get_running_loop().time() + 0.01)
    assert await rejection(read_body(late, 9)) == (
        TimedOut,
        "the deadline passed before the body was complete",
        None,
    )


async def test_a_shutdown_at_the_same_time_as_a_disconnect_is_not_lost() -> None:
    """Both cancel the task of the request. The deadline handles only its own cancellation."""
    callbacks = list[Any]()
    sent = request(hang=True, deadline=asyncio.get_running_loop().time() + PAUSE)
    sent.scope[CONNECTION] = SimpleNamespace(watch_disconnect=callbacks.append)

    async def wait() -> None:
        async with Deadline(sent):
            await asyncio.Event().wait()

    (task,) = await start_tasks(wait())
    callbacks[0]()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_each_chunk_restarts_the_allowed_pause() -> None:
    loop, now = asyncio.get_running_loop(), [0.0]
    chunks = 6
    clock, loop.time = loop.time, lambda: now[0]  # type: ignore[method-assign]

    async def receive() -> dict[str, Any]:
        nonlocal chunks
        now[0] += 0.6  # 0.6 s of the allowed pause of 1 s
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        chunks -= 1
        return {"type": "http.request", "body": b"x", "more_body": chunks > 0}

    try:
        sent = Request({"type": "http", "headers": []}, receive)
        sent.service = make_service(1.0)
        assert await read_body(sent, 9) == b"x" * 6
    finally:
        loop.time = clock  # type: ignore[method-assign]


async def test_only_named_content_codings_are_accepted() -> None:
    assert await read_body(request(b"x", content_encoding="identity"), 9) == b"x"
    assert await read_body(request(b"x", content_encoding="GZip"), 9, ("gzip",)) == b"x"
    assert await rejection(read_body(request(b"x", content_encoding="br"), 9, ("gzip", "deflate"))) == (
        BadValue,
        "content-encoding is 'br'; allowed values: gzip, deflate",
        "content-encoding",
    )
    assert await rejection(read_body(request(b"x", content_encoding="gzip"), 9)) == (
        BadValue,
        "content-encoding is 'gzip'; send the body as it is",
        "content-encoding",
    )
    assert (await rejection(read_body(request(b"1234567890"), 9)))[0] is TooLarge


# Bodies in a file


async def test_a_large_body_is_written_to_a_file_in_large_parts() -> None:
    parts: list[int] = []

    class File(io.BytesIO):
        def write(self, part: Any) -> int:
            parts.append(len(part))
            return super().write(part)

    file, chunk = File(), bytes(range(256)) * 2048  # 512 KiB
    await spool_body(request(chunk, b"x", chunk, b"y", b"z"), file)
    assert file.getvalue() == chunk + b"x" + chunk + b"yz"
    assert parts == [2**20 + 1, 2]


async def test_a_body_for_a_file_has_the_same_limits() -> None:
    async def rejected(body: Request, pause: float = PAUSE) -> tuple[type[Exception], str, str | None]:
        body.service = make_service(pause, max_import_bytes=3)
        return await rejection(spool_body(body, io.BytesIO()))

    more = TooLarge, "the body has more than 3 bytes, the allowed maximum", None
    paused = TooSlow, "no byte of the body arrived for 0.01 seconds", None
    gone = CallerGone, "the client disconnected before the body was complete", None
    assert await rejected(request(b"ab", b"cd")) == more
    assert await rejected(request(bytes(2**21), hang=True)) == more
    assert await rejected(request(content_length="4")) == (TooLarge, "the body has 4 bytes; the maximum is 3", None)
    assert await rejected(request(b"a", hang=True), SHORT_PAUSE) == paused
    assert await rejected(request(b"a", gone=True)) == gone


# JSON


class Body(RequestBody):
    name: str = "none"
    rows: list[int] = Field([], max_length=9)


async def test_a_json_body_is_read_as_a_model() -> None:
    assert await read_json(request(b'{"name":', b'"a"}'), Body) == Body(name="a")
    assert await read_json(request(), Body) == Body()
    assert (await rejection(read_json(request(b'{"a": 1}', service=make_service(max_body_bytes=3)), Body)))[
        0
    ] is TooLarge
    assert (await rejection(read_json(request(hang=True, service=make_service(SHORT_PAUSE)), Body)))[0] is TooSlow


@pytest.mark.parametrize(
    ("limit", "value_bytes"), [("max_prompt_characters", CHARACTER_BYTES), ("max_series_values", VALUE_BYTES)]
)
async def test_the_limits_of_json_depend_on_those_of_prompts_and_series(limit: str, value_bytes: int) -> None:
    larger = make_service(**{limit: 5000})
    size, commas = JSON_BYTES + 5000 * value_bytes, JSON_COMMAS + 5000
    assert await rejection(read_json(request(content_length=str(size + 1), service=larger), Body)) == (
        TooLarge,
        f"the body has {size + 1:,} bytes; the maximum is {size:,}",
        None,
    )
    message = f"the body has {commas + 1:,} commas, which separate values and names; the maximum is {commas:,}"
    assert await rejection(read_json(request(b"," * (commas + 1), service=larger), Body)) == (BadValue, message, None)
    assert "commas" not in (await rejection(read_json(request(b"," * commas, service=larger), Body)))[1]


async def test_the_deadline_applies_while_a_large_body_waits_for_parsing() -> None:
    late = request(b"{%b}" % (b" " * (INLINE_SIZE + 1) * BYTES_PER_VALUE), deadline=asyncio.get_running_loop().time())
    late.service = make_service(executor=BusyThreads())
    assert (await rejection(read_json(late, Body)))[0] is TimedOut


OBJECTS: list[tuple[bytes, Any]] = [
    (b"", {}),
    (b'{"a": {"b": [1, 2]}}', {"a": {"b": [1, 2]}}),
    (b'{"a": ":,:"}', {"a": ":,:"}),
    (rb'{"a\":\\": "\\", "b": 1}', {'a":\\': "\\", "b": 1}),
    (b'{"a": [{"b": 1}, {"b": 2}]}', {"a": [{"b": 1}, {"b": 2}]}),
    (b'{"a": [1, {"b": 1}]}', {"a": [1, {"b": 1}]}),
    (b'{"a": [[{"b": 1}]]}', {"a": [[{"b": 1}]]}),
    (b'{"a": ":::::"}', {"a": ":::::"}),  # colons in texts do not count as fields
    (rb'{"a": "\":::::\""}', {"a": '":::::"'}),
    (b'{"a": "::::", "b": [{"c": 1, "d": 2}]}', {"a": "::::", "b": [{"c": 1, "d": 2}]}),
    (b'{"a": [1, 2, 3, 4]}', {"a": [1, 2, 3, 4]}),  # three commas
]


@pytest.mark.parametrize(("content", "expected"), OBJECTS, ids=range(len(OBJECTS)))
def test_a_json_object_is_parsed(content: bytes, expected: Any) -> None:
    assert parse_object(content, 3) == expected


WRONG_OBJECTS: list[tuple[bytes, str, str | None]] = [
    (b"[1]", "the body is [1]; it should be an object", None),
    (b"{", "the body is not JSON: EOF while parsing an object at line 1 column 1", None),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' was sent more than once", "c"),
    (b'{"b": 1, "a": 1, "a": 2, "b": 2}', "'a' was sent more than once", "a"),
    (b'{"a": [{"b": 1}, {"b": 2, "b": 3}]}', "'b' was sent more than once", "b"),
    (rb'{"a": 1, "\u0061": 2}', "'a' was sent more than once", "a"),
    (rb'{"a": "\\", "a": 1}', "'a' was sent more than once", "a"),
    (b'{"a": [1, 2, 3, 4, 5]}', "the body has 4 commas, which separate values and names; the maximum is 3", None),
]


@pytest.mark.parametrize(("content", "sentence", "param"), WRONG_OBJECTS, ids=range(len(WRONG_OBJECTS)))
def test_other_json_is_rejected(content: bytes, sentence: str, param: str | None) -> None:
    with pytest.raises(BadValue) as raised:
        parse_object(content, 3)
    assert (raised.value.message, raised.value.param) == (sentence, param)


def test_json_of_several_megabytes_is_counted_as_a_whole() -> None:
    spaces = b" " * (2**20 - 10)
    content = b'{"a": [1,' + spaces + b"2," + spaces + b'3], "b": 4}'
    assert parse_object(content, 3) == {"a": [1, 2, 3], "b": 4}
    with pytest.raises(BadValue, match=r"^the body has 3 commas, which separate values and names; the maximum is 2$"):
        parse_object(content, 2)
    with pytest.raises(BadValue, match=r"^'a' was sent more than once$"):
        parse_object(b'{"a": 1,' + spaces * 2 + b'"a": 2}', 9)


# Forms


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    """Return a multipart body. Each part is (name, file name, content)."""
    content = b""
    for name, filename, data in parts:
        file = f'; filename="{filename}"' if filename is not None else ""
        content += f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"
    return content + b"--b--\r\n"


TYPE = "multipart/form-data; boundary=b"
UNUSUAL_TYPE = "multipart/form-data;boundary=b"  # without a space, so that python-multipart reads the form


@pytest.mark.parametrize("size", [3, (INLINE_SIZE + 1) * BYTES_PER_VALUE, 2**21])  # also forms that a thread reads
async def test_a_form_has_texts_and_files(size: int) -> None:
    files = ("file", "a.png", b"x" * size), ("file", "", b"")
    for parts in (files, (("text", None, b"\xc3\xa9"), *files)):
        for kind in (TYPE, UNUSUAL_TYPE):
            fields = await read_form(request(form(*parts), content_type=kind), 2**22, 2)
            assert fields == [FormField(name, file, data if file is not None else "é") for name, file, data in parts]


NAME = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\;'), min_size=1, max_size=8)
FILENAME = st.sampled_from(["a.png", "b c.jpg", "", "é", "a;b", None]) | NAME
CONTENT = st.lists(st.sampled_from([b"\r\n", b"--b", b"--b--", b"-", b"\n", b"x", b"\0\xff"]), max_size=5).map(b"".join)


@FUZZ
@given(
    parts=st.lists(st.tuples(NAME, FILENAME, CONTENT), min_size=1, max_size=3),
    position=st.floats(0, 1),
    cut=st.sampled_from([0, 0, 0, 0, 1]),
    inserted=st.sampled_from([b"", b"", b"", b"\r\n", b"-"]),
)
def test_every_form_is_read_as_python_multipart_reads_it(
    parts: list[tuple[str, str | None, bytes]], position: float, cut: int, inserted: bytes
) -> None:
    """The usual form of browsers and curl has a faster reader. Most of these forms are usual ones."""
    content = form(*parts)
    start = int(position * len(content))
    content = content[:start] + inserted + content[start + cut :]

    async def outcome(kind: str) -> Any:
        try:
            return await read_form(request(content, content_type=kind), 10**6, 2)
        except BadValue as error:
            return error.message, error.param

    assert asyncio.run(outcome(TYPE)) == asyncio.run(outcome(UNUSUAL_TYPE))


async def test_a_wrong_form_is_rejected() -> None:
    async def rejected(content: bytes, content_type: str = TYPE) -> tuple[type[Exception], str, str | None]:
        return await rejection(read_form(request(content, content_type=content_type), 10**6, 1))

    file = "file", "a", b"x"
    assert await rejected(form(file, file)) == (BadValue, "too many files were sent; the maximum is 1", "file")
    kind, message, param = await rejected(form(("a", None, b"x"), ("b", None, b"x")))
    assert (kind, param) == (BadValue, None)
    assert message.startswith("the multipart body cannot be read: Too many fields")
    text = ("text", None, b"x")
    for incomplete in (b"", form(file)[:-7], form(file)[:-3], form(text, file)[:-9]):
        assert await rejected(incomplete) == (
            BadValue,
            "the multipart body cannot be read: the closing boundary is missing",
            None,
        )
    assert await read_form(request(b"--b--", content_type=TYPE), 10**6, 1) == []
    assert (await rejected(b"", "text/plain"))[1] == "the multipart body cannot be read: Missing boundary in multipart."
    assert await rejected(form(file), f"{TYPE}; charset=utf-16") == (
        BadValue,
        "content-type has the charset 'utf-16'; names in a form are in utf-8",
        "content-type",
    )
    assert len(await read_form(request(form(file), content_type=f"{TYPE}; charset=UTF-8"), 10**6, 1)) == 1
    assert (await rejection(read_form(request(b"x" * 99, content_type=TYPE), 9, 1)))[0] is TooLarge
