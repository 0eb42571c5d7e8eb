"""Model-based test of the text engine: arrivals, streams, cancellations, failures, deadlines and shutdown."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from support.engine import RecordingObserver
from support.virtual_time import VirtualMachine, counted, manual_executor, run_machine

from app.engine import circuit_breaker, executor, scheduler, text_engine
from app.errors import InferenceFailed, NotReady, Overloaded

MAX_RUNNING, QUEUE_ROWS, STEP_SECONDS = 3, 6, 0.002


@dataclass(eq=False)
class CountedText:
    """A text of ``length`` steps, which fails at step ``fails_at``."""

    request: int
    length: int
    fails_at: int | None
    done: int = 0

    @property
    def finished(self) -> bool:
        return self.done == self.length

    @property
    def generated(self) -> int:
        return self.done

    @property
    def remaining(self) -> int:
        return self.length - self.done


@dataclass
class Request:
    number: int
    caller: str | None
    texts: list[CountedText]
    task: asyncio.Task[Any]
    allowed: set[type[BaseException]]  # errors that may be its answer


class TextEngineMachine(VirtualMachine):
    modules = (text_engine, scheduler, circuit_breaker, executor)

    @initialize(with_keys=st.booleans(), observer_fails=st.booleans())
    def create(self, with_keys: bool, observer_fails: bool) -> None:
        self.patch.setattr(scheduler, "PREEMPT_AFTER", 0.05)
        self.patch.setattr(scheduler, "PREEMPT_CHECK_INTERVAL", 0.01)
        self.with_keys = with_keys
        self.executor, self.pool = manual_executor("test")
        observer = RecordingObserver()
        if observer_fails:
            observer.on_failure = observer.failures.index  # type: ignore[assignment, method-assign]
        self.engine: Any = text_engine.TextEngine(
            "m", self.step, lambda rows: 1.0, self.executor, observer, MAX_RUNNING, QUEUE_ROWS
        )
        self.requests: list[Request] = []
        self.started: set[CountedText] = set()
        self.last_started: dict[str | None, int] = {}
        self.broken_steps = 0
        self.closing: asyncio.Task[None] | None = None

    def step(self, texts: Sequence[CountedText]) -> None:
        self.loop.seconds += STEP_SECONDS
        assert 1 <= len(set(texts)) == len(texts) <= MAX_RUNNING
        for text in texts:
            assert not text.finished
            if text not in self.started:
                self.started.add(text)
                caller = self.requests[text.request].caller
                assert self.last_started.get(caller, -1) <= text.request, "first in, first out for each caller"
                self.last_started[caller] = text.request
        if self.broken_steps:
            self.broken_steps -= 1
            raise RuntimeError("the device does not answer")
        if any(text.done == text.fails_at for text in texts):
            raise ValueError("failing")
        for text in texts:
            text.done += 1

    @rule(
        caller=st.sampled_from("abc"),
        lengths=st.lists(st.sampled_from([1, 5, 40, 400]), min_size=1, max_size=3),
        failing=st.sampled_from([False] * 4 + [True]),
        streamed=st.booleans(),
        timeout=st.sampled_from([None, None, None, 0.1, 5.0]),
    )
    def send(self, caller: str, lengths: list[int], failing: bool, streamed: bool, timeout: float | None) -> None:
        number, own = len(self.requests), caller if self.with_keys else None
        texts = [CountedText(number, length, None) for length in lengths]
        if failing:
            texts[-1].fails_at = texts[-1].length // 2
        waiting, own_rows = self.engine.load[0], self.waiting_texts()[own]
        full = waiting and waiting + own_rows * self.with_keys + len(texts) > QUEUE_ROWS

        async def submit() -> Any:
            async with asyncio.timeout(timeout):
                if not streamed:
                    return await self.engine.submit(texts)
                lengths = [[text.done for text in texts] async for _ in self.engine.stream(texts)]
                assert lengths == sorted(lengths)
                return texts

        allowed: set[type[BaseException]] = {InferenceFailed} if failing or self.broken_steps else set()
        allowed |= {TimeoutError} if timeout else set()
        request = Request(number, own, texts, self.loop.start(submit(), own), allowed)
        self.requests.append(request)
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
    @rule(rounds=st.sampled_from([1, 1, 3, 30]))
    def finish_rounds(self, rounds: int) -> None:
        for _ in range(rounds):
            if self.pool.jobs:
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

    @rule(steps=st.integers(1, 4))
    def break_network(self, steps: int) -> None:
        self.broken_steps = steps
        for request in self.pending():
            request.allowed.add(InferenceFailed)

    @precondition(lambda self: self.engine._run_task)
    @rule(chance=st.integers(0, 4))
    def cancel_run_task(self, chance: int) -> None:
        if not chance:
            for request in self.pending():
                request.allowed.add(NotReady)
            self.engine._run_task.cancel()
            self.loop.settle()
            assert not self.pending()

    @precondition(lambda self: not self.closing)
    @rule(chance=st.integers(0, 9), seconds=st.floats(0.1, 5))
    def close(self, chance: int, seconds: float) -> None:
        if not chance:
            self.closing = self.loop.start(self.engine.close(seconds), None)
            for request in self.pending():
                request.allowed.add(NotReady)

    def waiting_texts(self) -> Counter[str | None]:
        return Counter(sequence.caller for sequence in self.engine._scheduler.waiting)

    @invariant()
    def limits_hold(self) -> None:
        waiting = self.waiting_texts()
        assert self.engine.load[0] == waiting.total()
        assert self.engine._admission._waiting_by_caller == {key: count for key, count in waiting.items() if key}
        assert self.engine.load[1] <= MAX_RUNNING
        assert len(self.pool.jobs) <= 1
        assert bool(self.pending()) <= bool(self.pool.jobs), "somebody waits, but nothing is computed"

    def finish(self) -> None:
        for _ in counted(20_000):
            if self.pool.jobs:
                self.finish_rounds(1)
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
                assert request.task.result() == request.texts
                assert all(text.finished for text in request.texts)
        assert self.engine.load == (0, 0)
        assert self.engine._run_task is None
        assert not self.engine._scheduler.waiting
        assert not self.engine._admission._waiting_by_caller
        assert not self.executor.busy
        assert not self.executor._started_at


@pytest.mark.timeout(0)
def test_the_text_engine_keeps_its_promises_in_any_order_of_events() -> None:
    run_machine(TextEngineMachine, runs=100)
