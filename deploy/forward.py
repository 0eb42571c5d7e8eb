"""Forward requests to an application in another process, and return its ASGI messages. Does not depend on Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Protocol

from fastapi import FastAPI
from prometheus_client import Metric, generate_latest
from prometheus_client.samples import Sample
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.api.errors import error_content, error_response
from app.api.sse import DONE, event
from app.errors import NotReady, Overloaded
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
MAX_QUEUED_MESSAGES = 64  # of one response, until they are sent
MAX_HELD_BYTES = 2**20  # of a response, held back so that another replica can be tried if this one dies
MAX_TRIES = 3  # for a request whose replica died before the response started
END: Message = {"type": "end"}


class RemoteResponse(Protocol):
    """An asynchronous iterator over lists of ASGI messages that can be cancelled."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    def cancel(self) -> object: ...


class HostedApp:
    """An application without a socket, which its owner starts, calls and stops."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self._lifespan = app.router.lifespan_context(app)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._lifespan.__aenter__()

    async def stop(self) -> None:
        await self._lifespan.__aexit__(None, None, None)

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        """Yield lists of ASGI messages of the response. Close the generator to cancel the request."""
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
            while not queue.empty():  # so that no sender waits for space
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

    ``call`` sends the request to a replica. If it raises an error of ``replica_errors`` before the response has
    started, another replica is tried. It raises ``overload_error`` if all replicas are full.

    A stream starts with its first event. Other responses start when they are complete, or after ``MAX_HELD_BYTES``.
    Request bodies are cut one byte after ``max_body_bytes``, so that the application rejects them.
    """

    def __init__(
        self,
        call: Callable[[Scope, bytes], RemoteResponse],
        max_body_bytes: int,
        replica_errors: tuple[type[Exception], ...],
        overload_error: type[Exception],
    ) -> None:
        super().__init__()
        self.call = call
        self.max_body_bytes = max_body_bytes
        self.replica_errors = replica_errors
        self.overload_error = overload_error
        self.streamed = False
        self.started = False  # whether the client has received anything
        self.complete = False  # whether all has been sent: a later death of the replica does not matter
        self.held: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._body(receive)
        if body is None:
            return
        forwarded = {key: scope[key] for key in FORWARDED_SCOPE if key in scope}
        forwarded["headers"] = [tuple(header) for header in scope["headers"]]
        disconnected = asyncio.Event()
        for _ in range(MAX_TRIES):
            try:
                await self._relay(self.call(forwarded, body), receive, send, disconnected)
                return
            except self.overload_error:
                error = Overloaded("all replicas are at their limit of requests", retry_after=1)
                await error_response(error)(scope, receive, send)
                return
            except self.replica_errors:
                if self.complete:
                    return
                if self.started:
                    break
                self.held.clear()
        if not self.started:
            await error_response(NotReady("the replicas died while answering; try again"))(scope, receive, send)
        elif self.streamed:
            last_events = event(error_content(NotReady("the replica that generated this answer died"))) + DONE
            await send({"type": "http.response.body", "body": last_events, "more_body": False})
        else:
            raise ConnectionError("the replica died while sending its response")

    async def _body(self, receive: Receive) -> bytes | None:
        """The request body, or None if the client disconnected."""
        parts, length = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            if length <= self.max_body_bytes:
                parts.append(message.get("body", b""))
                length += len(parts[-1])
            if not message.get("more_body", False):
                return b"".join(parts)[: self.max_body_bytes + 1]

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
            if not disconnected.is_set():  # otherwise the cancellation above caused it
                raise
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher


def render_metrics(by_replica: Mapping[str, Iterable[Metric]]) -> bytes:
    """The metrics of several replicas in Prometheus' text format, with the label ``replica``."""
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


def task_of_path(path: str, task_of_model: Callable[[str], str | None]) -> str | None:
    """The task of a request, or None if any replica can answer. ``task_of_model`` maps a model name to its task."""
    for prefix in ("/v2/models/", "/v2/repository/models/"):
        if path.startswith(prefix):
            return task_of_model(path.removeprefix(prefix).split("/")[0].split("@")[0])
    return next((task.name for task in TASKS.values() if path in task.paths), None)
