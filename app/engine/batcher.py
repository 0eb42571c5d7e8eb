"""Dynamic batching for requests that need one forward pass.

There is no batching delay. A request starts immediately when its model is idle. All requests that queue while a batch
runs form the next batch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Generic, Protocol, TypeVar

from app.engine.admission import AdmissionControl, current_caller
from app.engine.circuit_breaker import CircuitBreaker
from app.engine.executor import Executor
from app.engine.fair_queue import FairQueue
from app.engine.futures import set_exception, set_result
from app.engine.observer import EngineObserver, RequestTrace, current_trace
from app.errors import BadValue, NotReady, inference_error

LARGE_ROWS = 16  # an item of more rows is split ...
PART_ROWS = 8  # ... into parts of so many rows
SHARING_SECONDS = 1.0  # seconds after a small item in which a batch has at most one part of a large one

Item = TypeVar("Item")
Result = TypeVar("Result")


class Splitter(Protocol[Item, Result]):
    """Splits items into parts. The joined results of the parts equal the result of the whole item."""

    def split(self, item: Item, rows: int) -> Sequence[Item]:
        """Split an item into parts of at most ``rows`` rows."""

    def join(self, results: Sequence[Result]) -> Result:
        """Join the results of all parts."""


@dataclass(eq=False, slots=True)
class QueueEntry(Generic[Item, Result]):
    """One item or a part of one, its number of rows, and the future of its result.

    Times are on ``time.monotonic``'s clock.
    """

    item: Item
    rows: int
    future: asyncio.Future[Result]
    caller: str | None = None  # name of the API key
    trace: RequestTrace | None = None
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    ended_at: float = 0.0
    waiting: bool = False  # whether it is in the queue
    is_part: bool = False  # of a large item
    following: QueueEntry[Item, Result] | None = None  # the next part of the item; it is queued after this one
    rows_left: int = 0  # of this part and all following ones

    def next_part(self) -> QueueEntry[Item, Result] | None:
        """Return the next part, unless it is cancelled, as after a failure of this one."""
        part = self.following
        return None if part is None or part.future.done() else part


class Batcher(Generic[Item, Result]):
    """Queue and batches of one model.

    ``predict`` maps N items to N results in the same order; it runs on ``executor``. ``rows`` returns the number of
    rows of an item, and ``expected_seconds`` the expected duration of a batch in seconds. A batch has at most
    ``batch_rows`` rows. At most ``queue_rows`` rows wait.

    ``splitter`` splits large items, so that small ones do not wait for all of their rows: after each part, the next one
    joins the end of the queue. Without ``splitter``, an item of more than ``batch_rows`` rows is computed alone.
    """

    def __init__(
        self,
        name: str,
        predict: Callable[[Sequence[Item]], Sequence[Result]],
        rows: Callable[[Item], int],
        expected_seconds: Callable[[Sequence[Item]], float],
        executor: Executor,
        observer: EngineObserver,
        batch_rows: int,
        queue_rows: int,
        splitter: Splitter[Item, Result] | None = None,
    ) -> None:
        self.name = name
        self._splitter = splitter
        self._large_rows, self._part_rows = min(LARGE_ROWS, batch_rows), min(PART_ROWS, batch_rows)
        self._predict = predict
        self._rows = rows
        self._expected_seconds = expected_seconds
        self._executor = executor
        self.observer = observer
        self._batch_rows = batch_rows
        self._admission = AdmissionControl(name, observer, queue_rows)
        self._queue: FairQueue[QueueEntry[Item, Result]] = FairQueue()
        self._running: list[QueueEntry[Item, Result]] = []
        self._drain_task: asyncio.Task[None] | None = None
        self._rows_per_second = 0.0  # moving average; 0: not measured yet
        self.circuit_breaker = CircuitBreaker()

    @property
    def load(self) -> tuple[int, int]:
        """The number of waiting rows and of running rows."""
        return self._admission.waiting, sum(entry.rows for entry in self._running)

    def admit(self, rows: int) -> None:
        """Return if ``rows`` more rows would be accepted now.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
        """
        self._admission.admit(rows, self._rows_per_second)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Queue all items or none, and return their results in the same order.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
            InferenceFailed, OutOfMemory: the network failed on one of the items.
            BadValue: the network cannot read one of the items.
        """
        rows = [self._rows(item) for item in items]
        self.admit(sum(rows))
        entries = [self._entries(item, count) for item, count in zip(items, rows, strict=True)]
        for first, *_ in entries:
            self._enqueue(first)
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())
        try:
            return [self._join([await entry.future for entry in parts]) for parts in entries]
        finally:
            for entry in chain.from_iterable(
                entries
            ):  # after a failure or a disconnect the remaining items are not computed
                entry.future.cancel()  # also marks an error as retrieved, which asyncio would log
                if entry.waiting:
                    self._queue.discard(entry)
                    self._leave(entry)

    def _entries(self, item: Item, rows: int) -> list[QueueEntry[Item, Result]]:
        """Return the entry of an item, or those of its parts."""
        loop, trace, caller = asyncio.get_running_loop(), current_trace.get(), current_caller.get()
        if self._splitter is None or rows <= self._large_rows:
            return [QueueEntry(item, rows, loop.create_future(), caller, trace, rows_left=rows)]
        entries = [
            QueueEntry(
                part, self._rows(part), loop.create_future(), caller, trace, is_part=True, rows_left=rows - start
            )
            for start, part in zip(
                range(0, rows, self._part_rows), self._splitter.split(item, self._part_rows), strict=True
            )
        ]
        for entry, following in pairwise(entries):
            entry.following = following
        return entries

    def _join(self, results: list[Result]) -> Result:
        return self._splitter.join(results) if self._splitter and len(results) > 1 else results[0]

    def _enqueue(self, entry: QueueEntry[Item, Result]) -> None:
        """Add an entry to the queue. The rows of all following parts count as waiting too."""
        entry.waiting, entry.queued_at = True, time.monotonic()
        self._queue.append(entry)
        self._admission.add(entry.caller, entry.rows_left)

    def _leave(self, entry: QueueEntry[Item, Result]) -> None:
        """Free the entry's place in the queue, and that of the parts that follow a running one."""
        entry.waiting = False
        self._admission.remove(entry.caller, entry.rows_left)

    async def _drain(self) -> None:
        """Run batches until the queue is empty."""
        try:
            while self._queue:
                try:
                    self._next_batch()
                    await self._run(self._running)
                except Exception as error:  # outside ``predict``: no caller may wait forever
                    self._fail(self._running or [*self._queue], f"{self.name} failed", error)
                parts = [part for entry in self._running if (part := entry.next_part())]
                if self._queue or parts:
                    await self._executor.yield_to_requests()
                self._running = []
                for part in parts:
                    if not part.future.done():
                        self._enqueue(part)
        finally:
            self._drain_task = None
            self._stop()  # nothing is left, unless this task was cancelled
            self._running = []

    def _fail(self, entries: Sequence[QueueEntry[Item, Result]], message: str, error: Exception) -> None:
        """Answer entries with an error, and report it. Never raises, even if the observer does."""
        for entry in entries:
            set_exception(entry.future, inference_error(message, error))
        self.circuit_breaker.record_failure()
        with suppress(Exception):
            self.observer.on_failure(error)

    def _next_batch(self) -> None:
        """Move the next batch from the queue to ``_running``: at least one entry, and as many as fit.

        While small items of any model wait, a batch has at most one part of a large item. Otherwise the parts of
        one item fill a batch, which is faster. Entries that are done, for example cancelled, are dropped.
        """
        batch = self._running = []
        rows, has_part = 0, False
        shared = time.monotonic() - self._executor.small_item_at < SHARING_SECONDS
        while self._queue:
            entry = self._queue.peek()
            if batch and (rows + entry.rows > self._batch_rows or (shared and has_part and entry.is_part)):
                return
            self._queue.pop()
            self._leave(entry)
            if entry.future.done():
                continue
            batch.append(entry)
            rows += entry.rows
            if not entry.is_part:
                self._executor.small_item_at = time.monotonic()
                continue
            has_part = True
            while (part := batch[-1].next_part()) and not shared and rows + part.rows <= self._batch_rows:
                batch.append(part)
                rows += part.rows

    async def _run(self, batch: list[QueueEntry[Item, Result]]) -> None:
        """Compute a batch and set its results. Never raises.

        If a batch fails, each entry is computed alone, so that only the failing entry gets the error.
        """
        try:
            results = await self._forward(batch)
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    if not entry.future.done():
                        await self._run([entry])
                        await asyncio.sleep(0)
                return
            if isinstance(error, BadValue):  # only the network could tell that the input is wrong
                set_exception(batch[0].future, error)
                return
            self._fail(batch, f"{self.name} failed on this input", error)
            return
        for entry, result in zip(batch, results, strict=True):
            set_result(entry.future, result)

    async def _forward(self, batch: list[QueueEntry[Item, Result]]) -> Sequence[Result]:
        """Compute a batch, and report and record its timing."""
        if not batch:
            return []
        items = [entry.item for entry in batch]
        submitted_at = time.monotonic()
        results, seconds = await self._executor.run_timed(self._expected_seconds(items), self._predict, items)
        if len(results) != len(batch):
            raise RuntimeError(f"{self.name} returned {len(results)} results for {len(batch)} items")
        self.circuit_breaker.record_success()
        rows = sum(entry.rows for entry in batch)
        ended_at = time.monotonic()
        for entry in batch:
            entry.started_at, entry.ended_at = ended_at - seconds, ended_at
        self.observer.on_dequeued(batch)
        self.observer.on_batch(rows, seconds)
        self.observer.on_completed(batch)
        measured = rows / max(ended_at - submitted_at, 1e-6)  # includes waiting for other models on the executor
        self._rows_per_second = 0.8 * self._rows_per_second + 0.2 * measured if self._rows_per_second else measured
        return results

    async def close(self, seconds: float) -> None:
        """Reject new requests and finish queued ones; after ``seconds`` seconds, fail those that are left."""
        self._admission.closed = True
        if self._drain_task:
            await asyncio.wait([self._drain_task], timeout=seconds)
        self._stop()

    def _stop(self) -> None:
        """Fail all entries that are left."""
        for entry in (*self._running, *self._queue):
            part: QueueEntry[Item, Result] | None = entry
            while part:
                set_exception(part.future, NotReady(f"{self.name} stopped before it could answer"))
                part = part.following
        self._queue.clear()
