"""Report the start, the first token, the time between tokens and the end of each text to the observer of its engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from app.engine.observer import EngineObserver, RequestTrace
from app.engine.scheduler import Text, TextSequence

REPORT_BATCH = 128  # number of finished texts that are reported together, or fewer if the engine becomes idle


@dataclass(eq=False, slots=True)
class FinishedText:
    """A ``BatchMember`` of a finished text. It does not keep the text, which may take several hundred kilobytes."""

    rows: int
    queued_at: float
    started_at: float
    ended_at: float
    trace: RequestTrace | None


class TextReporter(Generic[Text]):
    """Collects finished texts and reports them in batches, because one report per text would delay the next step."""

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer
        self._without_token: list[TextSequence[Text]] = []  # running texts without a character so far
        self._finished: list[FinishedText] = []  # finished texts that are not reported yet

    def started(self, sequences: Sequence[TextSequence[Text]]) -> None:
        """Report texts that run for the first time."""
        if sequences:
            self._without_token += sequences
            self._observer.on_dequeued(sequences)

    def first_tokens(self, now: float) -> None:
        """Report the texts whose first character was generated in the last round."""
        if not self._without_token:
            return
        for sequence in self._without_token:
            if sequence.text.generated and not sequence.future.done():
                sequence.first_token_at = now
                self._observer.on_first_token(sequence, now - sequence.queued_at)
        self._without_token = [
            sequence
            for sequence in self._without_token
            if not (sequence.first_token_at or sequence.text.finished or sequence.future.done())
        ]

    def finished(self, sequence: TextSequence[Text], now: float) -> None:
        """Report the mean time between two characters of a finished text, and collect its times for ``flush``."""
        sequence.ended_at = now
        if sequence.first_token_at and sequence.text.generated > 1:
            self._observer.on_inter_token((now - sequence.first_token_at) / (sequence.text.generated - 1))
        self._finished.append(FinishedText(sequence.rows, sequence.queued_at, sequence.started_at, now, sequence.trace))
        if sequence.trace:
            sequence.trace.ended_at = now
        if len(self._finished) >= REPORT_BATCH:
            self.flush()

    def flush(self) -> None:
        """Report the finished texts collected so far, and release texts that ended without a character."""
        self._without_token = [sequence for sequence in self._without_token if not sequence.future.done()]
        texts, self._finished = self._finished, []
        if texts:
            self._observer.on_completed(texts)
