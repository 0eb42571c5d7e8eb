"""The HTTP/1.1 protocol: limits on request heads, time limits, and errors in the service's format."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.errors import ErrorResponse
from app.errors import BadValue, QuartetError
from app.observability.middleware import SECURITY_HEADERS

HEAD_SECONDS = 30.0  # for a request head to arrive completely, and for the first one to begin
STALLED_WRITE_SECONDS = 60.0  # for a client to read at least a part of the unsent bytes
HEAD_BYTES = 64 * 1024  # of request line and headers: the limit of h11; httptools has none


class HeadTooLarge(QuartetError):
    """The request line and the headers exceed 64 KiB."""

    status = 431
    type = "invalid_request_error"
    code = "head_too_large"


class CoalescingTransport:
    """The transport of one response. Sends the head and the first part of the body in one system call.

    Two calls take twice as long and wake the client twice. Only heads with a content-length are delayed.
    """

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.head = b""
        self.started = False

    def write(self, data: bytes) -> None:
        if self.head:
            head, self.head = self.head, b""
            self.transport.writelines((head, data) if data else (head,))
        elif self.started or data.startswith(b"HTTP/1.1 100 "):
            self.transport.write(data)
        else:
            self.started = True
            if b"\r\ncontent-length: " in data:
                self.head = data
            else:
                self.transport.write(data)

    def close(self) -> None:
        if self.head:
            self.write(b"")
        self.transport.close()

    def is_closing(self) -> bool:
        return bool(self.transport.is_closing())


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's httptools protocol with limits on heads, idle connections and unread responses."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.head_bytes = 0  # of the head that is arriving, and of trailers after a chunked body
        self.in_head = True
        self.head_timer: asyncio.TimerHandle | None = None  # closes the connection if a head does not end
        self.write_timer: asyncio.TimerHandle | None = None  # closes the connection if the client reads nothing
        self.running: Any = None  # the request being answered; ``cycle`` may already be the next one
        self.close_after_response = False
        self.on_connection_lost: Callable[[], None] = lambda: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn narrows the type
        self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        if self.in_head:
            self.head_bytes += len(data)
        super().data_received(data)
        if self.in_head and self.head_bytes > HEAD_BYTES:
            self._reject_head()
        elif self.head_timer is None and ((self.in_head and self.head_bytes) or self._answered()):
            self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        if self.running and not self.running.response_complete:  # uvicorn notifies the last pipelined request only
            self.running.disconnected = True
            self.running.message_event.set()
        super().connection_lost(exc)
        self.on_connection_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_timer(self._unsent_bytes())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _start_write_timer(self, unsent: int) -> None:
        """Close the connection unless the client reads some of the bytes: they occupy memory and delay a stop."""

        def check() -> None:
            if (remaining := self._unsent_bytes()) < unsent:
                self._start_write_timer(remaining)
            else:
                self.transport.abort()

        self.write_timer = self.loop.call_later(STALLED_WRITE_SECONDS, check)

    def _unsent_bytes(self) -> int:
        """Bytes in the transport's buffer and in the socket's send queue."""
        unsent = self.transport.get_write_buffer_size()
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import fcntl
            import termios

            queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            unsent += int.from_bytes(queued, sys.byteorder)
        return int(unsent)

    def _stop_write_timer(self) -> None:
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None

    def on_response_complete(self) -> None:
        if self.pipeline:  # the next request starts
            self.running = self.pipeline[-1][0]
        super().on_response_complete()

    def on_message_begin(self) -> None:
        self.in_head, self.header_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.header_bytes += len(name) + len(value) + 4
        if self.header_bytes > HEAD_BYTES:
            self._reject_head()
            return
        if self.in_head:  # trailers are not headers of the request (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.in_head = False
        self._stop_head_timer()
        if self.transport.is_closing():  # rejected
            return
        super().on_headers_complete()
        if self.cycle and self.scope["method"] != "HEAD":  # a response to HEAD has no body to wait for
            self.cycle.transport = CoalescingTransport(self.transport)  # type: ignore[assignment]  # has all used methods
        if not self.pipeline:  # a pipelined request waits for the one before
            self.running = self.cycle
        if self.close_after_response and self.cycle:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self.head_bytes, self.in_head = 0, True
        if not self.transport.is_closing():
            super().on_message_complete()

    def _answered(self) -> bool:
        """Whether the latest request is answered: further data is the rest of its body."""
        return bool(self.cycle and self.cycle.response_complete)

    def _start_head_timer(self) -> None:
        self.head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this when the data is not valid HTTP."""
        running = self.running
        if running and not running.response_complete:
            if running is not self.cycle or not running.more_body or running.response_started:
                running.keep_alive = False  # finish this response, then close
                self.flow.pause_reading()
                return
            running.disconnected = True  # the running request's own body is invalid
            running.message_event.set()
        self._reject(BadValue(f"the request is not valid HTTP: {msg.strip()}"))

    def _reject_head(self) -> None:
        self._reject(HeadTooLarge(f"the request head has more than {HEAD_BYTES:,} bytes, the maximum"))

    def _reject(self, error: QuartetError) -> None:
        if self.transport.is_closing():
            return
        path = getattr(self, "url", b"").decode("latin-1").partition("?")[0]  # unset before a complete request line
        response, request_id = ErrorResponse(error, path), uuid.uuid4().hex
        if not self.running or self.running.response_complete:  # a running request is counted when it ends
            self.app.state.refused(path, error, request_id)  # set by create_app
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "connection: close"]
        lines.append(f"x-request-id: {request_id}")
        lines += [f"{name.decode()}: {value.decode()}" for name, value in (*response.raw_headers, *SECURITY_HEADERS)]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + bytes(response.body))
        self.transport.close()
