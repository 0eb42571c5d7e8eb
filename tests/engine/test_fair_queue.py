"""Where keys are in use, one that floods takes no more than its share: of what is computed, and of the queue."""

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
from app.engine.fair_queue import FairQueue
from app.engine.text_engine import TextEngine
from app.errors import Overloaded


@dataclass
class Item:
    caller: str | None
    rows: int = 1
    number: int = 0


def order(*items: Item) -> str:
    line: FairQueue[Item] = FairQueue()
    for item in items:
        line.append(item)
    assert len(line) == len(items)
    taken = ""
    while line:
        first = line.peek()
        assert line.pop() is first
        taken += first.caller or "-"
    return taken


def test_callers_are_taken_in_turn_and_each_one_in_order() -> None:
    assert order(*[Item("a")] * 4, *[Item("b")] * 2, Item("c")) == "abcabaa"
    assert order(*[Item(None)] * 3) == "---"
    items = [Item(who, number=i) for i, who in enumerate("aabbab")]
    line: FairQueue[Item] = FairQueue()
    for item in items:
        line.append(item)
    taken = [line.pop() for _ in items]
    assert [item.number for item in taken if item.caller == "a"] == [0, 1, 4]


def test_what_counts_is_rows_not_requests() -> None:
    taken = order(*[Item("a", rows=4)] * 10, *[Item("b")] * 40)
    assert abs(4 * taken[:25].count("a") - taken[:25].count("b")) <= 4


def test_who_comes_late_is_neither_punished_nor_paid_for_having_waited() -> None:
    line: FairQueue[Item] = FairQueue()
    for _ in range(100):
        line.append(Item("a"))
    for _ in range(50):
        line.pop()
    for _ in range(50):
        line.append(Item("b"))
    assert Counter(line.pop().caller for _ in range(40)) == {"a": 20, "b": 20}


def test_what_nobody_waits_for_any_more_leaves_and_costs_its_caller_nothing() -> None:
    line: FairQueue[Item] = FairQueue()
    gone, kept = [Item("a", rows=9) for _ in range(50)], [Item(who) for who in "aabb"]
    for item in (*gone, *kept):
        line.append(item)
    for item in (*gone, *gone):  # twice is once
        line.discard(item)
    assert len(line) == 4
    assert "".join(line.pop().caller or "" for _ in kept) == "abab"
    assert not line._queues
    assert not line._virtual_start
    line.discard(kept[0])


def test_those_who_are_gone_are_forgotten() -> None:
    line: FairQueue[Item] = FairQueue()
    for i in range(5000):
        line.append(Item(f"k{i}"))
        line.pop()
    assert not line._virtual_start
    line.append(Item("always", rows=3))
    for i in range(5000):
        line.append(Item("always", rows=3))
        line.append(Item(f"k{i}"))
        line.pop()
        line.pop()
    assert len(line._virtual_start) < 1000


def test_a_caller_alone_may_have_half_of_the_queue_and_who_comes_new_finds_room() -> None:
    door = AdmissionControl("m", RecordingObserver(), 100)

    def fill(who: str) -> int:
        current_caller.set(who)
        own = 0
        while True:
            try:
                door.admit(1, 0.0)
            except Overloaded as refused:
                told = refused.message
                break
            door.add(who, 1)
            own += 1
        assert f"{own} of them of {who}" in told
        return own

    async def check() -> None:
        assert [fill("a"), fill("b"), fill("c"), fill("d")] == [50, 25, 13, 6]
        door.remove("a", 50)
        assert door.waiting == 44
        current_caller.set(None)
        door.admit(100 - door.waiting, 0.0)
        with pytest.raises(Overloaded):
            door.admit(101 - door.waiting, 0.0)

    asyncio.run(check())


