"""An event loop, a transport and an application for tests of the HTTP protocol without sockets and real time."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import uvicorn
from uvicorn.server import ServerState

from app.server.http_protocol import BoundedHttpProtocol


@dataclass(eq=False)
class Timer:
    """A timer of a ``Loop``."""

    timers: list[Timer]
    end: float
    callback: Callable[[], None]

    def cancel(self) -> None:
        if self in self.timers:
            self.timers.remove(self)


class Loop:
    """An event loop whose time passes only in ``wait``. Requests run only in ``answer``."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self.requests: list[Coroutine[Any, Any, None]] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.timers, self.now + seconds, callback))
        return self.timers[-1]

    def wait(self, seconds: float) -> None:
        """Let ``seconds`` pass, and call the timers that end in this time."""
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer.end <= end]:
            first = min(due, key=lambda timer: timer.end)
            first.cancel()
            self.now = first.end
            first.callback()
        self.now = end

    def create_task(self, request: Coroutine[Any, Any, None]) -> Any:
        self.requests.append(request)
        return Mock()

    def answer(self) -> None:
        """Answer the request that has arrived first."""
        with pytest.raises(StopIteration):
            self.requests.pop(0).send(None)


class Socket:
    """A socket whose send queue cannot be read, and whose options cannot be set."""

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 8000

    getpeername = getsockname

    def fileno(self) -> int:
        raise OSError

    def setsockopt(self, *_: object) -> None:
        raise OSError


class Transport:
    """A transport that records what the protocol does. A test sets the number of ``unsent`` bytes."""

    def __init__(self) -> None:
        self.socket: Any = Socket()
        self.written, self.unsent = b"", 0
        self.closed = self.aborted = self.paused = False

    def get_extra_info(self, name: str) -> Any:
        return self.socket if name == "socket" else None

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, parts: Iterable[bytes]) -> None:
        self.write(b"".join(parts))

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Application:
    """Answers each request without reading its body. It records the requests that the protocol rejects."""

    def __init__(self) -> None:
        self.rejected: list[tuple[str, str, str]] = []
        self.state = SimpleNamespace(
            on_rejected=lambda path, error, request_id: self.rejected.append((path, error.code, request_id))
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})


class ReadingApplication(Application):
    """Reads and records the body of each request, and answers it."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[tuple[dict[str, Any], bytes]] = []  # scope and body of each request

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more_body = b"", True
        while more_body:
            message = await receive()
            body, more_body = body + message["body"], message["more_body"]
        self.received.append((scope, body))
        await super().__call__(scope, receive, send)


class Connection:
    """A connection to the protocol."""

    def __init__(self, application: Application | None = None) -> None:
        self.loop, self.transport, self.application = Loop(), Transport(), application or Application()
        config = uvicorn.Config(self.application, ws="none", log_config=None, proxy_headers=False)
        config.load()
        loop: Any = self.loop
        self.protocol = BoundedHttpProtocol(config, ServerState(), {}, loop)
        self.protocol.connection_made(self.transport)  # type: ignore[arg-type]

    def send(self, *parts: bytes) -> bytes:
        """Let these bytes arrive one part after the other. Return what the protocol writes meanwhile."""
        before = len(self.transport.written)
        for part in parts:
            self.protocol.data_received(part)
        return self.transport.written[before:]
