"""A transport that sends the head of a response together with its body, and the number of unsent bytes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any


class CoalescingTransport:
    """The transport of one response. It sends the head and the first part of the body in one system call.

    Two system calls would take twice as long and wake the client twice. A head without a content-length is sent
    immediately. ``close`` calls ``on_close``, which closes the connection now or later.
    """

    def __init__(self, transport: Any, on_close: Callable[[], None]) -> None:
        self.transport = transport
        self.on_close = on_close
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
        self.on_close()

    def is_closing(self) -> bool:
        return bool(self.transport.is_closing())


def unsent_bytes(transport: Any) -> int:
    """Return the number of bytes in the buffer of ``transport`` and in the send queue of its socket."""
    unsent = transport.get_write_buffer_size()
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import fcntl
        import termios

        queued = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        unsent += int.from_bytes(queued, sys.byteorder)
    return int(unsent)
