"""Who waits, and whose turn is next: the oldest; of several callers with keys, each in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Generic, Protocol, TypeVar

MAX_IDLE_CALLERS = 256  # callers whose last turn is remembered before those are forgotten that nobody owes anything


class Queued(Protocol):
    @property
    def caller(self) -> str | None: ...
    @property
    def rows(self) -> int: ...


Item = TypeVar("Item", bound=Queued)


class FairQueue(Generic[Item]):
    """First come, first served among what one caller sends; among callers, rows are shared evenly.

    Start-time fair queueing (Goyal, Vin and Cheng 1996): a caller's next item is due when the rows of its items before
    it were; the one that is due first is next, and who comes new is due now. With one caller, or without keys, that is
    a plain queue.
    """

    def __init__(self) -> None:
        self._queues: dict[str | None, deque[Item]] = {}
        self._virtual_start: dict[str | None, int] = {}  # in rows
        self._virtual_time = 0  # when that was due which was taken last

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(self._queues.values())

    def append(self, item: Item) -> None:
        queue = self._queues.get(item.caller)
        if queue is None:
            queue = self._queues[item.caller] = deque()
            self._virtual_start[item.caller] = max(self._virtual_start.get(item.caller, 0), self._virtual_time)
        queue.append(item)

    def peek(self) -> Item:
        """The next item, which stays."""
        return self._queues[self._next_caller()][0]

    def pop(self) -> Item:
        """The next item, which leaves."""
        who = self._next_caller()
        queue = self._queues[who]
        item = queue.popleft()
        self._virtual_time = self._virtual_start[who]
        self._virtual_start[who] += item.rows
        self._forget_idle(who)
        return item

    def discard(self, item: Item) -> None:
        """An item that nobody waits for any more leaves, if it is here: it takes no room, and its caller nothing."""
        queue = self._queues.get(item.caller)
        if queue is not None:
            with suppress(ValueError):
                queue.remove(item)
            self._forget_idle(item.caller)

    def _forget_idle(self, who: str | None) -> None:
        """Keep no empty queue, and no turn of a caller whom nobody owes anything."""
        if self._queues[who]:
            return
        del self._queues[who]
        if not self._queues:  # nobody was kept waiting
            self._virtual_start.clear()
            self._virtual_time = 0
        elif len(self._virtual_start) > MAX_IDLE_CALLERS:
            self._virtual_start = {
                one: due for one, due in self._virtual_start.items() if due > self._virtual_time or one in self._queues
            }

    def clear(self) -> None:
        self._queues.clear()

    def _next_caller(self) -> str | None:
        if len(self._queues) == 1:
            return next(iter(self._queues))
        return min(self._queues, key=self._virtual_start.__getitem__)
