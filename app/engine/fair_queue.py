"""Who waits, and whose turn is next: the oldest; of several callers with keys, each in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Generic, Protocol, TypeVar

FORGET = 256  # callers whose last turn is remembered before those are forgotten that nobody owes anything


class Waiting(Protocol):
    @property
    def caller(self) -> str | None: ...
    @property
    def rows(self) -> int: ...


Item = TypeVar("Item", bound=Waiting)


class Line(Generic[Item]):
    """First come, first served among what one caller sends; among callers, rows are shared evenly.

    Start-time fair queueing (Goyal, Vin and Cheng 1996): a caller's next item is due when the rows of its items before
    it were; the one that is due first is next, and who comes new is due now. With one caller, or without keys, that is
    a plain queue.
    """

    def __init__(self) -> None:
        self._queues: dict[str | None, deque[Item]] = {}
        self._due: dict[str | None, int] = {}  # in rows
        self._now = 0  # when that was due which was taken last

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
            self._due[item.caller] = max(self._due.get(item.caller, 0), self._now)
        queue.append(item)

    def first(self) -> Item:
        """The next item, which stays."""
        return self._queues[self._next()][0]

    def pop(self) -> Item:
        """The next item, which leaves."""
        who = self._next()
        queue = self._queues[who]
        item = queue.popleft()
        self._now = self._due[who]
        self._due[who] += item.rows
        self._tidy(who)
        return item

    def discard(self, item: Item) -> None:
        """An item that nobody waits for any more leaves, if it is here: it takes no room, and its caller nothing."""
        queue = self._queues.get(item.caller)
        if queue is not None:
            with suppress(ValueError):
                queue.remove(item)
            self._tidy(item.caller)

    def _tidy(self, who: str | None) -> None:
        """Keep no empty queue, and no turn of a caller whom nobody owes anything."""
        if self._queues[who]:
            return
        del self._queues[who]
        if not self._queues:  # nobody was kept waiting
            self._due.clear()
            self._now = 0
        elif len(self._due) > FORGET:
            self._due = {one: due for one, due in self._due.items() if due > self._now or one in self._queues}

    def clear(self) -> None:
        self._queues.clear()

    def _next(self) -> str | None:
        if len(self._queues) == 1:
            return next(iter(self._queues))
        return min(self._queues, key=self._due.__getitem__)
