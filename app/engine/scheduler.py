"""Decide which texts of a text engine run, which wait, and which are preempted.

The scheduler starts no asyncio tasks and does not read the clock. Methods that need the current time have the argument
``now``, on ``time.monotonic``'s clock.
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
# A waiting text preempts a running text only if the running text has more than this many times as many remaining
# characters as the waiting text.
PREEMPT_RATIO = 4
PREEMPT_CHECK_INTERVAL = 0.05  # seconds between two searches for texts to preempt


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
    """A text, and the future that returns the text when the text is finished.

    Times are on ``time.monotonic``'s clock. 0 means that the event has not happened yet.
    """

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
    waiting: bool = False  # whether the text is in the queue
    joined_at: float = 0.0  # when the text last began to run; after a preemption it begins again
    notified_at: float = 0.0  # when ``updated`` was last set

    def fail(self, error: Exception) -> None:
        """End the text with an error, unless it is already done."""
        set_exception(self.future, error)
        if self.updated:
            self.updated.set()


class Scheduler(Generic[Text]):
    """Chooses the texts that run. There are ``max_running`` slots for running texts.

    The other texts wait in a queue, whose length ``admission`` limits. A text normally runs until it is finished or
    cancelled. When all slots are in use, a text that has run for ``PREEMPT_AFTER`` seconds may be preempted. It then
    returns to the queue, and a waiting text gets its slot. There are two reasons to preempt a text. First, its API key
    has more than an equal share of the slots, and another key has less. Second, a waiting text is much shorter, and
    its key does not get more slots than the key of the longer text had. Texts of the same key and of similar length
    never replace each other. On average, they finish sooner if they run one after the other.
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
        """Drop texts that are done, preempt texts, and fill the free slots from the queue.

        Afterwards, ``running`` holds the texts to compute. Returns the texts that run for the first time.
        """
        self.drop_done()
        started: list[TextSequence[Text]] = []
        if self.waiting and len(self.running) >= self._max_running:
            self._preempt(now, started)
        while self.waiting and len(self.running) < self._max_running:
            self._start(self.waiting.pop(), now, started)
        return started

    def _start(self, sequence: TextSequence[Text], now: float, started: list[TextSequence[Text]]) -> None:
        """Give a slot to a text popped from the queue. Append it to ``started`` if it runs for the first time."""
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
        """Share the slots among the API keys, then replace long running texts by much shorter waiting texts."""
        if now - self._preemption_checked_at < PREEMPT_CHECK_INTERVAL:
            return
        self._preemption_checked_at = now
        self._share_slots(now, started)
        self._replace_long(now, started)

    def _replace_long(self, now: float, started: list[TextSequence[Text]]) -> None:
        """Replace long running texts by much shorter waiting texts, one by one. The shortest waiting texts go first."""
        preemptible = self._preemptible(now)
        if not preemptible:
            return
        longest = max(sequence.text.remaining for sequence in preemptible)
        short_texts = [sequence for sequence in self.waiting if PREEMPT_RATIO * sequence.text.remaining < longest]
        slots = Counter(sequence.caller for sequence in self.running)
        checked = set[str | None]()  # keys whose shortest waiting text can replace no text
        for short in sorted(short_texts, key=lambda sequence: sequence.text.remaining):
            caller, limit = short.caller, PREEMPT_RATIO * short.text.remaining
            if caller in checked:
                continue
            for long in preemptible:
                if long.text.remaining > limit and (long.caller == caller or slots[long.caller] > slots[caller]):
                    break
            else:
                checked.add(caller)
                continue
            slots[long.caller] -= 1
            slots[caller] += 1
            preemptible.remove(long)
            self._replace(long, self.waiting.take(short), now, started)

    def _share_slots(self, now: float, started: list[TextSequence[Text]]) -> None:
        """Replace running texts of keys with more than an equal share of the slots by waiting texts of other keys.

        Only keys with less than an equal share get slots, until they have an equal share.
        """
        slots = Counter(sequence.caller for sequence in self.running)
        waiting = self.waiting.callers()
        share = max(1, self._max_running // len(slots | waiting))
        preemptible = self._preemptible(now)
        for caller, count in waiting.items():
            for _ in range(min(count, share - slots[caller])):
                while preemptible and slots[preemptible[-1].caller] <= share:
                    preemptible.pop()
                if not preemptible:
                    return
                preempted = preemptible.pop()
                slots[preempted.caller] -= 1
                self._replace(preempted, self.waiting.pop_from(caller), now, started)

    def _replace(
        self,
        preempted: TextSequence[Text],
        sequence: TextSequence[Text],
        now: float,
        started: list[TextSequence[Text]],
    ) -> None:
        """Give the slot of a running text to a text popped from the queue, and queue the running text."""
        self.running.remove(preempted)
        self._start(sequence, now, started)
        self.add(preempted)

    def _preemptible(self, now: float) -> list[TextSequence[Text]]:
        return [sequence for sequence in self.running if now - sequence.joined_at > PREEMPT_AFTER]

    def _leave(self, sequence: TextSequence[Text]) -> None:
        """Stop counting a text as waiting."""
        sequence.waiting = False
        self._admission.remove(sequence.caller, 1)
