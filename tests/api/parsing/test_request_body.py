"""Reading request bodies: limits of size and time, JSON and forms.

The requests are stubs. The tests of the routes send real requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from support.hypothesis_profiles import FUZZ
from support.service import make_settings

from app.api.deadline import DEADLINE, INLINE_SIZE
from app.api.operation import Request, Service
from app.api.request_body import (
    BYTES_PER_VALUE,
    JSON_BYTES,
    JSON_COMMAS,
    VALUE_BYTES,
    RequestBody,
    parse_object,
    read_body,
    read_form,
    read_json,
)
from app.errors import BadValue, QuartetError, TimedOut

pytestmark = pytest.mark.anyio

PAUSE = 60.0


def request(body: bytes = b"", deadline: float | None = None, **headers: str) -> Request:
    """Return a request whose body arrives in one chunk."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": True}]
    messages.append({"type": "http.request"})  # ASGI allows a message without body and more_body

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    scope: dict[str, Any] = {
        "type": "http",
        "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    scope[DEADLINE] = asyncio.get_running_loop().time() + PAUSE if deadline is None else deadline
    result = Request(scope, receive)
    result.service = make_service()
    return result


class Threads:
    """Runs the parsing of large bodies on a thread, as the service's executor does."""

    def admit(self) -> None: ...

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.to_thread(function, *arguments)


class BusyThreads(Threads):
    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.Event().wait()


def make_service(pause: float = PAUSE, executor: Any = Threads()) -> Service:
    settings = make_settings(body_seconds=pause, max_prompt_characters=1000, max_series_values=5000)
    return Service(Mock(settings=settings, parse_executor=executor, disk=executor), Mock())


async def rejection(body: Any) -> tuple[type[Exception], str, str | None]:
    with pytest.raises(QuartetError) as raised:
        await body
    return type(raised.value), raised.value.message, raised.value.param


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


# JSON


class Body(RequestBody):
    name: str = "none"
    rows: list[int] = Field([], max_length=9)


async def test_the_deadline_applies_while_a_large_body_waits_for_parsing() -> None:
    late = request(b"{%b}" % (b" " * (INLINE_SIZE + 1) * BYTES_PER_VALUE), deadline=asyncio.get_running_loop().time())
    late.service = make_service(executor=BusyThreads())
    assert (await rejection(read_json(late, Body)))[0] is TimedOut


async def test_the_limits_of_json_depend_on_those_of_prompts_and_series() -> None:
    size, commas = JSON_BYTES + 5000 * VALUE_BYTES, JSON_COMMAS + 5000
    too_large = await rejection(read_json(request(content_length=str(size + 1)), Body))
    assert too_large[1] == f"the body has {size + 1:,} bytes; the maximum is {size:,}"
    message = f"the body has {commas + 1:,} commas, which separate values and names; the maximum is {commas:,}"
    assert (await rejection(read_json(request(b"," * (commas + 1)), Body)))[1] == message
    assert "commas" not in (await rejection(read_json(request(b"," * commas), Body)))[1]


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
