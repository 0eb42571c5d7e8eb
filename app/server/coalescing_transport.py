"""A transport that sends the head of a response together with its body."""

from __future__ import annotations

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
