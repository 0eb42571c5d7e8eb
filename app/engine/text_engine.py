"""Continuous batching of texts: texts join and leave the running batch between two rounds.

A round is one job on the executor. It consists of one or more steps, and each step advances every running text.
``scheduler`` decides which texts run, ``step_budget`` decides how long a round lasts, and the ``step`` function of the
model computes the steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Generic

from app.engine.admission import AdmissionControl, current_caller
from app.engine.circuit_breaker import CircuitBreaker
from app.engine.executor import Executor
from app.engine.futures import set_result
from app.engine.observer import EngineObserver, current_trace
from app.engine.scheduler import Scheduler, Text, TextSequence
from app.engine.step_budget import STEP_BUDGET, expected_seconds, is_long, step_budget
from app.engine.text_reporter import TextReporter
from app.errors import BadValue, NotReady, inference_error

# Seconds. The interval between two notifications of a consumer is this value times the number of streamed texts.
NOTIFY_INTERVAL = 0.0002


class TextEngine(Generic[Text]):
    """Generates texts with one model. It holds the queue of waiting texts and the list of running texts.

    ``step`` runs on ``executor``. For each given text, ``step`` generates one character or reads a part of the prompt.
    If ``step`` raises an error, it must leave the texts unchanged. ``step_seconds`` returns the expected duration of a
    step in seconds. At most ``max_running`` texts run at the same time, and at most ``queue_rows`` texts wait. A round
    normally lasts ``normal_budget`` seconds.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[Sequence[Text]], None],
        step_seconds: Callable[[Sequence[Text]], float],
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
        self._round_ended_at = 0.0  # time.perf_counter() at the end of the last round
        self._text_seconds = 0.0  # the executor's ``text_seconds`` at the end of the last round
        self._rejected = 0  # number of rejected requests when the last round began

    @staticmethod
    def parsing() -> AbstractContextManager[None]:
        """Return a context manager that does nothing, because texts join the running batch at any time."""
        return nullcontext()

    @property
    def row_counts(self) -> tuple[int, int]:
        """Two numbers: how many texts wait, and how many texts run."""
        return self._admission.waiting, len(self._scheduler.running)

    def admit(self, texts: int) -> None:
        """Raise an error unless ``texts`` more texts would be accepted now.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
        """
        self._admission.admit(texts, self._max_running / self._seconds_per_text)

    async def submit(self, texts: Sequence[Text]) -> list[Text]:
        """Queue the texts, and return them when all are finished. Either all texts are accepted or none.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
            InferenceFailed, OutOfMemory: the network failed on one of the texts.
            BadValue: one of the texts is invalid, and only the network could detect that.
        """
        sequences = self._enqueue(texts)
        try:
            return [await sequence.future for sequence in sequences]
        finally:
            self._cancel(sequences)

    async def stream(self, texts: Sequence[Text]) -> AsyncGenerator[None, None]:
        """Queue the texts as ``submit`` does. Yield whenever some texts have new characters, until all are finished.

        Updates are not queued. A slow consumer gets several updates in one iteration, and then finds more new
        characters.
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
                yield  # yield before an error is raised, because the characters generated so far are valid
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
        """Cancel unfinished texts. Waiting texts leave the queue now, and running texts stop after the round."""
        for sequence in sequences:
            sequence.future.cancel()  # also keeps asyncio from logging an error that nobody retrieves
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
                except Exception as error:  # an error outside ``step``; otherwise callers would wait forever
                    self._fail(self._scheduler.running or [*self._scheduler.waiting], f"{self.name} failed", error)
                await self._executor.yield_to_requests()
        finally:
            self._run_task = None
            self._stop()  # texts are left only if this task was cancelled
            self._scheduler.drop_done()
            self._reporter.flush()

    def _fail(self, sequences: Sequence[TextSequence[Text]], message: str, error: Exception) -> None:
        """Fail the texts with an error, and report the error. Never raises, even if the observer does."""
        for sequence in sequences:
            sequence.fail(inference_error(message, error))
        self.circuit_breaker.record_failure()
        with suppress(Exception):
            self.observer.on_failure(error)

    def _schedule(self) -> bool:
        """Choose the texts of the next round, and return whether there are any."""
        self._reporter.started(self._scheduler.schedule(time.monotonic()))
        return bool(self._scheduler.running)

    async def _advance(self, sequences: list[TextSequence[Text]]) -> None:
        """Compute one round for all texts. Never raises.

        If the round fails, each text gets a separate round, so that only the failing text gets the error.
        """
        try:
            texts = [sequence.text for sequence in sequences]
            expected = expected_seconds(self._step_seconds(texts), self._gap())
            _, seconds = await self._executor.run_timed(expected, self._compute_round, texts)
            self.circuit_breaker.record_success()
            self.observer.on_batch(len(texts), seconds)
            return
        except Exception as error:
            if len(sequences) == 1:
                if isinstance(error, BadValue):  # the text is invalid, and only the network could detect that
                    sequences[0].fail(error)
                elif not sequences[0].future.done():
                    self._fail(sequences, f"{self.name} failed on this text", error)
                return
        # outside of ``except``, because the traceback of the error keeps the tensors of the failed round in memory
        for sequence in sequences:
            await self._advance([sequence])
            await asyncio.sleep(0)

    def _compute_round(self, texts: list[Text]) -> None:
        """Take one step for all texts, and further steps until the time budget is used or a text is finished.

        After a long gap (see ``_gap``), the round also ends when a text gets its first character, so that this
        character is sent without delay.
        """
        started_at, gap = time.perf_counter(), self._gap()
        rejected = self._admission.rejected
        budget = step_budget(self._normal_budget, gap, rejecting=rejected != self._rejected)
        self._rejected = rejected
        without_token = [text for text in texts if not text.generated] if is_long(gap) else []
        try:
            self._step(texts)
            while (
                time.perf_counter() < started_at + budget
                and not any(text.finished for text in texts)
                and not any(text.generated for text in without_token)
            ):
                self._step(texts)
        finally:
            self._record_round(time.perf_counter() - started_at)

    def _record_round(self, seconds: float) -> None:
        """Record that a round of ``seconds`` seconds has ended now."""
        self._executor.text_seconds += seconds
        self._round_ended_at, self._text_seconds = time.perf_counter(), self._executor.text_seconds

    def _gap(self) -> float:
        """Return the seconds that the event loop and other models have used since the last round.

        Rounds of other text engines do not count. Otherwise two text engines would lengthen each other's rounds
        without end.
        """
        return time.perf_counter() - self._round_ended_at - (self._executor.text_seconds - self._text_seconds)

    def _complete(self) -> None:
        """Hand the finished texts to their callers, and notify the consumers of streamed texts."""
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
        """Notify the consumer of each streamed text after its first round, at its end, and at an interval in between.

        The interval grows with the number of streamed texts. To wake every consumer and write to every socket after
        each round would take longer than a round.
        """
        streamed = [(sequence, sequence.updated) for sequence in self._scheduler.running if sequence.updated]
        for sequence, updated in streamed:
            if sequence.future.done() or now - sequence.notified_at >= NOTIFY_INTERVAL * len(streamed):
                sequence.notified_at = now
                updated.set()

    async def close(self, seconds: float) -> None:
        """Reject new requests and finish the accepted texts. Fail the texts that are left after ``seconds`` seconds."""
        self._admission.closed = True
        if self._run_task:
            await asyncio.wait([self._run_task], timeout=seconds)
        self._stop()

    def _stop(self) -> None:
        """Fail all texts that still wait or run."""
        for sequence in (*self._scheduler.waiting, *self._scheduler.running):
            sequence.fail(NotReady(f"{self.name} stopped before it could answer"))
        self._scheduler.waiting.clear()
