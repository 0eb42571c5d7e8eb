"""The bounded fair queue of the batcher, the text engine and the executor."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from itertools import chain
from typing import Generic, Protocol, TypeVar

from app.errors import NotReady, Overloaded
from app.limits import Limits

# The name of the API key of the current request, or None without API keys.
current_caller: ContextVar[str | None] = ContextVar("caller", default=None)


class Queued(Protocol):
    """An item of a fair queue: the name of its API key or None, and its number of waiting rows."""

    rows: int

    @property
    def caller(self) -> str | None: ...


Item = TypeVar("Item", bound=Queued)


class FairQueue(Generic[Item]):
    """A queue of at most ``max_rows`` rows, whose callers take turns. The items of one caller keep their order.

    Start-time fair queueing (Goyal, Vin and Cheng 1996) gives each caller an equal share of the rows. The order is
    computed in virtual time. An item takes one unit of virtual time for each row, and starts when the previous item of
    its caller ends. The first item of a new caller starts at the current virtual time. The item with the earliest
    virtual start is next. Without API keys, the queue is first-in, first-out. ``on_rejected`` gets the reason of each
    rejection.
    """

    def __init__(
        self,
        name: str,
        max_rows: float = math.inf,
        on_rejected: Callable[[str], object] = lambda reason: None,
        limits: Limits = Limits(),  # it is immutable
    ) -> None:
        self.rows = 0  # number of waiting rows
        self.closed = False  # while it is true, all new requests are rejected
        self._name, self._max_rows, self._on_rejected, self._limits = name, max_rows, on_rejected, limits
        self._seconds_per_row = 0.0  # moving average; 0 means not measured yet
        self._items: dict[str | None, deque[Item]] = {}  # of each caller that waits
        self._rows: Counter[str | None] = Counter()  # waiting rows of each caller
        self._starts: dict[str | None, int] = {}  # virtual start of each caller's next item, in rows
        self._now = 0  # virtual time: the virtual start of the item that was taken last

    def __bool__(self) -> bool:
        return bool(self._items)

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(self._items.values())

    def admit(self, rows: int) -> None:
        """Raise an error unless ``rows`` more rows may join the queue now.

        An empty queue accepts any request. With API keys, the waiting rows of one key may not outnumber the free places
        of the queue (dynamic threshold; Choudhury and Hahne 1998). So a single key can use half of the queue.

        Raises:
            NotReady: the service is shutting down.
            Overloaded: the rows do not fit. Its ``retry_after`` is the expected time to compute all waiting rows and
                these rows.
        """
        if self.closed:
            self._on_rejected("stopping")
            raise NotReady(f"{self._name} is stopping")
        if not self.rows:
            return
        caller = current_caller.get()
        own = 0 if caller is None else self._rows[caller]
        if self.rows + own + rows > self._max_rows:
            self._on_rejected("queue_full")
            # If clients came back as soon as enough rows had left the queue, they would compete for few free places.
            seconds = math.ceil((self.rows + rows) * self._seconds_per_row)
            share = "" if caller is None else f", {own} of them of {caller}"
            raise Overloaded(
                f"the queue of {self._name} is full: {self.rows} of {self._max_rows} rows are waiting{share}; "
                f"this request adds {rows}",
                min(max(seconds, 1), self._limits.max_retry_after_seconds),
            )

    def measure(self, rows: int, seconds: float) -> None:
        """Record that ``rows`` rows were computed in ``seconds`` seconds."""
        measured = seconds / rows
        self._seconds_per_row = 0.8 * self._seconds_per_row + 0.2 * measured if self._seconds_per_row else measured

    def append(self, item: Item) -> None:
        """Add an item at the end of its caller's queue."""
        caller = item.caller
        if caller not in self._items:
            self._items[caller] = deque()
            self._starts[caller] = max(self._starts.get(caller, 0), self._now)
        self._items[caller].append(item)
        self.rows += item.rows
        self._rows[caller] += item.rows

    def peek(self) -> Item:
        """Return the next item without removing it."""
        return self._items[self._next_caller()][0]

    def pop(self) -> Item:
        """Remove and return the next item."""
        item = self.peek()
        self.take(item, item.rows)
        return item

    def take(self, item: Item, rows: int) -> None:
        """Take ``rows`` rows of a waiting item, which count towards the share of its caller.

        If the item has more rows, it moves to the end of its caller's queue. Otherwise, it leaves the queue.
        """
        caller = item.caller
        self._now = self._starts[self._next_caller()]  # otherwise new callers could wait behind others
        self._starts[caller] += rows
        self.rows -= rows
        self._rows[caller] -= rows
        items = self._items[caller]
        items.remove(item)
        if rows < item.rows:
            item.rows -= rows
            items.append(item)
        elif not items:
            self._forget(caller)

    def remove(self, item: Item) -> None:
        """Remove an item, if it waits. It does not count towards the share of its caller."""
        if item in self._items.get(item.caller, ()):
            self._items[item.caller].remove(item)
            self.rows -= item.rows
            self._rows[item.caller] -= item.rows
            if not self._items[item.caller]:
                self._forget(item.caller)

    def clear(self) -> None:
        """Remove all items."""
        self.rows = 0
        for state in (self._items, self._rows, self._starts):
            state.clear()

    def _forget(self, caller: str | None) -> None:
        del self._items[caller]
        if not self._items:
            self.clear()

    def _next_caller(self) -> str | None:
        if len(self._items) == 1:
            return next(iter(self._items))
        return min(self._items, key=self._starts.__getitem__)
