"""Model-based test of the batcher.

Requests arrive, are cancelled, fail and reach their deadlines in any order, and the batcher shuts down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from support.engine import one_millisecond
from support.state_machines.engines import EngineMachine, Request
from support.state_machines.virtual_time import run_machine

from app.engine import batcher, circuit_breaker, executor

BATCH_ROWS, QUEUE_ROWS, PART_ROWS = 8, 20, 3


class BatcherMachine(EngineMachine):
    """A batcher whose rows are numbers. The network doubles each number, and fails on negative numbers."""

    modules = (batcher, circuit_breaker, executor)
    run_task, max_running, queue_rows = "_batch_task", BATCH_ROWS, QUEUE_ROWS

    @initialize(with_keys=st.booleans(), observer_fails=st.booleans())
    def create(self, with_keys: bool, observer_fails: bool) -> None:
        self.patch.setattr(batcher, "LARGE_ROWS", PART_ROWS)
        self.patch.setattr(batcher, "PART_ROWS", PART_ROWS)
        self.prepare(with_keys, observer_fails)
        self.engine = batcher.Batcher(
            "m", self.predict, len, one_millisecond, self.executor, self.observer, BATCH_ROWS, QUEUE_ROWS, splitter=self
        )
        self.batches = 0
        self.last_batch: dict[int, int] = {}  # request -> number of the last batch in which it may start
        next_batch = self.engine._next_batch

        def count_and_begin() -> None:
            self.batches += 1
            next_batch()

        self.engine._next_batch = count_and_begin

    def predict(self, items: Sequence[list[int]]) -> list[list[int]]:
        assert sum(map(len, items)) <= BATCH_ROWS
        for item in items:
            number = abs(item[0]) // 1000
            if number not in self.started:
                self.started.add(number)
                self.begin(self.requests[number])
                assert self.batches <= self.last_batch[number], "no caller starves"
        self.fail_if_broken()
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
        self.last_batch[number] = self.batches + self.waiting()[own] + sum(sizes) + 4
        self.start(caller, items, sum(sizes), failing, timeout, lambda: self.engine.submit(items))

    @precondition(lambda self: self.pool.jobs)
    @rule()
    def finish_batch(self) -> None:
        self.finish_job()

    def waiting(self) -> Counter[str | None]:
        rows: Counter[str | None] = Counter()
        for entry in self.engine._queue:
            rows[entry.caller] += entry.rows_left
        return rows

    def check_result(self, request: Request) -> None:
        assert request.task.result() == [[2 * number for number in item] for item in request.items]


@pytest.mark.timeout(0)
def test_the_batcher_keeps_its_promises_in_any_order_of_events() -> None:
    run_machine(BatcherMachine, runs=100)
