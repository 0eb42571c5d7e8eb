"""uvicorn's HTTP/1.1 protocol, with the limits of SECURITY.md and with errors in the service's format."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import re
import socket
import struct
import sys
import termios
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.api.connection import CONNECTION
from app.api.errors import error_response
from app.errors import BadValue, QuartetError
from app.limits import Limits
from app.observability.middleware import REJECTION, SECURITY_HEADERS, assign_request_id, new_request_id

FIELD_BYTES = 32  # added to the size of each field, because parsing a field takes time (RFC 9113, 6.5.2)
SMALL_CHUNK, SMALL_CHUNK_BYTES = 8, 128  # bytes of a small chunk, and what is added to its framing for the same reason
UPGRADE = re.compile(rb"(?<=\r\n)upgrade:", re.IGNORECASE)


class HeadTooLarge(QuartetError):
    """The request line, the headers and the trailers together are larger than ``Limits.head_bytes``."""

    status = 431
    type = "invalid_request_error"
    code = "head_too_large"


class StopParsing(Exception):
    """Raised in a callback of the parser to stop the parser. uvicorn then calls ``send_400_response``."""


class Cycle(RequestResponseCycle):
    """A request and its response. The application finds this object in the scope, as its ``Connection``."""

    on_disconnect: Callable[[], None] | None = None
    waits_for_body = True  # before the connection is closed; False while the service stops
    close_after_body = False

    def take_body(self) -> bytes | None:
        """Return the body. This method is ten times as fast as ``receive()``.

        Return None if the body is incomplete, or can no longer be received.
        """
        if self.more_body or self.disconnected or self.response_complete or self.waiting_for_100_continue:
            return None
        self.flow.resume_reading()
        self.message_event.clear()  # the next message can only be the disconnect
        body, self.body = bytes(self.body), bytearray()
        return body

    def watch_disconnect(self, on_disconnect: Callable[[], None] | None) -> None:
        """Call ``on_disconnect`` if the client disconnects, until the next call."""
        self.on_disconnect = on_disconnect
        if on_disconnect:  # ``receive()`` stops reading if much of the body arrives at its end
            self.flow.resume_reading()

    def disconnect(self) -> None:
        """Tell the application that the client has disconnected."""
        self.disconnected = True
        self.message_event.set()
        if self.on_disconnect:
            self.on_disconnect()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if has_length and self.scope["method"] != "HEAD":
                self.transport = HeldHead(self)  # type: ignore[assignment]  # has all methods that are used
        elif self.more_body and self.waits_for_body and not self.keep_alive and not message.get("more_body"):
            # If the connection were closed now, the system would reset it when the rest of the body arrives, and the
            # client could lose the response (RFC 9112, 9.6).
            self.keep_alive = self.close_after_body = True
        await super().send(message)


class HeldHead:
    """Holds the head of a response, to send it with the first part of the body.

    Otherwise, more than 9 of 10 answers to images reach the client in two parts, and wake it twice (measured).
    """

    def __init__(self, cycle: Cycle) -> None:
        self.cycle, self.transport, self.head = cycle, cycle.transport, b""

    def write(self, data: bytes) -> None:
        if self.head:
            self.cycle.transport = self.transport
            self.transport.writelines((self.head, data))
        else:
            self.head = data

    def close(self) -> None:
        self.transport.close()


class HttpProtocol(HttpToolsProtocol):
    """A connection. The application limits the time and the size of bodies; this class limits everything else.

    ``on_lost`` is called when the connection has ended.
    """

    def __init__(
        self,
        config: Any,
        server_state: Any,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
        limits: Limits,
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self.limits, self.on_lost = limits, on_lost
        self.in_head = True  # whether the next byte belongs to a head
        self.received = 0  # size of the data that are parsed now
        self.excess = 0  # bytes received for a request, minus twice the bytes of its body; small chunks count more
        self.field_bytes = 0  # size of the request line, the headers and the trailers of one request
        self.error: QuartetError | None = None  # why a callback of the parser has stopped the parser
        self.running: Cycle | None = None  # the request that is being answered; ``cycle`` may be a later one
        self.last_request = False  # whether the connection is closed after the next response
        self.stopping = False
        self.timer: asyncio.TimerHandle | None = None  # closes the connection if no complete head arrives in time
        self.write_timer: asyncio.TimerHandle | None = None  # closes the connection if the client does not read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer(self.limits.head_seconds)

    def data_received(self, data: bytes) -> None:
        if self.in_head and b"pgrade" in data:
            data = without_upgrade(data)
        self.received = len(data)
        self.excess += self.received
        super().data_received(data)
        if self.excess > (self.limits.head_bytes if self.in_head else self.limits.framing_bytes):
            self._reject(self._too_large())
        elif self.timer is None and not self._is_answering():
            self._start_timer(self.limits.head_seconds)

    def on_message_begin(self) -> None:
        self.field_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_field(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_field(len(name) + len(value) + FIELD_BYTES)
        if self.in_head:  # trailers are not headers of the request (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def _count_field(self, size: int) -> None:
        self.field_bytes += size
        if self.field_bytes > self.limits.head_bytes:
            self._stop_parsing(self._too_large())

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._stop_parsing(BadValue("the service cannot change the protocol of the connection"))
        self.in_head, self.excess = False, 0
        self._stop_timer()
        if self.transport.is_closing():
            return
        super().on_headers_complete()
        self.cycle.__class__ = Cycle  # uvicorn has no option for the class of a cycle
        self.cycle.keep_alive &= not self.last_request
        if not self.pipeline:  # otherwise the request waits for earlier requests
            self._run(self.cycle)

    def _run(self, cycle: Any) -> None:
        """Make ``cycle`` the request that is being answered."""
        self._forget_running()
        self.running = cycle
        cycle.scope[CONNECTION] = cycle

    def _forget_running(self) -> None:
        if self.running:  # otherwise the scope and the cycle would refer to each other
            self.running.scope.pop(CONNECTION, None)  # type: ignore[misc]

    def on_body(self, body: bytes) -> None:
        self.excess += (SMALL_CHUNK_BYTES if len(body) < SMALL_CHUNK else 0) - 2 * len(body)
        if self.excess - self.received > self.limits.framing_bytes:  # to parse all chunks would take too long
            self._stop_parsing(self._too_large())
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self.in_head, self.excess = True, 0
        if self.running and self.running.close_after_body:
            self._close()
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline:  # the next request starts
            self._run(self.pipeline[-1][0])
        super().on_response_complete()
        if self.transport.is_closing():
            self._limit_closing()
        elif not self._is_answering() and (self.excess or not self.in_head):  # the rest of a body, or a part of a head
            self._start_timer(self.limits.last_request_seconds if self.stopping else self.limits.head_seconds)

    def _is_answering(self) -> bool:
        return self.running is not None and not self.running.response_complete

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self.timer = self.loop.call_later(seconds, self._on_timeout)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _on_timeout(self) -> None:
        self.timer = None
        if self._is_answering():  # ``on_response_complete`` starts the timer again
            return
        if self.stopping and self.scheme == "https":
            # Clients that do not read while they are idle do not end TLS, and would delay the exit of the server.
            if self._unsent_bytes():
                self._start_timer(self.limits.last_request_seconds)
            else:
                self.transport.abort()
        else:
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def shutdown(self) -> None:
        """Answer the requests that have arrived, then close the connection. uvicorn calls this when the server stops.

        A client without a running request may be about to send one, so the connection stays open for a short time.
        """
        self.last_request = self.stopping = True
        if self.running and self._is_answering():
            self.running.waits_for_body = False
            super().shutdown()
        else:
            self._start_timer(self.limits.last_request_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        self._forget_running()
        if self.running and not self.running.response_complete:  # uvicorn itself tells only the last pipelined request
            self.running.disconnect()
        super().connection_lost(exc)
        self.on_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _start_write_timer(self) -> None:
        """Start a timer that resets the connection if the client does not read. Unsent bytes would use memory."""
        unsent = self._unsent_bytes()

        def check() -> None:
            if self._unsent_bytes() <= max(0, unsent - self.limits.stalled_write_bytes):
                self._start_write_timer()
                return
            with contextlib.suppress(OSError):  # SO_LINGER lets the system drop its unsent bytes too
                linger = struct.pack("ii", 1, 0)
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()

        self.write_timer = self.loop.call_later(self.limits.stalled_write_seconds, check)

    def _stop_write_timer(self) -> None:
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None

    def _close(self) -> None:
        self.transport.close()
        self._limit_closing()

    def _limit_closing(self) -> None:
        if self.write_timer is None and self.transport.get_write_buffer_size():
            self._start_write_timer()

    def _unsent_bytes(self) -> int:
        """Return the number of bytes that the client has not received. The buffer of the system can have megabytes."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        queued = fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def _too_large(self) -> QuartetError:
        if self.in_head or self.field_bytes > self.limits.head_bytes:
            return HeadTooLarge(f"the request head has more than {self.limits.head_bytes:,} bytes, the maximum")
        limit = f"{self.limits.framing_bytes:,} bytes more than the body, the maximum"
        return BadValue(f"chunk sizes, extensions and trailers have {limit}")

    def _stop_parsing(self, error: QuartetError) -> None:
        self.error = error
        raise StopParsing

    def send_400_response(self, msg: str) -> None:
        """Reject data that is not valid HTTP. uvicorn also calls this after an error in a callback of the parser."""
        self._reject(self.error or BadValue(f"the request is not valid HTTP: {msg.strip()}"))

    def _reject(self, error: QuartetError) -> None:
        """Send ``error``, unless an earlier request is being answered or has an answer. Then close the connection."""
        if self.transport.is_closing():
            return
        scope: Any = {}
        if self.running and self._is_answering():
            scope = self.running.scope
            if self.running is not self.cycle or not self.running.more_body or self.running.response_started:
                self.running.keep_alive = False  # its answer is the last one
                self.flow.pause_reading()
                return
            scope[REJECTION] = error  # recorded when the request ends
            self.running.disconnect()
        elif self.running and not self.in_head:  # the error is in a body whose request has been answered
            self._close()
            return
        path = getattr(self, "url", b"").decode("latin-1").partition("?")[0]  # unset before a complete request line
        request_id = assign_request_id(scope) if scope else new_request_id()
        if not scope:
            self.app.state.on_rejected(path, error, request_id)  # set by create_app
        self.transport.write(error_bytes(error, path, request_id))
        self._close()


def without_upgrade(data: bytes) -> bytes:
    """Rename the header ``Upgrade`` of the head at the start of ``data``. Servers may ignore it (RFC 9110, 7.8).

    Each request of the JDK's HTTP client to an ``http`` URL asks for h2c. But httptools ends such a request after its
    head, and would parse its body as the next request.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return UPGRADE.sub(b"x-upgrade:", head) + end + rest


def error_bytes(error: QuartetError, path: str, request_id: str) -> bytes:
    """Return an HTTP/1.1 response in the error format of ``path``. It tells the client that the connection ends."""
    response = error_response(error, path)
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "connection: close"]
    lines.append(f"x-request-id: {request_id}")
    lines += [f"{name.decode()}: {value.decode()}" for name, value in (*response.raw_headers, *SECURITY_HEADERS)]
    return "\r\n".join([*lines, "", ""]).encode() + bytes(response.body)
