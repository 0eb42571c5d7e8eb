"""The common parts of the model-based tests of both engines: events, and checks after each event and at the end."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from app.errors import InferenceFailed, NotReady, Overloaded
from support.engine import RecordingObserver
from support.state_machines.virtual_time import VirtualMachine, counted, manual_executor


@dataclass
class Request:
    """A request to an engine. ``allowed``: the errors that may answer it."""

    number: int
    caller: str | None
    items: list[Any]
    task: asyncio.Task[Any]
    allowed: set[type[BaseException]]


class EngineMachine(VirtualMachine):
    """A state machine with an engine and its requests. Rules of the machine decide when the engine's jobs end."""

    engine: Any
    run_task: str  # the engine's attribute with the task that runs batches or rounds
    max_running: int
    queue_rows: int

    def prepare(self, with_keys: bool, observer_fails: bool) -> None:
        self.with_keys = with_keys
        self.executor, self.pool = manual_executor("test")
        self.observer = RecordingObserver()
        if observer_fails:
            self.observer.on_failure = self.observer.failures.index  # type: ignore[assignment, method-assign]
        self.requests: list[Request] = []
        self.started: set[int] = set()
        self.last_started: dict[str | None, int] = {}
        self.broken_jobs = 0
        self.closing: asyncio.Task[None] | None = None

    def waiting(self) -> Counter[str | None]:
        """Return the number of queued rows for each caller."""
        raise NotImplementedError

    def check_result(self, request: Request) -> None:
        """Check the answer to a request that has no error."""
        raise NotImplementedError

    def fail_if_broken(self) -> None:
        if self.broken_jobs:
            self.broken_jobs -= 1
            raise RuntimeError("the device does not answer")

    def begin(self, request: Request) -> None:
        assert self.last_started.get(request.caller, -1) <= request.number, "first in, first out for each caller"
        self.last_started[request.caller] = request.number

    def start(
        self, caller: str, items: list[Any], rows: int, failing: bool, timeout: float | None, compute: Any
    ) -> None:
        """Send a request; ``compute`` returns the coroutine that waits for its answer."""
        own = caller if self.with_keys else None
        waiting = self.waiting()
        full = waiting and waiting.total() + waiting[own] * self.with_keys + rows > self.queue_rows

        async def answer() -> Any:
            async with asyncio.timeout(timeout):
                return await compute()

        allowed: set[type[BaseException]] = {InferenceFailed} if failing or self.broken_jobs else set()
        allowed |= {TimeoutError} if timeout else set()
        request = Request(len(self.requests), own, items, None, allowed)  # type: ignore[arg-type]
        self.requests.append(request)
        request.task = self.loop.start(answer(), own)
        if self.closing or full:
            rejection = NotReady if self.closing else Overloaded
            assert isinstance(request.task.exception(), rejection)
            allowed.add(rejection)
        else:
            assert not request.task.done()

    def pending(self) -> list[Request]:
        return [request for request in self.requests if not request.task.done()]

    def allow(self, error: type[BaseException]) -> None:
        for request in self.pending():
            request.allowed.add(error)

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
        self.allow(InferenceFailed)

    @precondition(lambda self: getattr(self.engine, self.run_task))
    @rule(chance=st.integers(0, 4))
    def cancel_run_task(self, chance: int) -> None:
        if not chance:
            self.allow(NotReady)
            getattr(self.engine, self.run_task).cancel()
            self.loop.settle()
            assert not self.pending()

    @precondition(lambda self: not self.closing)
    @rule(chance=st.integers(0, 9), seconds=st.floats(0.1, 5))
    def close(self, chance: int, seconds: float) -> None:
        if not chance:
            self.closing = self.loop.start(self.engine.close(seconds), None)
            self.allow(NotReady)

    @invariant()
    def limits_hold(self) -> None:
        waiting = self.waiting()
        assert self.engine.row_counts[0] == waiting.total()
        assert self.engine._admission._waiting_by_caller == {key: count for key, count in waiting.items() if key}
        assert len(self.pool.jobs) <= 1
        assert self.engine.row_counts[1] <= self.max_running
        assert bool(self.pending()) <= bool(self.pool.jobs), "a request waits, but nothing is computed"

    def finish(self) -> None:
        for _ in counted(20_000):
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
                self.check_result(request)
        assert self.engine.row_counts == (0, 0)
        assert getattr(self.engine, self.run_task) is None
        assert not self.waiting()
        assert not self.engine._admission._waiting_by_caller
        assert not self.executor.busy
        assert not self.executor._started_at
