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
from app.engine.futures import cancel, set_exception, set_result
from app.engine.observer import EngineObserver, RequestTrace, current_trace
from app.errors import InferenceFailed, NotReady

STEP_BUDGET = 0.001  # seconds; shorter steps are taken several at a time, for what a turn of the event loop costs
STEP_BUDGET_REJECTING = (
    0.012  # seconds of a turn after which nobody finds room: to refuse one after each step costs more
)
LONG_GAP = 0.006  # seconds that all else takes between two turns, from which on a turn lasts as long as that did
MAX_STEP_BUDGET = 0.05  # seconds of a turn
PREEMPT_AFTER = 1.0  # seconds that a text runs before it makes room for a shorter one that waits
PREEMPT_RATIO = 4  # times as much has to be left of it: texts of one kind are done soonest one after the other
PREEMPT_CHECK_INTERVAL = 0.05  # seconds between two looks at who could make room
REPORT_BATCH = 128  # texts that are reported as computed together, when the engine is not idle before


NOTIFY_INTERVAL = 0.0002  # seconds between two tellings of a text, for each text that is followed: see ``_tell``


class SteppableText(Protocol):
    @property
    def finished(self) -> bool: ...

    @property
    def generated(self) -> int:
        """Characters so far."""

    @property
    def remaining(self) -> int:
        """Characters that it may yet take."""


Text = TypeVar("Text", bound=SteppableText)


