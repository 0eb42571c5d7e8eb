"""Who is let into a queue: the one rule of both engines."""

from __future__ import annotations

import math
from contextvars import ContextVar

from app.engine.observer import Watch
from app.errors import NotReady, Overloaded

caller: ContextVar[str | None] = ContextVar("caller", default=None)  # whose request it is, where keys are in use


class Door:
    """The way into the queue of one model, or of ``name``, where ``waiting`` rows wait; ``watch`` is told of refusals.

    It is closed once, when the service stops.
    """

    def __init__(self, name: str, watch: Watch | None, most: int) -> None:
        self.name = name
        self.closed = False
        self.waiting = 0
        self.refused = 0  # requests for which there was no room, so far
        self._of: dict[str, int] = {}  # waiting rows of each caller who has a key
        self._watch = watch
        self._most = most

    def admit(self, wanted: int, rate: float) -> None:
        """Let ``wanted`` rows join the waiting ones; ``rate`` is in rows a second, 0 while it is unknown.

        An empty queue takes whatever the limits of a request let through. Of callers with keys, each may have as many
        rows waiting as there is room left: alone half of the queue, two in time a third each, and who comes new finds
        room (dynamic thresholds, Choudhury and Hahne 1998).

        Raises NotReady when the service is stopping, and Overloaded, with the seconds until there should be room, when
        the rows do not fit.
        """
        if self.closed:
            self._refused("stopping")
            raise NotReady(f"{self.name} is stopping")
        if not self.waiting:
            return
        who = caller.get()
        own = 0 if who is None else self._of.get(who, 0)
        if self.waiting + own + wanted > self._most:
            self.refused += 1
            self._refused("queue_full")
            seconds = math.ceil((self.waiting + wanted) / rate) if rate else 1
            theirs = "" if who is None else f", {own} of them of {who}"
            raise Overloaded(
                f"the queue of {self.name} is full: {self.waiting} of {self._most} rows wait{theirs}, "
                f"{wanted} more were sent",
                min(max(seconds, 1), 60),
            )

    def _refused(self, reason: str) -> None:
        if self._watch:
            self._watch.refused(reason)

    def enter(self, who: str | None, rows: int) -> None:
        """So many rows of a caller wait from now on."""
        self.waiting += rows
        if who is not None:
            self._of[who] = self._of.get(who, 0) + rows

    def leave(self, who: str | None, rows: int) -> None:
        """They wait no longer, so that their room is free."""
        self.waiting -= rows
        if who is not None:
            self._of[who] -= rows
            if not self._of[who]:
                del self._of[who]
