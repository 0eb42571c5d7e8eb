"""Model-based test of the batcher: arrivals, cancellations, failures, deadlines and shutdown in any order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from support.engine import RecordingObserver, one_millisecond
from support.virtual_time import VirtualMachine, counted, manual_executor, run_machine

from app.engine import batcher, circuit_breaker, executor
from app.errors import InferenceFailed, NotReady, Overloaded

BATCH_ROWS, QUEUE_ROWS, PART_ROWS = 8, 20, 3


@dataclass
class Request:
    """A request, and the number of batches begun when it was sent."""

    number: int
    caller: str | None
    items: list[list[int]]
    has_deadline: bool
    task: asyncio.Task[Any]
    batches: int
    rows_ahead: int
    allowed: set[type[BaseException]]  # errors that may be its answer


class BatcherMachine(VirtualMachine):
    """Each number is a row; the network doubles it, and fails on negative ones."""

    modules = (batcher, circuit_breaker, executor)

    @initialize(with_keys=st.booleans(), observer_fails=st.booleans())
    def create(self, with_keys: bool, observer_fails: bool) -> None:
        self.patch.setattr(batcher, "LARGE_ROWS", PART_ROWS)
        self.patch.setattr(batcher, "PART_ROWS", PART_ROWS)
        self.with_keys = with_keys
        self.executor, self.pool = manual_executor("test")
        observer = RecordingObserver()
        if observer_fails:
            observer.on_failure = observer.failures.index  # type: ignore[assignment, method-assign]
        self.engine: Any = batcher.Batcher(
            "m", self.predict, len, one_millisecond, self.executor, observer, BATCH_ROWS, QUEUE_ROWS, splitter=self
        )
        self.requests: list[Request] = []
        self.started: set[int] = set()
        self.last_started: dict[str | None, int] = {}
        self.broken_jobs = self.batches = 0
        self.closing: asyncio.Task[None] | None = None
        next_batch = self.engine._next_batch

        def count_and_begin() -> None:
            self.batches += 1
            next_batch()

        self.engine._next_batch = count_and_begin

    def predict(self, items: Sequence[list[int]]) -> list[list[int]]:
        assert sum(map(len, items)) <= BATCH_ROWS
        for item in items:
            request = self.requests[abs(item[0]) // 1000]
            if request.number not in self.started:
                self.started.add(request.number)
                assert self.last_started.get(request.caller, -1) < request.number, "first in, first out for each caller"
                self.last_started[request.caller] = request.number
                assert self.batches - request.batches <= request.rows_ahead + 4, "no caller starves"
        if self.broken_jobs:
            self.broken_jobs -= 1
            raise RuntimeError("the device does not answer")
        if any(number < 0 for number in chain.from_iterable(items)):
            raise ValueError("negative")
        return [[2 * number for number in item] for item in items]

    def split(self, item: list[int], rows: int) -> list[list[int]]:
        return [item[start : start + rows] for start in range(0, len(item), rows)]

    def join(self, results: Sequence[list[int]]) -> list[int]:
        return list(chain.from_iterable(results))

    @rule(
        caller=st.sampled_from("abc"),
        sizes=st.lists(st.integers(1, 10), min_size=1, max_size=3),
        failing=st.sampled_from([False] * 4 + [True]),
        timeout=st.sampled_from([None, None, None, 0.1, 5.0]),
    )
    def send(self, caller: str, sizes: list[int], failing: bool, timeout: float | None) -> None:
        number, own = len(self.requests), caller if self.with_keys else None
        items = [[number * 1000 + 100 * i + row + 1 for row in range(size)] for i, size in enumerate(sizes)]
        if failing:
            items[-1][-1] *= -1
        waiting, own_rows = self.engine.load[0], self.waiting_rows()[own]
        full = waiting and waiting + own_rows * self.with_keys + sum(sizes) > QUEUE_ROWS

        async def submit() -> list[list[int]]:
            async with asyncio.timeout(timeout):
                result: list[list[int]] = await self.engine.submit(items)
                return result

        coroutine = submit()
        allowed: set[type[BaseException]] = {InferenceFailed} if failing or self.broken_jobs else set()
        allowed |= {TimeoutError} if timeout else set()
        request = Request(number, own, items, bool(timeout), None, self.batches, own_rows + sum(sizes), allowed)  # type: ignore[arg-type]
        self.requests.append(request)
        request.task = self.loop.start(coroutine, own)
        if self.closing:
            assert isinstance(request.task.exception(), NotReady)
            allowed.add(NotReady)
        elif full:
            assert isinstance(request.task.exception(), Overloaded)
            allowed.add(Overloaded)
        else:
            assert not request.task.done()

    def pending(self) -> list[Request]:
        return [request for request in self.requests if not request.task.done()]

    @precondition(lambda self: self.pool.jobs)
    @rule()
    def finish_job(self) -> None:
        self.pool.finish()
        self.loop.settle()

    @precondition(lambda self: self.pending())
    @rule(index=st.integers(0, 10**6))
    def cancel(self, index: int) -> None:
        request = self.pending()[index % len(self.pending())]
        request.allowed.add(asyncio.CancelledError)
        request.task.cancel()
        self.loop.settle()

    @rule(seconds=st.floats(0.01, 3))
    def advance(self, seconds: float) -> None:
        self.loop.advance(seconds)

    @rule(jobs=st.integers(1, 4))
    def break_network(self, jobs: int) -> None:
        self.broken_jobs = jobs
        for request in self.pending():
            request.allowed.add(InferenceFailed)

    @precondition(lambda self: self.engine._drain_task)
    @rule(chance=st.integers(0, 4))
    def cancel_run_task(self, chance: int) -> None:
        if not chance:
            for request in self.pending():
                request.allowed.add(NotReady)
            self.engine._drain_task.cancel()
            self.loop.settle()
            assert not self.pending()

    @precondition(lambda self: not self.closing)
    @rule(chance=st.integers(0, 9), seconds=st.floats(0.1, 5))
    def close(self, chance: int, seconds: float) -> None:
        if not chance:
            self.closing = self.loop.start(self.engine.close(seconds), None)
            for request in self.pending():
                request.allowed.add(NotReady)

    def waiting_rows(self) -> Counter[str | None]:
        rows: Counter[str | None] = Counter()
        for entry in self.engine._queue:
            rows[entry.caller] += entry.rows_left
        return rows

    @invariant()
    def limits_hold(self) -> None:
        rows = self.waiting_rows()
        assert self.engine.load[0] == rows.total()
        assert self.engine._admission._waiting_by_caller == {key: count for key, count in rows.items() if key}
        assert len(self.pool.jobs) <= 1
        assert self.engine.load[1] <= BATCH_ROWS
        assert bool(self.pending()) <= bool(self.pool.jobs), "somebody waits, but nothing is computed"

    def finish(self) -> None:
        for _ in counted(2000):
            if self.pool.jobs:
                self.finish_job()
            elif self.pending() or (self.closing and not self.closing.done()):
                self.loop.advance(1.0)
            else:
                break
        for request in self.requests:
            if request.task.cancelled():
                assert asyncio.CancelledError in request.allowed
            elif error := request.task.exception():
                assert type(error) in request.allowed, error
            else:
                assert request.task.result() == [[2 * number for number in item] for item in request.items]
        assert self.engine.load == (0, 0)
        assert self.engine._drain_task is None
        assert not self.engine._queue
        assert not self.engine._admission._waiting_by_caller
        assert not self.executor.busy
        assert not self.executor._started_at


@pytest.mark.timeout(0)
def test_the_batcher_keeps_its_promises_in_any_order_of_events() -> None:
    run_machine(BatcherMachine, runs=100)
