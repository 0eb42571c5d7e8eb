"""The HTTP/1.1 protocol, with limits for each state of a connection and errors in the service's format."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.api.connection import CONNECTION
from app.errors import BadValue, QuartetError, TooSlow
from app.observability.middleware import REJECTION, assign_request_id
from app.server.close_delimited import CloseDelimitedCycle
from app.server.coalescing_transport import CoalescingTransport
from app.server.error_bytes import error_bytes
from app.server.write_limit import WriteLimitedProtocol

HEAD_SECONDS = 30.0  # longest time until a request head is complete, or until the first request of a connection begins
TRAILER_SECONDS = 30.0  # longest time until the trailers after a chunked body are complete
DISCARD_SECONDS = 30.0  # longest time until the rest of a body has arrived, after its request was answered
# When the server stops, it waits this long for a request that has begun, or for the first request of a new connection.
FIRST_REQUEST_SECONDS = 2.0
IDLE_SECONDS = 0.05  # when the server stops, it waits this long for the next request on an idle connection
FIELD_BYTES = 32  # added to the size of each field's name and value, as in HTTP/2 (RFC 9113, 6.5.2)
HEAD_BYTES = 64 * 1024  # largest size of request line and headers, as in h11, because httptools has no limit
TRAILER_BYTES = 64 * 1024  # largest size of the fields after a chunked body
FRAMING_BYTES = 512 * 1024  # chunk sizes and extensions may have this many bytes more than the body itself
DISCARD_BYTES = 64 * 2**20  # largest size of the rest of a body after its request was answered
SLICE_BYTES = 16 * 1024  # number of bytes that are parsed at a time
SMALL_SLICE_BYTES = 1024  # the same while the chunks of a body are small; parsing a slice takes about 0.2 ms
SMALL_SLICE_SECONDS = 0.001  # between the starts of two small slices, which thus take a fifth of the loop's time
SMALL_CHUNK_BYTES = 16  # chunks are small if they have fewer bytes than this on average, with their size lines
MAX_PIPELINED = 128  # largest number of requests that wait for earlier responses on the same connection


class State(Enum):
    """The part of a request to which the next byte of a connection belongs."""

    HEAD = "head"  # a request line or headers; also the state of an idle connection
    BODY = "body"
    TRAILER = "trailer"  # fields after the last chunk of a body
    DISCARD = "discard"  # the rest of a body whose request was already answered


STATE_BYTES = {
    State.HEAD: HEAD_BYTES,
    State.BODY: FRAMING_BYTES,
    State.TRAILER: TRAILER_BYTES,
    State.DISCARD: DISCARD_BYTES,
}
LOWEST_LIMIT = min(STATE_BYTES.values())


class HeadTooLarge(QuartetError):
    """The request line, the headers and the trailers together have more than 64 KiB."""

    status = 431
    type = "invalid_request_error"
    code = "head_too_large"


class StopParsing(Exception):
    """Raised in a callback of the parser to stop the parser. uvicorn then calls ``send_400_response``."""


class BoundedHttpProtocol(WriteLimitedProtocol):
    """uvicorn's httptools protocol with limits on the bytes and the time of each state of a connection.

    The time limit of a state applies only while the server waits for data from the client. While a request of the
    connection is being answered, only the time limit of ``TRAILER`` applies. The application limits the bytes of a body
    and the pauses while the body arrives. The application finds this object in the scope of the running request, as its
    ``Connection``.
    """

    delayed: ClassVar[set[BoundedHttpProtocol]] = set()  # connections of this process that have ``unparsed`` bytes

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.state = State.HEAD
        self.state_bytes = 0  # received in this state; in BODY, the framing bytes minus the bytes of the body
        self.field_bytes = 0  # size of request line, headers and trailers of one request
        self.slice_bytes = SLICE_BYTES  # number of bytes that are parsed at a time
        self.unparsed = memoryview(b"")  # received bytes that wait, so that other connections are served first
        self.chunks = 0  # number of chunks whose size lines have arrived
        self.chunks_with_data = 0  # the value of ``chunks`` when the last data arrived
        self.state_timer: asyncio.TimerHandle | None = None  # ends a state that lasts too long
        self.problem = ""  # what is wrong with a request that the parser accepts
        self.running: Any = None  # the request that is being answered; ``cycle`` may be a later request
        self.close_after_response = self.close_after_body = self.stopping = False
        self.on_disconnect: Callable[[], None] | None = None  # set while a request waits for its answer
        self.on_connection_lost: Callable[[], None] = lambda: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # uvicorn narrows the type
        self._start_state_timer()

    def data_received(self, data: bytes) -> None:
        if self.unparsed:  # the application has resumed reading although some bytes wait
            self.unparsed = memoryview(bytes(self.unparsed) + data)
            self.transport.pause_reading()
        elif len(data) <= self.slice_bytes:
            self._parse(data)
        else:
            self._parse_slices(memoryview(data))

    def _parse_slices(self, data: memoryview) -> None:
        """Parse ``data`` in slices, and check the limits after each slice. Pause after a slice of small chunks."""
        start = 0
        while start < len(data) and not self.transport.is_closing():
            size, chunks = self.slice_bytes, self.chunks
            self._parse(bytes(data[start : start + size]))
            start += size
            small = (self.chunks - chunks) * SMALL_CHUNK_BYTES > size
            self.slice_bytes = SMALL_SLICE_BYTES if small else SLICE_BYTES
            if small and start < len(data) and not self.transport.is_closing():
                self.unparsed = data[start:]
                self.transport.pause_reading()
                self.delayed.add(self)
                self.loop.call_later(SMALL_SLICE_SECONDS * len(self.delayed), self._parse_rest)
                return

    def _parse_rest(self) -> None:
        self.delayed.discard(self)
        data, self.unparsed = self.unparsed, memoryview(b"")
        self._parse_slices(data)
        if not (self.unparsed or self.flow.read_paused or self.transport.is_closing()):
            self.transport.resume_reading()

    def _parse(self, data: bytes) -> None:
        chunks, length = self.chunks, len(data)
        self.state_bytes += length
        super().data_received(data)
        if self.chunks == chunks != self.chunks_with_data and self.state is not State.TRAILER:
            self._enter(State.TRAILER)  # the last size was 0, because neither data nor a size line has followed it
            self.state_bytes = length
        if self.state_bytes > LOWEST_LIMIT and self.state_bytes > STATE_BYTES[self.state]:  # the first test is faster
            self._on_too_many_bytes()
        elif self.state_timer is None and (self.state is State.TRAILER or not self._is_answering()):
            self._start_state_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_state_timer()
        self._stop_write_timer()
        self.delayed.discard(self)
        if self.running:
            self.running.scope.pop(CONNECTION, None)  # otherwise the scope and this object would refer to each other
            self.running.transport = self.transport  # for the same reason
            if not self.running.response_complete:  # uvicorn itself notifies only the last pipelined request
                self._disconnect()
        super().connection_lost(exc)
        self.on_connection_lost()

    def _run(self, cycle: RequestResponseCycle) -> None:
        """Make ``cycle`` the request that is being answered."""
        self.running = cycle
        cycle.scope[CONNECTION] = self  # type: ignore[literal-required]

    def take_body(self) -> bytes | None:
        """Return the body of the running request. This method is ten times as fast as ``receive()``.

        Return None if the body is incomplete, or can no longer be received.
        """
        cycle: RequestResponseCycle = self.running
        if cycle.more_body or cycle.disconnected or cycle.response_complete or cycle.waiting_for_100_continue:
            return None
        self.flow.resume_reading()
        cycle.message_event.clear()  # the next message can only be the disconnect
        body, cycle.body = bytes(cycle.body), bytearray()
        return body

    def watch_disconnect(self, on_disconnect: Callable[[], None] | None) -> None:
        """Call ``on_disconnect`` if the client disconnects, until the next call."""
        self.on_disconnect = on_disconnect
        if on_disconnect:  # ``receive()`` stops reading if much of the body arrives at its end
            self.flow.resume_reading()

    def _disconnect(self) -> None:
        """Tell the running request that its client has disconnected."""
        self.running.disconnected = True
        self.running.message_event.set()
        if self.on_disconnect:
            self.on_disconnect()

    def _enter(self, state: State) -> None:
        self.state, self.state_bytes = state, 0
        if self.state_timer is not None:
            self._stop_state_timer()

    def _is_answering(self) -> bool:
        return bool(self.running and not self.running.response_complete)

    def on_response_complete(self) -> None:
        if self.pipeline:  # the next request starts
            self._run(self.pipeline[-1][0])
        elif self.state is State.BODY:
            self._enter(State.DISCARD)
            self._start_state_timer()
        super().on_response_complete()
        if self.transport.is_closing():
            self._limit_closing()

    def on_message_begin(self) -> None:
        self.field_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self.field_bytes += len(url)
        if self.field_bytes > HEAD_BYTES:  # checked here too, because the end of a head resets ``state_bytes``
            raise StopParsing
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.field_bytes += len(name) + len(value) + FIELD_BYTES
        if self.field_bytes > HEAD_BYTES:  # checked for the same reason as in ``on_url``
            raise StopParsing
        if self.state is State.HEAD:  # trailers are not headers of the request (RFC 9110, 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.is_upgrade_request():
            return
        self._enter(State.BODY)
        if self.transport.is_closing():  # the request was rejected
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise StopParsing  # the connection is closed after the response to the last waiting request
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and self.parser.get_http_version() == "1.1"):  # as RFC 9112, 3.2 requires
            self.problem = f"the request has {hosts} Host headers; HTTP requires exactly one"
            raise StopParsing
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = CloseDelimitedCycle  # uvicorn has no option for the class of a cycle
            self.cycle.waiting_for_100_continue = False  # such clients expect only one response (RFC 9110, 10.1.1)
        if self.scope["method"] != "HEAD":  # a response to HEAD has no body to wait for
            transport: Any = CoalescingTransport(self.transport, self._close_after_response)  # has all used methods
            self.cycle.transport = transport
        if not self.pipeline:  # otherwise the request waits for earlier requests
            self._run(self.cycle)
        self.cycle.keep_alive &= not self.close_after_response

    def on_chunk_header(self) -> None:
        self.chunks += 1

    def on_body(self, body: bytes) -> None:
        self.chunks_with_data = self.chunks
        if self.state is State.BODY and not self.transport.is_closing():
            self.state_bytes -= 2 * len(body)
            self.cycle.body += body  # as in uvicorn, but twice as fast, because a body may have many small chunks
            if len(self.cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self.is_upgrade_request():
            return
        self.chunks_with_data = self.chunks
        self._enter(State.HEAD)
        if self.close_after_body:
            self._close()
        if not self.transport.is_closing():
            super().on_message_complete()

    def _start_state_timer(self) -> None:
        seconds = {State.TRAILER: TRAILER_SECONDS, State.DISCARD: DISCARD_SECONDS}.get(self.state, HEAD_SECONDS)
        self.state_timer = self.loop.call_later(seconds, self._on_state_timeout)

    def _stop_state_timer(self) -> None:
        if self.state_timer is not None:
            self.state_timer.cancel()
            self.state_timer = None

    def _on_state_timeout(self) -> None:
        if self.state is State.TRAILER:
            self._reject(TooSlow(f"the trailers of the body did not end within {TRAILER_SECONDS:g} seconds"))
        else:
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def shutdown(self) -> None:
        """Answer the requests that have arrived, then close the connection. uvicorn calls this when the server stops.

        A request whose first bytes have not been read yet is answered too. A client that has just connected may be
        about to send a request. Therefore a new connection stays open longer than an idle connection.
        """
        self.close_after_response = self.stopping = True
        if self._is_answering():
            super().shutdown()
        else:
            is_expected = self.cycle is None or self.state is not State.HEAD or self.state_bytes
            self.loop.call_later(FIRST_REQUEST_SECONDS if is_expected else IDLE_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if not (self._is_answering() or self.transport.is_closing()):
            self._close()

    def _close_after_response(self) -> None:
        """Close the connection, but first receive the rest of the body whose request was just answered.

        Otherwise the system would reset the connection, and the client might lose the response (RFC 9112, 9.6). But a
        service that stops does not wait.
        """
        if self.running.response_complete and self.running.more_body and not self.stopping:
            self.close_after_body = True
        else:
            self._close()

    def _close(self) -> None:
        self.transport.close()
        self._limit_closing()

    def _on_too_many_bytes(self) -> None:
        if self.state is State.BODY:
            self._reject(
                BadValue(f"chunk sizes and extensions have {FRAMING_BYTES:,} bytes more than the body, the maximum")
            )
        else:
            self._reject_head()

    def _reject_head(self) -> None:
        name = "head" if self.state is State.HEAD else "head with its trailers"
        self._reject(HeadTooLarge(f"the request {name} has more than {HEAD_BYTES:,} bytes, the maximum"))

    def send_400_response(self, msg: str) -> None:
        """Reject data that is not valid HTTP. uvicorn also calls this after an error in a callback of the parser."""
        if self.field_bytes > HEAD_BYTES:
            self._reject_head()
        else:
            self._reject(BadValue(self.problem or f"the request is not valid HTTP: {msg.strip()}"))

    def _reject(self, error: QuartetError) -> None:
        """Send ``error``, or the responses to earlier requests if there are any. Then close the connection."""
        if self.transport.is_closing():
            return
        if self._is_answering():
            if self.pipeline and self.cycle is self.pipeline[0][0] and self.cycle.more_body:
                self.pipeline.popleft()  # the error is in the body of this waiting request
            last = self.pipeline[0][0] if self.pipeline else self.running
            if last is not self.cycle or not last.more_body or last.response_started:
                last.keep_alive = False
                self.flow.pause_reading()
                return
            request_id = assign_request_id(self.running.scope)
            self.running.scope[REJECTION] = error  # recorded when the request ends
            self._disconnect()  # the error is in the body of the running request
        elif self.state in (State.TRAILER, State.DISCARD):  # the request already has a response
            self._close()
            return
        path = getattr(self, "url", b"").decode("latin-1").partition("?")[0]  # unset before a complete request line
        if not self._is_answering():
            request_id = uuid.uuid4().hex
            self.app.state.on_rejected(path, error, request_id)  # set by create_app
        self.transport.write(error_bytes(error, path, request_id))
        self._close()
