"""An event loop, threads and clocks that advance only when a test advances them, for model-based tests."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from app.engine.admission import current_caller
from app.engine.executor import Executor

RUNS = int(os.environ.get("MODEL_RUNS", "0"))  # number of runs of each machine; `make model-check` sets MODEL_RUNS
MAX_ITERATIONS = 10_000  # iterations of the event loop while the time stands still; more mean an endless loop


def run_machine(machine: Callable[[], RuleBasedStateMachine], runs: int) -> None:
    """Run a state machine ``runs`` times with a fixed seed. If MODEL_RUNS is set, run it so often with new seeds."""
    phases = [Phase.generate, Phase.shrink]
    profile = settings(
        max_examples=RUNS or runs,
        stateful_step_count=40,
        deadline=None,
        derandomize=not RUNS,
        database=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=profile)  # type: ignore[no-untyped-call]


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time changes only in calls of ``advance``.

    The loop also has the functions of the module ``time`` that engines use, and replaces this module.
    """

    def __init__(self) -> None:
        self.seconds = 1000.0
        super().__init__()

    def time(self) -> float:
        return self.seconds

    monotonic = perf_counter = time

    def advance(self, seconds: float) -> None:
        """Advance the time, and run the callbacks that are due."""
        self.seconds += seconds
        self.settle()

    def settle(self) -> None:
        """Run the loop until all tasks wait for a later time or for the end of a job."""
        for _ in range(MAX_ITERATIONS):
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready and not (self._scheduled and self._scheduled[0].when() <= self.seconds):  # type: ignore[attr-defined]
                return
        raise AssertionError("the event loop does not come to rest")

    def start(self, coroutine: Coroutine[Any, Any, Any], caller: str | None) -> asyncio.Task[Any]:
        """Start a task on behalf of a caller, and run it until it first waits."""
        context = contextvars.copy_context()
        context.run(current_caller.set, caller)
        task = self.create_task(coroutine, context=context)
        self.settle()
        return task


class ManualPool:
    """A thread pool without threads. A call of ``finish`` computes the oldest job."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        self.jobs.append((future, lambda: function(*args, **kwargs)))
        return future

    def finish(self) -> None:
        future, function = self.jobs.popleft()
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None: ...


def manual_executor(name: str) -> tuple[Executor, ManualPool]:
    """Return an executor and its pool. The test takes the place of the pool's only thread."""
    executor, pool = Executor(name), ManualPool()
    executor._pool.shutdown()
    executor._pool = pool  # type: ignore[assignment]
    return executor, pool


class VirtualMachine(RuleBasedStateMachine):
    """A state machine on a virtual event loop. ``modules`` are the modules that use its clock."""

    modules: Sequence[ModuleType] = ()

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loop = VirtualLoop()
        self.errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.patch = pytest.MonkeyPatch()
        for module in self.modules:
            self.patch.setattr(module, "time", self.loop)

    def teardown(self) -> None:
        try:
            self.finish()
            assert not asyncio.all_tasks(self.loop)
            assert not self.errors
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.settle()
            self.loop.close()
            self.patch.undo()

    def finish(self) -> None:
        """Finish all jobs and tasks, and check that all requests are answered and that nothing is left."""
        raise NotImplementedError


def counted(limit: int) -> Iterator[int]:
    """Yield 0, 1, 2, ... Fail after ``limit`` numbers, because then a caller waits for ever."""
    yield from range(limit)
    raise AssertionError(f"not done after {limit} rounds")
