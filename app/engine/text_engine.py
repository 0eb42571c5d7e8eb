"""Continuous batching: texts join and leave the running batch at every step, or every millisecond of short ones.

A text waits, runs, and leaves when it is finished or nobody waits for it any more. A short one never waits for a
long one: where all rows are taken, long ones that have run for a while make room, and go on when it is their turn
again. What a step does is the decoder's: this file only says whose turn it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from app.engine.admission import AdmissionControl, current_caller
from app.engine.circuit_breaker import CircuitBreaker
from app.engine.executor import Executor
from app.engine.fair_queue import FairQueue
from app.engine.futures import abandon, fail, give
from app.engine.observer import ACCOUNT, Account, Watch
from app.errors import InferenceFailed, NotReady

TURN = 0.001  # seconds; shorter steps are taken several at a time, for what a turn of the event loop costs
CROWDED = 0.012  # seconds of a turn after which nobody finds room: to refuse one after each step costs more
LONG = 0.006  # seconds that all else takes between two turns, from which on a turn lasts as long as that did
LONGEST = 0.05  # seconds of a turn
STINT = 1.0  # seconds that a text runs before it makes room for a shorter one that waits
SHORTER = 4  # times as much has to be left of it: texts of one kind are done soonest one after the other
LOOK = 0.05  # seconds between two looks at who could make room
TOGETHER = 128  # texts that are reported as computed together, when the engine is not idle before


FOLLOWED = 0.0002  # seconds between two tellings of a text, for each text that is followed: see ``_tell``


class Steppable(Protocol):
    @property
    def finished(self) -> bool: ...

    @property
    def written(self) -> int:
        """Characters so far."""

    @property
    def left(self) -> int:
        """Characters that it may yet take."""


Text = TypeVar("Text", bound=Steppable)


@dataclass(eq=False, slots=True)
class Row(Generic[Text]):
    """A text, the future that carries it back when it is finished, and who wants to know that it has grown."""

    text: Text
    answer: asyncio.Future[Text]
    grown: asyncio.Event | None = None
    caller: str | None = None  # whose key sent it
    account: Account | None = None  # of the request that it belongs to
    queued: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    first: float = 0.0  # when its first character had come
    ended: float = 0.0
    rows: int = 1
    waits: bool = False  # in the queue
    joined: float = 0.0  # when it began to run, this time
    told: float = 0.0  # when its follower was woken last


class TextEngine(Generic[Text]):
    """The texts of one model. ``step`` advances each text it is given by a little, on the lane; ``seconds`` says how
    long a step of so many texts should take.

    ``step`` must leave a text as it was when it raises. At most ``rows`` texts run and ``queue_rows`` wait.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[Sequence[Text]], None],
        seconds: Callable[[int], float],
        executor: Executor,
        watch: Watch,
        rows: int,
        queue_rows: int,
        turn: float = TURN,
    ) -> None:
        self.name = name
        self._turn_seconds = turn
        self._step = step
        self._seconds = seconds
        self._executor = executor
        self.watch = watch
        self._rows = rows
        self._admission = AdmissionControl(name, watch, queue_rows)
        self._waiting: FairQueue[Row[Text]] = FairQueue()
        self._running: list[Row[Text]] = []
        self._silent: list[Row[Text]] = []  # those that run without a character so far
        self._done: list[Row[Text]] = []  # those that are finished and not reported yet
        self._stepping: asyncio.Task[None] | None = None
        self._pace = 1.0  # seconds from a text's start to its end
        self._turned = 0.0  # when the last turn ended
        self._written = 0.0  # by the lane, until then
        self._refused = 0  # by the door, when the last turn began
        self._looked = 0.0  # for somebody who could make room
        self.circuit_breaker = CircuitBreaker()

    @property
    def load(self) -> tuple[int, int]:
        """How many texts wait, and how many run."""
        return self._admission.waiting, len(self._running)

    def admit(self, texts: int) -> None:
        """Raises NotReady or Overloaded when so many texts would not be let in now."""
        self._admission.admit(texts, self._rows / self._pace)

    async def submit(self, texts: Sequence[Text]) -> list[Text]:
        """Queue all texts or none, and wait until each is finished.

        Raises as ``admit`` does, and InferenceFailed when the network fails on one of them.
        """
        rows = self._enter(texts)
        try:
            return [await row.answer for row in rows]
        finally:
            self._abandon(rows)

    async def follow(self, texts: Sequence[Text]) -> AsyncGenerator[None, None]:
        """The same, but comes back whenever some of the texts have grown, until all are finished.

        However slowly it is asked, nothing piles up: who comes late finds the texts longer. Raises as ``submit`` does.
        """
        grown = asyncio.Event()
        rows = self._enter(texts, grown)
        try:
            open_rows = rows
            while open_rows:
                await grown.wait()
                grown.clear()
                done = [row for row in open_rows if row.answer.done()]
                open_rows = [row for row in open_rows if row not in done]
                yield  # also what came before a failure
                for row in done:
                    row.answer.result()
        finally:
            self._abandon(rows)

    def _enter(self, texts: Sequence[Text], grown: asyncio.Event | None = None) -> list[Row[Text]]:
        self.admit(len(texts))
        loop, account, who = asyncio.get_running_loop(), ACCOUNT.get(), current_caller.get()
        rows = [Row(text, loop.create_future(), grown, who, account) for text in texts]
        for row in rows:
            self._queue(row)
        if self._stepping is None:
            self._stepping = loop.create_task(self._run())
        return rows

    def _abandon(self, rows: Sequence[Row[Text]]) -> None:
        """Nobody waits for these any more: they leave the queue, or the running batch at the next step."""
        for row in rows:
            abandon(row.answer)
            if row.waits:
                self._waiting.discard(row)
                self._leave_queue(row)

    def _leave_queue(self, row: Row[Text]) -> None:
        row.waits = False
        self._admission.remove(row.caller, 1)

    async def _run(self) -> None:
        self._note_turn(0.0)
        try:
            while self._join():
                await self._advance(self._running)
                self._leave()
                await self._executor.yield_to_requests()
        finally:
            self._stepping = None
            self._report()

    def _join(self) -> list[Row[Text]]:
        """Let waiting texts take the rows that are free; gives who runs now."""
        now = time.monotonic()
        self._running = [row for row in self._running if not row.answer.done()]
        if self._waiting and len(self._running) >= self._rows:
            self._make_room(now)
        while self._waiting and len(self._running) < self._rows:
            row = self._waiting.pop()
            self._leave_queue(row)
            if row.answer.done():
                continue
            row.joined = now
            self._running.append(row)
            if not row.begun:
                row.begun = now
                self._silent.append(row)
                self.watch.waited([row])
        return self._running

    def _make_room(self, now: float) -> None:
        """As many as wait leave their rows, of those that have run for a while and are much longer than one that waits.

        They are in the queue again: it is bounded, whoever is in it.
        """
        if now - self._looked < LOOK:
            return
        self._looked = now
        most = SHORTER * min(row.text.left for row in self._waiting)
        long = [row for row in self._running if now - row.joined > STINT and row.text.left > most]
        for row in long[: len(self._waiting)]:
            self._running.remove(row)
            self._queue(row)

    def _queue(self, row: Row[Text]) -> None:
        row.waits = True
        self._admission.add(row.caller, 1)
        self._waiting.append(row)

    def _leave(self) -> None:
        """Answer the finished texts, and tell whoever follows one."""
        now = time.monotonic()
        if self._silent:
            self._listen(now)
        for row in self._running:
            if row.text.finished and not row.answer.done():
                self._pace = 0.8 * self._pace + 0.2 * (now - row.begun)
                self._finish(row, now)
                give(row.answer, row.text)
        self._tell(now)
        self._running = [row for row in self._running if not row.answer.done()]
        if not self._running:
            self._report()

    def _listen(self, now: float) -> None:
        """Report the texts whose first character has come."""
        for row in self._silent:
            if row.text.written and not row.answer.done():
                row.first = now
                self.watch.first(row, now - row.queued)
        self._silent = [row for row in self._silent if not (row.first or row.text.finished or row.answer.done())]

    def _finish(self, row: Row[Text], now: float) -> None:
        row.ended = now
        if row.first and row.text.written > 1:
            self.watch.between((now - row.first) / (row.text.written - 1))
        self._done.append(row)
        if row.account:
            row.account.ended = now
        if len(self._done) >= TOGETHER:
            self._report()

    def _report(self) -> None:
        """Tell which texts were computed together since the engine was idle."""
        done, self._done = self._done, []
        if done:
            self.watch.served(done)

    def _tell(self, now: float) -> None:
        """Wake those who follow a text: at its first step and its end, and between the less often the more they are.

        To wake everybody and write to every socket at each step would cost more than the step.
        """
        followed = [row for row in self._running if row.grown]
        for row in followed:
            if row.answer.done() or now - row.told >= FOLLOWED * len(followed):
                row.told = now
                row.grown.set()  # type: ignore[union-attr]  # as was asked above

    def _turn(self, texts: list[Text]) -> None:
        """A step for all texts, and more until one of them is finished or begins to be written, or the turn is over.

        Beside long forwards of other models, or many short ones, it is a long turn: else texts would have a hundredth
        of the time. It is longer, too, while others are refused: the step after what came between is a slow one.
        """
        begun, others = time.perf_counter(), self._others()
        long = others > LONG
        seconds = min(others, LONGEST) if long else self._turn_seconds
        if self._refused != self._admission.rejected:
            self._refused, seconds = self._admission.rejected, max(seconds, CROWDED)
        silent = [text for text in texts if long and not text.written]
        try:
            self._step(texts)
            while time.perf_counter() < begun + seconds and not any(text.finished for text in texts):
                if any(text.written for text in silent):
                    break
                self._step(texts)
        finally:
            self._note_turn(time.perf_counter() - begun)

    def _note_turn(self, seconds: float) -> None:
        self._executor.text_seconds += seconds
        self._turned, self._written = time.perf_counter(), self._executor.text_seconds

    def _others(self) -> float:
        """For how many seconds all else has had its turn: the event loop, and other models in the lane.

        But not texts of another model: each would have as long a turn as the other, and both ever longer ones.
        """
        return time.perf_counter() - self._turned - (self._executor.text_seconds - self._written)

    async def _advance(self, rows: list[Row[Text]]) -> None:
        """A turn for all; when it fails, one for each, so that only the guilty one is told. Never raises."""
        try:
            texts = [row.text for row in rows]
            expected = self._seconds(len(rows)) if self._others() <= LONG else LONGEST
            _, seconds = await self._executor.run_timed(expected, self._turn, texts)
            self.circuit_breaker.record_success()
            self.watch.computed(len(rows), seconds)
        except Exception as error:
            if len(rows) > 1:
                for row in rows:
                    await self._advance([row])
                    await asyncio.sleep(0)
            elif not rows[0].answer.done():
                fail(rows[0].answer, InferenceFailed(f"{self.name} failed on this text ({type(error).__name__})"))
                self.circuit_breaker.record_failure()
                self.watch.failed(error)

    async def close(self, seconds: float) -> None:
        """Refuse what comes, finish what runs and waits, and after ``seconds`` tell those still waiting."""
        self._admission.closed = True
        if self._stepping:
            await asyncio.wait([self._stepping], timeout=seconds)
        for row in (*self._waiting, *self._running):
            fail(row.answer, NotReady(f"{self.name} stopped before it could answer"))
            if row.grown:
                row.grown.set()
        self._waiting.clear()
