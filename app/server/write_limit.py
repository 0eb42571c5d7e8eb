"""Limits on the time that a response waits for the client to read it, and on the end of TLS."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any

from app.server.coalescing_transport import unsent_bytes
from app.server.upgrade import UpgradeIgnoringProtocol

STALLED_WRITE_SECONDS = 60.0  # in this time a client must read STALLED_WRITE_BYTES, or all unsent bytes if fewer
STALLED_WRITE_BYTES = 64 * 1024
CLOSE_NOTIFY_SECONDS = 1.0  # longest time until the client also ends TLS, after the server ended it and all bytes left


class WriteLimitedProtocol(UpgradeIgnoringProtocol):
    """uvicorn's httptools protocol, with limits on the time that a response or the end of TLS waits for the client."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.write_timer: asyncio.TimerHandle | None = None  # closes the connection if the client reads too little
        self.tls_timer: asyncio.TimerHandle | None = None  # ends a closed connection if the client does not end TLS

    def connection_lost(self, exc: Exception | None) -> None:
        if self.tls_timer is not None:
            self.tls_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_write_timer(unsent_bytes(self.transport))

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _start_write_timer(self, unsent: int) -> None:
        """Start a timer that closes the connection if the client reads too little.

        Otherwise unsent bytes would use memory, and would delay the exit of the server.
        """

        def check() -> None:
            if (remaining := unsent_bytes(self.transport)) <= max(0, unsent - STALLED_WRITE_BYTES):
                self._start_write_timer(remaining)
            else:
                with contextlib.suppress(OSError):  # SO_LINGER lets the system drop the unsent bytes
                    linger = self.transport.get_extra_info("socket").setsockopt
                    linger(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.transport.abort()

        self.write_timer = self.loop.call_later(STALLED_WRITE_SECONDS, check)

    def _stop_write_timer(self) -> None:
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None

    def _limit_closing(self) -> None:
        """Limit the time that a closed transport waits for the client to read the unsent bytes, and to end TLS."""
        is_tls = self.scheme == "https"
        if self.write_timer is None and (is_tls or self.transport.get_write_buffer_size()):
            self._start_write_timer(unsent_bytes(self.transport))
        if is_tls and self.tls_timer is None:
            self._start_tls_timer()

    def _start_tls_timer(self) -> None:
        """Start a timer that ends a closed connection if all bytes have left, but the client does not end TLS.

        The transport would wait 30 s for the client's ``close_notify``. Clients that do not read while they are idle do
        not send it, and would delay the exit of the server.
        """

        def check() -> None:
            if unsent_bytes(self.transport):
                self._start_tls_timer()
            else:  # not abort(), because the transport below TLS may still have bytes, which ``unsent_bytes`` omits
                with contextlib.suppress(OSError), self.transport.get_extra_info("socket").dup() as connection:
                    connection.shutdown(socket.SHUT_RD)  # for the transport, as if the client closed the connection

        self.tls_timer = self.loop.call_later(CLOSE_NOTIFY_SECONDS, check)
