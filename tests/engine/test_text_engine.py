"""Continuous batching: the rules, one example each, and each text is the same in a batch and alone.

``test_simulation`` tests the rules in any order of events.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import RecordingObserver, start_tasks
from support.networks import publish_tiny

from app.engine.executor import Executor
from app.engine.text_engine import TextEngine
from app.errors import BadValue, InferenceFailed, NotReady
from app.limits import Limits
from app.tasks.text_generation import TextGenerator

pytestmark = pytest.mark.anyio

ONE_STEP = replace(Limits(), round_seconds=0.0, max_round_seconds=0.0)  # each round has one step


@dataclass(eq=False)
class CountingText:
    """A text of ``steps`` steps, of which ``prompt`` read its prompt. It may fail at its third step."""

    steps: int
    failing: bool = False
    prompt: int = 0
    done: int = 0

    @property
    def finished(self) -> bool:
        return self.done >= self.steps

    @property
    def generated(self) -> int:
        return max(self.done - self.prompt, 0)

    @property
    def remaining(self) -> int:
        return self.steps - self.done


@dataclass
class Stepper:
    """A fake model for counting texts. Each step uses up one permit of the test."""

    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    sizes: list[int] = field(default_factory=list)

    def step(self, texts: Sequence[CountingText]) -> None:
        assert self.permits.acquire(timeout=60)
        if any(text.failing and text.done == 2 for text in texts):
            raise ValueError("failing")
        for text in texts:
            text.done += 1
        self.sizes.append(len(texts))


def unlimited() -> Stepper:
    return Stepper(threading.Semaphore(999))


def engine_of(
    step: Callable[[Any], None], executor: Executor, rows: int = 2, limits: Limits = ONE_STEP, **options: Any
) -> Any:
    options = {"observer": RecordingObserver(), "queue_rows": 4, **options}
    return TextEngine("m", step, lambda texts: 0.001, executor, max_running=rows, limits=limits, **options)


async def test_a_short_text_does_not_wait_for_a_long_one(executor: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper.step, executor)
    long, short, waiting = await start_tasks(*(engine.submit([CountingText(steps)]) for steps in (9, 2, 3)))
    stepper.permits.release(2)
    await short
    assert not long.done()
    stepper.permits.release(3)
    await waiting
    assert not long.done()
    stepper.permits.release(99)
    await long
    assert stepper.sizes == [2, 2, 2, 2, 2, 1, 1, 1, 1]


async def test_a_cancelled_text_frees_its_slot_at_the_next_step(executor: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper.step, executor, rows=1)
    cancelled, waiting = await start_tasks(engine.submit([CountingText(10**9)]), engine.submit([CountingText(1)]))
    while engine.row_counts != (1, 1):  # noqa: ASYNC110  # its first step has not started
        await asyncio.sleep(0)
    cancelled.cancel()
    stepper.permits.release(2)
    await waiting
    assert sum(stepper.sizes) == 2


@pytest.mark.parametrize("count", [2, 3])
async def test_only_the_failing_text_gets_the_error(executor: Executor, count: int) -> None:
    engine = engine_of(unlimited().step, executor, rows=3)
    texts = [CountingText(5), CountingText(5, failing=True), CountingText(5)][:count]
    answers = await asyncio.gather(*(engine.submit([text]) for text in texts), return_exceptions=True)
    assert isinstance(answers[1], InferenceFailed)
    assert str(answers[1]) == "m failed on this text (ValueError)"
    assert [text.done for text in texts] == [5, 2, 5][:count]
    assert [str(error) for error in engine.observer.failures] == ["failing"]


async def test_a_text_that_the_network_cannot_read_is_the_callers_error(executor: Executor) -> None:
    def step(texts: Sequence[CountingText]) -> None:
        raise BadValue("not allowed")

    engine = engine_of(step, executor)
    with pytest.raises(BadValue, match="not allowed"):
        await engine.submit([CountingText(5)])
    assert engine.observer.failures == []


async def test_a_stream_shows_what_was_generated_before_an_error(executor: Executor) -> None:
    engine = engine_of(unlimited().step, executor)
    short, failing, seen = CountingText(1), CountingText(5, failing=True), list[tuple[int, int]]()
    with pytest.raises(InferenceFailed):  # noqa: PT012
        async for _ in engine.stream([short, failing]):
            seen.append((short.done, failing.done))
    assert seen == sorted(seen)
    assert seen[-1] == (1, 2)


async def test_shutdown_finishes_texts_or_fails_them(executor: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper.step, executor, rows=1)
    tasks = await start_tasks(engine.submit([CountingText(1)]), engine.submit([CountingText(1)]), engine.close(60))
    with pytest.raises(NotReady):
        await engine.submit([CountingText(1)])
    stepper.permits.release(2)
    await asyncio.gather(*tasks)

    other = engine_of(stepper.step, executor, rows=1)
    tasks = await start_tasks(other.submit([CountingText(1)]), other.submit([CountingText(1)]))
    await other.close(0.01)
    stepper.permits.release(1)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(answer) for answer in answers] == ["m stopped before it could answer"] * 2


class Timed:
    """A text engine on a clock. Steps take 0.25 seconds, and ``pauses`` follow the rounds."""

    def __init__(self, limits: Limits, pauses: Sequence[float] = ()) -> None:
        self.now, self.stepper, self.pauses = 1000.0, unlimited(), [*pauses]
        self.executor = Executor("inline", inline_seconds=99.0, clock=lambda: self.now)
        self.engine = engine_of(
            self.step, self.executor, limits=limits, clock=lambda: self.now, observer=self.observer()
        )

    def observer(self) -> RecordingObserver:
        class Pausing(RecordingObserver):
            def on_batch(observer, rows: int, seconds: float) -> None:
                super().on_batch(rows, seconds)
                self.now += self.pauses.pop(0) if self.pauses else 0

        return Pausing()

    def step(self, texts: Sequence[CountingText]) -> None:
        self.now += 0.25
        self.stepper.step(texts)

    def rounds(self) -> list[tuple[int, float]]:
        self.executor.close()
        return self.engine.observer.batches  # type: ignore[no-any-return]


async def test_a_round_takes_several_steps_until_its_time_is_over_or_a_text_is_finished() -> None:
    timed = Timed(replace(ONE_STEP, round_seconds=0.5))
    await timed.engine.submit([CountingText(5), CountingText(9)])
    assert timed.rounds() == [(2, 0.5), (2, 0.5), (2, 0.25), (1, 0.5), (1, 0.5)]


async def test_a_round_lasts_as_long_as_the_other_work_since_the_last_round() -> None:
    timed = Timed(replace(ONE_STEP, max_round_seconds=1.0), pauses=[0.75, 99.0])
    await timed.engine.submit([CountingText(9)])
    assert timed.rounds() == [(1, 0.25), (1, 0.75), (1, 1.0), (1, 0.25)]


async def test_rounds_of_another_text_engine_do_not_lengthen_rounds() -> None:
    timed = Timed(replace(ONE_STEP, max_round_seconds=60.0))
    other = engine_of(
        timed.step, timed.executor, clock=lambda: timed.now, limits=replace(ONE_STEP, max_round_seconds=60.0)
    )
    await asyncio.gather(timed.engine.submit([CountingText(9)]), other.submit([CountingText(9)]))
    assert timed.rounds() == other.observer.batches == [(1, 0.25)] * 9


async def test_a_text_is_reported_with_its_times() -> None:
    timed = Timed(ONE_STEP)
    await timed.engine.submit([CountingText(5, prompt=2)])
    observer = timed.engine.observer
    assert observer.dequeued == [(1, 0.0)]
    assert (observer.first_token_seconds, observer.inter_token_seconds) == ([0.75], [0.25])
    ((member),) = observer.completed
    assert (member.queued_at, member.started_at, member.ended_at) == (1000.0, 1000.0, 1001.25)


@pytest.mark.parametrize("preempting", [False, True])
async def test_each_text_is_the_same_in_a_batch_and_alone(tmp_path: Path, executor: Executor, preempting: bool) -> None:
    """Sixty texts with random lengths and settings share eight slots. Every fifth text is cancelled on its way."""
    generator = TextGenerator(publish_tiny(tmp_path, "tiny-rnn"), torch.device("cpu"))
    rng = random.Random(0)

    def text(seed: int) -> Any:
        rng.seed(seed)
        prompt, _ = generator.parse("".join(rng.choices("abc \nXé", k=rng.choice([0, 1, 5, 300]))))
        temperature, top_k = rng.choice([0, 0.5, 1, 3]), rng.choice([None, 1, 4])
        top_p, stop = rng.choice([None, 0.3, 0.9]), rng.choice([[], ["aa", "b"]])
        return generator.begin(prompt, rng.randint(1, 60), temperature, top_k, top_p, stop, seed)

    alone = []
    for seed in range(60):
        sequence = text(seed)
        while not sequence.finished:
            generator.step([sequence])
        alone.append((sequence.text, sequence.finish_reason))

    limits = replace(ONE_STEP, preempt_after_seconds=0, preempt_check_seconds=0) if preempting else Limits()
    engine: Any = TextEngine("m", generator.step, generator.seconds, executor, RecordingObserver(), 8, 99, limits)  # type: ignore[arg-type]
    tasks = []
    for begin in range(0, 60, 3):
        tasks += await start_tasks(*(engine.submit([text(seed)]) for seed in range(begin, begin + 3)))
        await executor.run(lambda: None)
        if begin % 5 == 0:
            tasks[begin].cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    batched = [(seed, answer[0]) for seed, answer in enumerate(answers) if isinstance(answer, list)]
    assert len(batched) >= 50
    assert [(text.text, text.finish_reason) for _, text in batched] == [alone[seed] for seed, _ in batched]
    assert {text.finish_reason for _, text in batched} == {"length", "stop"}
