"""What stands before a body: bounded, and when it is no HTTP refused in the shape of all other errors."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.failures import response
from app.errors import BadValue, QuartetError

HEAD_BYTES = 64 * 1024  # of the request line and the headers, as h11 has it; the faster parser has no limit of its own


class HeadTooLarge(QuartetError):
    status = 431
    type = "invalid_request_error"
    code = "head_too_large"


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's faster HTTP protocol, for heads of a size that is sane."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.head_bytes = 0
        self.in_head = True
        self.last = False  # whether the connection is to end with its next answer
        self.left: Callable[[], None] = lambda: None  # called when it has ended

    def data_received(self, data: bytes) -> None:
        self.head_bytes += len(data)
        super().data_received(data)
        if self.in_head and self.head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self._refuse(HeadTooLarge(f"the request's head has more than {HEAD_BYTES:,} bytes, which are allowed"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.left()

    def on_message_begin(self) -> None:
        self.in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.in_head = False
        super().on_headers_complete()
        if self.last and self.cycle:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self.head_bytes, self.in_head = 0, True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the request is not HTTP."""
        self._refuse(BadValue(f"the request is not HTTP as it should be: {msg.strip()}"))

    def _refuse(self, error: QuartetError) -> None:
        answer = response(error)
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "connection: close"]
        lines += [f"{name.decode()}: {value.decode()}" for name, value in answer.raw_headers]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + bytes(answer.body))
        self.transport.close()