@dataclass(eq=False, slots=True)
class TextSequence(Generic[Text]):
    """A text, the future that carries it back when it is finished, and who wants to know that it has grown."""

    text: Text
    future: asyncio.Future[Text]
    updated: asyncio.Event | None = None
    caller: str | None = None  # whose key sent it
    trace: RequestTrace | None = None  # of the request that it belongs to
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    first_token_at: float = 0.0  # when its first character had come
    ended_at: float = 0.0
    rows: int = 1
    waiting: bool = False  # in the queue
    joined_at: float = 0.0  # when it began to run, this time
    notified_at: float = 0.0  # when its follower was woken last


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
        observer: EngineObserver,
        rows: int,
        queue_rows: int,
        step_budget: float = STEP_BUDGET,
    ) -> None:
        self.name = name
        self._step_budget = step_budget
        self._step = step
        self._seconds = seconds
        self._executor = executor
        self.observer = observer
        self._rows = rows
        self._admission = AdmissionControl(name, observer, queue_rows)
        self._waiting: FairQueue[TextSequence[Text]] = FairQueue()
        self._running: list[TextSequence[Text]] = []
        self._without_token: list[TextSequence[Text]] = []  # those that run without a character so far
        self._unreported: list[TextSequence[Text]] = []  # those that are finished and not reported yet
        self._run_task: asyncio.Task[None] | None = None
        self._seconds_per_text = 1.0  # seconds from a text's start to its end
        self._last_turn_at = 0.0  # when the last turn ended
        self._text_seconds = 0.0  # by the lane, until then
        self._rejected = 0  # by the door, when the last turn began
        self._preemption_checked_at = 0.0  # for somebody who could make room
        self.circuit_breaker = CircuitBreaker()

    @property
    def load(self) -> tuple[int, int]:
        """How many texts wait, and how many run."""
        return self._admission.waiting, len(self._running)

    def admit(self, texts: int) -> None:
        """Raises NotReady or Overloaded when so many texts would not be let in now."""
        self._admission.admit(texts, self._rows / self._seconds_per_text)

    async def submit(self, texts: Sequence[Text]) -> list[Text]:
        """Queue all texts or none, and wait until each is finished.

        Raises as ``admit`` does, and InferenceFailed when the network fails on one of them.
        """
        rows = self._enqueue_all(texts)
        try:
            return [await row.future for row in rows]
        finally:
            self._cancel(rows)

    async def stream(self, texts: Sequence[Text]) -> AsyncGenerator[None, None]:
        """The same, but comes back whenever some of the texts have grown, until all are finished.

        However slowly it is asked, nothing piles up: who comes late finds the texts longer. Raises as ``submit`` does.
        """
        grown = asyncio.Event()
        rows = self._enqueue_all(texts, grown)
        try:
            open_rows = rows
            while open_rows:
                await grown.wait()
                grown.clear()
                done = [row for row in open_rows if row.future.done()]
                open_rows = [row for row in open_rows if row not in done]
                yield  # also what came before a failure
                for row in done:
                    row.future.result()
        finally:
            self._cancel(rows)

    def _enqueue_all(self, texts: Sequence[Text], grown: asyncio.Event | None = None) -> list[TextSequence[Text]]:
        self.admit(len(texts))
        loop, account, who = asyncio.get_running_loop(), current_trace.get(), current_caller.get()
        rows = [TextSequence(text, loop.create_future(), grown, who, account) for text in texts]
        for row in rows:
            self._queue(row)
        if self._run_task is None:
            self._run_task = loop.create_task(self._run())
        return rows

    def _cancel(self, rows: Sequence[TextSequence[Text]]) -> None:
        """Nobody waits for these any more: they leave the queue, or the running batch at the next step."""
        for row in rows:
            cancel(row.future)
            if row.waiting:
                self._waiting.discard(row)
                self._dequeue(row)

    def _dequeue(self, row: TextSequence[Text]) -> None:
        row.waiting = False
        self._admission.remove(row.caller, 1)

    async def _run(self) -> None:
        self._note_turn(0.0)
        try:
            while self._join():
                await self._advance(self._running)
                self._complete()
                await self._executor.yield_to_requests()
        finally:
            self._run_task = None
            self._report()

    def _join(self) -> list[TextSequence[Text]]:
        """Let waiting texts take the rows that are free; gives who runs now."""
        now = time.monotonic()
        self._running = [row for row in self._running if not row.future.done()]
        if self._waiting and len(self._running) >= self._rows:
            self._preempt(now)
        while self._waiting and len(self._running) < self._rows:
            row = self._waiting.pop()
            self._dequeue(row)
            if row.future.done():
                continue
            row.joined_at = now
            self._running.append(row)
            if not row.started_at:
                row.started_at = now
                self._without_token.append(row)
                self.observer.on_dequeued([row])
        return self._running

    def _preempt(self, now: float) -> None:
        """As many as wait leave their rows, of those that have run for a while and are much longer than one that waits.

        They are in the queue again: it is bounded, whoever is in it.
        """
        if now - self._preemption_checked_at < PREEMPT_CHECK_INTERVAL:
            return
        self._preemption_checked_at = now
        most = PREEMPT_RATIO * min(row.text.remaining for row in self._waiting)
        long = [row for row in self._running if now - row.joined_at > PREEMPT_AFTER and row.text.remaining > most]
        for row in long[: len(self._waiting)]:
            self._running.remove(row)
            self._queue(row)

    def _queue(self, row: TextSequence[Text]) -> None:
        row.waiting = True
        self._admission.add(row.caller, 1)
        self._waiting.append(row)

    def _complete(self) -> None:
        """Answer the finished texts, and tell whoever follows one."""
        now = time.monotonic()
        if self._without_token:
            self._report_first_tokens(now)
        for row in self._running:
            if row.text.finished and not row.future.done():
                self._seconds_per_text = 0.8 * self._seconds_per_text + 0.2 * (now - row.started_at)
                self._finish(row, now)
                set_result(row.future, row.text)
        self._notify(now)
        self._running = [row for row in self._running if not row.future.done()]
        if not self._running:
            self._report()

    def _report_first_tokens(self, now: float) -> None:
        """Report the texts whose first character has come."""
        for row in self._without_token:
            if row.text.generated and not row.future.done():
                row.first_token_at = now
                self.observer.on_first_token(row, now - row.queued_at)
        self._without_token = [
            row for row in self._without_token if not (row.first_token_at or row.text.finished or row.future.done())
        ]

    def _finish(self, row: TextSequence[Text], now: float) -> None:
        row.ended_at = now
        if row.first_token_at and row.text.generated > 1:
            self.observer.on_inter_token((now - row.first_token_at) / (row.text.generated - 1))
        self._unreported.append(row)
        if row.trace:
            row.trace.ended_at = now
        if len(self._unreported) >= REPORT_BATCH:
            self._report()

    def _report(self) -> None:
        """Tell which texts were computed together since the engine was idle."""
        done, self._unreported = self._unreported, []
        if done:
            self.observer.on_completed(done)

    def _notify(self, now: float) -> None:
        """Wake those who follow a text: at its first step and its end, and between the less often the more they are.

        To wake everybody and write to every socket at each step would cost more than the step.
        """
        followed = [row for row in self._running if row.updated]
        for row in followed:
            if row.future.done() or now - row.notified_at >= NOTIFY_INTERVAL * len(followed):
                row.notified_at = now
                row.updated.set()  # type: ignore[union-attr]  # as was asked above

    def _turn(self, texts: list[Text]) -> None:
        """A step for all texts, and more until one of them is finished or begins to be written, or the turn is over.

        Beside long forwards of other models, or many short ones, it is a long turn: else texts would have a hundredth
        of the time. It is longer, too, while others are refused: the step after what came between is a slow one.
        """
        begun, others = time.perf_counter(), self._seconds_since_turn()
        long = others > LONG_GAP
        seconds = min(others, MAX_STEP_BUDGET) if long else self._step_budget
        if self._rejected != self._admission.rejected:
            self._rejected, seconds = self._admission.rejected, max(seconds, STEP_BUDGET_REJECTING)
        silent = [text for text in texts if long and not text.generated]
        try:
            self._step(texts)
            while time.perf_counter() < begun + seconds and not any(text.finished for text in texts):
                if any(text.generated for text in silent):
                    break
                self._step(texts)
        finally:
            self._note_turn(time.perf_counter() - begun)

    def _note_turn(self, seconds: float) -> None:
        self._executor.text_seconds += seconds
        self._last_turn_at, self._text_seconds = time.perf_counter(), self._executor.text_seconds

    def _seconds_since_turn(self) -> float:
        """For how many seconds all else has had its turn: the event loop, and other models in the lane.

        But not texts of another model: each would have as long a turn as the other, and both ever longer ones.
        """
        return time.perf_counter() - self._last_turn_at - (self._executor.text_seconds - self._text_seconds)

    async def _advance(self, rows: list[TextSequence[Text]]) -> None:
        """A turn for all; when it fails, one for each, so that only the guilty one is told. Never raises."""
        try:
            texts = [row.text for row in rows]
            expected = self._seconds(len(rows)) if self._seconds_since_turn() <= LONG_GAP else MAX_STEP_BUDGET
            _, seconds = await self._executor.run_timed(expected, self._turn, texts)
            self.circuit_breaker.record_success()
            self.observer.on_batch(len(rows), seconds)
        except Exception as error:
            if len(rows) > 1:
                for row in rows:
                    await self._advance([row])
                    await asyncio.sleep(0)
            elif not rows[0].future.done():
                set_exception(
                    rows[0].future, InferenceFailed(f"{self.name} failed on this text ({type(error).__name__})")
                )
                self.circuit_breaker.record_failure()
                self.observer.on_failure(error)

    async def close(self, seconds: float) -> None:
        """Refuse what comes, finish what runs and waits, and after ``seconds`` tell those still waiting."""
        self._admission.closed = True
        if self._run_task:
            await asyncio.wait([self._run_task], timeout=seconds)
        for row in (*self._waiting, *self._running):
            set_exception(row.future, NotReady(f"{self.name} stopped before it could answer"))
            if row.updated:
                row.updated.set()
        self._waiting.clear()
