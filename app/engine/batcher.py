"""Dynamic batching for requests that need one forward pass.

If the model is idle, a request is normally submitted to the executor immediately. The requests that arrive while a
batch runs form the next batch, up to the maximum number of rows. A batch is delayed only while several requests are
being parsed on threads, such as large photos that are being decoded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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

LARGE_ROWS = 16  # an item with more rows than this is large, and is split into parts
PART_ROWS = 8  # maximum number of rows of a part
GATHER_ROWS = 4  # a batch waits for items that are being parsed until it has this many rows
GATHER_FACTOR = 4.0  # longest such wait, relative to the expected duration of the batch without these items
GATHER_MAX_RATIO = 0.9  # a batch waits only if this many rows take at most this share of their time one by one
SHARING_SECONDS = 1.0  # for this many seconds after a small item, each batch has at most one part of a large item

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
    """An item or a part of an item, with its number of rows and the future of its result.

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
    waiting: bool = False  # whether the entry is in the queue
    is_part: bool = False  # whether the entry is a part of a large item
    following: QueueEntry[Item, Result] | None = None  # the next part; it is queued after this one is computed
    rows_left: int = 0  # rows of this part and all following parts

    def next_part(self) -> QueueEntry[Item, Result] | None:
        """Return the next part, or None if there is no next part or its future is done, for example after an error."""
        part = self.following
        return None if part is None or part.future.done() else part


