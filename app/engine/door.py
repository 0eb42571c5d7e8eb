"""Who is let into a queue: the one rule of both engines."""

from __future__ import annotations

import math

from app.engine.watch import Watch
from app.errors import NotReady, Overloaded


class Door:
    """The way into the queue of one model, where ``waiting`` rows wait. It is closed once, when the service stops."""

    def __init__(self, name: str, watch: Watch, most: int) -> None:
        self.name = name
        self.closed = False
        self.waiting = 0
        self._watch = watch
        self._most = most

    def admit(self, wanted: int, rate: float) -> None:
        """Let ``wanted`` rows join the waiting ones; ``rate`` is in rows a second, 0 while it is unknown.

        An empty queue takes whatever the limits of a request let through. Raises NotReady when the service is
        stopping, and Overloaded, with the seconds until there should be room, when the rows do not fit.
        """
        if self.closed:
            self._watch.refused("stopping")
            raise NotReady(f"{self.name} is stopping")
        if self.waiting and self.waiting + wanted > self._most:
            self._watch.refused("queue_full")
            seconds = math.ceil((self.waiting + wanted) / rate) if rate else 1
            raise Overloaded(
                f"the queue of {self.name} is full: {self.waiting} of {self._most} rows wait, {wanted} more were sent",
                min(max(seconds, 1), 60),
            )
