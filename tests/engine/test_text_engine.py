"""Continuous batching: the rules, one example each, and each text is the same in a batch and alone.

``test_simulation`` tests the rules in any order of events.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import RecordingObserver, start_tasks
from support.networks import publish_tiny

from app.engine.executor import Executor
from app.engine.text_engine import TextEngine
from app.limits import Limits
from app.tasks.text_generation import ContinueJob, TextGenerator

pytestmark = pytest.mark.anyio

ONE_STEP = replace(Limits(), round_seconds=0.0, max_round_seconds=0.0)  # each round has one step


@dataclass(eq=False)
class CountingText:
    """A text of ``steps`` steps, of which ``prompt`` read its prompt."""

    steps: int
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


def engine_of(
    step: Callable[[Any], None], executor: Executor, rows: int = 2, limits: Limits = ONE_STEP, **options: Any
) -> Any:
    options = {"observer": RecordingObserver(), "queue_rows": 4, **options}
    return TextEngine("m", step, lambda texts: 0.001, executor, max_running=rows, limits=limits, **options)


class Timed:
    """A text engine on a clock. Steps take 0.25 seconds, and ``pauses`` follow the rounds."""

    def __init__(self, limits: Limits, pauses: Sequence[float] = ()) -> None:
        self.now, self.pauses = 1000.0, [*pauses]
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
        for text in texts:
            text.done += 1

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


async def test_each_text_is_the_same_in_a_batch_and_alone(tmp_path: Path, executor: Executor) -> None:
    """Sixty texts with random lengths and settings share eight slots. Every fifth text is cancelled on its way."""
    generator = TextGenerator(publish_tiny(tmp_path, "tiny-rnn"), torch.device("cpu"))
    rng = random.Random(0)

    def text(seed: int) -> Any:
        rng.seed(seed)
        prompt = "".join(rng.choices("abc \nXé", k=rng.choice([0, 1, 5, 300])))
        temperature, top_k = rng.choice([0, 0.5, 1, 3]), rng.choice([None, 1, 4])
        top_p, stop = rng.choice([None, 0.3, 0.9]), rng.choice([[], ["aa", "b"]])
        return generator.prepare(ContinueJob([prompt], rng.randint(1, 60), temperature, top_k, top_p, stop, seed))[0]

    alone = []
    for seed in range(60):
        sequence = text(seed)
        while not sequence.finished:
            generator.step([sequence])
        alone.append((sequence.text, sequence.finish_reason))

    limits = replace(ONE_STEP, preempt_after_seconds=0, preempt_check_seconds=0)
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
