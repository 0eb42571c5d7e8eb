"""Admission control for the queues of the batcher, the text engine and the executor."""

from __future__ import annotations

import math
from contextvars import ContextVar

from app.engine.observer import EngineObserver
from app.errors import NotReady, Overloaded

MAX_RETRY_AFTER = 60  # seconds

# The name of the API key of the current request, or None without API keys.
current_caller: ContextVar[str | None] = ContextVar("caller", default=None)


class AdmissionControl:
    """Limits the rows that wait in the queue ``name`` to ``max_rows`` and reports rejections to ``observer``.

    While ``closed`` is true, all new requests are rejected. The engine sets ``closed`` at shutdown.
    """

    def __init__(self, name: str, observer: EngineObserver | None, max_rows: int) -> None:
        self.name = name
        self.closed = False
        self.waiting = 0  # number of waiting rows
        self.rejected = 0  # requests rejected so far because the queue was full
        self._waiting_by_caller: dict[str, int] = {}  # waiting rows of each API key
        self._observer = observer
        self._max_rows = max_rows

    def admit(self, rows: int, rows_per_second: float) -> None:
        """Raise an error unless ``rows`` more rows may join the queue now.

        An empty queue accepts any request. With API keys, the waiting rows of one key may not outnumber the free places
        of the queue. A single key can thus use half of the queue, and two keys can use a third each. Choudhury and
        Hahne (1998) call this a dynamic threshold.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the rows do not fit. Its ``retry_after`` is the time in seconds to compute the waiting rows and
                these rows at ``rows_per_second``, where 0 means unknown.
        """
        if self.closed:
            self._report_rejection("stopping")
            raise NotReady(f"{self.name} is stopping")
        if not self.waiting:
            return
        caller = current_caller.get()
        own = 0 if caller is None else self._waiting_by_caller.get(caller, 0)
        if self.waiting + own + rows > self._max_rows:
            self.rejected += 1
            self._report_rejection("queue_full")
            # If clients came back as soon as enough rows had left the queue, they would compete for few free places.
            seconds = math.ceil((self.waiting + rows) / rows_per_second) if rows_per_second else 1
            share = "" if caller is None else f", {own} of them of {caller}"
            raise Overloaded(
                f"the queue of {self.name} is full: {self.waiting} of {self._max_rows} rows are waiting{share}; "
                f"this request adds {rows}",
                min(max(seconds, 1), MAX_RETRY_AFTER),
            )

    def _report_rejection(self, reason: str) -> None:
        if self._observer:
            self._observer.on_rejected(reason)

    def add(self, caller: str | None, rows: int) -> None:
        """Count ``rows`` rows of ``caller`` as waiting."""
        self.waiting += rows
        if caller is not None:
            self._waiting_by_caller[caller] = self._waiting_by_caller.get(caller, 0) + rows

    def remove(self, caller: str | None, rows: int) -> None:
        """Stop counting ``rows`` rows of ``caller`` as waiting."""
        self.waiting -= rows
        if caller is not None:
            self._waiting_by_caller[caller] -= rows
            if not self._waiting_by_caller[caller]:
                del self._waiting_by_caller[caller]