class Batcher(Generic[Item, Result]):
    """Collects the requests for one model in a queue, and computes them in batches.

    ``predict`` maps N items to N results in the same order. It runs on ``executor``. ``rows`` returns the number of
    rows of an item, and ``expected_seconds`` returns the expected duration of a batch in seconds. A batch has at most
    ``batch_rows`` rows. At most ``queue_rows`` rows wait.

    ``splitter`` splits a large item into parts, so that small items do not wait for all rows of the large item. After a
    part is computed, the next part joins the end of the queue. Without ``splitter``, an item of more than
    ``batch_rows`` rows is computed alone.
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
        self._parsing = 0  # number of requests that are being parsed on threads, or wait for such a thread
        self._gather_rows = min(GATHER_ROWS, batch_rows)
        self._arrived = asyncio.Event()  # set when an item is queued, or a request is no longer being parsed
        self._queue: FairQueue[QueueEntry[Item, Result]] = FairQueue()
        self._running: list[QueueEntry[Item, Result]] = []
        self._batch_task: asyncio.Task[None] | None = None
        self._rows_per_second = 0.0  # moving average; 0 means not measured yet
        self.circuit_breaker = CircuitBreaker()

    @property
    def row_counts(self) -> tuple[int, int]:
        """Two numbers: how many rows wait, and how many rows are being computed."""
        return self._admission.waiting, sum(entry.rows for entry in self._running)

    def admit(self, rows: int) -> None:
        """Raise an error unless ``rows`` more rows would be accepted now.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
        """
        self._admission.admit(rows, self._rows_per_second)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Queue the items, and return their results in the same order. Either all items are accepted or none.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
            InferenceFailed, OutOfMemory: the network failed on one of the items.
            BadValue: one of the items is invalid, and only the network could detect that.
        """
        counted = [(item, self._rows(item)) for item in items]
        self.admit(sum(rows for _, rows in counted))
        entries = [self._entries(item, rows) for item, rows in counted]
        for first, *_ in entries:
            self._enqueue(first)
        if self._batch_task is None:
            self._batch_task = asyncio.get_running_loop().create_task(self._run_batches())
        try:
            return [self._join([await entry.future for entry in parts]) for parts in entries]
        finally:
            # Do not compute the remaining items after a failure or a disconnect.
            for entry in chain.from_iterable(entries):
                entry.future.cancel()  # also keeps asyncio from logging an error that nobody retrieves
                if entry.waiting:
                    self._queue.discard(entry)
                    self._leave(entry)

    def _entries(self, item: Item, rows: int) -> list[QueueEntry[Item, Result]]:
        """Return one entry for an item, or one for each of its parts if the item is split."""
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
        self._arrived.set()

    def _leave(self, entry: QueueEntry[Item, Result]) -> None:
        """Stop counting the rows of an entry and of its following parts as waiting."""
        entry.waiting = False
        self._admission.remove(entry.caller, entry.rows_left)

    async def _run_batches(self) -> None:
        """Run batches until the queue is empty."""
        try:
            while self._queue:
                try:
                    if self._can_gather():
                        await self._gather()
                    self._next_batch()
                    await self._run(self._running)
                except Exception as error:  # an error outside ``predict``; otherwise callers would wait forever
                    self._fail(self._running or [*self._queue], f"{self.name} failed", error)
                parts = [part for entry in self._running if (part := entry.next_part())]
                if self._queue or parts:
                    await self._executor.yield_to_requests()
                self._running = []
                for part in parts:
                    if not part.future.done():
                        self._enqueue(part)
        finally:
            self._batch_task = None
            self._stop()  # entries are left only if this task was cancelled
            self._running = []

    def _fail(self, entries: Sequence[QueueEntry[Item, Result]], message: str, error: Exception) -> None:
        """Fail the entries with an error, and report the error. Never raises, even if the observer does."""
        for entry in entries:
            set_exception(entry.future, inference_error(message, error))
        self.circuit_breaker.record_failure()
        with suppress(Exception):
            self.observer.on_failure(error)

    @contextmanager
    def parsing(self) -> Iterator[None]:
        """Count a request as being parsed while the ``with`` block runs. The next batch may wait for its items."""
        self._parsing += 1
        try:
            yield
        finally:
            self._parsing -= 1
            self._arrived.set()

    def _can_gather(self) -> bool:
        """Return whether the next batch is small, and enough requests are being parsed to fill it."""
        waiting = self._admission.waiting
        return waiting < self._gather_rows <= waiting + self._parsing

    async def _gather(self) -> None:
        """Wait for items that are being parsed, so that they are computed together.

        If parsing an item takes longer than computing it, each batch would otherwise have one row, which takes more
        time per row. Do not wait if the network computes several rows no faster together than alone.
        """
        items = [entry.item for entry in self._queue]
        alone, together = (self._expected_seconds(items[:1] * rows) for rows in (1, self._gather_rows))
        if together > GATHER_MAX_RATIO * self._gather_rows * alone:
            return
        expected = self._expected_seconds(items)
        with suppress(TimeoutError):
            async with asyncio.timeout(GATHER_FACTOR * expected):
                while self._queue and self._can_gather():
                    self._arrived.clear()
                    await self._arrived.wait()

    def _next_batch(self) -> None:
        """Move the next batch from the queue to ``_running``: the first entry, and as many more entries as fit.

        For ``SHARING_SECONDS`` after a small item of any model, a batch has at most one part of a large item.
        Otherwise a batch may have several parts of the same item, so that the item is finished sooner. Entries that are
        done, for example cancelled, are dropped.
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
                self._queue.charge(part)
                part.queued_at = entry.queued_at  # this part did not wait while earlier parts were computed
                batch.append(part)
                rows += part.rows

    async def _run(self, batch: list[QueueEntry[Item, Result]]) -> None:
        """Compute a batch and set its results. Never raises.

        If a batch fails, each entry is computed alone, so that only the failing entry gets the error.
        """
        started_at = time.monotonic()
        try:
            results = await self._forward(batch)
        except Exception as error:
            if len(batch) == 1:
                self._fail_alone(batch[0], started_at, error)
                return
        else:
            for entry, result in zip(batch, results, strict=True):
                set_result(entry.future, result)
            return
        # outside of ``except``, because the traceback of the error keeps the tensors of the failed batch in memory
        for entry in batch:
            if not entry.future.done():
                await self._run([entry])
                await asyncio.sleep(0)

    def _fail_alone(self, entry: QueueEntry[Item, Result], started_at: float, error: Exception) -> None:
        """Set the error of an entry that failed although it was computed alone."""
        entry.started_at = started_at
        with suppress(Exception):
            self.observer.on_dequeued([entry])  # so that the log of the request has its number of rows
        if isinstance(error, BadValue):  # the input is invalid, and only the network could detect that
            set_exception(entry.future, error)
        else:
            self._fail([entry], f"{self.name} failed on this input", error)

    async def _forward(self, batch: list[QueueEntry[Item, Result]]) -> Sequence[Result]:
        """Compute a batch, report its timing to the observer, and update the measured speed."""
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
        measured = rows / max(ended_at - submitted_at, 1e-6)  # includes the wait for other models on the executor
        self._rows_per_second = 0.8 * self._rows_per_second + 0.2 * measured if self._rows_per_second else measured
        return results

    async def close(self, seconds: float) -> None:
        """Reject new requests and finish accepted requests. Fail the requests left after ``seconds`` seconds."""
        self._admission.closed = True
        if self._batch_task:
            await asyncio.wait([self._batch_task], timeout=seconds)
        self._stop()

    def _stop(self) -> None:
        """Fail all entries that still wait or run, and their following parts."""
        for entry in (*self._running, *self._queue):
            part: QueueEntry[Item, Result] | None = entry
            while part:
                set_exception(part.future, NotReady(f"{self.name} stopped before it could answer"))
                part = part.following
        self._queue.clear()
