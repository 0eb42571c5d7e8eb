"""One-shot requests grouped into one forward, without a timer.

A batch is what queued up while the last one ran: idle means instant, busy means full.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from app.engine.admission import AdmissionControl, current_caller
from app.engine.circuit_breaker import CircuitBreaker
from app.engine.executor import Executor
from app.engine.fair_queue import FairQueue
from app.engine.futures import cancel, set_exception, set_result
from app.engine.observer import EngineObserver, RequestTrace, current_trace
from app.errors import InferenceFailed, NotReady

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class QueueEntry(Generic[Item, Result]):
    """An item in the queue, how many rows it brings, the future that carries its answer, and whose key sent it."""

    item: Item
    rows: int
    future: asyncio.Future[Result]
    caller: str | None = None
    trace: RequestTrace | None = None  # of the request that it belongs to
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    ended_at: float = 0.0
    waiting: bool = True  # in the queue


class Batcher(Generic[Item, Result]):
    """The queue of one model. ``predict`` takes items and gives as many answers, in order, on the lane; ``rows`` says
    how many rows an item brings, and ``seconds`` how long a batch of items should take.

    ``batch_rows`` bounds a batch, though an item larger than that goes alone; ``queue_rows`` bounds what waits.
    """

    def __init__(
        self,
        name: str,
        predict: Callable[[Sequence[Item]], Sequence[Result]],
        rows: Callable[[Item], int],
        seconds: Callable[[Sequence[Item]], float],
        executor: Executor,
        observer: EngineObserver,
        batch_rows: int,
        queue_rows: int,
    ) -> None:
        self.name = name
        self._predict = predict
        self._rows = rows
        self._seconds = seconds
        self._executor = executor
        self.observer = observer
        self._batch_rows = batch_rows
        self._admission = AdmissionControl(name, observer, queue_rows)
        self._queue: FairQueue[QueueEntry[Item, Result]] = FairQueue()
        self._running: list[QueueEntry[Item, Result]] = []
        self._drain_task: asyncio.Task[None] | None = None
        self._rows_per_second = 0.0  # rows a second, while any wait
        self.circuit_breaker = CircuitBreaker()

    @property
    def load(self) -> tuple[int, int]:
        """How many rows wait, and how many are computed."""
        return self._admission.waiting, sum(entry.rows for entry in self._running)

    def admit(self, rows: int) -> None:
        """Raises NotReady or Overloaded when so many rows would not be let in now."""
        self._admission.admit(rows, self._rows_per_second)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Queue all items or none, and wait for their answers.

        Raises as ``admit`` does, and InferenceFailed when the network fails on one of them.
        """
        rows = [self._rows(item) for item in items]
        self.admit(sum(rows))
        loop, account, who = asyncio.get_running_loop(), current_trace.get(), current_caller.get()
        entries = [
            QueueEntry(item, count, loop.create_future(), who, account) for item, count in zip(items, rows, strict=True)
        ]
        for entry in entries:
            self._queue.append(entry)
        self._admission.add(who, sum(rows))
        if self._drain_task is None:
            self._drain_task = loop.create_task(self._drain())
        try:
            return [await entry.future for entry in entries]
        finally:
            for entry in entries:  # on failure or hang-up the rest needs no computing
                cancel(entry.future)
                if entry.waiting:
                    self._queue.discard(entry)
                    self._leave(entry)

    def _leave(self, entry: QueueEntry[Item, Result]) -> None:
        """It waits no longer, so that its room in the queue is free."""
        entry.waiting = False
        self._admission.remove(entry.caller, entry.rows)

    async def _drain(self) -> None:
        try:
            while self._queue:
                self._running = self._take()
                await self._run(self._running)
                self._running = []
                if self._queue:
                    await self._executor.yield_to_requests()
        finally:
            self._drain_task = None

    def _take(self) -> list[QueueEntry[Item, Result]]:
        """The next entries that fit into a batch, at least one; entries nobody waits for any more are dropped."""
        batch: list[QueueEntry[Item, Result]] = []
        rows = 0
        while self._queue and (not batch or rows + self._queue.peek().rows <= self._batch_rows):
            entry = self._queue.pop()
            self._leave(entry)
            if not entry.future.done():
                batch.append(entry)
                rows += entry.rows
        return batch

    async def _run(self, batch: list[QueueEntry[Item, Result]]) -> None:
        """One forward; when it fails, one for each, so that only the guilty one is told. Never raises."""
        try:
            answers = await self._forward(batch)
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    if not entry.future.done():
                        await self._run([entry])
                        await asyncio.sleep(0)
                return
            set_exception(
                batch[0].future, InferenceFailed(f"{self.name} failed on this input ({type(error).__name__})")
            )
            self.circuit_breaker.record_failure()
            self.observer.on_failure(error)
            return
        for entry, answer in zip(batch, answers, strict=True):
            set_result(entry.future, answer)

    async def _forward(self, batch: list[QueueEntry[Item, Result]]) -> Sequence[Result]:
        if not batch:
            return []
        items = [entry.item for entry in batch]
        turn = time.monotonic()
        answers, seconds = await self._executor.run_timed(self._seconds(items), self._predict, items)
        if len(answers) != len(batch):
            raise RuntimeError(f"{self.name} gave {len(answers)} answers to {len(batch)} items")
        self.circuit_breaker.record_success()
        rows = sum(entry.rows for entry in batch)
        ended = time.monotonic()
        for entry in batch:
            entry.started_at, entry.ended_at = ended - seconds, ended
        self.observer.on_dequeued(batch)
        self.observer.on_batch(rows, seconds)
        self.observer.on_completed(batch)
        measured = rows / max(ended - turn, 1e-6)  # with what other models computed before its turn came
        self._rows_per_second = 0.8 * self._rows_per_second + 0.2 * measured if self._rows_per_second else measured
        return answers

    async def close(self, seconds: float) -> None:
        """Refuse what comes, finish what waits, and after ``seconds`` tell those still waiting."""
        self._admission.closed = True
        if self._drain_task:
            await asyncio.wait([self._drain_task], timeout=seconds)
        for entry in (*self._running, *self._queue):
            set_exception(entry.future, NotReady(f"{self.name} stopped before it could answer"))
        self._queue.clear()
