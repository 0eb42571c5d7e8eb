"""A limit on the memory of all requests. ``app/api/request_body.py`` limits each single body."""

from __future__ import annotations

from collections.abc import Collection

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import Overloaded

HOLD = "quartet.hold_memory"  # key in the ASGI scope: a function that counts bytes for the request


def hold_memory(request: Request, size: int) -> None:
    """Count ``size`` further bytes until the request ends, such as a decompressed body. Call this on the event loop.

    Raises:
        Overloaded: all requests together would hold too many bytes.
    """
    if size and (hold := request.scope.get(HOLD)):
        hold(size)


class BodyMemoryLimit:
    """ASGI middleware: reject a request when all running requests would hold more than ``limit`` bytes.

    Counted are bodies, and what endpoints report by ``hold_memory``. Bodies of requests to ``spooled`` paths are not
    counted: their endpoints write them to disk as they arrive.
    """

    def __init__(self, app: ASGIApp, limit: int, spooled: Collection[str] = ()) -> None:
        self.app = app
        self.limit = limit
        self.spooled = spooled
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.spooled and scope.get("path") in self.spooled:
            await self.app(scope, receive, send)
            return
        request_bytes = 0

        def hold(size: int) -> None:
            nonlocal request_bytes
            request_bytes += size
            self.held_bytes += size
            if size and self.held_bytes > self.limit:
                raise Overloaded(f"all running requests together would hold more than {self.limit:,} bytes", 1)

        async def counted_receive() -> Message:
            message = await receive()
            hold(len(message.get("body", b"")))
            return message

        scope[HOLD] = hold
        try:
            await self.app(scope, counted_receive, send)
        finally:
            self.held_bytes -= request_bytes
