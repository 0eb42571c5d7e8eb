"""A limit on the bytes of all request bodies in memory. ``app/api/request_body.py`` limits each single body."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import Overloaded


class BodyMemoryLimit:
    """ASGI middleware: reject a request when the bodies of all running requests would hold more than ``limit`` bytes.

    Bodies of requests to ``spooled`` paths are not counted: their endpoints write them to disk as they arrive.
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
        body_bytes = 0

        async def counted_receive() -> Message:
            nonlocal body_bytes
            message = await receive()
            length = len(message.get("body", b""))
            body_bytes += length
            self.held_bytes += length
            if length and self.held_bytes > self.limit:
                raise Overloaded(f"all running request bodies together exceed {self.limit:,} bytes", retry_after=1)
            return message

        try:
            await self.app(scope, counted_receive, send)
        finally:
            self.held_bytes -= body_bytes
