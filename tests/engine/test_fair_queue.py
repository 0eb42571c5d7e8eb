"""The fair queue: admission, turns of callers, and a key that floods the service."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from support.engine import RecordingObserver
from support.faults import Hold
from support.service import Serve
from support.waiting import wait_until

from app import key_file
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


def rejection(queue: FairQueue[Item], rows: int) -> Overloaded:
    with pytest.raises(Overloaded) as raised:
        queue.admit(rows)
    return raised.value


def test_callers_take_turns() -> None:
    assert order(queue_of(*[Item("a")] * 4, *[Item("b")] * 2, Item("c"))) == "abcabaa"
    assert order(queue_of(*[Item(None)] * 3)) == "---"


def test_callers_share_rows_and_not_requests() -> None:
    callers = order(queue_of(*[Item("a", rows=4) for _ in range(10)], *[Item("b") for _ in range(40)]))
    assert abs(4 * callers[:25].count("a") - callers[:25].count("b")) <= 4


def test_a_late_caller_gets_an_equal_share_from_its_arrival_on() -> None:
    queue = queue_of(*[Item("a") for _ in range(100)])
    for _ in range(50):
        queue.pop()
    for _ in range(50):
        queue.append(Item("b"))
    assert Counter(queue.pop().caller for _ in range(40)) == {"a": 20, "b": 20}


def test_a_removed_item_is_not_charged_to_its_caller() -> None:
    removed = [Item("a", rows=9) for _ in range(5)]
    queue = queue_of(*removed, *[Item(caller) for caller in "aabb"])
    for item in (*removed, *removed):  # a second time changes nothing
        queue.remove(item)
    assert queue.rows == 4
    assert order(queue) == "abab"


def test_an_item_that_is_taken_out_of_turn_is_charged_to_its_caller() -> None:
    items = [Item(caller, rows=2) for caller in "aaabbb"]
    queue = queue_of(*items)
    queue.take(items[2], 2)
    assert order(queue) == "babab"


def test_a_new_caller_does_not_wait_behind_others_after_items_were_taken() -> None:
    items = [Item(caller) for caller in "a" * 40 + "b" * 40]
    queue = queue_of(*items)
    for item in items[:32]:
        queue.take(item, 1)
    queue.append(Item("c"))
    assert "c" in [queue.pop().caller for _ in range(2)]


def test_the_rest_of_a_partly_taken_item_goes_to_the_end_of_its_callers_queue() -> None:
    large, small = Item("a", rows=5), Item("a")
    queue = queue_of(large, small)
    queue.take(large, 3)
    assert (queue.rows, large.rows) == (3, 2)
    assert [queue.pop(), queue.pop()] == [small, large]


def test_a_caller_is_charged_for_its_last_items_after_its_queue_was_empty() -> None:
    queue = queue_of(Item("a", rows=10), *[Item("b") for _ in range(20)])
    assert [queue.pop().caller for _ in range(3)] == ["a", "b", "b"]
    queue.append(Item("a"))
    assert (
        order(queue).index("a") == 9
    )  # b has had 11 rows by then; if both have had the same, the older queue is first


def test_rows_are_admitted_up_to_the_limit() -> None:
    queue = queue_of(max_rows=10)
    queue.admit(99)  # an empty queue accepts any request
    queue.append(Item(None, rows=4))
    queue.admit(6)
    assert str(rejection(queue, 7)) == "the queue of m is full: 4 of 10 rows are waiting; this request adds 7"


@pytest.mark.parametrize(("seconds_per_row", "seconds"), [(0.0, 1), (0.01, 1), (0.5, 6), (0.51, 7), (99.0, 60)])
def test_retry_after_is_the_time_of_the_waiting_and_the_rejected_rows(seconds_per_row: float, seconds: int) -> None:
    queue = queue_of(Item(None, rows=5), max_rows=10)
    for rows in (1, 4):
        queue.measure(rows, rows * seconds_per_row)
    assert rejection(queue, 7).headers() == {"retry-after": str(seconds)}


def test_the_time_of_a_row_is_a_moving_average() -> None:
    queue = queue_of(Item(None, rows=5), max_rows=5)
    queue.measure(1, 1.0)
    queue.measure(2, 12.0)
    assert rejection(queue, 5).retry_after == 20  # 0.8 * 1 + 0.2 * 6 = 2 seconds for each row


def test_a_key_may_have_as_many_waiting_rows_as_are_free() -> None:
    queue = queue_of(max_rows=100)
    shares = []
    for caller in "abcd":
        current_caller.set(caller)
        own = 0
        with pytest.raises(Overloaded) as raised:  # noqa: PT012
            while True:
                queue.admit(1)
                queue.append(Item(caller))
                own += 1
        assert f"{own} of them of {caller}; this request adds 1" in raised.value.message
        shares.append(own)
    assert shares == [50, 25, 13, 6]


def test_rejections_are_reported_with_their_reason() -> None:
    observer = RecordingObserver()
    queue: FairQueue[Item] = FairQueue("m", 1, observer.on_rejected)
    queue.append(Item(None))
    rejection(queue, 1)
    queue.closed = True
    with pytest.raises(NotReady, match=r"^m is stopping$"):
        queue.admit(1)
    assert observer.rejections == ["queue_full", "stopping"]


def test_another_key_is_admitted_while_one_floods_the_queue(serve: Serve, tmp_path: Path, held: Hold) -> None:
    heavy, light = key_file.add(tmp_path / "keys", "heavy"), key_file.add(tmp_path / "keys", "light")
    with serve(keys_file=tmp_path / "keys", queue_rows=16, batch_rows=4, inline_seconds=0) as client:
        url = f"{client.base_url}/v1/images/sample"

        def post(key: str) -> httpx.Response:
            return httpx.post(url, json={"count": 1}, headers={"x-api-key": key}, timeout=60)

        with ThreadPoolExecutor(40) as pool:
            held.armed.set()
            first = pool.submit(post, heavy)
            assert held.entered.wait(30)
            flood = [pool.submit(post, heavy) for _ in range(30)]
            wait_until(lambda: sum(answer.done() for answer in flood) == 22)  # the key may use 8 of the 16 rows
            late = pool.submit(post, light)
            wait_until(lambda: _rows_wait(client, light, 9))
            held.release.set()
            assert late.result().status_code == 200
            assert first.result().status_code == 200
            assert sorted(answer.result().status_code for answer in flood) == [200] * 8 + [429] * 22


def _rows_wait(client: httpx.Client, key: str, rows: int) -> bool:
    """Return whether ``rows`` rows wait, which the error message of another request states."""
    answer = client.post("/v1/images/sample", json={"count": 16}, headers={"x-api-key": key})
    return f"{rows} of 16 rows are waiting" in answer.json()["error"]["message"]
