"""The limit on the time that a response waits for the client. Stubs replace the event loop and the transport."""

from __future__ import annotations

import socket
import struct
from unittest.mock import Mock

import pytest
from support.stubs.http import Connection

from app.server.coalescing_transport import unsent_bytes
from app.server.write_limit import STALLED_WRITE_BYTES, STALLED_WRITE_SECONDS


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
