"""Decides which texts of a text engine run, wait and are preempted.

The scheduler starts no asyncio tasks and measures no time: its methods take ``now`` on ``time.monotonic``'s clock.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from app.engine.admission import AdmissionControl
from app.engine.fair_queue import FairQueue
from app.engine.futures import set_exception
from app.engine.observer import RequestTrace

PREEMPT_AFTER = 1.0  # seconds that a text runs before it may be preempted
PREEMPT_RATIO = 4  # preemption needs more than this many times the remaining characters of a waiting text
PREEMPT_CHECK_INTERVAL = 0.05  # seconds between two searches for texts to preempt


class SteppableText(Protocol):
    """A text in generation, as the engine sees it."""

    @property
    def finished(self) -> bool: ...

    @property
    def generated(self) -> int:
        """Characters generated so far."""

    @property
    def remaining(self) -> int:
        """Characters it may still take: of its prompt to read, and to generate."""


Text = TypeVar("Text", bound=SteppableText)


@dataclass(eq=False, slots=True)
class TextSequence(Generic[Text]):
    """A text and the future that returns it when finished. Times are on ``time.monotonic``'s clock; 0 means not yet."""

    text: Text
    future: asyncio.Future[Text]
    updated: asyncio.Event | None = None  # set when a streamed text has new characters
    caller: str | None = None  # name of the API key
    trace: RequestTrace | None = None
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    first_token_at: float = 0.0
    ended_at: float = 0.0
    rows: int = 1
    waiting: bool = False  # whether it is in the queue
    joined_at: float = 0.0  # when it began to run, or to run again after a preemption
    notified_at: float = 0.0  # when ``updated`` was set last

    def fail(self, error: Exception) -> None:
        """Answer the text with an error, unless it is done."""
        set_exception(self.future, error)
        if self.updated:
            self.updated.set()


class Scheduler(Generic[Text]):
    """At most ``max_running`` texts run; the others wait in a fair queue that ``admission`` limits.

    A text runs until it is finished or cancelled. When all slots are in use, texts that have run for ``PREEMPT_AFTER``
    seconds are preempted by much shorter waiting texts, and are queued again. Texts of one API key and similar length
    never preempt each other: run one after the other, they finish soonest. A key with more than an equal share of the
    slots gives slots to keys with less.
    """

    def __init__(self, max_running: int, admission: AdmissionControl) -> None:
        self.running: list[TextSequence[Text]] = []
        self.waiting: FairQueue[TextSequence[Text]] = FairQueue()
        self._max_running = max_running
        self._admission = admission
        self._preemption_checked_at = 0.0

    def add(self, sequence: TextSequence[Text]) -> None:
        """Queue a text."""
        sequence.waiting = True
        self._admission.add(sequence.caller, 1)
        self.waiting.append(sequence)

    def discard(self, sequence: TextSequence[Text]) -> None:
        """Remove a text from the queue, if it waits there."""
        if sequence.waiting:
            self.waiting.discard(sequence)
            self._leave(sequence)

    def schedule(self, now: float) -> Sequence[TextSequence[Text]]:
        """Drop texts that are done, preempt, and fill the free slots from the queue.

        ``running`` then holds the texts to compute. Returns those that run for the first time.
        """
        self.drop_done()
        started: list[TextSequence[Text]] = []
        if self.waiting and len(self.running) >= self._max_running:
            self._preempt(now, started)
        while self.waiting and len(self.running) < self._max_running:
            self._start(self.waiting.pop(), now, started)
        return started

    def _start(self, sequence: TextSequence[Text], now: float, started: list[TextSequence[Text]]) -> None:
        """Give a slot to a text that was popped from the queue. One that runs for the first time joins ``started``."""
        self._leave(sequence)
        if sequence.future.done():
            return
        sequence.joined_at = now
        self.running.append(sequence)
        if not sequence.started_at:
            sequence.started_at = now
            started.append(sequence)

    def drop_done(self) -> None:
        """Free the slots of texts that are finished, failed or cancelled."""
        self.running = [sequence for sequence in self.running if not sequence.future.done()]

    def _preempt(self, now: float, started: list[TextSequence[Text]]) -> None:
        """Share the slots among keys, then queue again texts that are much longer than the shortest waiting one.

        At most as many texts are preempted as wait.
        """
        if now - self._preemption_checked_at < PREEMPT_CHECK_INTERVAL:
            return
        self._preemption_checked_at = now
        self._share_slots(now, started)
        limit = PREEMPT_RATIO * min(sequence.text.remaining for sequence in self.waiting)
        preemptible = [sequence for sequence in self._preemptible(now) if sequence.text.remaining > limit]
        for sequence in preemptible[: len(self.waiting)]:
            self.running.remove(sequence)
            self.add(sequence)

    def _share_slots(self, now: float, started: list[TextSequence[Text]]) -> None:
        """Replace texts of keys that have more than an equal share of the slots by those of keys that have less."""
        slots = Counter(sequence.caller for sequence in self.running)
        waiting = self.waiting.callers()
        share = max(1, self._max_running // len(slots | waiting))
        preemptible = [sequence for sequence in self._preemptible(now) if slots[sequence.caller] > share]
        for caller, count in waiting.items():
            for _ in range(min(count, share - slots[caller])):
                while preemptible and slots[preemptible[-1].caller] <= share:
                    preemptible.pop()
                if not preemptible:
                    return
                preempted = preemptible.pop()
                slots.subtract([preempted.caller])
                slots.update([caller])
                self.running.remove(preempted)
                self._start(self.waiting.pop_from(caller), now, started)
                self.add(preempted)

    def _preemptible(self, now: float) -> list[TextSequence[Text]]:
        return [sequence for sequence in self.running if now - sequence.joined_at > PREEMPT_AFTER]

    def _leave(self, sequence: TextSequence[Text]) -> None:
        """Free the text's place in the queue."""
        sequence.waiting = False
        self._admission.remove(sequence.caller, 1)
