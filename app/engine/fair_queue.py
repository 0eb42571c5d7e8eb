"""A fair queue, in which callers with API keys take turns. The items of each caller keep their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Generic, Protocol, TypeVar

MAX_IDLE_CALLERS = 256  # if there are more virtual starts than this, outdated starts of idle callers are dropped


class Queued(Protocol):
    """An item of a fair queue. ``caller`` is the name of its API key or None, and ``rows`` is its number of rows."""

    @property
    def caller(self) -> str | None: ...
    @property
    def rows(self) -> int: ...


Item = TypeVar("Item", bound=Queued)


class FairQueue(Generic[Item]):
    """Start-time fair queueing (Goyal, Vin and Cheng 1996), which gives each caller an equal share of the rows.

    The order of the items is computed in virtual time. An item takes one unit of virtual time for each of its rows. The
    item starts when the previous item of the same caller ends. The first item of a new caller starts at the current
    virtual time. The queue returns the item with the earliest virtual start first. With one caller or without API keys,
    the queue is a plain first-in, first-out queue.
    """

    def __init__(self) -> None:
        self._queues: dict[str | None, deque[Item]] = {}
        self._virtual_start: dict[str | None, int] = {}  # virtual start of each caller's next item, in rows
        self._virtual_time = 0  # virtual start of the item that was popped last, in rows

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(self._queues.values())

    def append(self, item: Item) -> None:
        """Add an item at the end of its caller's queue."""
        queue = self._queues.get(item.caller)
        if queue is None:
            queue = self._queues[item.caller] = deque()
            now = self._virtual_time
            self._virtual_start[item.caller] = max(self._virtual_start.get(item.caller, now), now)
        queue.append(item)

    def peek(self) -> Item:
        """Return the next item without removing it."""
        return self._queues[self._next_caller()][0]

    def callers(self) -> dict[str | None, int]:
        """Return a dictionary from each caller with queued items to the number of its items."""
        return {caller: len(queue) for caller, queue in self._queues.items()}

    def pop(self) -> Item:
        """Remove and return the next item."""
        caller = self._next_caller()
        self._virtual_time = self._virtual_start[caller]
        return self._remove(self._queues[caller][0])

    def pop_from(self, caller: str | None) -> Item:
        """Remove and return the first queued item of ``caller``. There must be one."""
        return self.take(self._queues[caller][0])

    def take(self, item: Item) -> Item:
        """Remove and return any queued item. As after ``pop``, its rows count towards the share of its caller."""
        self._virtual_time = self._virtual_start[self._next_caller()]  # otherwise new callers could wait behind others
        return self._remove(item)

    def charge(self, item: Item) -> None:
        """Count the rows of an item that is computed without being queued towards the share of its caller."""
        if item.caller in self._virtual_start:  # otherwise nobody else waits, and the shares are forgotten
            self._virtual_start[item.caller] += item.rows

    def _remove(self, item: Item) -> Item:
        self._queues[item.caller].remove(item)
        self._virtual_start[item.caller] += item.rows
        self._forget_idle(item.caller)
        return item

    def discard(self, item: Item) -> None:
        """Remove an item if it is queued. A removed item does not count towards the share of its caller."""
        queue = self._queues.get(item.caller)
        if queue is not None:
            with suppress(ValueError):
                queue.remove(item)
            self._forget_idle(item.caller)

    def _forget_idle(self, caller: str | None) -> None:
        """Drop the queue of a caller if it is empty. Also drop outdated virtual starts if there are too many."""
        if self._queues[caller]:
            return
        del self._queues[caller]
        if not self._queues:
            self._virtual_start.clear()
        elif len(self._virtual_start) > MAX_IDLE_CALLERS:
            self._virtual_start = {
                name: start
                for name, start in self._virtual_start.items()
                if start > self._virtual_time or name in self._queues
            }

    def clear(self) -> None:
        """Remove all items."""
        self._queues.clear()

    def _next_caller(self) -> str | None:
        if len(self._queues) == 1:
            return next(iter(self._queues))
        return min(self._queues, key=self._virtual_start.__getitem__)
