"""Model-based test of the versions in memory.

Rollouts, damaged files, loading, eviction, requests and shutdown happen in any order.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from support.networks import TINY, tiny_card
from support.state_machines.virtual_time import VirtualMachine, counted, manual_executor, run_machine

from app.engine import circuit_breaker, executor
from app.engine.observer import VersionKey
from app.errors import NotReady, QuartetError, RetiredModel, TimedOut, TooManyVersions, UnknownModel, UnloadedModel
from app.serving import models, store_watcher
from app.serving.model import LoadFailure, Model
from app.serving.model_cache import VersionState
from app.serving.reconcile import IN_USE_SECONDS, desired_versions
from app.serving.store_snapshot import StoreSnapshot, VersionFiles
from app.settings import Settings
from app.store import Card
from app.store.disk_thread import DiskThread
from app.store.rollout import Canary, Rollout
from app.tasks import GENERATE_IMAGES

BYTES, MAX_ON_DEMAND = 10, 2
ERRORS = (NotReady, RetiredModel, TimedOut, TooManyVersions, UnknownModel, UnloadedModel)


@cache
def card(name: str, version: int) -> Card:
    _, kind, sizes, fields = TINY["tiny-gan"]
    content = tiny_card(name, "sample", kind, sizes, fields)
    return Card.model_validate({**content, "version": version, "weights_sha256": "0" * 64})


class StubEngine:
    """A stub of an engine to which no requests are sent."""

    load = (0, 0)

    def __init__(self) -> None:
        self.circuit_breaker = circuit_breaker.CircuitBreaker()

    async def close(self, seconds: float) -> None: ...


class StubObservers:
    """A stub of the observer factory. It is also the observer of every version."""

    def for_version(self, model: str, version: int) -> StubObservers:
        return self

    def on_memory(self, size: int) -> None: ...


async def run_at_once(self: DiskThread, function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class LifecycleMachine(VirtualMachine):
    """A service with two models: a, the default, and b. The store is in memory. Rules decide when loading ends."""

    modules = (models, store_watcher, circuit_breaker, executor)

    @initialize(limit=st.sampled_from([0, 0, 65]))
    def create(self, limit: int) -> None:
        logging.disable(logging.CRITICAL)
        self.rollouts = {"a": Rollout(), "b": Rollout()}
        self.stored = {"a": {1, 2, 3, 4, 5}, "b": {1, 2, 3}}
        self.reloading: set[str] = set()  # models that were unloaded and are not in memory again
        self.broken: set[VersionKey] = set()
        self.repaired: set[VersionKey] = set()
        self.patch.setattr(DiskThread, "run", run_at_once)
        self.patch.setattr(StoreSnapshot, "scan", self.scan)
        self.patch.setattr(store_watcher, "is_unloaded", lambda _, name: self.rollouts[name].unloaded)
        self.folder = tempfile.TemporaryDirectory()
        settings = Settings(
            store=Path(self.folder.name), device="cpu", model_bytes=limit, max_on_demand_versions=MAX_ON_DEMAND
        )
        self.models = models.Models(settings, StubObservers())  # type: ignore[arg-type]
        self.models.executor.close()
        self.models.parse_executor.close()
        self.models.load_executor, self.pool = manual_executor("load")
        self.models.loader.load = self.load  # type: ignore[method-assign]
        self.requests: list[asyncio.Task[Model]] = []
        starting = self.loop.start(self.models.load(), None)
        self.end_loads()
        assert starting.done()
        self.watching = self.loop.start(self.models.watcher.watch(), None)

    def scan(self, folder: Path, previous: StoreSnapshot, failed: Mapping[VersionKey, LoadFailure]) -> StoreSnapshot:
        keys = [(name, number) for name, numbers in self.stored.items() for number in sorted(numbers)]
        retry = frozenset(key for key in failed if key in self.repaired or key not in keys)
        self.repaired -= retry
        return StoreSnapshot(
            numbers={name: sorted(numbers) for name, numbers in self.stored.items()},
            rollouts=dict(self.rollouts),
            cards={key: card(*key) for key in keys},
            files={key: VersionFiles(0, BYTES, ()) for key in keys},
            retry=retry,
            defaults={"sample": "a"},
        )

    def load(self, name: str, number: int, in_background: bool = False) -> Model | LoadFailure:
        if (name, number) in self.broken or number not in self.stored[name]:
            return LoadFailure(name, number, "damaged")
        predictor: Any = None
        engine: Any = StubEngine()
        return Model(card(name, number), predictor, engine, bytes=BYTES)

    # Actions of operators

    @rule(name=st.sampled_from("ab"))
    def publish(self, name: str) -> None:
        number = max(self.stored[name]) + 1
        self.stored[name].add(number)
        self.repaired.add((name, number))  # the number may have failed before, with other files

    @rule(name=st.sampled_from("ab"), data=st.data())
    def change_rollout(self, name: str, data: st.DataObject) -> None:
        number = st.sampled_from(sorted(self.stored[name]))
        active, previous = data.draw(st.none() | number), data.draw(st.none() | number)
        canary = data.draw(st.none() | st.builds(Canary, version=number, share=st.just(50.0)))
        kept = {active, previous, canary.version if canary else None}
        retired = [each for each in data.draw(st.lists(number, unique=True)) if each not in kept]
        if active is None:
            previous, canary, retired = None, None, retired[:-1]
        unloaded = name == "b" and data.draw(st.booleans())
        self.rollouts[name] = Rollout(
            active=active, previous=previous, canary=canary, retired=retired, unloaded=unloaded
        )

    @rule(name=st.sampled_from("ab"), data=st.data())
    def damage_or_repair(self, name: str, data: st.DataObject) -> None:
        key = name, data.draw(st.sampled_from(sorted(self.stored[name])))
        if key in self.broken:
            self.broken.remove(key)
            self.repaired.add(key)
        else:
            self.broken.add(key)

    @rule(name=st.sampled_from("ab"), data=st.data())
    def remove(self, name: str, data: st.DataObject) -> None:
        if len(self.stored[name]) > 1:
            self.stored[name].remove(data.draw(st.sampled_from(sorted(self.stored[name]))))

    # Events in the process

    @precondition(lambda self: self.pool.jobs)
    @rule()
    def end_load(self) -> None:
        self.pool.finish()
        self.loop.settle()
        limit = self.models.settings.model_bytes
        if limit and self.models.cache.bytes() > limit:
            others = [model for model in self.models.loaded() if not self.models._is_default(model)]
            assert len(others) <= 1, "more than the memory limit allows"

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 12.0, 400.0]))
    def advance(self, seconds: float) -> None:
        self.loop.advance(seconds)

    @rule(
        model=st.sampled_from(
            [None, "a", "b", "c", *(f"a@{i}" for i in range(1, 8)), *(f"b@{i}" for i in range(1, 5))]
        ),
        timeout=st.sampled_from([0.5, 5.0, 60.0]),
    )
    def send(self, model: str | None, timeout: float) -> None:
        before, loading = set(self.models.loaded()), set(self.models.cache.loading())
        coroutine = self.models.wait_for(GENERATE_IMAGES, model, "id", self.loop.time() + timeout)
        task = self.loop.start(coroutine, None)
        self.requests.append(task)
        for evicted in before - set(self.models.loaded()):
            version_set = self.models.version_sets.get(evicted.card.name)
            if version_set is None or evicted.card.version not in version_set.numbers:
                continue  # a scan during this request found that the version is not served any more
            assert self.loop.time() - evicted.last_used_at >= IN_USE_SECONDS, "a version in use was evicted"
        if new := [key for key in set(self.models.cache.loading()) - loading if not self.is_resident(key)]:
            keys = [*self.models.cache.loading(), *self.keys_in_memory()]
            assert sum(not self.is_resident(key) for key in keys) <= MAX_ON_DEMAND, new
        if task.done() and not task.exception():
            answer, name = task.result().card, (model or "a").partition("@")[0]
            assert answer.name == name
            assert model in (None, name, f"{name}@{answer.version}")
            assert answer.version in self.models.version_sets[name].numbers

    def has_failed(self, name: str) -> bool:
        return any(key[0] == name for key in self.models.cache.failures())

    def is_resident(self, key: VersionKey) -> bool:
        sets = [*self.models.version_sets.values(), *self.models._desired().values()]
        return any(key[0] == version_set.name and key[1] in version_set.resident for version_set in sets)

    def keys_in_memory(self) -> list[VersionKey]:
        return [(model.card.name, model.card.version) for model in self.models.loaded()]

    @precondition(lambda self: not all(task.done() for task in self.requests))
    @rule(index=st.integers(0, 10**6))
    def cancel(self, index: int) -> None:
        pending = [task for task in self.requests if not task.done()]
        pending[index % len(pending)].cancel()
        self.loop.settle()

    @invariant()
    def sets_are_consistent(self) -> None:
        for version_set in self.models.version_sets.values():
            assert not set(version_set.numbers) & set(version_set.retired)
            assert set(version_set.resident) <= set(version_set.numbers)
            name, active = version_set.name, version_set.active
            if version_set.unloaded or not active:
                self.reloading.add(name)
            elif self.models.state(name, active) is VersionState.READY:
                self.reloading.discard(name)
            elif not self.models.settings.model_bytes and not self.has_failed(name):
                assert name in self.reloading, "the active version is not in memory"
        assert len(self.pool.jobs) <= 1

    def end_loads(self) -> None:
        for _ in counted(100):
            if not self.pool.jobs:
                return
            self.end_load()

    def finish(self) -> None:
        for _ in range(2):  # a failure after the first scan may change what the second scan loads
            self.end_loads()
            self.loop.advance(61.0)
            self.end_loads()
        assert all(task.done() for task in self.requests), "a request has no answer"
        for task in self.requests:
            if not task.cancelled() and (error := task.exception()):
                assert isinstance(error, ERRORS), error
        failures = self.models.cache.failures()
        assert all(key in self.broken for key in failures), "a repaired version is not loaded"
        desired = desired_versions(self.models.watcher.snapshot, failures)
        assert self.models.version_sets == desired
        if not self.models.settings.model_bytes:
            for version_set in desired.values():
                for number in version_set.resident:
                    assert self.models.state(version_set.name, number) is VersionState.READY
        for name, number in self.keys_in_memory():
            assert number in desired[name].numbers
        self.watching.cancel()
        closing = self.loop.start(self.models.close(), None)
        assert closing.done()
        with pytest.raises(QuartetError):
            self.models.resolve(GENERATE_IMAGES, None)
        assert not self.models.cache.loading()

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            logging.disable(logging.NOTSET)
            self.folder.cleanup()


@pytest.mark.timeout(0)
def test_versions_keep_their_promises_in_any_order_of_events() -> None:
    run_machine(LifecycleMachine, runs=100)
