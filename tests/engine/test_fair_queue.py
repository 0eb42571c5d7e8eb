"""The fair queue: a key that floods the service gets no more than its share of computing and of the queue."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.engine import RecordingObserver, one_millisecond
from support.service import HeldGenerator, Serve
from support.waiting import wait_until

from app import key_file
from app.engine.admission import AdmissionControl, current_caller
from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.engine.fair_queue import MAX_IDLE_CALLERS, FairQueue
from app.engine.text_engine import TextEngine
from app.errors import Overloaded


@dataclass
class Item:
    caller: str | None
    rows: int = 1
    number: int = 0


def order(*items: Item) -> str:
    queue: FairQueue[Item] = FairQueue()
    for item in items:
        queue.append(item)
    assert len(queue) == len(items)
    callers = ""
    while queue:
        first = queue.peek()
        assert queue.pop() is first
        callers += first.caller or "-"
    return callers


def test_callers_take_turns_and_each_caller_s_items_stay_in_order() -> None:
    assert order(*[Item("a")] * 4, *[Item("b")] * 2, Item("c")) == "abcabaa"
    assert order(*[Item(None)] * 3) == "---"
    items = [Item(caller, number=i) for i, caller in enumerate("aabbab")]
    queue: FairQueue[Item] = FairQueue()
    for item in items:
        queue.append(item)
    popped = [queue.pop() for _ in items]
    assert [item.number for item in popped if item.caller == "a"] == [0, 1, 4]


def test_callers_share_rows_and_not_requests() -> None:
    callers = order(*[Item("a", rows=4)] * 10, *[Item("b")] * 40)
    assert abs(4 * callers[:25].count("a") - callers[:25].count("b")) <= 4


def test_rows_that_were_never_queued_are_charged_to_their_caller_while_others_wait() -> None:
    queue: FairQueue[Item] = FairQueue()
    for caller in "aaabbb":
        queue.append(Item(caller))
    assert queue.pop().caller == "a"
    queue.charge(Item("a", rows=2))
    assert [queue.pop().caller for _ in range(5)] == ["b", "b", "b", "a", "a"]
    queue.charge(Item("a", rows=9))  # nobody waits
    for caller in "ab":
        queue.append(Item(caller))
    assert queue.pop().caller == "a"


def test_a_late_caller_gets_an_equal_share_from_its_arrival_on() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(100):
        queue.append(Item("a"))
    for _ in range(50):
        queue.pop()
    for _ in range(50):
        queue.append(Item("b"))
    assert Counter(queue.pop().caller for _ in range(40)) == {"a": 20, "b": 20}


def test_a_discarded_item_leaves_and_is_not_charged_to_its_caller() -> None:
    queue: FairQueue[Item] = FairQueue()
    discarded, remaining_items = [Item("a", rows=9) for _ in range(50)], [Item(caller) for caller in "aabb"]
    for item in (*discarded, *remaining_items):
        queue.append(item)
    for item in (*discarded, *discarded):  # a second time changes nothing
        queue.discard(item)
    assert len(queue) == 4
    assert "".join(queue.pop().caller or "" for _ in remaining_items) == "abab"
    assert not queue._queues
    assert not queue._virtual_start
    queue.discard(remaining_items[0])


def test_a_taken_item_leaves_and_is_charged_to_its_caller() -> None:
    queue: FairQueue[Item] = FairQueue()
    items = [Item(caller, rows=2, number=i) for i, caller in enumerate("aaabbb")]
    for item in items:
        queue.append(item)
    assert queue.take(items[2]) is items[2]
    assert [queue.pop().number for _ in range(5)] == [3, 0, 4, 1, 5]
    assert not queue._queues


def test_a_new_caller_does_not_wait_behind_others_after_items_were_taken() -> None:
    queue: FairQueue[Item] = FairQueue()
    items = [Item(caller) for caller in "a" * 40 + "b" * 40]
    for item in items:
        queue.append(item)
    for item in items[:32]:
        queue.take(item)
    queue.append(Item("c"))
    assert "c" in [queue.pop().caller for _ in range(2)]


def test_idle_callers_are_forgotten() -> None:
    queue: FairQueue[Item] = FairQueue()
    for i in range(5000):
        queue.append(Item(f"k{i}"))
        queue.pop()
    assert not queue._virtual_start
    queue.append(Item("always", rows=3))
    for i in range(5000):
        queue.append(Item("always", rows=3))
        queue.append(Item(f"k{i}"))
        queue.pop()
        queue.pop()
    assert len(queue._virtual_start) < 1000


def test_a_caller_is_charged_for_its_last_items_after_its_queue_was_empty() -> None:
    queue: FairQueue[Item] = FairQueue()
    for item in (Item("a", rows=10), *[Item("b")] * 20):
        queue.append(item)
    assert [queue.pop().caller for _ in range(3)] == ["a", "b", "b"]
    queue.append(Item("a"))
    assert (
        "".join(queue.pop().caller or "" for _ in range(len(queue))).index("a") == 9
    )  # b has had 11 rows by then; if both have had the same number, the older queue is first


def test_callers_are_forgotten_only_when_they_owe_nothing() -> None:
    queue: FairQueue[Item] = FairQueue()
    queue.append(Item("heavy", rows=1000))
    for i in range(2 * MAX_IDLE_CALLERS):
        queue.append(Item("always"))
        queue.append(Item(f"k{i}"))
    assert queue.pop().caller == "heavy"
    for _ in range(2 * MAX_IDLE_CALLERS):
        queue.pop()
    queue.append(Item("heavy"))
    assert "heavy" not in [queue.pop().caller for _ in range(MAX_IDLE_CALLERS)]


def test_one_key_may_use_half_of_the_queue_so_that_a_second_one_fits() -> None:
    admission = AdmissionControl("m", RecordingObserver(), 100)

    def fill(caller: str) -> int:
        current_caller.set(caller)
        own = 0
        while True:
            try:
                admission.admit(1, 0.0)
            except Overloaded as rejection:
                message = rejection.message
                break
            admission.add(caller, 1)
            own += 1
        assert f"{own} of them of {caller}" in message
        return own

    async def check() -> None:
        assert [fill("a"), fill("b"), fill("c"), fill("d")] == [50, 25, 13, 6]
        admission.remove("a", 50)
        assert admission.waiting == 44
        current_caller.set(None)
        admission.admit(100 - admission.waiting, 0.0)
        with pytest.raises(Overloaded):
            admission.admit(101 - admission.waiting, 0.0)

    asyncio.run(check())


def shares(create_requester: Any, answers: int = 600) -> Counter[str]:
    """Return how ``answers`` answers are divided between two keys, which have 100 callers and 16 callers.

    Each caller sends its next request after an answer. After a rejection, it waits for the next answer to any caller.
    """

    async def run() -> Counter[str]:
        counts: Counter[str] = Counter()
        answered = asyncio.Condition()
        executor = Executor("test")
        send_request = create_requester(executor)

        async def run_caller(caller: str) -> None:
            current_caller.set(caller)
            while counts.total() < answers:
                try:
                    await send_request()
                except Overloaded:
                    async with answered:
                        await answered.wait()
                    continue
                async with answered:
                    if counts.total() < answers:
                        counts[caller] += 1
                    answered.notify_all()

        await asyncio.gather(
            *(run_caller(caller) for caller, callers in (("heavy", 100), ("light", 16)) for _ in range(callers))
        )
        executor.close()
        return counts

    return asyncio.run(run())


def test_two_keys_share_batches_equally_within_a_tenth() -> None:
    def create_requester(executor: Executor) -> Any:
        engine = Batcher(
            "m", list, lambda item: 1, one_millisecond, executor, RecordingObserver(), batch_rows=8, queue_rows=64
        )
        return lambda: engine.submit([1])

    counts = shares(create_requester)
    assert abs(counts["light"] / counts.total() - 0.5) <= 0.05, counts


def test_two_keys_share_parsing_threads_equally_within_a_tenth() -> None:
    executors = list[Executor]()

    def create_requester(_: Executor) -> Any:
        executors.append(Executor("parse", max_waiting=64))
        return lambda: executors[0].run(int)

    counts = shares(create_requester)
    executors[0].close()
    assert abs(counts["light"] / counts.total() - 0.5) <= 0.05, counts


@dataclass
class Countdown:
    remaining: int

    @property
    def finished(self) -> bool:
        return self.remaining <= 0

    @property
    def generated(self) -> int:
        return 5 - self.remaining


def test_two_keys_share_text_slots_equally_within_a_tenth() -> None:
    def step(texts: Sequence[Countdown]) -> None:
        for text in texts:
            text.remaining -= 1

    def create_requester(executor: Executor) -> Any:
        engine = TextEngine(
            "m", step, lambda rows: 0.001, executor, RecordingObserver(), max_running=8, queue_rows=64, normal_budget=0
        )
        return lambda: engine.submit([Countdown(5)])

    counts = shares(create_requester)
    assert abs(counts["light"] / counts.total() - 0.5) <= 0.05, counts


def test_another_key_is_admitted_while_one_floods_the_queue(serve: Serve, tmp_path: Path, held: HeldGenerator) -> None:
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
