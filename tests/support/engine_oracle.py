"""What the requests to an engine must be answered, and what an engine must compute and when.

An oracle sees the calls of the network and the requests. From these, it knows the answer to each request, and checks
the rules of batching, fairness and admission at each call and before each advance of the clock.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from app.errors import BadValue, InferenceFailed, NotReady, OutOfMemory
from app.limits import Limits
from support.virtual_loop import VirtualLoop

LARGEST_ROWS = 12  # of an item
LEAVING_SECONDS = 0.001  # between the choice of texts and the call of the network
NETWORK_ERROR = "the network fails"
ANSWERS = {ValueError: InferenceFailed, RuntimeError: InferenceFailed, MemoryError: OutOfMemory, BadValue: BadValue}


@dataclass(eq=False)
class Request:
    """A request of ``caller``. It leaves at ``deadline`` or ``cancelled_at`` if it has no answer by then."""

    caller: str | None
    deadline: float
    cancelled_at: float
    jobs: list[Any] = field(default_factory=list)
    ended_at: float = math.inf
    seen: list[int] = field(default_factory=list)  # for a stream: the generated characters that its consumer knows
    streamed: bool = False
    raced: bool = False  # whether it left during a computation on the event loop, so that its answer may come first

    @property
    def leaves_at(self) -> float:
        return min(self.deadline, self.cancelled_at)

    @property
    def answer(self) -> Any:
        """The results, the class of the first error, or None while jobs are not computed.

        The results of a request are awaited in their order. A stream ends at any error.
        """
        outcomes = [job.outcome for job in self.jobs]
        if self.streamed:
            outcomes.sort(key=lambda outcome: not isinstance(outcome, type))
        for outcome in outcomes:
            if outcome is None or isinstance(outcome, type):
                return outcome
        return outcomes


@dataclass(eq=False)
class Job:
    """One item of a request to a batcher. ``fault`` is the error that the network raises at row ``fault_row``."""

    request: Request
    rows: int
    fault: type[Exception] | None = None
    fault_row: int = 0
    taken: int = 0  # rows that have been put into a batch
    computed: int = 0
    outcome: Any = None  # list of results, or class of the error


@dataclass(eq=False)
class Rows:
    """Rows of a job: an item of the batcher, or a part of one."""

    job: Job
    start: int
    stop: int


@dataclass(eq=False)
class Text:
    """A text of ``length`` steps, which ``fault`` ends at step ``fault_step``. The prompt takes ``prompt`` steps."""

    request: Request
    length: int
    prompt: int = 0
    fault: type[Exception] | None = None
    fault_step: int = 0
    steps: int = 0
    outcome: Any = None
    started_at: float = math.inf
    joined_at: float = math.inf
    rows = 1

    @property
    def finished(self) -> bool:
        return self.steps == self.length

    @property
    def generated(self) -> int:
        return max(self.steps - self.prompt, 0)

    @property
    def remaining(self) -> int:
        return self.length - self.steps


class Oracle:
    """The common part of both oracles."""

    isolating = False  # whether the members of a failed batch run singly, and are answered together

    def __init__(self, loop: VirtualLoop, limits: Limits, max_rows: int, queue_rows: int) -> None:
        self.loop, self.limits, self.max_rows, self.queue_rows = loop, limits, max_rows, queue_rows
        self.engine: Any = None
        self.requests: list[Request] = []  # accepted and not ended
        self.waiting: list[Any] = []  # jobs, in the order of the queue of each caller
        self.flight: Sequence[Any] = ()  # members of the computation that has been chosen and has not ended
        self.flight_at = 0.0
        self.alone: list[Any] = []  # members of a failed computation that must be computed alone
        self.broken_until = 0.0
        self.closed, self.stops_at, self.stop_raced = False, math.inf, False
        self.failures, self.failed_at, self.breaker_known = 0, 0.0, True
        self.racing = False  # whether a request that raced may still be in the queue
        self.worked = False  # whether the last computation had no error
        self.seconds_per_row, self.rate_known = 0.0, True
        self.counts = dict.fromkeys(
            ("request", "call", "failed call", "rejection", "retry later", "large item", "preemption"), 0
        )

    # Requests

    def rejection(self, request: Request) -> type[Exception] | set[int] | None:
        """Return the error with which a request must be rejected now; for Overloaded, its ``retry_after``."""
        self.counts["request"] += 1
        rows = sum(job.rows for job in request.jobs)
        if self.closed:
            return NotReady
        queued = self.queued(self.waiting)
        own = 0 if request.caller is None else self.queued(
            [job for job in self.waiting if job.request.caller == request.caller]
        )  # fmt: skip
        if queued and queued + own + rows > self.queue_rows:
            self.counts["rejection"] += 1
            seconds = (queued + rows) * self.seconds_per_row
            rounded = (math.ceil(seconds + error) for error in (-1e-9, 1e-9))  # sums of times have small errors
            return {min(max(each, 1), self.limits.max_retry_after_seconds) for each in rounded}
        self.requests.append(request)
        self.waiting += request.jobs
        return None

    def end(self, request: Request, outcome: Any) -> None:
        """Check the answer to an accepted request."""
        now, answer = self.loop.time(), request.answer
        request.ended_at = now
        self.requests.remove(request)
        self.waiting = [job for job in self.waiting if job.request is not request]
        if isinstance(outcome, TimeoutError):
            assert now >= request.deadline
            assert answer is None or request.raced or self.isolating
        elif isinstance(outcome, asyncio.CancelledError):
            assert now >= request.cancelled_at
            assert answer is None or request.raced or self.isolating
        elif isinstance(outcome, NotReady):
            assert now >= self.stops_at
            assert answer is None or self.stop_raced or self.holds_answers()
        elif isinstance(outcome, Exception):
            assert type(outcome) is answer, f"{outcome!r} instead of {answer}"
        else:
            assert outcome == answer, f"{outcome} instead of {answer}"

    def present(self, job: Any) -> bool:
        """Return whether a job must still be computed."""
        request = job.request
        if job.outcome is not None or request.answer is not None:
            return False
        return request in self.requests and request.leaves_at > self.loop.time()

    def must_be_present(self, job: Any) -> None:
        assert job.outcome is None, "a computed item is computed again"
        assert job.request.ended_at >= self.loop.time(), "a cancelled item is computed"

    # Computations

    def choose(self, members: Sequence[Any]) -> None:
        """Check the members of a computation that the engine has just chosen."""
        self.note_success()
        assert not self.flight
        assert self.loop.time() <= self.stops_at or self.stop_raced, "a stopped engine computes"
        for member in members:
            self.must_be_present(self.job(member))
        retried = members[0] in self.alone
        at = self.alone.index(members[0]) if retried else len(self.alone)
        skipped, self.alone = self.alone[:at], self.alone[at + 1 :]
        assert not any(self.present(self.job(member)) for member in skipped), "a member is not computed alone"
        if not retried:
            self.choose_new(members)
        else:
            assert len(members) == 1, "after a failed computation, each member is computed alone"
        self.flight, self.flight_at = members, self.loop.time()

    def note_success(self) -> None:
        """Reset the circuit breaker after a computation without an error, such as a round of texts."""
        if self.worked:
            self.failures, self.breaker_known, self.worked = 0, True, False

    def fault(self, members: Sequence[Any]) -> type[Exception] | None:
        """Return the error that the network raises for these members."""
        raise NotImplementedError

    def job(self, member: Any) -> Any:
        raise NotImplementedError

    def queued(self, jobs: Sequence[Any]) -> int:
        raise NotImplementedError

    def choose_new(self, members: Sequence[Any]) -> None:
        raise NotImplementedError

    def succeed(self, members: Sequence[Any]) -> None:
        raise NotImplementedError

    def compute(self, members: Sequence[Any], seconds: float) -> None:
        """Advance the clock, and raise the error of the network, if there is one."""
        assert list(members) == list(self.flight)
        self.loop.advance(seconds)
        self.counts["call"] += 1
        raced = any(self.job(member).request.raced for member in members)
        fault = RuntimeError if self.loop.time() < self.broken_until else self.fault(members)
        self.worked = fault is None
        if fault is None:
            self.rate_known &= not raced
            self.succeed(members)
            return
        self.counts["failed call"] += 1
        self.flight = ()
        if len(members) > 1:
            self.alone = list(members)
        else:
            self.fail(self.job(members[0]), ANSWERS[fault])
            self.breaker_known &= not raced
        raise fault(NETWORK_ERROR)

    def fail(self, job: Any, answer: type[Exception]) -> None:
        now = self.loop.time()
        if job.request in self.requests and now < self.stops_at and answer is InferenceFailed:
            self.failures, self.failed_at = self.failures + 1, now
        job.outcome = answer
        self.waiting = [other for other in self.waiting if other is not job]

    def measure(self, rows: int, seconds: float) -> None:
        value = seconds / rows
        self.seconds_per_row = 0.8 * self.seconds_per_row + 0.2 * value if self.seconds_per_row else value

    # Time

    def note_races(self, started_at: float, ended_at: float) -> None:
        self.stop_raced |= started_at < self.stops_at <= ended_at
        for request in self.requests:
            if started_at < request.leaves_at <= ended_at:
                request.raced = self.racing = True

    def check(self) -> None:
        """Check the engine when all callbacks have run, before the clock advances."""
        now, self.racing = self.loop.time(), False
        self.note_success()
        assert self.engine.row_counts[0] == self.queued(self.waiting)
        assert self.engine.row_counts[1] <= self.max_rows or len(self.flight) == 1
        assert self.flight or not self.requests, "a request waits, but nothing is computed"
        for request in self.requests:
            assert request.leaves_at > now, "a deadline or a cancellation is ignored"
            assert self.stops_at > now, "a stopped engine leaves a request without an answer"
            assert request.answer is None or self.holds_answers(), "an answer is late"
        if self.breaker_known:
            late = now - self.failed_at >= self.limits.breaker_reset_seconds
            is_open = self.failures >= self.limits.breaker_failures and not late
            assert self.engine.circuit_breaker.is_open() == is_open

    def holds_answers(self) -> bool:
        return False


class BatchOracle(Oracle):
    """The oracle of a batcher, whose result for each row is the number of the row."""

    def __init__(self, *args: Any, memory_rows: int, splits: bool) -> None:
        super().__init__(*args)
        self.memory_rows = memory_rows  # a batch of more rows does not fit into memory
        self.part_rows = min(self.limits.part_rows, self.max_rows) if splits else 10**9
        self.served: dict[tuple[Any, Any], list[int]] = {}  # of two callers: difference of their rows, least, largest

    def job(self, member: Rows) -> Job:
        return member.job

    def queued(self, jobs: Sequence[Job]) -> int:
        return sum(job.rows - job.taken for job in jobs)

    def rows(self, item: Rows) -> int:
        return item.stop - item.start

    def split(self, item: Rows, rows: int) -> list[Rows]:
        self.counts["large item"] += 1
        return [Rows(item.job, at, min(at + rows, item.stop)) for at in range(item.start, item.stop, rows)]

    def join(self, results: Sequence[list[int]]) -> list[int]:
        return [number for result in results for number in result]

    def choose_new(self, batch: Sequence[Rows]) -> None:
        total, jobs, before = 0, dict.fromkeys(rows.job for rows in batch), self.heads()
        for rows in batch:
            job, count = rows.job, rows.stop - rows.start
            assert self.heads().get(job.request.caller) is job or not self.present(job), (
                "each caller's items are computed in order"
            )
            assert rows.start == job.taken, "the parts of an item are computed in order"
            assert count == min(self.part_rows, job.rows - job.taken)
            self.waiting.remove(job)
            job.taken, total = rows.stop, total + count
            if job.taken < job.rows:
                self.waiting.append(job)
            self.check_shares(job.request.caller, count, before)
        assert total <= self.max_rows or len(batch) == 1
        assert len(batch) == len(jobs) or len(jobs) == 1, "only an item that is alone has several parts in a batch"
        sizes = {job: min(self.part_rows, job.rows - job.taken) for job in self.heads().values()}
        full = any(total + size > self.max_rows or (job in jobs and len(jobs) > 1) for job, size in sizes.items())
        assert full or not sizes or self.racing, "a batch is not full"

    def end(self, request: Request, outcome: Any) -> None:
        super().end(request, outcome)
        self.forget_idle()

    def fail(self, job: Any, answer: type[Exception]) -> None:
        super().fail(job, answer)
        self.forget_idle()

    def forget_idle(self) -> None:
        """Forget the shares of callers without waiting jobs."""
        callers = set(self.heads())
        self.served = {pair: rows for pair, rows in self.served.items() if set(pair) <= callers}

    def heads(self) -> dict[str | None, Job]:
        """Return the first waiting job of each caller."""
        return {job.request.caller: job for job in reversed(self.waiting) if self.present(job)}

    def check_shares(self, caller: str | None, count: int, before: dict[str | None, Job]) -> None:
        """Check that two callers whose jobs wait all the time get the same number of rows, up to some items."""
        waiting = self.heads()
        for pair in combinations(sorted(before, key=str), 2):
            if not set(pair) <= set(waiting):
                self.served.pop(pair, None)
            elif caller in pair:
                difference, least, largest = self.served.get(pair, (0, 0, 0))
                difference += count if caller == pair[0] else -count
                least, largest = min(least, difference), max(largest, difference)
                self.served[pair] = [difference, least, largest]
                assert largest - least <= 3 * min(self.part_rows, LARGEST_ROWS), "a caller gets more than its share"

    def fault(self, batch: Sequence[Rows]) -> type[Exception] | None:
        if len(batch) > 1 and sum(rows.stop - rows.start for rows in batch) > self.memory_rows:
            return MemoryError
        faults = [rows.job.fault for rows in batch if rows.start <= rows.job.fault_row < rows.stop and rows.job.fault]
        return faults[0] if faults else None

    def predict(self, batch: Sequence[Rows], seconds: float) -> list[list[int]]:
        self.compute(batch, seconds)
        return [list(range(rows.start, rows.stop)) for rows in batch]

    def succeed(self, batch: Sequence[Rows]) -> None:
        self.flight = ()
        self.measure(sum(rows.stop - rows.start for rows in batch), self.loop.time() - self.flight_at)
        for rows in batch:
            rows.job.computed = rows.stop
            if rows.job.computed == rows.job.rows:
                rows.job.outcome = list(range(rows.job.rows))


class TextOracle(Oracle):
    """The oracle of a text engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.running: list[Text] = []
        self.isolating = False

    def job(self, member: Text) -> Text:
        return member

    def queued(self, jobs: Sequence[Text]) -> int:
        return len(jobs)

    def choose_new(self, texts: Sequence[Text]) -> None:
        now, self.isolating = self.loop.time(), False
        preempted = [text for text in self.running if text not in texts and self.present(text)]
        joined = [text for text in texts if text not in self.running]
        assert len(set(texts)) == len(texts) <= self.max_rows
        left = [text for text in self.waiting if text not in joined and self.present(text)]
        assert len(texts) == self.max_rows or not left, "a slot is free while a text waits"
        for text in preempted:
            self.counts["preemption"] += 1
            assert len(texts) == self.max_rows
            assert now - text.joined_at > self.limits.preempt_after_seconds
            assert any(
                text.request.caller != other.request.caller
                or text.remaining > self.limits.preempt_ratio * other.remaining
                for other in joined
            ), "a text makes room for a text of another caller, or for a much shorter one"
        # A text may also have been preempted just before its request left.
        replaced = preempted or any(
            text.outcome is None and text.request.leaves_at > now - LEAVING_SECONDS
            for text in self.running
            if text not in texts and now - text.joined_at > self.limits.preempt_after_seconds
        )
        for text in joined:
            earlier = [other for other in self.waiting[: self.waiting.index(text)] if other in left]
            assert all(
                replaced and text.remaining < other.remaining
                for other in earlier
                if other.request.caller == text.request.caller and other.started_at == math.inf
            ), "texts of a caller start in order"
            text.joined_at, text.started_at = now, min(text.started_at, now)
        self.waiting, self.running = left + preempted, list(texts)

    def fault(self, texts: Sequence[Text]) -> type[Exception] | None:
        faults = [text.fault for text in texts if text.fault and text.steps == text.fault_step]
        return faults[0] if faults else None

    def step(self, texts: Sequence[Text], seconds: float) -> None:
        self.flight = self.flight or texts  # a further step of a round
        self.isolating |= len(texts) > 1 and bool(self.fault(texts))
        self.compute(texts, seconds)

    def compute(self, members: Sequence[Any], seconds: float) -> None:
        try:
            super().compute(members, seconds)
        except Exception:
            self.isolating |= len(members) > 1
            raise

    def succeed(self, texts: Sequence[Text]) -> None:
        self.flight = ()
        for text in texts:
            text.steps += 1
            if text.finished:
                text.outcome = text.length
                self.rate_known &= not self.isolating  # the time of the whole round counts
                if text.request in self.requests:
                    self.measure(self.max_rows, self.loop.time() - text.started_at)

    def holds_answers(self) -> bool:
        """While texts are computed alone after a failure, finished texts wait for the end of the round."""
        return self.isolating and bool(self.flight)

    def check(self) -> None:
        super().check()
        if not (self.isolating and self.flight):
            for request in self.requests:
                if request.streamed and any(text.generated for text in request.jobs):
                    assert request.seen == [text.generated for text in request.jobs], "a consumer was not notified"
