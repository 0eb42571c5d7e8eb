"""Forward requests to an application in another process, and return its responses. This module does not import Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Protocol

from fastapi import FastAPI
from prometheus_client import Metric, generate_latest
from prometheus_client.samples import Sample
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.api.errors import error_content, error_response
from app.api.request_body import body_chunks
from app.api.sse import DONE, event
from app.errors import CallerGone, InferenceFailed, NotReady, Overloaded, QuartetError
from app.tasks import TASKS

FORWARDED_SCOPE = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
)
MAX_QUEUED_MESSAGES = 64  # limit for the unsent messages of a response
MAX_HELD_BYTES = 2**20  # bytes of a response that are held back; if the replica dies, another replica can still answer
MAX_TRIES = 2  # tries of a repeatable request; there are only two, because the request itself may crash replicas
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
REPLICAS_DIED = f"{MAX_TRIES} replicas died while they answered this request"
OUTCOME_UNKNOWN = "the replica died while it answered; check whether it made the change before you repeat the request"
END: Message = {"type": "end"}


class RemoteResponse(Protocol):
    """A response as an asynchronous iterator over lists of ASGI messages. It can be cancelled."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    def cancel(self) -> object: ...


class HostedApp:
    """An application that does not listen on a socket. Its owner starts it, sends it requests and stops it."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self._lifespan = app.router.lifespan_context(app)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._lifespan.__aenter__()

    async def stop(self) -> None:
        await self._lifespan.__aexit__(None, None, None)

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        """Answer a request. Yields lists of ASGI messages. Closing the generator cancels the request."""
        queue: asyncio.Queue[Message] = asyncio.Queue(MAX_QUEUED_MESSAGES)
        cancelled = asyncio.Event()
        task = asyncio.create_task(self._run(scope, body, queue, cancelled))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while (messages := [await queue.get()])[-1] is not END:
                while not queue.empty() and messages[-1] is not END:
                    messages.append(queue.get_nowait())
                if ended := messages[-1] is END:
                    messages.pop()
                yield messages
                if ended:
                    return
        finally:
            cancelled.set()
            while not queue.empty():  # make space, so that no sender waits
                queue.get_nowait()

    async def _run(self, scope: Scope, body: bytes, queue: asyncio.Queue[Message], cancelled: asyncio.Event) -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await cancelled.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if not cancelled.is_set():
                await queue.put(message)

        try:
            await self.app({**scope, "state": {}, "client": None, "server": None}, receive, send)
        finally:
            await send(END)


class ForwardedResponse(Response):
    """The response of a replica in another process.

    ``call`` sends the request to a replica. It raises ``overload_error`` if all replicas are at their limit of
    requests, and one of ``replica_errors`` if the replica fails. If the replica fails before anything was sent to the
    client, a repeatable request is sent to another replica. A request is rejected as soon as its body has more than
    ``max_body_bytes``, or if no byte of the body arrives for ``pause_seconds``.

    The events of a stream are sent to the client immediately. Any other response is held back until it is complete or
    has more than ``MAX_HELD_BYTES``.
    """

    def __init__(
        self,
        call: Callable[[Scope, bytes], RemoteResponse],
        max_body_bytes: int,
        pause_seconds: float,
        replica_errors: tuple[type[Exception], ...],
        overload_error: type[Exception],
    ) -> None:
        super().__init__()
        self.call = call
        self.max_body_bytes = max_body_bytes
        self.pause_seconds = pause_seconds
        self.replica_errors = replica_errors
        self.overload_error = overload_error
        self.streamed = False
        self.started = False  # whether the client has received anything
        self.complete = False  # whether everything has been sent; an error of the replica then has no effect
        self.held: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            chunks = body_chunks(Request(scope, receive), self.max_body_bytes, self.pause_seconds)
            body = b"".join([chunk async for chunk in chunks])
        except CallerGone:
            return
        except QuartetError as rejection:
            await error_response(rejection, scope["path"])(scope, receive, send)
            return
        forwarded = {key: scope[key] for key in FORWARDED_SCOPE if key in scope}
        forwarded["headers"] = [tuple(header) for header in scope["headers"]]
        disconnected = asyncio.Event()
        repeatable = is_repeatable(scope)
        for _ in range(MAX_TRIES if repeatable else 1):
            try:
                await self._relay(self.call(forwarded, body), receive, send, disconnected)
                return
            except self.overload_error:
                error = Overloaded("all replicas are at their limit of requests", retry_after=1)
                await error_response(error, scope["path"])(scope, receive, send)
                return
            except self.replica_errors:
                if self.complete:
                    return
                if self.started:
                    break
                self.held.clear()
        if not self.started:
            failure = InferenceFailed(REPLICAS_DIED if repeatable else OUTCOME_UNKNOWN)
            await error_response(failure, scope["path"])(scope, receive, send)
        elif self.streamed:
            last_events = (
                event(error_content(NotReady("the replica that generated this answer died"), scope["path"])) + DONE
            )
            await send({"type": "http.response.body", "body": last_events, "more_body": False})
        else:
            raise ConnectionError("the replica died while sending its response")

    async def _pass_on(self, message: Message, send: Send) -> None:
        self.held.append(message)
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.streamed = kind.startswith(b"text/event-stream")
            return
        complete = not message.get("more_body", False)
        if complete or self.streamed or sum(len(each.get("body", b"")) for each in self.held) > MAX_HELD_BYTES:
            self.started = True
            for each in self.held:
                await send(each)
            self.held.clear()
            self.complete = complete

    async def _relay(self, response: RemoteResponse, receive: Receive, send: Send, disconnected: asyncio.Event) -> None:
        async def wait_for_disconnect() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            disconnected.set()
            response.cancel()

        watcher = asyncio.create_task(wait_for_disconnect())
        try:
            async for messages in response:
                for message in messages:
                    await self._pass_on(message, send)
        except BaseException:
            if not disconnected.is_set():  # if disconnected, the cancellation above caused the error
                raise
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher


def render_metrics(by_replica: Mapping[str, Iterable[Metric]]) -> bytes:
    """Return the metrics of all replicas in Prometheus' text format, with the name of the replica as a label."""
    families: dict[str, Metric] = {}
    for replica, metrics in by_replica.items():
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [
                Sample(sample.name, {**sample.labels, "replica": replica}, sample.value) for sample in metric.samples
            ]

    class Families:
        def collect(self) -> Iterable[Metric]:
            return families.values()

    return generate_latest(Families())


def is_repeatable(scope: Scope) -> bool:
    """Return whether a request changes nothing, so that it may be sent again if its outcome is unknown."""
    path = scope["path"]
    computes = path.startswith("/v2/models/") or any(path in task.paths for task in TASKS.values())
    return computes or scope["method"] in SAFE_METHODS
