"""The fair queue: admission, turns of callers, and a key that floods the service."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from app.engine.fair_queue import FairQueue, current_caller
from app.errors import NotReady, Overloaded


@pytest.fixture(autouse=True)
def _no_caller() -> Iterator[None]:
    token = current_caller.set(None)
    yield
    current_caller.reset(token)


@dataclass(eq=False)
class Item:
    caller: str | None
    rows: int = 1


def queue_of(*items: Item, max_rows: int = 100) -> FairQueue[Item]:
    queue: FairQueue[Item] = FairQueue("m", max_rows)
    for item in items:
        queue.append(item)
    return queue


def order(queue: FairQueue[Item]) -> str:
    callers = ""
    while queue:
        first = queue.peek()
        assert queue.pop() is first
        callers += first.caller or "-"
    assert queue.rows == 0
    return callers


def test_callers_take_turns() -> None:
    assert order(queue_of(*[Item("a")] * 4, *[Item("b")] * 2, Item("c"))) == "abcabaa"
    assert order(queue_of(*[Item(None)] * 3)) == "---"


def test_a_new_caller_does_not_wait_behind_others_after_items_were_taken() -> None:
    items = [Item(caller) for caller in "a" * 40 + "b" * 40]
    queue = queue_of(*items)
    for item in items[:32]:
        queue.take(item, 1)
    queue.append(Item("c"))
    assert "c" in [queue.pop().caller for _ in range(2)]


def test_a_caller_is_charged_for_its_last_items_after_its_queue_was_empty() -> None:
    queue = queue_of(Item("a", rows=10), *[Item("b") for _ in range(20)])
    assert [queue.pop().caller for _ in range(3)] == ["a", "b", "b"]
    queue.append(Item("a"))
    assert (
        order(queue).index("a") == 9
    )  # b has had 11 rows by then; if both have had the same, the older queue is first


def test_the_reason_of_each_rejection_is_reported() -> None:
    reasons: list[str] = []
    queue: FairQueue[Item] = FairQueue("m", 1, reasons.append)
    queue.append(Item(None))
    with pytest.raises(Overloaded):
        queue.admit(1)
    queue.closed = True
    with pytest.raises(NotReady, match="m is stopping"):
        queue.admit(1)
    assert reasons == ["queue_full", "stopping"]
