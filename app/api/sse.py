"""Server-sent events: an answer that grows while it is read, and never ends without saying why."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import orjson
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api.deadline import Deadline
from app.api.errors import error_content, error_response
from app.errors import CallerGone, NotReady, QuartetError

log = logging.getLogger("quartet")
DONE = b"data: [DONE]\n\n"
MAX_CLOSE_SECONDS = 1.0  # seconds that a caller who has stopped reading may take to read why the stream ends


def event(data: object) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(Response):
    """Sends ``events`` as they come. What fails before the first one is an answer with its status, later an event.

    A caller who reads slowly is waited for, and until then nothing is asked of ``events``: no more than the socket's
    buffer is held for it. ``last`` stands at every end.
    """

    def __init__(
        self,
        request: Request,
        events: AsyncGenerator[bytes, None],
        until: float,
        last: bytes = DONE,
        **headers: str,
    ) -> None:
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        # so that no proxy gathers or stores what is to be seen at once
        told |= {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
        super().__init__(None, headers=told, media_type="text/event-stream")
        del self.headers["content-length"]
        self.request = request
        self.events = events
        self.until = until
        self.last = last
        self.begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure: QuartetError
        try:
            async with aclosing(self.events) as events, Deadline(self.request, self.until):
                async for piece in events:
                    await self._send(send, piece)
                await self._send(send, self.last, more=False)
                return
        except CallerGone:
            raise
        except QuartetError as error:
            failure = error
        except asyncio.CancelledError:  # at shutdown, when a request has had the time that it may take
            failure = NotReady("the service stopped before the answer was whole")
        except Exception:  # nothing foreseen: but a stream never just ends
            if not self.begun:
                raise
            log.exception("a stream failed")
            failure = QuartetError("the service failed; its log tells more")
        if not self.begun:
            await error_response(failure)(scope, receive, send)
            return
        try:
            async with asyncio.timeout(MAX_CLOSE_SECONDS):
                await self._send(send, event(error_content(failure, scope["path"])) + self.last, more=False)
        except TimeoutError:
            raise CallerGone("the caller reads no longer") from None

    async def _send(self, send: Send, piece: bytes, more: bool = True) -> None:
        if not self.begun:
            self.begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": piece, "more_body": more})
