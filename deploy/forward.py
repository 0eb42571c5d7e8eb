"""A request carried to an application in another process, and its answer back, message by message. Knows no Ray."""

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

CARRIED = (
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
PENDING = 64  # messages of an answer that its reader has not taken yet
HELD = 2**20  # bytes of an answer that may wait for its end, so that another replica can be asked if it does not come
TRIES = 3  # at a request whose replica died before the answer had begun
END: Message = {"type": "end"}


class Answer(Protocol):
    """Lists of ASGI messages, as they come."""

    def __aiter__(self) -> AsyncIterator[list[Message]]: ...

    def cancel(self) -> object: ...


class Hosted:
    """An application without a socket: it is started, asked and stopped by whoever holds it."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self._lifespan = app.router.lifespan_context(app)
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._lifespan.__aenter__()

    async def stop(self) -> None:
        await self._lifespan.__aexit__(None, None, None)

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        """The ASGI messages of an answer: those that come at once in one list. Closed early, the caller has hung up."""
        queue: asyncio.Queue[Message] = asyncio.Queue(PENDING)
        gone = asyncio.Event()
        task = asyncio.create_task(self._run(scope, body, queue, gone))
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
            gone.set()
            while not queue.empty():  # so that nobody waits to put one more into it
                queue.get_nowait()

    async def _run(self, scope: Scope, body: bytes, queue: asyncio.Queue[Message], gone: asyncio.Event) -> None:
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if whole:
                return whole.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if not gone.is_set():
                await queue.put(message)

        try:
            await self.app({**scope, "state": {}, "client": None, "server": None}, receive, send)
        finally:
            await send(END)


class Forwarded(Response):
    """The answer of another process. ``call`` asks one of several; ``lost`` are the failures by which one dies, after
    which another one is asked as long as the answer has not begun, ``full`` is raised when all have too much to do.

    A stream begins with its first event, any other answer once it is whole or has more than ``HELD`` bytes.

    ``most``: bytes of a body that are carried; a longer one is cut after one more, and the application refuses it.
    """

    def __init__(
        self,
        call: Callable[[Scope, bytes], Answer],
        most: int,
        lost: tuple[type[Exception], ...],
        full: type[Exception],
    ) -> None:
        super().__init__()
        self.call = call
        self.most = most
        self.lost = lost
        self.full = full
        self.streamed = False
        self.begun = False  # whether the caller has seen anything
        self.whole = False  # whether all has been sent: a replica that dies then takes nothing with it
        self.held: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._body(receive)
        if body is None:
            return
        carried = {key: scope[key] for key in CARRIED if key in scope}
        carried["headers"] = [tuple(header) for header in scope["headers"]]
        left = asyncio.Event()
        for _ in range(TRIES):
            try:
                await self._relay(self.call(carried, body), receive, send, left)
                return
            except self.full:
                told = Overloaded("all replicas have as much to do as they may", retry_after=1)
                await error_response(told)(scope, receive, send)
                return
            except self.lost:
                if self.whole:
                    return
                if self.begun:
                    break
                self.held.clear()
        if not self.begun:
            await error_response(NotReady("the replicas that were asked died; try again"))(scope, receive, send)
        elif self.streamed:
            told_in_stream = event(error_content(NotReady("the replica that wrote this answer died"))) + DONE
            await send({"type": "http.response.body", "body": told_in_stream, "more_body": False})
        else:
            raise ConnectionError("the replica died in the middle of its answer")

    async def _body(self, receive: Receive) -> bytes | None:
        """What the caller sent, or none when it hung up."""
        pieces, length = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            if length <= self.most:
                pieces.append(message.get("body", b""))
                length += len(pieces[-1])
            if not message.get("more_body", False):
                return b"".join(pieces)[: self.most + 1]

    async def _pass_on(self, message: Message, send: Send) -> None:
        self.held.append(message)
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self.streamed = kind.startswith(b"text/event-stream")
            return
        whole = not message.get("more_body", False)
        if whole or self.streamed or sum(len(each.get("body", b"")) for each in self.held) > HELD:
            self.begun = True
            for each in self.held:
                await send(each)
            self.held.clear()
            self.whole = whole

    async def _relay(self, answer: Answer, receive: Receive, send: Send, left: asyncio.Event) -> None:
        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()
            answer.cancel()

        watching = asyncio.create_task(watch())
        try:
            async for messages in answer:
                for message in messages:
                    await self._pass_on(message, send)
        except BaseException:
            if not left.is_set():  # else it was ended from here
                raise
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching


def gathered(figures: Mapping[str, Iterable[Metric]]) -> bytes:
    """The figures of several processes as one page for Prometheus, with the label ``replica``."""
    families: dict[str, Metric] = {}
    for replica, metrics in figures.items():
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [
                Sample(sample.name, {**sample.labels, "replica": replica}, sample.value) for sample in metric.samples
            ]

    class Gathered:
        def collect(self) -> Iterable[Metric]:
            return families.values()

    return generate_latest(Gathered())  # it only collects


def task_of(path: str, cards: Callable[[str], str | None]) -> str | None:
    """Which task a request is for, by its path; ``cards`` says it of a model. None: of none, any process can answer."""
    for prefix in ("/v2/models/", "/v2/repository/models/"):
        if path.startswith(prefix):
            return cards(path.removeprefix(prefix).split("/")[0].split("@")[0])
    return next((task.name for task in TASKS.values() if path in task.paths), None)
