"""The common part of the batcher and the text engine: a queue, and a task that computes while requests wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from typing import Any, Generic, Protocol, TypeVar

from app.engine.circuit_breaker import CircuitBreaker
from app.engine.executor import Executor
from app.engine.fair_queue import FairQueue, Queued
from app.engine.observer import EngineObserver
from app.errors import BadValue, NotReady, OutOfMemory, QuartetError, inference_error
from app.limits import Limits

REQUEST_STAGES = 4  # event-loop iterations that a short request needs: read, queue, compute, respond


class Member(Protocol):
    """A part of a request that is computed, and the future of its result."""

    rows: int

    @property
    def future(self) -> asyncio.Future[Any]: ...


class Waiting(Member, Queued, Protocol):
    """A part of a request that waits in the queue."""


W = TypeVar("W", bound=Waiting)
M = TypeVar("M", bound=Member)


class Engine(Generic[W, M]):
    """Computes the requests for one model. Subclasses decide which waiting items are computed together."""

    INPUT: str  # the word for an item in error messages

    def __init__(
        self,
        name: str,
        executor: Executor,
        observer: EngineObserver,
        queue_rows: int,
        limits: Limits,
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self.observer = observer
        self.circuit_breaker = CircuitBreaker(limits, clock)
        self._queue: FairQueue[W] = FairQueue(name, queue_rows, observer.on_rejected, limits)
        self._running: Sequence[M] = ()
        self._executor, self._limits, self._clock = executor, limits, clock
        self._task: asyncio.Task[None] | None = None

    @property
    def row_counts(self) -> tuple[int, int]:
        """Two numbers: how many rows wait, and how many rows are being computed. A text is one row."""
        return self._queue.rows, sum(member.rows for member in self._running)

    def admit(self, rows: int) -> None:
        """Raise an error unless ``rows`` more rows would be accepted now.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
        """
        self._queue.admit(rows)

    async def close(self, seconds: float) -> None:
        """Reject new requests and finish accepted requests. Fail the requests left after ``seconds`` seconds."""
        self._queue.closed = True
        if self._task:
            await asyncio.wait([self._task], timeout=seconds)
        self._stop()

    def _enqueue(self, items: Sequence[W]) -> None:
        for item in items:
            self._queue.append(item)
        if self._task is None:
            # in an empty context, because the task does not belong to the request that starts it
            self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    def _leave(self, items: Iterable[W]) -> None:
        """Stop the work on items whose caller has its answer or waits no longer."""
        for item in items:
            item.future.cancel()  # also keeps asyncio from logging an error that nobody retrieves
            if item.future.cancelled():
                self._queue.remove(item)

    async def _run(self) -> None:
        """Compute until no request waits or runs."""
        try:
            while self._queue or self._running:
                # Let requests that have arrived join the batch. With a single iteration of the event loop, a request
                # would wait for one computation at each of its stages.
                for _ in range(REQUEST_STAGES):
                    await asyncio.sleep(0)
                await self._turn()
        except Exception as defect:  # otherwise callers would wait forever
            self._stop(inference_error(f"{self.name} failed", defect))
            self.circuit_breaker.record_failure()
            self.observer.on_failure(defect)
        finally:
            self._task = None
            self._stop()  # requests are left only after an error, or if this task was cancelled

    async def _turn(self) -> None:
        """Choose the members of one batch or round, and compute them."""
        raise NotImplementedError

    async def _compute(self, members: Sequence[M]) -> None:
        """Compute members together. If this fails, compute each alone, so that only the failing member fails."""
        try:
            await self._forward(members)
            self.circuit_breaker.record_success()
            return
        except Exception as error:
            if len(members) == 1:
                self._fail(members[0], error)
                return
        # outside of ``except``, because the traceback of the error keeps the tensors of the failed batch in memory
        for member in members:
            if not member.future.done():
                await self._compute([member])
                await asyncio.sleep(0)

    async def _forward(self, members: Sequence[M]) -> None:
        """Compute members together. Any error of the network is raised, and leaves the members unchanged."""
        raise NotImplementedError

    def _fail(self, member: M, error: Exception) -> None:
        """Fail a member that was computed alone."""
        if member.future.done():  # its caller has left
            return
        if not isinstance(error, BadValue):  # otherwise the input is invalid, and only the network could detect that
            self.observer.on_failure(error)
            error = inference_error(f"{self.name} failed on this {self.INPUT}", error)
            if not isinstance(error, OutOfMemory):  # a smaller input may succeed
                self.circuit_breaker.record_failure()
        member.future.set_exception(error)

    def _stop(self, error: QuartetError | None = None) -> None:
        """Fail all requests that still wait or run, each with a copy of ``error``."""
        error = error or NotReady(f"{self.name} stopped before it could answer")
        for member in (*self._queue, *self._running):
            if not member.future.done():
                member.future.set_exception(type(error)(error.message))
        self._queue.clear()
        self._running = ()
