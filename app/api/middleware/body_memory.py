"""Limit the memory of all running requests together. ``app/api/request_body.py`` limits the size of each body."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import error_response
from app.errors import CallerGone, MemoryFull
from app.limits import Limits

PART_BYTES = 64 * 1024  # larger responses are sent in parts of this size; the server buffers about as much
HOLD = "quartet.hold_memory"  # key in the ASGI scope: a function that counts bytes for the request


def hold_memory(request: Request, size: int) -> None:
    """Count ``size`` more bytes, such as a decompressed body, until the request ends. Call this on the event loop.

    Raises:
        MemoryFull: all requests together would hold too many bytes.
    """
    if size and (hold := request.scope.get(HOLD)):
        hold(size)


@dataclass(eq=False)
class BodyMemoryLimit:
    """ASGI middleware that rejects a request if all running requests together would hold more than ``limit`` bytes.

    The middleware counts request bodies, the bytes that endpoints report with ``hold_memory``, and large responses
    until the client has read them. A response may exceed the limit if all other requests hold at most half of the
    limit. Requests to the paths in ``spooled`` are not counted, because their endpoints write the body to disk as it
    arrives.
    """

    app: ASGIApp
    limit: int
    spooled: Collection[str] = ()
    limits: Limits = field(default_factory=Limits)
    held_bytes: int = 0

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
                raise self._memory_full()

        async def counted_receive() -> Message:
            message = await receive()
            hold(len(message.get("body", b"")))
            return message

        start: Message | None = None  # the start of the response, held back until the first part of its body comes

        async def counted_send(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            size = len(message.get("body", b""))
            if start and size > PART_BYTES and not self._has_room(size, request_bytes):
                await error_response(self._memory_full(), scope["path"])(scope, receive, send)
                raise CallerGone("the response has been replaced by an error")
            if start:
                await send(start)
                start = None
            if size <= PART_BYTES:
                await send(message)
                return
            self.held_bytes += size
            try:
                await self._send_in_parts(send, message)
            except TimeoutError:
                raise CallerGone("the client reads the response too slowly") from None
            finally:
                self.held_bytes -= size

        scope[HOLD] = hold
        try:
            await self.app(scope, counted_receive, counted_send)
        finally:
            self.held_bytes -= request_bytes

    def _has_room(self, size: int, own: int) -> bool:
        """Return whether a request that already holds ``own`` bytes may hold a response of ``size`` bytes."""
        return self.held_bytes + size <= self.limit or self.held_bytes - own <= self.limit / 2

    def _memory_full(self) -> MemoryFull:
        return MemoryFull(f"all running requests together would hold more than {self.limit:,} bytes", retry_after=1)

    async def _send_in_parts(self, send: Send, message: Message) -> None:
        """Send a body in parts, so that the server waits for the client between two parts.

        Raises:
            TimeoutError: the client reads too slowly.
        """
        body, more_body = message["body"], message.get("more_body", False)
        seconds = self.limits.slow_read_seconds + len(body) / self.limits.min_read_bytes_per_second
        async with asyncio.timeout(seconds):
            for end in range(PART_BYTES, len(body) + PART_BYTES, PART_BYTES):
                more = more_body or end < len(body)
                await send({**message, "body": body[end - PART_BYTES : end], "more_body": more})
