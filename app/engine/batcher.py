"""Dynamic batching for requests that need one forward pass.

If the model is idle, a request is computed immediately. The requests that arrive while a batch runs form the next
batch, up to the maximum number of rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from app.engine.engine import Engine
from app.engine.executor import Executor
from app.engine.fair_queue import current_caller
from app.engine.observer import EngineObserver, RequestTrace, current_trace
from app.limits import Limits

Item = TypeVar("Item")
Result = TypeVar("Result")


class Splitter(Protocol[Item, Result]):
    """Splits items into parts. The joined results of the parts equal the result of the whole item."""

    def split(self, item: Item, rows: int) -> Sequence[Item]:
        """Split an item into parts of ``rows`` rows. The last part may have fewer rows."""

    def join(self, results: Sequence[Result]) -> Result:
        """Join the results of all parts."""


@dataclass(eq=False, slots=True)
class Entry(Generic[Item, Result]):
    """An item in the queue. ``parts`` are its parts; a small item is its own only part."""

    parts: Sequence[Item]
    rows: int  # rows of the parts that still wait
    future: asyncio.Future[list[Result]]  # the results of all parts
    caller: str | None
    trace: RequestTrace | None
    queued_at: float
    taken: int = 0  # number of parts that have left the queue
    results: list[Result] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Part(Generic[Item, Result]):
    """A part of an entry in a batch. It is a ``BatchMember``."""

    entry: Entry[Item, Result]
    item: Item
    rows: int
    future: asyncio.Future[list[Result]]
    trace: RequestTrace | None
    queued_at: float
    started_at: float
    ended_at: float = 0.0


class Batcher(Engine[Entry[Item, Result], Part[Item, Result]], Generic[Item, Result]):
    """Collects the requests for one model in a queue, and computes them in batches.

    ``predict`` maps N items to N results in the same order. It runs on ``executor``. ``rows`` returns the number of
    rows of an item, and ``expected_seconds`` returns the expected duration of a batch in seconds. A batch has at most
    ``batch_rows`` rows. At most ``queue_rows`` rows wait.

    ``splitter`` splits an item of more than ``part_rows`` rows into parts. Each batch has one part of each such item,
    so that small items do not wait for all of its rows. If only one item waits, its parts fill the batch. Without
    ``splitter``, an item of more than ``batch_rows`` rows is computed alone.
    """

    INPUT = "input"

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
        limits: Limits = Limits(),  # it is immutable
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name, executor, observer, queue_rows, limits, clock)
        self._predict, self._rows, self._expected_seconds = predict, rows, expected_seconds
        self._batch_rows = batch_rows
        self._splitter = splitter
        self._part_rows = min(limits.part_rows, batch_rows)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Queue the items, and return their results in the same order. Either all items are accepted or none.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
            InferenceFailed, OutOfMemory: the network failed on one of the items.
            BadValue: one of the items is invalid, and only the network could detect that.
        """
        rows = [self._rows(item) for item in items]
        self.admit(sum(rows))
        loop, caller, trace, now = asyncio.get_running_loop(), current_caller.get(), current_trace.get(), self._clock()
        entries = [
            Entry(self._parts(item, count), count, loop.create_future(), caller, trace, now)
            for item, count in zip(items, rows, strict=True)
        ]
        self._enqueue(entries)
        try:
            results = [await entry.future for entry in entries]
            return [self._splitter.join(parts) if self._splitter and len(parts) > 1 else parts[0] for parts in results]
        finally:
            self._leave(entries)

    def _parts(self, item: Item, rows: int) -> Sequence[Item]:
        if self._splitter and rows > self._part_rows:
            return self._splitter.split(item, self._part_rows)
        return (item,)

    async def _turn(self) -> None:
        self._running = batch = self._next_batch()
        if batch:
            await self._compute(batch)
        self._running = ()

    def _next_batch(self) -> list[Part[Item, Result]]:
        """Move the next batch out of the queue: the first entry, and as many more entries as fit."""
        batch: list[Part[Item, Result]] = []
        rows, entries, now = 0, set[Entry[Any, Any]](), self._clock()
        while self._queue:
            entry = self._queue.peek()
            count = min(entry.rows, self._part_rows) if len(entry.parts) > 1 else entry.rows
            if batch and (rows + count > self._batch_rows or (entry in entries and len(entries) > 1)):
                break
            self._queue.take(entry, count)
            part = entry.parts[entry.taken]
            batch.append(Part(entry, part, count, entry.future, entry.trace, entry.queued_at, now))
            entry.taken += 1
            entries.add(entry)
            rows += count
        return batch

    async def _forward(self, batch: Sequence[Part[Item, Result]]) -> None:
        """Compute a batch, report its timing to the observer, and set its results."""
        items = [part.item for part in batch]
        submitted_at = self._clock()
        results, seconds = await self._executor.compute(self._expected_seconds(items), self._predict, items)
        if len(results) != len(items):
            raise RuntimeError(f"{self.name} returned {len(results)} results for {len(items)} items")
        rows, ended_at = sum(part.rows for part in batch), self._clock()
        for part in batch:
            part.started_at, part.ended_at = ended_at - seconds, ended_at
        self.observer.on_dequeued(batch)
        self.observer.on_batch(rows, seconds)
        self.observer.on_completed(batch)
        self._queue.measure(rows, ended_at - submitted_at)  # includes the wait for other models on the executor
        for part, result in zip(batch, results, strict=True):
            entry = part.entry
            entry.results.append(result)
            entry.queued_at = ended_at  # the next part did not wait while this part was computed
            if len(entry.results) == len(entry.parts) and not entry.future.done():
                entry.future.set_result(entry.results)

    def _fail(self, part: Part[Item, Result], error: Exception) -> None:
        self.observer.on_dequeued([part])  # so that the log of the request has its number of rows
        super()._fail(part, error)
        self._queue.remove(part.entry)
