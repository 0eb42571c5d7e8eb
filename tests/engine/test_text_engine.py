"""Continuous batching: texts join and leave at every step, and a crowd changes nothing."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import RecordingObserver, start_tasks
from support.networks import publish_tiny

from app.engine.executor import Executor
from app.engine.text_engine import TextEngine
from app.errors import InferenceFailed, NotReady, Overloaded
from app.tasks.text_generation import TextGenerator

pytestmark = pytest.mark.anyio


@dataclass(eq=False)
class Count:
    """A text that is finished after so many steps; a guilty one fails at its third."""

    steps: int
    guilty: bool = False
    done: int = 0

    @property
    def finished(self) -> bool:
        return self.done >= self.steps

    @property
    def generated(self) -> int:
        return self.done

    @property
    def remaining(self) -> int:
        return self.steps - self.done


@dataclass
class Stepper:
    """Steps such texts, each step only when it is let."""

    turns: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    sizes: list[int] = field(default_factory=list)

    def step(self, texts: Sequence[Count]) -> None:
        assert self.turns.acquire(timeout=10)
        if any(text.guilty and text.done == 2 for text in texts):
            raise ValueError("guilty")
        for text in texts:
            text.done += 1
        self.sizes.append(len(texts))


@pytest.fixture
async def lane() -> AsyncIterator[Executor]:
    lane = Executor("test")
    yield lane
    lane.close()


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts make room at once."""
    monkeypatch.setattr("app.engine.scheduler.PREEMPT_AFTER", 0.0)
    monkeypatch.setattr("app.engine.scheduler.PREEMPT_CHECK_INTERVAL", 0.0)


def engine_of(
    stepper: Stepper, lane: Executor, rows: int = 2, queue_rows: int = 4, seen: RecordingObserver | None = None
) -> Any:
    return TextEngine(
        "m", stepper.step, lambda rows: 0.001, lane, seen or RecordingObserver(), rows, queue_rows, normal_budget=0
    )


async def test_a_short_text_does_not_wait_for_a_long_one(lane: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, lane)
    long, short, waiting = await start_tasks(*(engine.submit([Count(steps)]) for steps in (9, 2, 3)))
    stepper.turns.release(2)
    await short
    assert not long.done()
    stepper.turns.release(3)
    await waiting
    assert not long.done()
    stepper.turns.release(99)
    await long
    assert stepper.sizes == [2, 2, 2, 2, 2, 1, 1, 1, 1]


