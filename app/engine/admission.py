"""Who is let into a queue: the one rule of both engines."""

from __future__ import annotations

import math
from contextvars import ContextVar

from app.engine.observer import EngineObserver
from app.errors import NotReady, Overloaded

# The name of the API key of the current request, or None without API keys.
current_caller: ContextVar[str | None] = ContextVar("caller", default=None)


class AdmissionControl:
    """The way into the queue of one model, or of ``name``, where ``waiting`` rows wait; ``watch`` is told of refusals.

    It is closed once, when the service stops.
    """

    def __init__(self, name: str, observer: EngineObserver | None, max_rows: int) -> None:
        self.name = name
        self.closed = False
        self.waiting = 0
        self.rejected = 0  # requests for which there was no room, so far
        self._waiting_by_caller: dict[str, int] = {}  # waiting rows of each caller who has a key
        self._observer = observer
        self._max_rows = max_rows

    def admit(self, rows: int, rows_per_second: float) -> None:
        """Let ``wanted`` rows join the waiting ones; ``rate`` is in rows a second, 0 while it is unknown.

        An empty queue takes whatever the limits of a request let through. Of callers with keys, each may have as many
        rows waiting as there is room left: alone half of the queue, two in time a third each, and who comes new finds
        room (dynamic thresholds, Choudhury and Hahne 1998).

        Raises NotReady when the service is stopping, and Overloaded, with the seconds until there should be room, when
        the rows do not fit.
        """
        if self.closed:
            self._report_rejection("stopping")
            raise NotReady(f"{self.name} is stopping")
        if not self.waiting:
            return
        who = current_caller.get()
        own = 0 if who is None else self._waiting_by_caller.get(who, 0)
        if self.waiting + own + rows > self._max_rows:
            self.rejected += 1
            self._report_rejection("queue_full")
            seconds = math.ceil((self.waiting + rows) / rows_per_second) if rows_per_second else 1
            theirs = "" if who is None else f", {own} of them of {who}"
            raise Overloaded(
                f"the queue of {self.name} is full: {self.waiting} of {self._max_rows} rows wait{theirs}, "
                f"{rows} more were sent",
                min(max(seconds, 1), 60),
            )

    def _report_rejection(self, reason: str) -> None:
        if self._observer:
            self._observer.on_rejected(reason)

    def add(self, caller: str | None, rows: int) -> None:
        """So many rows of a caller wait from now on."""
        self.waiting += rows
        if caller is not None:
            self._waiting_by_caller[caller] = self._waiting_by_caller.get(caller, 0) + rows

    def remove(self, caller: str | None, rows: int) -> None:
        """They wait no longer, so that their room is free."""
        self.waiting -= rows
        if caller is not None:
            self._waiting_by_caller[caller] -= rows
            if not self._waiting_by_caller[caller]:
                del self._waiting_by_caller[caller]
