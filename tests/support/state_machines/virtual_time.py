"""An event loop, threads and clocks that only a test advances, and the settings of model-based tests."""

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

RUNS = int(os.environ.get("MODEL_RUNS", "0"))  # of each machine; `make model-check` sets it
MAX_ITERATIONS = 10_000  # of the event loop without progress of time: more means an endless loop


def run_machine(machine: Callable[[], RuleBasedStateMachine], runs: int) -> None:
    """Run a state machine ``runs`` times with fixed random numbers, or ``MODEL_RUNS`` times with new ones."""
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
    """An event loop whose time only ``advance`` changes. It has the methods of the module ``time`` that engines use."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        super().__init__()

    def time(self) -> float:
        return self.seconds

    monotonic = perf_counter = time

    def advance(self, seconds: float) -> None:
        """Let time pass, and run what is due."""
        self.seconds += seconds
        self.settle()

    def settle(self) -> None:
        """Run until nothing can go on without more time or the end of a job."""
        for _ in range(MAX_ITERATIONS):
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready and not (self._scheduled and self._scheduled[0].when() <= self.seconds):  # type: ignore[attr-defined]
                return
        raise AssertionError("the event loop does not come to rest")

    def start(self, coroutine: Coroutine[Any, Any, Any], caller: str | None) -> asyncio.Task[Any]:
        """Start a task that acts for a caller, up to its first wait."""
        context = contextvars.copy_context()
        context.run(current_caller.set, caller)
        task = self.create_task(coroutine, context=context)
        self.settle()
        return task


class ManualPool:
    """A thread pool without threads: ``finish`` computes the oldest job."""

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
    """Return an executor, and its pool of one thread that the test plays."""
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
        """Let everything end, and check that all requests are answered and nothing is left."""
        raise NotImplementedError


def counted(limit: int) -> Iterator[int]:
    """Count up; more than ``limit`` rounds mean that somebody starves."""
    yield from range(limit)
    raise AssertionError(f"not done after {limit} rounds")
