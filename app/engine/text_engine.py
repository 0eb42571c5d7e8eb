"""Continuous batching of texts: texts join and leave the running batch between two rounds.

A round is one job on the executor. It consists of one or more steps, and each step advances every running text.
``scheduler`` decides which texts run, and the ``step`` function of the model computes the steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Generic

from app.engine.engine import Engine
from app.engine.executor import Executor
from app.engine.fair_queue import current_caller
from app.engine.observer import EngineObserver, current_trace
from app.engine.scheduler import Scheduler, Text, TextSequence
from app.limits import Limits


class TextEngine(Engine[TextSequence[Text], TextSequence[Text]], Generic[Text]):
    """Generates texts with one model.

    ``step`` runs on ``executor``. For each given text, ``step`` generates one character or reads a part of the prompt.
    If ``step`` raises an error, it must leave the texts unchanged. ``step_seconds`` returns the expected duration of a
    step in seconds. At most ``max_running`` texts run at the same time, and at most ``queue_rows`` texts wait.
    """

    INPUT = "text"

    def __init__(
        self,
        name: str,
        step: Callable[[Sequence[Text]], None],
        step_seconds: Callable[[Sequence[Text]], float],
        executor: Executor,
        observer: EngineObserver,
        max_running: int,
        queue_rows: int,
        limits: Limits = Limits(),  # it is immutable
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name, executor, observer, queue_rows, limits, clock)
        self._step, self._step_seconds = step, step_seconds
        self._max_running = max_running
        self._scheduler: Scheduler[Text] = Scheduler(max_running, self._queue, limits)
        self._round_ended_at = 0.0
        self._text_seconds = 0.0  # the executor's ``text_seconds`` at the end of the last round

    async def submit(self, texts: Sequence[Text]) -> list[Text]:
        """Queue the texts, and return them when all are finished. Either all texts are accepted or none.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the queue is full.
            InferenceFailed, OutOfMemory: the network failed on one of the texts.
            BadValue: one of the texts is invalid, and only the network could detect that.
        """
        sequences = self._sequences(texts, None)
        try:
            return [await sequence.future for sequence in sequences]
        finally:
            self._leave(sequences)

    async def stream(self, texts: Sequence[Text]) -> AsyncGenerator[None, None]:
        """Queue the texts as ``submit`` does. Yield whenever some texts have new characters, until all are finished.

        Updates are not queued. A slow consumer gets several updates in one iteration, and then finds more new
        characters.
        """
        updated = asyncio.Event()
        sequences = unfinished = self._sequences(texts, updated)
        try:
            while unfinished:
                await updated.wait()
                updated.clear()
                done = [sequence for sequence in unfinished if sequence.future.done()]
                unfinished = [sequence for sequence in unfinished if sequence not in done]
                yield  # yield before an error is raised, because the characters generated so far are valid
                for sequence in done:
                    sequence.future.result()
        finally:
            self._leave(sequences)

    def _sequences(self, texts: Sequence[Text], updated: asyncio.Event | None) -> list[TextSequence[Text]]:
        self.admit(len(texts))
        loop, caller, trace, now = asyncio.get_running_loop(), current_caller.get(), current_trace.get(), self._clock()
        sequences = [TextSequence(text, loop.create_future(), caller, trace, now, updated) for text in texts]
        if updated:
            for sequence in sequences:
                sequence.future.add_done_callback(lambda _: updated.set())
        self._enqueue(sequences)
        return sequences

    async def _run(self) -> None:
        self._record_round(0.0)
        await super()._run()

    async def _turn(self) -> None:
        if started := self._scheduler.schedule(self._clock()):
            self.observer.on_dequeued(started)
        self._running = self._scheduler.running
        if self._running:
            await self._compute(self._running)
            self._complete()

    async def _forward(self, sequences: Sequence[TextSequence[Text]]) -> None:
        texts = [sequence.text for sequence in sequences]
        expected = max(self._step_seconds(texts), self._round_seconds())
        _, seconds = await self._executor.compute(expected, self._compute_round, texts)
        self.observer.on_batch(len(texts), seconds)

    def _compute_round(self, texts: Sequence[Text]) -> None:
        """Take one step for all texts, and further steps until the time is over or a text is finished."""
        started_at, seconds = self._clock(), self._round_seconds()
        try:
            self._step(texts)
            while self._clock() < started_at + seconds and not any(text.finished for text in texts):
                self._step(texts)
        finally:
            self._record_round(self._clock() - started_at)

    def _round_seconds(self) -> float:
        """Return how long a round that starts now lasts: as long as the other work since the last round.

        So texts get half of the computing time while other models or the event loop are busy. Rounds of other text
        engines are not other work. Otherwise two text engines would lengthen each other's rounds without end.
        """
        other = self._clock() - self._round_ended_at - (self._executor.text_seconds - self._text_seconds)
        return max(self._limits.round_seconds, min(other, self._limits.max_round_seconds))

    def _record_round(self, seconds: float) -> None:
        """Record that a round of ``seconds`` seconds has ended now."""
        self._executor.text_seconds += seconds
        self._round_ended_at, self._text_seconds = self._clock(), self._executor.text_seconds

    def _complete(self) -> None:
        """Hand the finished texts to their callers, and notify the consumers of streamed texts."""
        now, finished = self._clock(), []
        for sequence in self._running:
            text = sequence.text
            if sequence.future.done() or (not text.generated and not text.finished):
                continue
            if text.generated and not sequence.first_token_at:
                sequence.first_token_at = now
                self.observer.on_first_token(sequence, now - sequence.queued_at)
            if sequence.updated:
                sequence.updated.set()
            if text.finished:
                sequence.ended_at = now
                if text.generated > 1:
                    self.observer.on_inter_token((now - sequence.first_token_at) / (text.generated - 1))
                self._queue.measure(self._max_running, now - sequence.started_at)
                sequence.future.set_result(text)
                finished.append(sequence)
        if finished:
            self.observer.on_completed(finished)
        self._scheduler.drop_done()
        self._running = self._scheduler.running
