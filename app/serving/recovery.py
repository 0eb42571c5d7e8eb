"""Detect networks that fail permanently, for example after a CUDA error that lasts until the process ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from app.engine.circuit_breaker import CircuitBreaker
from app.engine.executor import Executor
from app.errors import is_out_of_memory
from app.serving.model import Model

log = logging.getLogger("quartet")

MAX_FAILED_RECOVERIES = 3


class RecoveryMonitor:
    """Sets ``failure`` when a network is broken, so that the process must be restarted.

    A network that has failed to recover ``MAX_FAILED_RECOVERIES`` times is run on a dummy input. The network could
    compute this input when the version was loaded. If it fails on the input now, the network is broken. Otherwise, only
    the inputs of clients make the network fail.
    """

    def __init__(self, models: Callable[[], Sequence[Model]], executor: Executor, check_seconds: float) -> None:
        self.failure = ""  # why this process must be restarted; empty if no restart is needed
        self._models = models
        self._executor = executor
        self._check_seconds = check_seconds

    async def watch(self) -> None:
        """Check all networks at intervals until a network is broken."""
        while not self.failure:
            await asyncio.sleep(self._check_seconds)
            for model in self._models():
                for engine in model.engines:
                    await self._check(model, engine.circuit_breaker)

    async def _check(self, model: Model, breaker: CircuitBreaker) -> None:
        if breaker.failed_recoveries < MAX_FAILED_RECOVERIES:
            return
        try:
            await self._executor.run(model.predictor.dummy_run, 1)
        except Exception as error:
            if is_out_of_memory(error):  # memory may become free later, and a new process would need the same amount
                breaker.failed_recoveries = 0
                return
            self.failure = (
                f"{model.id} fails on every input, failed {breaker.failed_recoveries} recoveries, "
                f"and fails on a dummy input ({type(error).__name__}: {error}): the process must be restarted"
            )
            log.critical("%s", self.failure)
        else:
            breaker.failed_recoveries = 0
