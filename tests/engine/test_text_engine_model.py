"""Model-based test of the text engine.

Texts and streams arrive, are cancelled, fail and reach their deadlines in any order, and the engine shuts down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from support.state_machines.engines import EngineMachine, Request
from support.state_machines.virtual_time import run_machine

from app.engine import circuit_breaker, executor, scheduler, text_engine

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


class TextEngineMachine(EngineMachine):
    modules = (text_engine, scheduler, circuit_breaker, executor)
    run_task, max_running, queue_rows = "_run_task", MAX_RUNNING, QUEUE_ROWS

    @initialize(with_keys=st.booleans(), observer_fails=st.booleans())
    def create(self, with_keys: bool, observer_fails: bool) -> None:
        self.patch.setattr(scheduler, "PREEMPT_AFTER", 0.05)
        self.patch.setattr(scheduler, "PREEMPT_CHECK_INTERVAL", 0.01)
        self.prepare(with_keys, observer_fails)
        self.begun: dict[str | None, list[CountedText]] = {}
        self.engine = text_engine.TextEngine(
            "m", self.step, lambda texts: 1.0, self.executor, self.observer, MAX_RUNNING, QUEUE_ROWS
        )

    def step(self, texts: Sequence[CountedText]) -> None:
        self.loop.seconds += STEP_SECONDS
        assert 1 <= len(set(texts)) == len(texts) <= MAX_RUNNING
        for text in texts:
            assert not text.finished
            if id(text) not in self.started:
                self.started.add(id(text))
                self.begin_text(text)
        self.fail_if_broken()
        if any(text.done == text.fails_at for text in texts):
            raise ValueError("failing")
        for text in texts:
            text.done += 1

    def begin_text(self, text: CountedText) -> None:
        """Texts of a caller start in the order of their requests, but a shorter text may start earlier."""
        begun = self.begun.setdefault(self.requests[text.request].caller, [])
        assert all(other.request <= text.request or other.length < text.length for other in begun)
        begun.append(text)

    @rule(
        caller=st.sampled_from("abc"),
        lengths=st.lists(st.sampled_from([1, 5, 40, 400]), min_size=1, max_size=3),
        failing=st.sampled_from([False] * 4 + [True]),
        streamed=st.booleans(),
        timeout=st.sampled_from([None, None, None, 0.1, 5.0]),
    )
    def send(self, caller: str, lengths: list[int], failing: bool, streamed: bool, timeout: float | None) -> None:
        texts = [CountedText(len(self.requests), length, None) for length in lengths]
        if failing:
            texts[-1].fails_at = texts[-1].length // 2

        async def stream() -> Any:
            seen = [[text.done for text in texts] async for _ in self.engine.stream(texts)]
            assert seen == sorted(seen)
            return texts

        compute = stream if streamed else lambda: self.engine.submit(texts)
        self.start(caller, texts, len(texts), failing, timeout, compute)

    @precondition(lambda self: self.pool.jobs)
    @rule(rounds=st.sampled_from([1, 1, 3, 30]))
    def finish_rounds(self, rounds: int) -> None:
        for _ in range(rounds):
            if self.pool.jobs:
                self.finish_job()

    def waiting(self) -> Counter[str | None]:
        return Counter(sequence.caller for sequence in self.engine._scheduler.waiting)

    def check_result(self, request: Request) -> None:
        assert request.task.result() == request.items
        assert all(text.finished for text in request.items)


@pytest.mark.timeout(0)
def test_the_text_engine_keeps_its_promises_in_any_order_of_events() -> None:
    run_machine(TextEngineMachine, runs=100)
