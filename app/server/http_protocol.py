"""What stands before a body: bounded, and when it is no HTTP refused in the shape of all other errors."""

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

HEAD_SECONDS = 30.0  # for a head to come whole, and for the first one of a connection to begin
STALLED_WRITE_SECONDS = 60.0  # seconds in which a caller has to read something of what waits to be sent
HEAD_BYTES = 64 * 1024  # of the request line and the headers, as h11 has it; the faster parser has no limit of its own


class HeadTooLarge(QuartetError):
    status = 431
    type = "invalid_request_error"
    code = "head_too_large"


class CoalescingTransport:
    """The transport of one answer. A head that says how long its body is waits for the body's first piece, and both
    leave in one call of the system: as two they cost twice as much here, and wake the caller twice.
    """

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.head = b""
        self.begun = False

    def write(self, data: bytes) -> None:
        if self.head:
            head, self.head = self.head, b""
            self.transport.writelines((head, data) if data else (head,))
        elif self.begun or data.startswith(b"HTTP/1.1 100 "):
            self.transport.write(data)
        else:
            self.begun = True
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
    """uvicorn's faster HTTP protocol, for heads of a size that is sane; what is short leaves in one piece."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.head_bytes = 0  # of the head that is coming, and of what comes behind a body in chunks
        self.in_head = True
        self.patience: asyncio.TimerHandle | None = None  # with a head, or an answered body, that does not end
        self.unread: asyncio.TimerHandle | None = None  # with what the caller does not read
        self.running: Any = None  # the request and answer under way; ``cycle`` may be the next one already
        self.last = False  # whether the connection is to end with its next answer
        self.left: Callable[[], None] = lambda: None  # called when it has ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn's own narrowing
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self.in_head:
            self.head_bytes += len(data)
        super().data_received(data)
        if self.in_head and self.head_bytes > HEAD_BYTES:
            self._reject_head()
        elif self.patience is None and ((self.in_head and self.head_bytes) or self._answered()):
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._reads()
        if self.running and not self.running.response_complete:  # with another request behind it, uvicorn forgets it
            self.running.disconnected = True
            self.running.message_event.set()
        super().connection_lost(exc)
        self.left()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self._unsent())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reads()

    def _watch(self, held: int) -> None:
        """End the connection unless some of so many bytes are read in time: it takes memory, and holds up a stop."""

        def look() -> None:
            if (now := self._unsent()) < held:
                self._watch(now)
            else:
                self.transport.abort()

        self.unread = self.loop.call_later(STALLED_WRITE_SECONDS, look)

    def _unsent(self) -> int:
        """Bytes that wait here, and those that wait in the system until the caller has taken others."""
        held = self.transport.get_write_buffer_size()
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import fcntl
            import termios

            told = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            held += int.from_bytes(told, sys.byteorder)
        return int(held)

    def _reads(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
            self.unread = None

    def on_response_complete(self) -> None:
        if self.pipeline:  # the next one begins
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
        if self.in_head:  # what comes behind a body is none of the request's (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.in_head = False
        self._stop_timer()
        if self.transport.is_closing():  # refused
            return
        super().on_headers_complete()
        if self.cycle and self.scope["method"] != "HEAD":  # whose answer has no body to wait for
            self.cycle.transport = CoalescingTransport(self.transport)  # type: ignore[assignment]  # of it nothing else is asked
        if not self.pipeline:  # else it waits until the one before it is answered
            self.running = self.cycle
        if self.last and self.cycle:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self.head_bytes, self.in_head = 0, True
        if not self.transport.is_closing():
            super().on_message_complete()

    def _answered(self) -> bool:
        """Whether nothing is under way: what came is the rest of a body that was answered before it was whole."""
        return bool(self.cycle and self.cycle.response_complete)

    def _start_timer(self) -> None:
        self.patience = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the request is not HTTP."""
        running = self.running
        if running and not running.response_complete:
            if running is not self.cycle or not running.more_body or running.response_started:
                running.keep_alive = False  # the one before it is still answered, and is the last
                self.flow.pause_reading()
                return
            running.disconnected = True  # its own body is wrong, and nothing more of it will come
            running.message_event.set()
        self._reject(BadValue(f"the request is not HTTP as it should be: {msg.strip()}"))

    def _reject_head(self) -> None:
        self._reject(HeadTooLarge(f"the request's head has more than {HEAD_BYTES:,} bytes, which are allowed"))

    def _reject(self, error: QuartetError) -> None:
        if self.transport.is_closing():
            return
        path = getattr(self, "url", b"").decode("latin-1").partition("?")[0]  # none before the request line is whole
        answer, request_id = ErrorResponse(error, path), uuid.uuid4().hex
        if not self.running or self.running.response_complete:  # else that is a request, and is counted as one
            self.app.state.refused(path, error, request_id)  # of ``app.main``
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "connection: close"]
        lines.append(f"x-request-id: {request_id}")
        lines += [f"{name.decode()}: {value.decode()}" for name, value in (*answer.raw_headers, *SECURITY_HEADERS)]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + bytes(answer.body))
        self.transport.close()
