"""Decide which texts of a text engine run, which wait, and which are preempted.

The scheduler starts no asyncio tasks and does not read the clock. Methods that need the current time have the argument
``now``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from app.engine.fair_queue import FairQueue
from app.engine.observer import RequestTrace
from app.limits import Limits


class SteppableText(Protocol):
    """The properties of a text in generation that the engine uses."""

    @property
    def finished(self) -> bool: ...

    @property
    def generated(self) -> int:
        """The number of characters generated so far."""

    @property
    def remaining(self) -> int:
        """The largest number of characters still to be read or generated."""


Text = TypeVar("Text", bound=SteppableText)


@dataclass(eq=False, slots=True)
class TextSequence(Generic[Text]):
    """A text, and the future that returns the text when the text is finished. It is a ``BatchMember``.

    A time of 0 means that the event has not happened yet.
    """

    text: Text
    future: asyncio.Future[Text]
    caller: str | None  # name of the API key
    trace: RequestTrace | None
    queued_at: float
    updated: asyncio.Event | None = None  # set when a streamed text has new characters
    started_at: float = 0.0
    joined_at: float = 0.0  # when the text last began to run; after a preemption it begins again
    first_token_at: float = 0.0
    ended_at: float = 0.0
    rows: int = 1


class Scheduler(Generic[Text]):
    """Chooses the texts that run, at most ``max_running``. The other texts wait in ``queue``.

    A text normally runs until it is finished or cancelled. When all slots are in use, a waiting text can preempt a text
    that has run for ``preempt_after_seconds``. The preempted text returns to the queue. There are two reasons to
    preempt a text. First, the slots are then shared more equally by two API keys. Second, the waiting text is much
    shorter, and its key does not get more slots than the key of the longer text had. Texts of the same key and of
    similar length never replace each other. On average, they finish sooner if they run one after the other.
    """

    def __init__(self, max_running: int, queue: FairQueue[TextSequence[Text]], limits: Limits) -> None:
        self.running: list[TextSequence[Text]] = []
        self._queue, self._max_running, self._limits = queue, max_running, limits
        self._preempted_at = 0.0  # when texts were preempted last, or looked for

    def schedule(self, now: float) -> Sequence[TextSequence[Text]]:
        """Drop texts that are done, preempt texts, and fill the free slots from the queue.

        Afterwards, ``running`` holds the texts to compute. Returns the texts that run for the first time.
        """
        self.drop_done()
        if (
            self._queue
            and len(self.running) >= self._max_running
            and now - self._preempted_at >= self._limits.preempt_check_seconds
        ):
            self._preempted_at = now
            self._preempt(now)
        while self._queue and len(self.running) < self._max_running:
            self._start(self._queue.peek(), now)
        started = [sequence for sequence in self.running if not sequence.started_at]
        for sequence in started:
            sequence.started_at = now
        return started

    def drop_done(self) -> None:
        """Free the slots of texts that are finished, failed or cancelled."""
        self.running = [sequence for sequence in self.running if not sequence.future.done()]

    def _start(self, sequence: TextSequence[Text], now: float) -> None:
        self._queue.take(sequence, 1)
        sequence.joined_at = now
        self.running.append(sequence)

    def _preempt(self, now: float) -> None:
        """Replace running texts by waiting texts, one by one. The shortest waiting texts go first."""
        ran = [sequence for sequence in self.running if now - sequence.joined_at > self._limits.preempt_after_seconds]
        if not ran:
            return
        ran.sort(key=lambda sequence: sequence.text.remaining, reverse=True)
        slots = Counter(sequence.caller for sequence in self.running)
        stuck = set[str | None]()  # keys whose shortest waiting text can replace no text
        for waiting in sorted(self._queue, key=lambda sequence: sequence.text.remaining):
            if waiting.caller in stuck:
                continue
            preempted = next((text for text in ran if self._may_replace(waiting, text, slots)), None)
            if preempted is None:
                stuck.add(waiting.caller)
                continue
            slots[preempted.caller] -= 1
            slots[waiting.caller] += 1
            ran.remove(preempted)
            self.running.remove(preempted)
            self._start(waiting, now)
            self._queue.append(preempted)

    def _may_replace(
        self, waiting: TextSequence[Text], running: TextSequence[Text], slots: Counter[str | None]
    ) -> bool:
        more = slots[running.caller] - slots[waiting.caller]  # slots of the key of the running text
        if running.caller != waiting.caller and more > 1:
            return True
        much_longer = running.text.remaining > self._limits.preempt_ratio * waiting.text.remaining
        return much_longer and (more > 0 or running.caller == waiting.caller)
