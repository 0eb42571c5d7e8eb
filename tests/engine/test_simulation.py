"""Simulation of batchers and text engines that share a compute thread, with random requests, faults and shutdown.

Each episode runs on a virtual clock. ``SIMULATION_SEED`` repeats a run, and ``SIMULATION_EPISODES`` lengthens it.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from support.engine import RecordingObserver
from support.engine_oracle import LARGEST_ROWS, NETWORK_ERROR, BatchOracle, Job, Oracle, Request, Rows, Text, TextOracle
from support.virtual_loop import VirtualLoop, VirtualPool

from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.engine.fair_queue import current_caller
from app.engine.text_engine import TextEngine
from app.errors import BadValue, NotReady, Overloaded
from app.limits import Limits

EPISODES = int(os.environ.get("SIMULATION_EPISODES", "40"))
REQUESTS = 60  # in each episode
FAULTS = (ValueError, BadValue, MemoryError)


class Episode:
    """Two batchers and a text engine on one compute thread, and the requests to them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.loop = rng, VirtualLoop()
        self.keys = rng.choice([[None], [None], ["a", "b", "c"]])
        self.mean = mean = rng.choice([0.001, 0.1, 1.0])  # seconds of a computation
        self.limits = replace(
            Limits(),
            part_rows=rng.choice([2, 3, 100]),
            preempt_after_seconds=rng.choice([2, 20]) * mean,
            preempt_check_seconds=rng.choice([0, mean]),
            round_seconds=rng.choice([0, mean / 5]),
            max_round_seconds=rng.choice([0, mean * 5]),
            breaker_reset_seconds=mean * 10,
        )
        self.pool = VirtualPool(self.loop, self.seconds)
        self.executor = Executor(
            "test", inline_seconds=rng.choice([0.0, 0.0, 1.0]), clock=self.loop.time, pool=self.pool
        )
        self.oracles: list[Oracle] = [self.batch_oracle(), self.batch_oracle(), self.text_oracle()]
        self.loop.selector.before_jump = self.check
        self.loop.on_advance = self.note_races
        self.tasks: list[asyncio.Task[Any]] = []
        self.errors: list[Any] = []
        self.violations: list[Exception] = []

    def check(self) -> None:
        for oracle in self.oracles:
            oracle.check()

    def note_races(self, before: float, after: float) -> None:
        for oracle in self.oracles:
            oracle.note_races(before, after)

    def checked(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Keep errors of the oracle, which an engine would take for errors of the network."""

        def checked(members: Any) -> Any:
            try:
                return function(members)
            except Exception as error:
                if str(error) != NETWORK_ERROR:
                    self.violations.append(error)
                raise

        return checked

    def seconds(self) -> float:
        return self.rng.expovariate(1 / self.mean)

    def batch_oracle(self) -> Oracle:
        rng, splits = self.rng, self.rng.random() < 0.7
        oracle = BatchOracle(
            self.loop, self.limits, rng.choice([1, 4, 8]), rng.choice([6, 12, 40]),
            memory_rows=rng.choice([3, 100]), splits=splits,
        )  # fmt: skip

        @self.checked
        def predict(batch: Any) -> Any:
            return oracle.predict(batch, 0.0 if self.pool.busy else self.seconds() * 0.2)

        @self.checked
        def expected_seconds(batch: Any) -> float:
            oracle.choose(batch)
            return 0.01

        oracle.engine = Batcher(
            "m", predict, oracle.rows, expected_seconds, self.executor, RecordingObserver(), oracle.max_rows,
            oracle.queue_rows, oracle if splits else None, self.limits, self.loop.time,
        )  # fmt: skip
        return oracle

    def text_oracle(self) -> Oracle:
        rng = self.rng
        oracle = TextOracle(self.loop, self.limits, rng.choice([1, 3]), rng.choice([4, 10]))

        @self.checked
        def step(texts: Any) -> None:
            oracle.step(texts, self.mean / 10)

        @self.checked
        def expected_seconds(texts: Any) -> float:
            oracle.choose(texts)
            return 0.01

        oracle.engine = TextEngine(
            "t", step, expected_seconds, self.executor, RecordingObserver(),
            oracle.max_rows, oracle.queue_rows, self.limits, self.loop.time,
        )  # fmt: skip
        return oracle

    def jobs(self, oracle: Oracle, request: Request) -> list[Any]:
        rng = self.rng
        fault = rng.choice(FAULTS) if rng.random() < 0.15 else None
        if isinstance(oracle, TextOracle):
            lengths = [rng.choice([1, 3, 10, 60]) for _ in range(rng.choice([1, 1, 2]))]
            return [Text(request, length, rng.randint(0, length - 1), fault, length // 2) for length in lengths]
        sizes = [rng.choice([1, 1, 1, 2, 5, LARGEST_ROWS]) for _ in range(rng.choice([1, 1, 2, 4]))]
        faulty = rng.randrange(len(sizes))
        return [
            Job(request, size, fault if number == faulty else None, rng.randrange(size))
            for number, size in enumerate(sizes)
        ]

    async def send(self, oracle: Oracle) -> None:
        """Send a request, and compare its answer with the oracle's."""
        while oracle.racing:  # noqa: ASYNC110
            await asyncio.sleep(1e-6)
        rng, now = self.rng, self.loop.time()
        deadline = now + self.seconds() * 8 if rng.random() < 0.2 else math.inf
        cancelled_at = now + self.seconds() * 4 if rng.random() < 0.15 else math.inf
        request = Request(rng.choice(self.keys), deadline, cancelled_at)
        request.jobs = self.jobs(oracle, request)
        request.streamed = isinstance(oracle, TextOracle) and rng.random() < 0.5
        current_caller.set(request.caller)
        if cancelled_at < math.inf:
            self.loop.call_at(cancelled_at, asyncio.current_task().cancel)  # type: ignore[union-attr]
        expected = oracle.rejection(request)
        try:
            async with asyncio.timeout_at(deadline if deadline < math.inf else None):
                outcome = await self.answer(oracle, request)
        except (Overloaded, NotReady, BadValue, Exception, asyncio.CancelledError) as error:
            outcome = error
        if expected is None:
            oracle.end(request, outcome)
        elif isinstance(expected, set):
            assert isinstance(outcome, Overloaded), outcome
            assert outcome.retry_after in expected or not oracle.rate_known
            oracle.counts["retry later"] += outcome.retry_after > 1
        else:
            assert type(outcome) is expected

    async def answer(self, oracle: Oracle, request: Request) -> Any:
        engine = oracle.engine
        if isinstance(oracle, BatchOracle):
            return await engine.submit([Rows(job, 0, job.rows) for job in request.jobs])
        if not request.streamed:
            return [text.length for text in await engine.submit(request.jobs)]
        async for _ in engine.stream(request.jobs):
            seen = [text.generated for text in request.jobs]
            assert all(new >= old for new, old in zip(seen, request.seen, strict=False))
            request.seen = seen
        return [text.length for text in request.jobs]

    async def close(self, oracle: Oracle) -> None:
        oracle.closed, seconds = True, self.seconds() * 10
        oracle.stops_at = self.loop.time() + seconds
        await oracle.engine.close(seconds)
        answered = all(request.answer is not None for request in oracle.requests)
        assert answered or self.loop.time() >= oracle.stops_at, "shutdown did not finish the accepted requests"
        oracle.stops_at = min(oracle.stops_at, self.loop.time())

    async def run(self) -> None:
        rng, interval = self.rng, self.mean * self.rng.choice([0.2, 1.0, 3.0])
        closing = rng.choice([None, rng.randrange(REQUESTS)])
        for number in range(REQUESTS):
            await asyncio.sleep(rng.choice([0, rng.expovariate(1 / interval)]))
            self.tasks.append(self.loop.create_task(self.send(rng.choice(self.oracles))))
            if rng.random() < 0.03:
                rng.choice(self.oracles).broken_until = self.loop.time() + 5 * self.mean
            if number == closing:
                self.tasks.append(self.loop.create_task(self.close(rng.choice(self.oracles))))
        await asyncio.gather(*self.tasks)
        while self.pool.busy:  # noqa: ASYNC110  # the network of a stopped engine may still compute
            await asyncio.sleep(1)

    def play(self) -> Counter[str]:
        """Run the episode, and return how often each event happened."""
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        try:
            self.loop.run_until_complete(self.run())
            for _ in range(9):
                self.loop.run_until_complete(asyncio.sleep(0))
            assert [oracle.engine.row_counts for oracle in self.oracles] == [(0, 0)] * 3
            assert not asyncio.all_tasks(self.loop)
            assert not self.errors
            assert not self.violations
        except Exception as error:
            raise (self.violations or [error])[0] from None
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.selector.before_jump = lambda: None
            self.loop.run_until_complete(asyncio.sleep(0))
            self.loop.close()
        return sum((Counter(oracle.counts) for oracle in self.oracles), Counter[str]())


def test_the_engines_keep_their_promises_in_any_order_of_events() -> None:
    seed = int(os.environ.get("SIMULATION_SEED", random.SystemRandom().randrange(10**6)))
    counts = Counter[str]()
    for episode in range(EPISODES):
        try:
            counts += Episode(random.Random(f"{seed} {episode}")).play()
        except BaseException as error:
            error.add_note(f"SIMULATION_SEED={seed}, episode {episode}")
            raise
    print(f"SIMULATION_SEED={seed}", dict(counts))
    assert counts["request"] >= 1000
    assert min(counts.values()) >= 5, counts
