"""Continuous batching: texts join and leave at every step, and each text is the same in a batch and alone."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import Activations, Gate, RecordingObserver, record_sleeps, start_tasks
from support.networks import publish_tiny

from app.engine.admission import current_caller
from app.engine.circuit_breaker import FAILURE_THRESHOLD
from app.engine.executor import Executor
from app.engine.observer import RequestTrace, current_trace
from app.engine.scheduler import TextSequence
from app.engine.text_engine import TextEngine
from app.errors import BadValue, InferenceFailed, NotReady, Overloaded
from app.tasks.text_generation import TextGenerator

pytestmark = pytest.mark.anyio


@dataclass(eq=False)
class CountingText:
    """A text that finishes after ``steps`` steps. If ``failing`` is true, it fails at its third step."""

    steps: int
    failing: bool = False
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
    """A fake model for counting texts. Each step uses up one permit of the test."""

    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    sizes: list[int] = field(default_factory=list)

    def step(self, texts: Sequence[CountingText]) -> None:
        assert self.permits.acquire(timeout=10)
        if any(text.failing and text.done == 2 for text in texts):
            raise ValueError("failing")
        for text in texts:
            text.done += 1
        self.sizes.append(len(texts))


class Clock:
    """A clock for the engine's rounds that only the test advances, so that a slow machine does not change them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        return time.monotonic()

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("app.engine.text_engine.time", clock)
    return clock


