"""Send a response as server-sent events."""

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


def event(data: object) -> bytes:
    """Encode an event with ``data`` as JSON."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(Response):
    """A response that sends ``events`` as they come, and ``last`` at the end.

    An error before the first event becomes a response with the error's status. A later error becomes an event, so that
    no stream ends without a reason. FastAPI's ``EventSourceResponse`` cannot do this, because it starts the response
    before the first event.

    While the client does not read, no further event is taken from ``events`` (back-pressure). Sending the error that
    ends a stream takes at most ``close_seconds``. ``model`` is the value of the header ``x-model``.

    Raises:
        CallerGone: the client disconnected.
    """

    def __init__(
        self,
        request: Request,
        events: AsyncGenerator[bytes, None],
        last: bytes = DONE,
        close_seconds: float = 1.0,
        model: str = "",
    ) -> None:
        # Proxies must not buffer, compress or store the events.
        headers = {"x-model": model, "cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
        super().__init__(None, headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.request = request
        self.events = events
        self.last = last
        self.close_seconds = close_seconds
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure: QuartetError
        try:
            async with aclosing(self.events) as events, Deadline(self.request):
                async for chunk in events:
                    await self._send(send, chunk)
                await self._send(send, self.last, more=False)
                return
        except CallerGone:
            raise
        except QuartetError as error:
            failure = error.without_frames()
        except asyncio.CancelledError:  # the time for a graceful shutdown is over
            failure = NotReady("the service stopped before the answer was complete")
        except Exception:
            if not self.started:
                raise
            log.exception("a stream failed")
            failure = QuartetError("the service failed; see its log")
        if not self.started:
            await error_response(failure, scope["path"])(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.close_seconds):
                await self._send(send, event(error_content(failure, scope["path"])) + self.last, more=False)
        except TimeoutError:
            raise CallerGone("the client no longer reads") from None

    async def _send(self, send: Send, chunk: bytes, more: bool = True) -> None:
        if not self.started:
            self.started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
