"""Continuous batching: texts join and leave the running batch between two rounds.

A round is one executor job of one or more steps; each step advances every running text. ``scheduler`` decides which
texts run, ``step_budget`` how long a round lasts, and the ``step`` function of the model computes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Generic

from app.engine.admission import AdmissionControl, current_caller
from app.engine.circuit_breaker import CircuitBreaker
from app.engine.executor import Executor
from app.engine.futures import set_result
from app.engine.observer import EngineObserver, current_trace
from app.engine.scheduler import Scheduler, Text, TextSequence
from app.engine.step_budget import STEP_BUDGET, expected_seconds, is_long, step_budget
from app.engine.text_reporter import TextReporter
from app.errors import NotReady, inference_error

NOTIFY_INTERVAL = 0.0002  # seconds between two notifications of a streamed text, times the number of streamed texts


class TextEngine(Generic[Text]):
    """Queue and running texts of one model.

    ``step`` advances each given text by about one character; it runs on ``executor``. If ``step`` raises, the texts
    must be unchanged. ``step_seconds`` returns the expected duration in seconds of a step for a number of texts. At
    most ``max_running`` texts run and ``queue_rows`` wait. A round normally lasts ``normal_budget`` seconds.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[Sequence[Text]], None],
        step_seconds: Callable[[int], float],
        executor: Executor,
        observer: EngineObserver,
        max_running: int,
        queue_rows: int,
        normal_budget: float = STEP_BUDGET,
    ) -> None:
        self.name = name
        self.observer = observer
        self.circuit_breaker = CircuitBreaker()
        self._step = step
        self._step_seconds = step_seconds
        self._executor = executor
        self._max_running = max_running
        self._normal_budget = normal_budget
        self._admission = AdmissionControl(name, observer, queue_rows)
        self._scheduler: Scheduler[Text] = Scheduler(max_running, self._admission)
        self._reporter: TextReporter[Text] = TextReporter(observer)
        self._run_task: asyncio.Task[None] | None = None
        self._seconds_per_text = 1.0  # moving average of the time from a text's start to its end
        self._round_ended_at = 0.0  # time.perf_counter's clock
        self._text_seconds = 0.0  # the executor's ``text_seconds`` at that time
        self._rejected = 0  # rejected requests when the last round began

    @property
    def load(self) -> tuple[int, int]:
        """The number of waiting texts and of running texts."""
        return self._admission.waiting, len(self._scheduler.running)

    def admit(self, texts: int) -> None:
        """Return if ``texts`` texts would be accepted now.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
        """
        self._admission.admit(texts, self._max_running / self._seconds_per_text)

    async def submit(self, texts: Sequence[Text]) -> list[Text]:
        """Queue all texts or none, and return them when all are finished.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
            InferenceFailed, OutOfMemory: the network failed on one of the texts.
        """
        sequences = self._enqueue(texts)
        try:
            return [await sequence.future for sequence in sequences]
        finally:
            self._cancel(sequences)

    async def stream(self, texts: Sequence[Text]) -> AsyncGenerator[None, None]:
        """As ``submit``, but yield whenever some of the texts have new characters, until all are finished.

        Updates do not pile up: a slow consumer finds more new characters at its next iteration.
        """
        updated = asyncio.Event()
        sequences = self._enqueue(texts, updated)
        try:
            unfinished = sequences
            while unfinished:
                await updated.wait()
                updated.clear()
                done = [sequence for sequence in unfinished if sequence.future.done()]
                unfinished = [sequence for sequence in unfinished if sequence not in done]
                yield  # before an error is raised: the characters generated before the error are valid
                for sequence in done:
                    sequence.future.result()
        finally:
            self._cancel(sequences)

    def _enqueue(self, texts: Sequence[Text], updated: asyncio.Event | None = None) -> list[TextSequence[Text]]:
        self.admit(len(texts))
        loop, trace, caller = asyncio.get_running_loop(), current_trace.get(), current_caller.get()
        sequences = [TextSequence(text, loop.create_future(), updated, caller, trace) for text in texts]
        for sequence in sequences:
            self._scheduler.add(sequence)
        if self._run_task is None:
            self._run_task = loop.create_task(self._run())
        return sequences

    def _cancel(self, sequences: Sequence[TextSequence[Text]]) -> None:
        """Cancel unfinished texts: they leave the queue now, or the running batch after the current round."""
        for sequence in sequences:
            sequence.future.cancel()  # also marks an error as retrieved, which asyncio would log
            self._scheduler.discard(sequence)

    async def _run(self) -> None:
        """Run rounds until no text runs or waits."""
        self._record_round(0.0)
        try:
            while self._scheduler.running or self._scheduler.waiting:
                try:
                    if self._schedule():
                        await self._advance(self._scheduler.running)
                        self._complete()
                except Exception as error:  # outside ``step``: no caller may wait forever
                    self._fail(self._scheduler.running or [*self._scheduler.waiting], f"{self.name} failed", error)
                await self._executor.yield_to_requests()
        finally:
            self._run_task = None
            self._stop()  # nothing is left, unless this task was cancelled
            self._scheduler.drop_done()
            self._reporter.flush()

    def _fail(self, sequences: Sequence[TextSequence[Text]], message: str, error: Exception) -> None:
        """Answer texts with an error, and report it. Never raises, even if the observer does."""
        for sequence in sequences:
            sequence.fail(inference_error(message, error))
        self.circuit_breaker.record_failure()
        with suppress(Exception):
            self.observer.on_failure(error)

    def _schedule(self) -> bool:
        """Choose the texts of the next round. Returns whether there are any."""
        self._reporter.started(self._scheduler.schedule(time.monotonic()))
        return bool(self._scheduler.running)

    async def _advance(self, sequences: list[TextSequence[Text]]) -> None:
        """Compute one round for all texts. Never raises.

        If the round fails, each text gets a separate round, so that only the failing text gets the error.
        """
        try:
            texts = [sequence.text for sequence in sequences]
            expected = expected_seconds(self._step_seconds(len(texts)), self._gap())
            _, seconds = await self._executor.run_timed(expected, self._compute_round, texts)
            self.circuit_breaker.record_success()
            self.observer.on_batch(len(texts), seconds)
        except Exception as error:
            if len(sequences) > 1:
                for sequence in sequences:
                    await self._advance([sequence])
                    await asyncio.sleep(0)
            elif not sequences[0].future.done():
                self._fail(sequences, f"{self.name} failed on this text", error)

    def _compute_round(self, texts: list[Text]) -> None:
        """Take one step for all texts, and further steps until the budget is used or a text is finished.

        After a long gap the round also ends when a text has its first character, so that it is sent without delay.
        """
        started_at, gap = time.perf_counter(), self._gap()
        rejected = self._admission.rejected
        budget = step_budget(self._normal_budget, gap, rejecting=rejected != self._rejected)
        self._rejected = rejected
        without_token = [text for text in texts if not text.generated] if is_long(gap) else []
        try:
            self._step(texts)
            while time.perf_counter() < started_at + budget and not any(text.finished for text in texts):
                if any(text.generated for text in without_token):
                    break
                self._step(texts)
        finally:
            self._record_round(time.perf_counter() - started_at)

    def _record_round(self, seconds: float) -> None:
        """Record that a round of ``seconds`` seconds has ended now."""
        self._executor.text_seconds += seconds
        self._round_ended_at, self._text_seconds = time.perf_counter(), self._executor.text_seconds

    def _gap(self) -> float:
        """Return the seconds that the event loop and other models have used since the last round.

        Rounds of other text engines do not count: two engines would lengthen each other's rounds without end.
        """
        return time.perf_counter() - self._round_ended_at - (self._executor.text_seconds - self._text_seconds)

    def _complete(self) -> None:
        """After a round: return finished texts and notify the consumers of streamed ones."""
        now = time.monotonic()
        self._reporter.first_tokens(now)
        for sequence in self._scheduler.running:
            if sequence.text.finished and not sequence.future.done():
                self._seconds_per_text = 0.8 * self._seconds_per_text + 0.2 * (now - sequence.started_at)
                self._reporter.finished(sequence, now)
                set_result(sequence.future, sequence.text)
        self._notify(now)
        self._scheduler.drop_done()
        if not self._scheduler.running:
            self._reporter.flush()

    def _notify(self, now: float) -> None:
        """Notify the consumers of streamed texts: at the first round, at the end, and in between at an interval.

        The interval grows with the number of streamed texts: to wake every consumer and write to every socket after
        each round would cost more than the round.
        """
        streamed = [(sequence, sequence.updated) for sequence in self._scheduler.running if sequence.updated]
        for sequence, updated in streamed:
            if sequence.future.done() or now - sequence.notified_at >= NOTIFY_INTERVAL * len(streamed):
                sequence.notified_at = now
                updated.set()

    async def close(self, seconds: float) -> None:
        """Reject new requests and finish accepted ones; after ``seconds`` seconds, fail those that are left."""
        self._admission.closed = True
        if self._run_task:
            await asyncio.wait([self._run_task], timeout=seconds)
        self._stop()

    def _stop(self) -> None:
        """Fail all texts that are left."""
        for sequence in (*self._scheduler.waiting, *self._scheduler.running):
            sequence.fail(NotReady(f"{self.name} stopped before it could answer"))
        self._scheduler.waiting.clear()