async def test_where_all_rows_are_long_ones_they_make_room_and_go_on_later(
    lane: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)
    stepper, seen = Stepper(), RecordingObserver()
    engine = engine_of(stepper, lane, rows=2, queue_rows=5, seen=seen)
    long = await start_tasks(*(engine.submit([Count(50)]) for _ in range(3)))
    short = await start_tasks(engine.submit([Count(2)]), engine.submit([Count(1)]))
    stepper.turns.release(12)
    await asyncio.gather(*short)
    assert not any(task.done() for task in long)
    while engine.load != (1, 2):  # noqa: ASYNC110  # others have their turn before the rows are filled again
        await asyncio.sleep(0.001)
    with pytest.raises(Overloaded, match="1 of 5 rows wait, 5 more were sent"):  # who made room is in the queue again
        await engine.submit([Count(1)] * 5)
    long[0].cancel()
    stepper.turns.release(999)
    answers = await asyncio.gather(*long, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert [text.done for answer in answers[1:] for text in answer] == [50, 50]
    assert engine.load == (0, 0)
    assert max(stepper.sizes) == 2
    assert len(seen.queue_seconds) == 5  # each has begun once


async def test_texts_of_one_kind_are_written_one_after_the_other(
    lane: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)
    stepper = Stepper()
    engine = engine_of(stepper, lane, rows=1)
    texts = [Count(5), Count(4), Count(5)]
    tasks = await start_tasks(*(engine.submit([text]) for text in texts))
    stepper.turns.release(4)
    while len(stepper.sizes) < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert [text.done for text in texts] == [4, 0, 0]
    stepper.turns.release(99)
    await asyncio.gather(*tasks)


async def test_a_text_that_left_while_it_made_room_does_not_come_back(
    lane: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)
    stepper = Stepper()
    engine = engine_of(stepper, lane, rows=1)
    gone, other = Count(10**9), Count(4)
    leaving, staying = await start_tasks(engine.submit([gone]), engine.submit([other]))
    stepper.turns.release(2)
    while not other.done:  # noqa: ASYNC110  # it runs in the other's place
        await asyncio.sleep(0.001)
    leaving.cancel()
    stepper.turns.release(99)
    await staying
    assert gone.done <= 3
    assert engine.load == (0, 0)


async def test_beside_long_forwards_of_others_a_turn_is_long(lane: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.step_budget.MAX_STEP_BUDGET", 60.0)
    stepper, seen = Stepper(), RecordingObserver()
    engine = engine_of(stepper, lane, seen=seen)

    (task,) = await start_tasks(engine.submit([Count(9)]))
    for _ in range(2):
        await asyncio.sleep(0)  # its first step has begun, and holds the lane
    (other,) = await start_tasks(lane.run_timed(30, time.sleep, 0.3))
    stepper.turns.release(99)
    await asyncio.gather(task, other)
    assert seen.batches == [1, 1]  # turns: a step, and all others
    assert len(stepper.sizes) == 9


async def test_long_turns_of_another_model_s_texts_make_none_longer(
    lane: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.step_budget.MAX_STEP_BUDGET", 60.0)
    quick, seen = Stepper(threading.Semaphore(99)), RecordingObserver()
    slow = TextEngine(
        "slow", lambda texts: [dawdle(text) for text in texts], lambda rows: 0.001, lane, RecordingObserver(), 1, 4, 0
    )
    other = asyncio.ensure_future(slow.submit([Count(9)]))
    await engine_of(quick, lane, seen=seen).submit([Count(9)])
    assert len(seen.batches) == 9  # turns, of a step each
    await other


def dawdle(text: Count) -> None:
    time.sleep(0.02)
    text.done += 1


async def test_while_others_are_refused_a_turn_is_long(lane: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.step_budget.STEP_BUDGET_REJECTING", 60.0)
    stepper, seen = Stepper(), RecordingObserver()
    engine = engine_of(stepper, lane, rows=1, queue_rows=1, seen=seen)
    tasks = await start_tasks(engine.submit([Count(9)]))
    await asyncio.sleep(0)  # it runs
    tasks += await start_tasks(engine.submit([Count(9)]))
    with pytest.raises(Overloaded):
        await engine.submit([Count(1)])
    stepper.turns.release(99)
    await asyncio.gather(*tasks)
    assert seen.batches[:2] == [1, 1]  # the step that had begun, and all others of the first text
    assert len(seen.batches) == 2 + 9  # then nobody was refused any more


async def test_an_abandoned_text_frees_its_row_at_the_next_step(lane: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, lane, rows=1)
    gone, waiting = await start_tasks(engine.submit([Count(10**9)]), engine.submit([Count(1)]))
    await asyncio.sleep(0)  # its first step has begun
    gone.cancel()
    stepper.turns.release(2)
    await waiting
    assert sum(stepper.sizes) == 2


async def test_who_leaves_at_the_last_step_is_left_alone_and_neighbours_go_on(lane: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, lane)
    last, beside, waiting = await start_tasks(*(engine.submit([Count(steps)]) for steps in (3, 5, 1)))
    stepper.turns.release(2)
    while len(stepper.sizes) < 2:  # noqa: ASYNC110  # its third step and last one has begun
        await asyncio.sleep(0.001)
    for _ in range(2):  # once would do
        last.cancel()
    stepper.turns.release(99)
    answers = await asyncio.gather(last, beside, waiting, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert [text.done for answer in answers[1:] for text in answer] == [5, 1]
    assert engine.load == (0, 0)
    assert [text.done for text in await engine.submit([Count(2)])] == [2]


async def test_who_leaves_while_it_stops_does_not_hold_it(lane: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, lane, rows=1)
    gone, waiting, kept, closing = await start_tasks(
        engine.submit([Count(10**9)]), engine.submit([Count(1)]), engine.submit([Count(2)]), engine.close(30)
    )
    gone.cancel()
    waiting.cancel()
    stepper.turns.release(9)
    answers = await asyncio.gather(gone, waiting, kept, closing, return_exceptions=True)
    assert [type(answer) for answer in answers[:2]] == [asyncio.CancelledError] * 2
    assert [text.done for text in answers[2]] == [2]
    assert engine.load == (0, 0)


async def test_only_the_guilty_text_gets_the_error(lane: Executor) -> None:
    stepper, seen = Stepper(), RecordingObserver()
    stepper.turns.release(999)
    engine = engine_of(stepper, lane, rows=3, seen=seen)
    texts = [Count(5), Count(5, guilty=True), Count(5)]
    answers = await asyncio.gather(*(engine.submit([text]) for text in texts), return_exceptions=True)
    assert isinstance(answers[1], InferenceFailed)
    assert [texts[0].done, texts[2].done] == [5, 5]
    assert len(seen.failures) == 1


async def test_a_full_queue_refuses_exactly_the_surplus(lane: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, lane, rows=2, queue_rows=4)
    running = await start_tasks(engine.submit([Count(1)]), engine.submit([Count(1)]))
    await asyncio.sleep(0)
    waiting = await start_tasks(*(engine.submit([Count(1)]) for _ in range(7)))
    assert [task.done() for task in waiting] == [False] * 4 + [True] * 3
    for task in waiting[4:]:
        error = task.exception()
        assert isinstance(error, Overloaded)
        assert error.retry_after >= 1
    stepper.turns.release(99)
    await asyncio.gather(*running, *waiting[:4])


async def test_stopping_finishes_or_tells_everybody(lane: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, lane, rows=1)
    tasks = await start_tasks(engine.submit([Count(1)]), engine.submit([Count(1)]), engine.close(10))
    with pytest.raises(NotReady):
        await engine.submit([Count(1)])
    stepper.turns.release(2)
    await asyncio.gather(*tasks)

    other = engine_of(stepper, lane, rows=1)
    tasks = await start_tasks(other.submit([Count(1)]), other.submit([Count(1)]))
    await other.close(0.01)
    stepper.turns.release(1)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(answer, NotReady) for answer in answers)


@pytest.mark.parametrize("make_room", [False, True])
async def test_in_a_crowd_each_text_is_what_it_is_alone(
    tmp_path: Path, lane: Executor, monkeypatch: pytest.MonkeyPatch, make_room: bool
) -> None:
    """Sixty texts of random length and settings through eight rows, arriving in threes between steps."""
    if make_room:
        eager(monkeypatch)
    continuer = TextGenerator(publish_tiny(tmp_path, "tiny-rnn"), torch.device("cpu"))
    chance = random.Random(0)

    def text(seed: int) -> Any:
        chance.seed(seed)
        prompt, _ = continuer.parse("".join(chance.choices("abc \nXé", k=chance.choice([0, 1, 5, 700]))))
        temperature, top_k = chance.choice([0, 0.5, 1, 3]), chance.choice([None, 1, 4])
        top_p, stop = chance.choice([None, 0.3, 0.9]), chance.choice([[], ["aa", "b"]])
        return continuer.begin(prompt, chance.randint(1, 60), temperature, top_k, top_p, stop, seed)

    alone = []
    for seed in range(60):
        one = text(seed)
        while not one.finished:
            continuer.step([one])
        alone.append((one.text, one.finish_reason))

    engine: Any = TextEngine("m", continuer.step, continuer.latency, lane, RecordingObserver(), 8, 99)
    tasks = []
    for begin in range(0, 60, 3):
        tasks += await start_tasks(*(engine.submit([text(seed)]) for seed in range(begin, begin + 3)))
        await lane.run(lambda: None)
    crowd = [(answer[0].text, answer[0].finish_reason) for answer in await asyncio.gather(*tasks)]
    assert crowd == alone
    assert {reason for _, reason in crowd} == {"length", "stop"}


async def test_who_leaves_a_crowd_changes_nothing_for_who_stays(tmp_path: Path, lane: Executor) -> None:
    """Of forty texts through eight rows every other one leaves: while it waits, on its way, or at its last step."""
    continuer = TextGenerator(publish_tiny(tmp_path, "tiny-rnn"), torch.device("cpu"))

    def text(seed: int) -> Any:
        prompt, _ = continuer.parse("abc" * (seed % 5))
        return continuer.begin(prompt, 20 + seed % 7, 1.0, None, None, [], seed)

    alone = []
    for seed in range(40):
        one = text(seed)
        while not one.finished:
            continuer.step([one])
        alone.append(one.text)

    loop = asyncio.get_running_loop()

    def step(running: Sequence[Any]) -> None:
        continuer.step(running)
        for one in running:
            if one.seed % 2 and len(one.text) >= one.seed % 23:
                loop.call_soon_threadsafe(tasks[one.seed].cancel)

    engine: Any = TextEngine("m", step, lambda rows: 0.001, lane, RecordingObserver(), 8, 99, normal_budget=0)
    tasks = [asyncio.ensure_future(engine.submit([text(seed)])) for seed in range(40)]
    await asyncio.sleep(0)
    tasks[39].cancel()  # it still waits
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answers[seed][0].text for seed in range(0, 40, 2)] == alone[::2]
    left = [answer for answer in answers[1::2] if isinstance(answer, asyncio.CancelledError)]
    assert len(left) >= 15  # some were finished before they could leave
    assert engine.load == (0, 0)


async def test_a_turn_takes_several_short_steps_until_one_text_is_finished(
    lane: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.step_budget.LONG_GAP", 60.0)  # on a busy machine any gap may be long
    stepper, seen = Stepper(), RecordingObserver()
    stepper.turns.release(99)
    engine: Any = TextEngine("m", stepper.step, lambda rows: 0.001, lane, seen, 2, 4, normal_budget=60)
    await asyncio.gather(engine.submit([Count(3)]), engine.submit([Count(5)]), engine.submit([Count(4)]))
    assert seen.batches == [2, 2, 1]  # turns: three steps, two with the one that waited, two for that one alone
    assert stepper.sizes == [2, 2, 2, 2, 2, 1, 1]
