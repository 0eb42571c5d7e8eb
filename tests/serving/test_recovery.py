"""Recovery of failing networks, and the failure of the process if a network cannot recover."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.engine.circuit_breaker import CircuitBreaker
from app.engine.executor import Executor
from app.serving import recovery
from app.serving.recovery import MAX_FAILED_RECOVERIES, RecoveryMonitor

pytestmark = pytest.mark.anyio


class Network:
    """A loaded model whose network may fail. Its explainer is the second of its engines."""

    id = "m@1"

    def __init__(
        self, failed_recoveries: int, failing: bool, error: Exception | None = None, failing_engine: int = 0
    ) -> None:
        self.predictor = self
        self.engines = [SimpleNamespace(circuit_breaker=CircuitBreaker()) for _ in range(2)]
        self.breakers = [engine.circuit_breaker for engine in self.engines]
        self.breakers[failing_engine].failed_recoveries = failed_recoveries
        self.failing, self.error = failing, error or RuntimeError("the device is lost")
        self.rows: list[int] = []

    def dummy_run(self, rows: int) -> None:
        self.rows.append(rows)
        if self.failing:
            raise self.error


async def watch(monkeypatch: pytest.MonkeyPatch, *networks: Network) -> tuple[str, list[float]]:
    """Return the failure message after at most three checks, and the intervals between the checks."""
    models: Any = networks
    executor, pauses = Executor("test"), list[float]()
    monitor = RecoveryMonitor(lambda: models, executor)

    async def sleep(seconds: float) -> None:
        if len(pauses) == 3:
            raise StopAsyncIteration
        pauses.append(seconds)

    monkeypatch.setattr(recovery, "asyncio", SimpleNamespace(sleep=sleep))
    try:
        await monitor.watch()
    except RuntimeError:  # caused by ``StopAsyncIteration``
        pass
    except StopAsyncIteration:
        pass
    executor.close()
    return monitor.failure, pauses


async def test_a_network_that_also_fails_on_a_dummy_input_needs_a_restart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Network(MAX_FAILED_RECOVERIES, failing=True)
    failure, pauses = await watch(monkeypatch, Network(0, failing=False), broken)
    assert failure == (
        "m@1 fails on every input, failed 3 recoveries, "
        "and fails on a dummy input (RuntimeError: the device is lost): the process must be restarted"
    )
    assert (broken.rows, pauses) == ([1], [1.0])  # the watch ends
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("CRITICAL", failure)]


async def test_a_network_that_computes_a_dummy_input_failed_on_its_callers_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for engine in range(2):
        working = Network(MAX_FAILED_RECOVERIES, failing=False, failing_engine=engine)
        with monkeypatch.context() as patch:
            failure, pauses = await watch(patch, working)
        assert (failure, pauses) == ("", [1.0] * 3)
        assert working.rows == [1]  # the network is checked again only after further failed recoveries
        assert [breaker.failed_recoveries for breaker in working.breakers] == [0, 0]


async def test_memory_may_be_free_later_so_its_lack_needs_no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Network(MAX_FAILED_RECOVERIES, failing=True, error=torch.OutOfMemoryError("CUDA out of memory"))
    assert (await watch(monkeypatch, full))[0] == ""
    assert (full.rows, full.breakers[0].failed_recoveries) == ([1], 0)


async def test_a_network_with_few_failed_recoveries_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    recovering = Network(MAX_FAILED_RECOVERIES - 1, failing=True)
    assert (await watch(monkeypatch, recovering))[0] == ""
    assert recovering.rows == []