def shares(ask_with: Any, answers: int = 600) -> Counter[str]:
    """What a flood of 100 callers and 16 callers of another key get, of so many answers.

    Each asks again when it is answered; who is refused, when somebody is.
    """

    async def run() -> Counter[str]:
        done: Counter[str] = Counter()
        answered = asyncio.Condition()
        lane = Executor("test")
        ask = ask_with(lane)

        async def one(who: str) -> None:
            current_caller.set(who)
            while done.total() < answers:
                try:
                    await ask()
                except Overloaded:
                    async with answered:
                        await answered.wait()
                    continue
                async with answered:
                    if done.total() < answers:
                        done[who] += 1
                    answered.notify_all()

        await asyncio.gather(*(one(who) for who, callers in (("heavy", 100), ("light", 16)) for _ in range(callers)))
        lane.close()
        return done

    return asyncio.run(run())


def test_of_one_shot_answers_each_key_gets_its_half_within_a_tenth() -> None:
    def ask_with(lane: Executor) -> Any:
        engine = Batcher(
            "m", list, lambda item: 1, one_millisecond, lane, RecordingObserver(), batch_rows=8, queue_rows=64
        )
        return lambda: engine.submit([1])

    found = shares(ask_with)
    assert abs(found["light"] / found.total() - 0.5) <= 0.05, found


def test_of_what_is_read_on_threads_each_key_gets_its_half_within_a_tenth() -> None:
    lanes = list[Executor]()

    def ask_with(_: Executor) -> Any:
        lanes.append(Executor("parse", max_waiting=64))
        return lambda: lanes[0].run(int)

    found = shares(ask_with)
    lanes[0].close()
    assert abs(found["light"] / found.total() - 0.5) <= 0.05, found


@dataclass
class Countdown:
    remaining: int

    @property
    def finished(self) -> bool:
        return self.remaining <= 0

    @property
    def generated(self) -> int:
        return 5 - self.remaining


def test_of_texts_each_key_gets_its_half_within_a_tenth() -> None:
    def step(texts: Sequence[Countdown]) -> None:
        for text in texts:
            text.remaining -= 1

    def ask_with(lane: Executor) -> Any:
        engine = TextEngine(
            "m", step, lambda rows: 0.001, lane, RecordingObserver(), max_running=8, queue_rows=64, normal_budget=0
        )
        return lambda: engine.submit([Countdown(5)])

    found = shares(ask_with)
    assert abs(found["light"] / found.total() - 0.5) <= 0.05, found


def test_in_a_flood_another_key_is_let_in(serve: Serve, tmp_path: Path, held: HeldGenerator) -> None:
    heavy, light = key_file.add(tmp_path / "keys", "heavy"), key_file.add(tmp_path / "keys", "light")
    with serve(keys_file=tmp_path / "keys", queue_rows=16, batch_rows=4, inline_seconds=0) as client:
        url = f"{client.base_url}/v1/images/sample"

        def ask(key: str) -> httpx.Response:
            return httpx.post(url, json={"count": 1}, headers={"x-api-key": key}, timeout=60)

        with ThreadPoolExecutor(40) as callers:
            held.armed.set()
            first = callers.submit(ask, heavy)
            assert held.entered.wait(30)
            flood = [callers.submit(ask, heavy) for _ in range(30)]
            wait_until(lambda: sum(answer.done() for answer in flood) == 22)  # the surplus: 8 of 16 rows are its own
            late = callers.submit(ask, light)
            wait_until(lambda: _waits(client, light, 9))
            held.release.set()
            assert late.result().status_code == 200
            assert first.result().status_code == 200
            assert sorted(answer.result().status_code for answer in flood) == [200] * 8 + [429] * 22


def _waits(client: httpx.Client, key: str, rows: int) -> bool:
    """Whether so many rows wait: one more of the same caller is told how many there are."""
    answer = client.post("/v1/images/sample", json={"count": 16}, headers={"x-api-key": key})
    return f"{rows} of 16 rows wait" in answer.json()["error"]["message"]
