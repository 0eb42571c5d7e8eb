"""Continuous batching: texts join and leave the running batch at every step.

A text waits, runs, and leaves when it is finished or nobody waits for it any more; a short one never waits for a
long one. What a step does is the decoder's: this file only says whose turn it is.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from app.engine.door import Door
from app.engine.lane import Lane
from app.engine.watch import Watch
from app.errors import InferenceFailed, NotReady


class Steppable(Protocol):
    @property
    def finished(self) -> bool: ...


Text = TypeVar("Text", bound=Steppable)


@dataclass(eq=False)
class Row(Generic[Text]):
    """A text and the future that carries it back when it is finished."""

    text: Text
    answer: asyncio.Future[Text]
    since: float = field(default_factory=time.monotonic)  # when it was queued, then when it began to run


class TextEngine(Generic[Text]):
    """The texts of one model. ``step`` advances each text it is given by a little, on the lane.

    ``step`` must leave a text as it was when it raises. At most ``rows`` texts run and ``queue_rows`` wait.
    """

    def __init__(
        self, name: str, step: Callable[[Sequence[Text]], None], lane: Lane, watch: Watch, rows: int, queue_rows: int
    ) -> None:
        self.name = name
        self._step = step
        self._lane = lane
        self._watch = watch
        self._rows = rows
        self._door = Door(name, watch, queue_rows)
        self._waiting: deque[Row[Text]] = deque()
        self._running: list[Row[Text]] = []
        self._stepping: asyncio.Task[None] | None = None
        self._pace = 1.0  # seconds from a text's start to its end

    @property
    def queued_rows(self) -> int:
        return sum(not row.answer.done() for row in self._waiting)

    def admit(self, texts: int) -> None:
        """Raises NotReady or Overloaded when so many texts would not be let in now."""
        self._door.admit(self.queued_rows, texts, self._rows / self._pace)

    async def submit(self, texts: Sequence[Text]) -> list[Text]:
        """Queue all texts or none, and wait until each is finished.

        Raises as ``admit`` does, and InferenceFailed when the network fails on one of them.
        """
        self.admit(len(texts))
        loop = asyncio.get_running_loop()
        rows = [Row(text, loop.create_future()) for text in texts]
        self._waiting.extend(rows)
        if self._stepping is None:
            self._stepping = loop.create_task(self._run())
        try:
            return list(await asyncio.gather(*(row.answer for row in rows)))
        finally:
            for row in rows:
                row.answer.cancel()  # on failure or hang-up the row leaves at the next step; done ones ignore it

    async def _run(self) -> None:
        try:
            while self._join():
                await self._advance(self._running)
                self._leave()
        finally:
            self._stepping = None

    def _join(self) -> list[Row[Text]]:
        """Let waiting texts take the rows that are free; gives who runs now."""
        now = time.monotonic()
        while self._waiting and len(self._running) < self._rows:
            row = self._waiting.popleft()
            if not row.answer.done():
                self._watch.waited(self.name, now - row.since)
                row.since = now
                self._running.append(row)
        return self._running

    def _leave(self) -> None:
        """Answer the finished texts, and take them and the abandoned ones out of the running batch."""
        for row in self._running:
            if row.text.finished and not row.answer.done():
                self._pace = 0.8 * self._pace + 0.2 * (time.monotonic() - row.since)
                row.answer.set_result(row.text)
        self._running = [row for row in self._running if not row.answer.done()]

    async def _advance(self, rows: list[Row[Text]]) -> None:
        """One step for all; when it fails, one for each, so that only the guilty one is told. Never raises."""
        try:
            _, seconds = await self._lane.timed(self._step, [row.text for row in rows])
            self._watch.computed(self.name, len(rows), seconds)
        except Exception as error:
            if len(rows) > 1:
                for row in rows:
                    await self._advance([row])
            elif not rows[0].answer.done():
                self._watch.failed(self.name, error)
                failure = InferenceFailed(f"{self.name} failed on this text ({type(error).__name__})")
                rows[0].answer.set_exception(failure)

    async def close(self, seconds: float) -> None:
        """Refuse what comes, finish what runs and waits, and after ``seconds`` tell those still waiting."""
        self._door.closed = True
        if self._stepping:
            await asyncio.wait([self._stepping], timeout=seconds)
        for row in (*self._waiting, *self._running):
            if not row.answer.done():
                row.answer.set_exception(NotReady(f"{self.name} stopped before it could answer"))
        self._waiting.clear()