def preempt_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preempt long texts without delay."""
    monkeypatch.setattr("app.engine.scheduler.PREEMPT_AFTER", 0.0)
    monkeypatch.setattr("app.engine.scheduler.PREEMPT_CHECK_INTERVAL", 0.0)


def engine_of(
    stepper: Stepper, executor: Executor, rows: int = 2, queue_rows: int = 4, observer: RecordingObserver | None = None
) -> Any:
    return TextEngine(
        "m",
        stepper.step,
        lambda texts: 0.001,
        executor,
        observer or RecordingObserver(),
        rows,
        queue_rows,
        normal_budget=0,
    )


async def test_a_short_text_does_not_wait_for_a_long_one(executor: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, executor)
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


async def test_long_texts_are_preempted_by_short_ones_and_resumed(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempt_at_once(monkeypatch)
    stepper, observer = Stepper(), RecordingObserver()
    engine = engine_of(stepper, executor, rows=2, queue_rows=5, observer=observer)
    long = await start_tasks(*(engine.submit([CountingText(50)]) for _ in range(3)))
    short = await start_tasks(engine.submit([CountingText(2)]), engine.submit([CountingText(1)]))
    stepper.permits.release(12)
    await asyncio.gather(*short)
    assert not any(task.done() for task in long)
    while engine.row_counts != (1, 2):  # noqa: ASYNC110  # other tasks run before the slots are filled again
        await asyncio.sleep(0.001)
    with pytest.raises(
        Overloaded, match="1 of 5 rows are waiting; this request adds 5"
    ):  # the preempted text is queued again
        await engine.submit([CountingText(1)] * 5)
    long[0].cancel()
    stepper.permits.release(999)
    answers = await asyncio.gather(*long, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert [text.done for answer in answers[1:] for text in answer] == [50, 50]
    assert engine.row_counts == (0, 0)
    assert max(stepper.sizes) == 2
    assert len(observer.queue_seconds) == 5  # a resumed text is not reported again


async def test_texts_of_similar_length_are_not_preempted(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_at_once(monkeypatch)
    stepper = Stepper()
    engine = engine_of(stepper, executor, rows=1)
    texts = [CountingText(5), CountingText(4), CountingText(5)]
    tasks = await start_tasks(*(engine.submit([text]) for text in texts))
    stepper.permits.release(4)
    while len(stepper.sizes) < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert [text.done for text in texts] == [4, 0, 0]
    stepper.permits.release(99)
    await asyncio.gather(*tasks)


async def test_a_cancelled_preempted_text_is_not_resumed(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    preempt_at_once(monkeypatch)
    stepper = Stepper()
    engine = engine_of(stepper, executor, rows=1)
    cancelled, other = CountingText(10**9), CountingText(4)
    leaving, staying = await start_tasks(engine.submit([cancelled]), engine.submit([other]))
    stepper.permits.release(2)
    while not other.done:  # noqa: ASYNC110  # it runs in the slot of the preempted text
        await asyncio.sleep(0.001)
    leaving.cancel()
    stepper.permits.release(99)
    await staying
    assert cancelled.done <= 3
    assert engine.row_counts == (0, 0)


async def test_a_round_is_long_beside_long_batches_of_other_models(
    executor: Executor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.step_budget.MAX_STEP_BUDGET", 60.0)
    stepper, observer = Stepper(), RecordingObserver()
    engine = engine_of(stepper, executor, observer=observer)

    (task,) = await start_tasks(engine.submit([CountingText(9)]))
    for _ in range(2):
        await asyncio.sleep(0)  # its first step has started and occupies the executor
    (other,) = await start_tasks(executor.run_timed(30, clock.advance, 0.3))
    stepper.permits.release(99)
    await asyncio.gather(task, other)
    assert observer.batches == [1, 1]  # rounds: one step, then all others
    assert len(stepper.sizes) == 9


async def test_long_rounds_of_another_text_engine_do_not_lengthen_rounds(
    executor: Executor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_step(texts: Sequence[CountingText]) -> None:
        clock.advance(0.02)
        slow_stepper.step(texts)

    monkeypatch.setattr("app.engine.step_budget.MAX_STEP_BUDGET", 60.0)
    quick, observer = Stepper(threading.Semaphore(99)), RecordingObserver()
    slow_stepper = Stepper(threading.Semaphore(99))
    slow = TextEngine("slow", slow_step, lambda texts: 0.001, executor, RecordingObserver(), 1, 4, 0)
    other = asyncio.ensure_future(slow.submit([CountingText(9)]))
    await engine_of(quick, executor, observer=observer).submit([CountingText(9)])
    assert len(observer.batches) == 9  # each round has one step
    await other


async def test_a_round_is_long_while_requests_are_rejected(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.step_budget.STEP_BUDGET_REJECTING", 60.0)
    stepper, observer = Stepper(), RecordingObserver()
    engine = engine_of(stepper, executor, rows=1, queue_rows=1, observer=observer)
    tasks = await start_tasks(engine.submit([CountingText(9)]))
    await asyncio.sleep(0)  # the text runs
    tasks += await start_tasks(engine.submit([CountingText(9)]))
    with pytest.raises(Overloaded):
        await engine.submit([CountingText(1)])
    stepper.permits.release(99)
    await asyncio.gather(*tasks)
    assert observer.batches[:2] == [1, 1]  # the running step, then all others of the first text
    assert len(observer.batches) == 2 + 9  # without rejections, each round of the second text has one step


async def test_a_cancelled_text_frees_its_slot_at_the_next_step(executor: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, executor, rows=1)
    cancelled, waiting = await start_tasks(engine.submit([CountingText(10**9)]), engine.submit([CountingText(1)]))
    await asyncio.sleep(0)  # its first step has started
    cancelled.cancel()
    stepper.permits.release(2)
    await waiting
    assert sum(stepper.sizes) == 2


async def test_cancelling_a_text_at_its_last_step_does_not_affect_the_others(executor: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, executor)
    last, beside, waiting = await start_tasks(*(engine.submit([CountingText(steps)]) for steps in (3, 5, 1)))
    stepper.permits.release(2)
    while len(stepper.sizes) < 2:  # noqa: ASYNC110  # its third and last step has started
        await asyncio.sleep(0.001)
    for _ in range(2):  # a second cancellation changes nothing
        last.cancel()
    stepper.permits.release(99)
    answers = await asyncio.gather(last, beside, waiting, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert [text.done for answer in answers[1:] for text in answer] == [5, 1]
    assert engine.row_counts == (0, 0)
    assert [text.done for text in await engine.submit([CountingText(2)])] == [2]


@pytest.mark.parametrize("inline_seconds", [0.0, 1.0])
async def test_an_idle_engine_keeps_no_texts_that_were_cancelled_before_their_first_character(
    inline_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = Executor("test", inline_seconds=inline_seconds)
    tasks: list[asyncio.Task[Any]] = []

    async def cancel() -> None:
        """Cancel the requests between two rounds."""
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    monkeypatch.setattr(executor, "yield_to_requests", cancel)
    engine: Any = TextEngine("m", lambda texts: None, lambda texts: 0.01, executor, RecordingObserver(), 4, 8, 0)
    texts = [CountingText(1) for _ in range(3)]
    references = [weakref.ref(text) for text in texts]
    tasks += await start_tasks(engine.submit(texts[:1]), engine.submit(texts[1:]))
    texts.clear()
    await engine.close(10)
    executor._pool.shutdown()  # the thread may keep the texts of the last round for a moment
    assert engine.row_counts == (0, 0)
    tasks.clear()
    assert [reference() for reference in references] == [None] * 3


@pytest.mark.parametrize("failing", [False, True])
async def test_texts_cancelled_during_their_last_round_count_neither_as_finished_nor_as_failures(
    executor: Executor, failing: bool
) -> None:
    stepper, observer = Stepper(), RecordingObserver()
    engine = engine_of(stepper, executor, rows=FAILURE_THRESHOLD, observer=observer)
    texts = [CountingText(3, failing, done=2) for _ in range(FAILURE_THRESHOLD)]
    (task,) = await start_tasks(engine.submit(texts))
    await asyncio.sleep(0)  # the round has started
    assert engine.row_counts == (0, FAILURE_THRESHOLD)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stepper.permits.release(99)
    await engine.close(10)
    assert [text.finished for text in texts] == [not failing] * FAILURE_THRESHOLD
    assert (observer.completed_batches, observer.failures) == ([], [])
    assert not engine.circuit_breaker.is_open()


async def test_a_cancelled_request_does_not_delay_shutdown(executor: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, executor, rows=1)
    cancelled, waiting, finished, closing = await start_tasks(
        engine.submit([CountingText(10**9)]),
        engine.submit([CountingText(1)]),
        engine.submit([CountingText(2)]),
        engine.close(30),
    )
    cancelled.cancel()
    waiting.cancel()
    stepper.permits.release(9)
    answers = await asyncio.gather(cancelled, waiting, finished, closing, return_exceptions=True)
    assert [type(answer) for answer in answers[:2]] == [asyncio.CancelledError] * 2
    assert [text.done for text in answers[2]] == [2]
    assert engine.row_counts == (0, 0)


@pytest.mark.parametrize("count", [2, 3])
async def test_only_the_failing_text_gets_the_error(executor: Executor, count: int) -> None:
    stepper, observer = Stepper(), RecordingObserver()
    stepper.permits.release(999)
    engine = engine_of(stepper, executor, rows=3, observer=observer)
    texts = [CountingText(5), CountingText(5, failing=True), CountingText(5)][:count]
    answers = await asyncio.gather(*(engine.submit([text]) for text in texts), return_exceptions=True)
    assert isinstance(answers[1], InferenceFailed)
    assert [text.done for text in texts] == [5, 2, 5][:count]
    assert [str(error) for error in observer.failures] == ["failing"]


@pytest.mark.parametrize("inline_seconds", [0.0, 1.0])
async def test_a_failed_round_leaves_no_tensors_in_memory(inline_seconds: float) -> None:
    executor, stepper, network = Executor("test", inline_seconds=inline_seconds), Stepper(), Activations()
    stepper.permits.release(999)

    def step(texts: Sequence[CountingText]) -> None:
        network.predict([0] * len(texts))
        stepper.step(texts)

    engine = TextEngine("m", step, lambda texts: 0.01, executor, RecordingObserver(), 4, 8)
    gc.disable()
    try:
        await engine.submit([CountingText(1), CountingText(1), CountingText(1)])
        assert network.alive == [0] * 4
    finally:
        gc.enable()
        executor.close()


async def test_a_text_that_the_network_cannot_read_is_the_callers_error(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepper, observer = Stepper(), RecordingObserver()
    stepper.permits.release(999)
    step = stepper.step

    def rejecting(texts: Sequence[CountingText]) -> None:
        if any(text.failing for text in texts):
            raise BadValue("not allowed")
        step(texts)

    monkeypatch.setattr(stepper, "step", rejecting)
    engine = engine_of(stepper, executor, observer=observer)
    for _ in range(4):
        answers = await asyncio.gather(
            engine.submit([CountingText(5, failing=True)]), engine.submit([CountingText(5)]), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [BadValue, list]
    with pytest.raises(BadValue):
        await engine.submit([CountingText(5, failing=True)])
    assert observer.failures == []
    assert not engine.circuit_breaker.is_open()


async def test_the_texts_of_a_failed_round_are_computed_without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, sleeps = Executor("inline", inline_seconds=1.0), record_sleeps(monkeypatch)
    engine = engine_of(Stepper(threading.Semaphore(999)), executor)
    texts = [CountingText(3), CountingText(3, failing=True)]
    answers = await asyncio.gather(*(engine.submit([text]) for text in texts), return_exceptions=True)
    assert [type(answer) for answer in answers] == [list, InferenceFailed]
    assert set(sleeps) == {0}
    executor.close()


async def test_a_stream_ends_when_all_of_its_texts_are_finished(executor: Executor) -> None:
    stepper = Stepper(threading.Semaphore(999))
    engine = engine_of(stepper, executor)
    short, long = texts = [CountingText(3), CountingText(6)]
    seen = [(short.done, long.done) async for _ in engine.stream(texts)]
    assert seen == sorted(seen)
    assert (seen[-1], engine.row_counts) == ((3, 6), (0, 0))
    assert 2 <= len(seen) <= 6


async def test_a_stream_shows_what_was_generated_before_an_error(executor: Executor) -> None:
    stepper = Stepper(threading.Semaphore(999))
    engine = engine_of(stepper, executor)
    failing, good, seen = CountingText(5, failing=True), CountingText(9**9), list[int]()
    with pytest.raises(InferenceFailed):  # noqa: PT012
        async for _ in engine.stream([failing, good]):
            seen.append(failing.done)
    assert seen[-1] == 2
    while engine.row_counts != (0, 0):  # noqa: ASYNC110  # the good text leaves after its round
        await asyncio.sleep(0.001)


async def test_consumers_are_notified_at_an_interval_that_grows_with_their_number(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.text_engine.NOTIFY_INTERVAL", 0.25)
    engine, loop = engine_of(Stepper(), executor), asyncio.get_running_loop()
    streamed = [TextSequence(CountingText(9), loop.create_future(), asyncio.Event()) for _ in range(2)]
    engine._scheduler.running = [*streamed, TextSequence(CountingText(9), loop.create_future())]

    def notified(now: float) -> list[bool]:
        engine._notify(now)
        events = [sequence.updated.is_set() for sequence in streamed if sequence.updated]
        for sequence in streamed:
            sequence.updated.clear()  # type: ignore[union-attr]
        return events

    assert notified(100.0) == [True, True]
    assert notified(100.25) == [False, False]
    assert notified(100.5) == [True, True]
    streamed[0].future.set_result(streamed[0].text)
    assert notified(100.5) == [True, False]


async def test_retry_after_follows_from_the_measured_time_of_a_text(
    executor: Executor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "monotonic", clock.perf_counter)

    def step(texts: Sequence[CountingText]) -> None:
        clock.advance(10.0)
        stepper.step(texts)

    clock.advance(5.0)
    stepper = Stepper()
    engine: Any = TextEngine("m", step, lambda texts: 0.001, executor, RecordingObserver(), 2, 4, normal_budget=0)
    for _ in range(2):  # 10 s each, so the average is 0.8 * (0.8 * 1 + 0.2 * 10) + 0.2 * 10 = 4.24 s
        stepper.permits.release()
        await engine.submit([CountingText(1)])
    tasks = await start_tasks(*(engine.submit([CountingText(1)]) for _ in range(4)))
    with pytest.raises(Overloaded) as raised:
        await engine.submit([CountingText(1)])
    assert raised.value.retry_after == 11  # 5 texts in 2 slots
    stepper.permits.release(99)
    await asyncio.gather(*tasks)


class FailingObserver(RecordingObserver):
    """An observer that raises an error at the first report of a first token, and at each report of a failure."""

    failures_left = 1

    def on_first_token(self, member: Any, seconds: float) -> None:
        if self.failures_left:
            self.failures_left -= 1
            raise LookupError("the observer fails")

    def on_failure(self, error: Exception) -> None:
        raise error


async def test_an_error_outside_the_network_fails_its_callers_immediately(executor: Executor) -> None:
    stepper = Stepper(threading.Semaphore(999))
    engine = engine_of(stepper, executor, rows=2, observer=FailingObserver())

    async def streamed() -> int:
        return len([None async for _ in engine.stream([CountingText(5)])])

    tasks = await start_tasks(engine.submit([CountingText(5)]), streamed(), engine.submit([CountingText(5)]))
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [InferenceFailed, InferenceFailed, list]
    assert str(answers[0]) == "m failed (LookupError)"
    assert engine.row_counts == (0, 0)
    (text,) = await engine.submit([CountingText(2)])
    assert text.finished


async def test_a_cancelled_run_task_answers_its_callers(executor: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, executor, rows=1)
    tasks = await start_tasks(engine.submit([CountingText(5)]), engine.submit([CountingText(5)]))
    await asyncio.sleep(0)
    engine._run_task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [NotReady, NotReady]
    assert engine.row_counts == (0, 0)
    stepper.permits.release(99)
    (text,) = await engine.submit([CountingText(2)])
    assert text.finished


async def test_a_full_queue_rejects_exactly_the_surplus(executor: Executor) -> None:
    stepper, observer = Stepper(), RecordingObserver()
    engine = engine_of(stepper, executor, rows=2, queue_rows=4, observer=observer)
    running = await start_tasks(engine.submit([CountingText(1)]), engine.submit([CountingText(1)]))
    await asyncio.sleep(0)
    waiting = await start_tasks(*(engine.submit([CountingText(1)]) for _ in range(7)))
    assert [task.done() for task in waiting] == [False] * 4 + [True] * 3
    for task in waiting[4:]:
        error = task.exception()
        assert isinstance(error, Overloaded)
        assert error.message == "the queue of m is full: 4 of 4 rows are waiting; this request adds 1"
        assert error.retry_after >= 1
    assert observer.rejections == 3
    stepper.permits.release(99)
    await asyncio.gather(*running, *waiting[:4])


async def test_shutdown_finishes_texts_or_fails_them(executor: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, executor, rows=1)
    tasks = await start_tasks(engine.submit([CountingText(1)]), engine.submit([CountingText(1)]), engine.close(10))
    with pytest.raises(NotReady):
        await engine.submit([CountingText(1)])
    stepper.permits.release(2)
    await asyncio.gather(*tasks)

    other = engine_of(stepper, executor, rows=1)
    tasks = await start_tasks(other.submit([CountingText(1)]), other.submit([CountingText(1)]))
    await other.close(0.01)
    stepper.permits.release(1)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(answer, NotReady) for answer in answers)


@pytest.mark.parametrize("preempting", [False, True])
async def test_each_text_is_the_same_in_a_batch_and_alone(
    tmp_path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch, preempting: bool
) -> None:
    """Sixty texts with random lengths and settings share eight slots. Three texts arrive between two steps."""
    if preempting:
        preempt_at_once(monkeypatch)
    generator = TextGenerator(publish_tiny(tmp_path, "tiny-rnn"), torch.device("cpu"))
    rng = random.Random(0)

    def text(seed: int) -> Any:
        rng.seed(seed)
        prompt, _ = generator.parse("".join(rng.choices("abc \nXé", k=rng.choice([0, 1, 5, 700]))))
        temperature, top_k = rng.choice([0, 0.5, 1, 3]), rng.choice([None, 1, 4])
        top_p, stop = rng.choice([None, 0.3, 0.9]), rng.choice([[], ["aa", "b"]])
        return generator.begin(prompt, rng.randint(1, 60), temperature, top_k, top_p, stop, seed)

    alone = []
    for seed in range(60):
        sequence = text(seed)
        while not sequence.finished:
            generator.step([sequence])
        alone.append((sequence.text, sequence.finish_reason))

    engine: Any = TextEngine("m", generator.step, generator.seconds, executor, RecordingObserver(), 8, 99)
    tasks = []
    for begin in range(0, 60, 3):
        tasks += await start_tasks(*(engine.submit([text(seed)]) for seed in range(begin, begin + 3)))
        await executor.run(lambda: None)
    batched = [(answer[0].text, answer[0].finish_reason) for answer in await asyncio.gather(*tasks)]
    assert batched == alone
    assert {reason for _, reason in batched} == {"length", "stop"}


async def test_cancelling_texts_does_not_change_the_others(tmp_path: Path, executor: Executor) -> None:
    """Forty texts share eight slots. Every second text is cancelled while it waits, runs, or takes its last step."""
    generator = TextGenerator(publish_tiny(tmp_path, "tiny-rnn"), torch.device("cpu"))

    def text(seed: int) -> Any:
        prompt, _ = generator.parse("abc" * (seed % 5))
        return generator.begin(prompt, 20 + seed % 7, 1.0, None, None, [], seed)

    alone = []
    for seed in range(40):
        sequence = text(seed)
        while not sequence.finished:
            generator.step([sequence])
        alone.append(sequence.text)

    loop = asyncio.get_running_loop()

    def step(running: Sequence[Any]) -> None:
        generator.step(running)
        for sequence in running:
            if sequence.seed % 2 and len(sequence.text) >= sequence.seed % 23:
                loop.call_soon_threadsafe(tasks[sequence.seed].cancel)

    engine: Any = TextEngine("m", step, lambda texts: 0.001, executor, RecordingObserver(), 8, 99, normal_budget=0)
    tasks = [asyncio.ensure_future(engine.submit([text(seed)])) for seed in range(40)]
    await asyncio.sleep(0)
    tasks[39].cancel()  # this text still waits
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [answers[seed][0].text for seed in range(0, 40, 2)] == alone[::2]
    cancelled_answers = [answer for answer in answers[1::2] if isinstance(answer, asyncio.CancelledError)]
    assert len(cancelled_answers) >= 15  # some were finished before they were cancelled
    assert engine.row_counts == (0, 0)


async def test_a_round_takes_several_short_steps_until_one_text_is_finished(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.step_budget.LONG_GAP", 60.0)  # on a busy machine any gap may be long
    stepper, observer = Stepper(), RecordingObserver()
    stepper.permits.release(99)
    engine: Any = TextEngine("m", stepper.step, lambda texts: 0.001, executor, observer, 2, 4, normal_budget=60)
    await asyncio.gather(
        engine.submit([CountingText(3)]), engine.submit([CountingText(5)]), engine.submit([CountingText(4)])
    )
    assert observer.batches == [2, 2, 1]  # rounds of 3, 2 and 2 steps; the third text waited for a slot
    assert stepper.sizes == [2, 2, 2, 2, 2, 1, 1]


async def test_errors_name_the_model_and_are_reported(executor: Executor) -> None:
    observer = RecordingObserver()
    engine = engine_of(Stepper(threading.Semaphore(999)), executor, observer=observer)
    while not engine.circuit_breaker.is_open():
        with pytest.raises(InferenceFailed, match=r"^m failed on this text \(ValueError\)$"):
            await engine.submit([CountingText(5, failing=True, done=2)])
    assert {str(error) for error in observer.failures} == {"failing"}
    await engine.submit([CountingText(1)])
    assert not engine.circuit_breaker.is_open()


async def test_a_stopped_engine_names_itself(executor: Executor) -> None:
    stepper = Stepper()
    engine = engine_of(stepper, executor, rows=1)
    tasks = await start_tasks(engine.submit([CountingText(9)]), engine.submit([CountingText(9)]))
    await engine.close(0.0)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(answer) for answer in answers] == ["m stopped before it could answer"] * 2
    stepper.permits.release(9)


async def test_rounds_are_reported_with_their_texts_and_seconds(
    executor: Executor, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.executor.time", clock)
    rounds: list[tuple[int, float]] = []

    def step(texts: Sequence[CountingText]) -> None:
        clock.advance(0.25)
        stepper.step(texts)

    stepper, observer = Stepper(threading.Semaphore(99)), RecordingObserver()
    monkeypatch.setattr(observer, "on_batch", lambda rows, seconds: rounds.append((rows, seconds)))
    engine: Any = TextEngine("m", step, lambda texts: 0.001, executor, observer, 2, 4, normal_budget=0.5)
    await engine.submit([CountingText(5), CountingText(9)])
    assert rounds == [(2, 0.5), (2, 0.5), (2, 0.25), (1, 0.5), (1, 0.5)]
    assert executor.text_seconds == 2.25


async def test_a_round_after_a_long_gap_ends_with_the_first_character_of_a_text(
    executor: Executor, clock: Clock
) -> None:
    """The prompt of a text is read first. The round then ends, so that the first character is sent without delay."""

    class Prompted(CountingText):
        @property
        def generated(self) -> int:
            return max(self.done - 3, 0)

    stepper, observer, gate = Stepper(), RecordingObserver(), Gate()
    executor.text_seconds = 1000.0  # computing time of earlier rounds
    engine: Any = TextEngine("m", stepper.step, lambda texts: 0.001, executor, observer, 2, 4, normal_budget=60)
    (other,) = await start_tasks(executor.run(gate.predict, [1]))
    (task,) = await start_tasks(engine.submit([Prompted(9)]))
    await asyncio.sleep(0)  # its first round waits for the other job
    clock.advance(30.0)
    gate.open.set()
    stepper.permits.release(99)
    await asyncio.gather(other, task)
    assert observer.batches == [1, 1]  # rounds of 4 and of 5 steps
    assert observer.first_token_seconds != []


async def test_the_expected_duration_of_a_round_decides_where_it_runs() -> None:
    executor, threads = Executor("both", inline_seconds=0.5), list[str]()

    def step(texts: Sequence[CountingText]) -> None:
        threads.append(threading.current_thread().name)
        for text in texts:
            text.done += 1

    engine: Any = TextEngine(
        "m", step, lambda texts: 0.3 * len(texts), executor, RecordingObserver(), 2, 4, normal_budget=0
    )
    await engine.submit([CountingText(1), CountingText(2)])
    assert [name.startswith("both") for name in threads] == [True, False]
    executor.close()


async def test_a_stream_raises_the_error_of_its_first_failed_text_only_after_its_characters(executor: Executor) -> None:
    stepper = Stepper(threading.Semaphore(999))
    engine = engine_of(stepper, executor)
    short, failing = CountingText(1), CountingText(5, failing=True)
    lengths: list[tuple[int, int]] = []
    with pytest.raises(InferenceFailed):  # noqa: PT012
        async for _ in engine.stream([short, failing]):
            lengths.append((short.done, failing.done))  # noqa: PERF401
    assert lengths[-1] == (1, 2)
    assert engine.row_counts == (0, 0)


async def test_a_text_is_reported_before_its_caller_gets_it(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer, trace, dequeued = RecordingObserver(), RequestTrace(), list[Any]()
    current_trace.set(trace)
    current_caller.set("alice")
    monkeypatch.setattr(observer, "on_dequeued", dequeued.extend)
    await engine_of(Stepper(threading.Semaphore(9)), executor, observer=observer).submit([CountingText(1)])
    ((member,),) = observer.completed_batches
    assert (dequeued[0].caller, dequeued[0].trace, member.trace) == ("alice", trace, trace)
