"""The limits on the time that a response waits for the client, and on the end of TLS.

Stubs replace the event loop and the transport, except in the tests with TLS.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import uvicorn
import uvloop
from support.stubs.http import Application, Connection
from uvicorn.server import ServerState

from app.server import write_limit
from app.server.coalescing_transport import unsent_bytes
from app.server.http_protocol import BoundedHttpProtocol
from app.server.write_limit import CLOSE_NOTIFY_SECONDS, STALLED_WRITE_BYTES, STALLED_WRITE_SECONDS

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def connection() -> Connection:
    return Connection()


def test_a_client_reads_a_part_of_the_unsent_bytes_in_each_interval_or_is_disconnected(connection: Connection) -> None:
    loop, transport = connection.loop, connection.transport
    transport.unsent = 4 * STALLED_WRITE_BYTES
    connection.protocol.pause_writing()
    for _ in range(2):
        transport.unsent -= STALLED_WRITE_BYTES
        loop.wait(STALLED_WRITE_SECONDS)
        assert not transport.aborted
    transport.unsent -= STALLED_WRITE_BYTES - 1
    loop.wait(STALLED_WRITE_SECONDS)
    assert transport.aborted


def test_a_closed_connection_waits_once_for_the_client_to_read(connection: Connection) -> None:
    """Afterwards, the system drops the unsent bytes."""
    connection.protocol.pause_writing()
    connection.protocol.resume_writing()
    connection.transport.unsent = 1
    connection.transport.socket = Mock(fileno=Mock(side_effect=OSError))
    connection.send(b"nonsense\r\n\r\n")
    connection.loop.wait(STALLED_WRITE_SECONDS - 1)
    assert (connection.transport.closed, connection.transport.aborted) == (True, False)
    connection.loop.wait(1)
    assert connection.transport.aborted
    set_option = connection.transport.socket.setsockopt
    set_option.assert_called_once_with(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_bytes_in_the_send_queue_of_the_socket_are_unsent_too(connection: Connection) -> None:
    near, far = socket.socketpair()
    with near, far:
        connection.transport.socket, connection.transport.unsent = near, 1000
        assert unsent_bytes(connection.transport) == 1000
        near.send(b"x")
        assert 1000 < unsent_bytes(connection.transport) < 20_000
        far.recv(1)
        assert unsent_bytes(connection.transport) == 1000
    connection.transport.socket = None
    assert unsent_bytes(connection.transport) == 1000


def test_no_timer_remains_after_the_end_of_a_connection_that_was_closed_with_unsent_bytes(
    connection: Connection,
) -> None:
    connection.transport.unsent = 1000
    for _ in range(2):
        connection.protocol.pause_writing()
        connection.protocol.resume_writing()
    connection.protocol.pause_writing()
    connection.send(b"nonsense\r\n\r\n")
    connection.protocol.connection_lost(None)
    assert connection.loop.timers == []


def test_a_closed_tls_connection_waits_for_unsent_bytes_and_then_a_short_time_for_the_client(
    connection: Connection,
) -> None:
    loop, transport = connection.loop, connection.transport
    transport.socket, transport.unsent = MagicMock(fileno=Mock(side_effect=OSError)), 1
    shutdown = transport.socket.dup().__enter__().shutdown
    connection.protocol.scheme = "https"
    connection.send(b"nonsense\r\n\r\n")
    loop.wait(2 * CLOSE_NOTIFY_SECONDS)
    transport.unsent = 0
    loop.wait(CLOSE_NOTIFY_SECONDS * 0.9)
    shutdown.assert_not_called()
    loop.wait(CLOSE_NOTIFY_SECONDS * 0.1)
    shutdown.assert_called_once_with(socket.SHUT_RD)
    assert not transport.aborted
    connection.protocol.connection_lost(None)
    assert loop.timers == []


class LargeAnswer(Application):
    """Answers each request with ``size`` bytes, and closes the connection."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"%d" % self.size), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(self.size)})


Loop = Callable[[], asyncio.AbstractEventLoop]
LOOPS = pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])


def serve_tls(
    application: Application, certificate: tuple[Path, Path], new_loop: Loop, use: Callable[[ssl.SSLSocket], None]
) -> None:
    """Serve one TLS connection until the server has closed it. ``use`` runs on a thread. Afterwards, the server stops.

    The client keeps its socket open and does not read from it after ``use``.
    """
    cert, key = certificate
    config = uvicorn.Config(application, log_config=None, proxy_headers=False, ssl_certfile=cert, ssl_keyfile=key)
    config.load()

    def connect(address: tuple[str, int]) -> ssl.SSLSocket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(30)
        client.connect(address)
        return ssl.create_default_context(cafile=str(cert)).wrap_socket(client, server_hostname="127.0.0.1")

    async def serve() -> None:
        loop, lost = asyncio.get_running_loop(), asyncio.Event()
        protocol = BoundedHttpProtocol(config, ServerState(), {}, loop)
        protocol.on_connection_lost = lost.set
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # the system buffers little
        server = await loop.create_server(lambda: protocol, sock=listener, ssl=config.ssl)
        async with server, asyncio.timeout(20):  # less than the 30 s of the event loop
            with await asyncio.to_thread(connect, listener.getsockname()) as client:
                await asyncio.to_thread(use, client)
                protocol.shutdown()
                await lost.wait()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve())


@LOOPS
def test_an_idle_tls_client_does_not_delay_the_stop(
    certificate: tuple[Path, Path], new_loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_limit, "CLOSE_NOTIFY_SECONDS", 0.01)

    def use(client: ssl.SSLSocket) -> None:
        client.sendall(GET)
        assert client.recv(65536).startswith(b"HTTP/1.1 204 ")

    serve_tls(Application(), certificate, new_loop, use)


@LOOPS
@pytest.mark.parametrize("size", [50_000, 2**20])
def test_a_large_tls_answer_that_the_client_still_reads_is_complete(
    certificate: tuple[Path, Path], new_loop: Loop, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transport of TLS has passed on all bytes, but the transport below it has not sent them.

    It keeps back the end of TLS itself only if many bytes are unsent.
    """
    monkeypatch.setattr(write_limit, "CLOSE_NOTIFY_SECONDS", 0.01)
    checks, checked = count(1), threading.Event()

    def counted(transport: Any) -> int:
        if next(checks) == 5:
            checked.set()
        return unsent_bytes(transport)

    monkeypatch.setattr(write_limit, "unsent_bytes", counted)

    def use(client: ssl.SSLSocket) -> None:
        client.sendall(GET)
        answer = bytearray(client.recv(100))
        assert checked.wait(30)
        while part := client.recv(2**20):
            answer += part
        assert len(answer.partition(b"\r\n\r\n")[2]) == size

    serve_tls(LargeAnswer(size), certificate, new_loop, use)
