"""What the workers tell each other and their parent, in memory that all of them share."""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable
from enum import IntEnum


class State(IntEnum):
    """The state of a place in the table."""

    STARTING = 0  # also: there is no worker at this place
    READY = 1
    UNHEALTHY = 2  # gets new connections only if no other worker is ready
    DRAINING = 3


class WorkerTable:
    """One place for each worker: its state, its last heartbeat and its number of connections.

    The memory must be allocated before the workers are forked. Each value has eight bytes, so processes need no lock.
    ``fresh_seconds`` is the age up to which a heartbeat shows that a worker accepts connections.
    """

    def __init__(self, count: int, fresh_seconds: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        values = memoryview(mmap.mmap(-1, 3 * 8 * count)).cast("d")
        self.states, self.heartbeats, self.connections = (values[i * count : (i + 1) * count] for i in range(3))
        self._fresh_seconds, self._clock = fresh_seconds, clock

    def beat(self, place: int) -> None:
        """Report that the worker at ``place`` works."""
        self.heartbeats[place] = self._clock()

    def clear(self, place: int) -> None:
        """Remove a worker that has ended."""
        self.states[place] = self.heartbeats[place] = self.connections[place] = 0

    def fewest_connections(self, place: int) -> float:
        """Return the smallest number of connections of the other workers that accept connections, or infinity."""
        oldest = self._clock() - self._fresh_seconds
        return min(
            (
                self.connections[other]
                for other in range(len(self.states))
                if other != place and self.states[other] == State.READY and self.heartbeats[other] >= oldest
            ),
            default=math.inf,
        )

    def may_accept(self, place: int) -> bool:
        """Return whether the next connection is for the worker at ``place``."""
        fewest = self.fewest_connections(place)
        if self.states[place] == State.READY:
            return self.connections[place] <= fewest
        return self.states[place] == State.UNHEALTHY and fewest == math.inf
