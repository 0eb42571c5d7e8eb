"""The pure functions of the reconciler.

They compute which versions are desired, loaded, served and evicted, and the state of each version.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import pytest
from support.networks import TINY, tiny_card

from app.engine.observer import VersionKey
from app.errors import TooManyVersions
from app.serving.model import LoadFailure, Model
from app.serving.model_cache import ModelCache, ModelLoading, VersionState
from app.serving.reconcile import (
    IDLE_SECONDS,
    IN_USE_SECONDS,
    check_defaults,
    desired_versions,
    sets_to_serve,
    versions_to_evict,
    versions_to_load,
    versions_to_replace,
)
from app.serving.store_snapshot import StoreSnapshot
from app.serving.version_set import VersionSet
from app.store import Card
from app.store.rollout import Canary, Rollout

CANARY = Rollout(active=1, canary=Canary(version=2, share=25))


def card(name: str = "a", version: int = 1, task: str = "sample") -> Card:
    _, kind, sizes, fields = TINY["tiny-gan"]
    content = tiny_card(name, "sample", kind, sizes, fields)
    return Card.model_validate({**content, "version": version, "weights_sha256": "0" * 64}).model_copy(
        update={"task": task}
    )


def snapshot(unreadable: tuple[VersionKey, ...] = (), **models: tuple[list[int], Rollout]) -> StoreSnapshot:
    """Return a snapshot of a store with these models, given by their version numbers and rollouts."""
    keys = [(name, number) for name, (numbers, _) in models.items() for number in numbers]
    return StoreSnapshot(
        numbers={name: numbers for name, (numbers, _) in models.items()},
        rollouts={name: rollout for name, (_, rollout) in models.items()},
        cards={key: card(*key) for key in keys if key not in unreadable},
    )


def loaded(name: str, version: int, size: int = 10, last_used_at: float = 0.0) -> Model:
    nothing: Any = None
    return Model(card(name, version), nothing, nothing, bytes=size, last_used_at=last_used_at)


def test_desired_versions_follow_from_stored_versions_and_rollout() -> None:
    desired = desired_versions(
        snapshot(
            newest=([1, 2, 3], Rollout()),
            chosen=([1, 2, 3], Rollout(active=2, previous=1)),
            canary=([1, 2], CANARY),
            retired=([1, 2], Rollout(retired=[2])),
            unloaded=([1, 2], Rollout(unloaded=True, retired=[1])),
        ),
        failed=[],
    )
    assert {name: version_set.resident for name, version_set in desired.items()} == {
        "newest": [3],
        "chosen": [2, 1],
        "canary": [1, 2],
        "retired": [1],
        "unloaded": [],
    }
    assert desired["canary"] == VersionSet("canary", (1, 2), (), active=1, previous=None, canary=2, share=25)
    assert desired["unloaded"] == VersionSet("unloaded", (), (1,), None, None, unloaded=(2,))


def test_versions_that_failed_or_have_no_readable_card_are_not_desired() -> None:
    store = snapshot(unreadable=(("a", 3),), a=([1, 2, 3], Rollout()), b=([1], Rollout()))
    desired = desired_versions(store, failed=[("a", 2), ("b", 1)])
    assert (desired["a"].numbers, desired["a"].resident) == ((1,), [1])
    assert (desired["b"].numbers, desired["b"].active) == ((), None)


def to_load(desired: dict[str, VersionSet], **changes: Any) -> list[VersionKey]:
    arguments: dict[str, Any] = {
        "served": {},
        "loaded": {},
        "defaults": {"b"},
        "max_bytes": 0,
        "weights_bytes": defaultdict(lambda: 10),
    }
    return versions_to_load(desired, **{**arguments, **changes})


SECOND = Rollout(active=2, previous=1)
DESIRED = desired_versions(
    snapshot(a=([1, 2], SECOND), b=([1, 2, 3], Rollout(active=3, previous=2)), c=([1], Rollout())), []
)


def test_active_versions_are_loaded_first_and_default_models_before_others() -> None:
    assert to_load(DESIRED) == [("b", 3), ("a", 2), ("c", 1), ("b", 2), ("a", 1)]


def test_versions_in_memory_are_not_loaded_again() -> None:
    assert to_load(DESIRED, loaded={("b", 3): 10, ("a", 1): 10}) == [("a", 2), ("c", 1), ("b", 2)]


@pytest.mark.parametrize(
    ("max_bytes", "in_memory", "expected"),
    [
        (100, {}, [("b", 3), ("a", 2), ("c", 1), ("b", 2), ("a", 1)]),  # each of these versions fits
        (20, {("b", 3): 10}, [("a", 2), ("c", 1), ("b", 2), ("a", 1)]),
        (20, {("b", 3): 11}, []),
        (5, {}, [("b", 3)]),  # the default model is loaded at any limit
    ],
)
def test_with_a_memory_limit_only_default_models_and_fitting_versions_are_loaded(
    max_bytes: int, in_memory: dict[VersionKey, int], expected: list[VersionKey]
) -> None:
    assert to_load(DESIRED, max_bytes=max_bytes, loaded=in_memory) == expected


@pytest.mark.parametrize(
    ("max_bytes", "loading", "expected"),
    [
        (30, [("a", 1)], [("a", 2), ("c", 1), ("b", 2), ("a", 1)]),
        (29, [("a", 1)], [("a", 1)]),  # its own bytes are counted once
        (29, [("a", 1), ("a", 2)], []),
        (20, [("gone", 1)], [("a", 2), ("c", 1), ("b", 2), ("a", 1)]),
        (0, [("a", 1)], [("a", 2), ("c", 1), ("b", 2), ("a", 1)]),
    ],
)
def test_other_versions_that_are_being_loaded_count_towards_the_memory_limit(
    max_bytes: int, loading: list[VersionKey], expected: list[VersionKey]
) -> None:
    sizes = {(name, number): 10 for name, version_set in DESIRED.items() for number in version_set.numbers}
    assert (
        to_load(DESIRED, max_bytes=max_bytes, loaded={("b", 3): 10}, loading=loading, weights_bytes=sizes) == expected
    )


def test_with_a_memory_limit_a_new_active_version_replaces_one_in_memory() -> None:
    served = desired_versions(snapshot(a=([1], Rollout()), c=([1], Rollout())), [])
    assert to_load(DESIRED, max_bytes=20, served=served, loaded={("a", 1): 10, ("b", 3): 10}) == [("a", 2)]


def test_a_version_set_is_published_when_its_active_and_canary_version_are_loaded() -> None:
    desired = desired_versions(snapshot(a=([1, 2], CANARY), b=([1, 2], SECOND)), [])

    def served(pending: list[VersionKey]) -> list[str]:
        return [version_set.name for version_set in sets_to_serve(desired, {}, pending)]

    assert served([]) == ["a", "b"]
    assert served([("a", 1)]) == served([("a", 2)]) == ["b"]
    assert served([("b", 1)]) == ["a", "b"]  # model b does not wait for its previous version


def test_a_model_that_is_loaded_again_is_published_immediately() -> None:
    unloaded = desired_versions(snapshot(a=([1], Rollout(unloaded=True))), [])
    desired = desired_versions(snapshot(a=([1], Rollout())), [])
    assert list(sets_to_serve(desired, unloaded, [("a", 1)])) == [desired["a"]]


def test_versions_that_are_not_served_or_idle_are_evicted() -> None:
    served = desired_versions(snapshot(a=([1, 2, 3, 4, 5], Rollout(active=4, previous=3, retired=[5]))), [])
    now = 1000.0
    models = [
        loaded("a", 1, last_used_at=now - IDLE_SECONDS - 1),
        loaded("a", 2, last_used_at=now - IDLE_SECONDS + 1),
        loaded("a", 3),  # previous
        loaded("a", 4),  # active
        loaded("a", 5),
        loaded("gone", 1, last_used_at=now),
    ]
    evicted = [(model.id, reason) for model, reason in versions_to_evict(models, served, now)]
    assert evicted == [
        ("a@1", "no request for 300 s"),
        ("a@5", "it is not served any more"),
        ("gone@1", "it is not served any more"),
    ]


def test_the_times_after_which_versions_are_evicted_are_exact() -> None:
    served = desired_versions(snapshot(a=([1, 2, 3], Rollout())), [])
    models = [loaded("a", 1, last_used_at=100.0)]
    assert list(versions_to_evict(models, served, 100.0 + IDLE_SECONDS)) == []
    assert list(versions_to_evict(models, served, 100.5 + IDLE_SECONDS)) != []
    assert versions_to_replace(models, 1, 0, lambda _: False, 100.0 + IN_USE_SECONDS) == models
    with pytest.raises(TooManyVersions):
        versions_to_replace(models, 1, 0, lambda _: False, 99.5 + IN_USE_SECONDS)


def to_replace(surplus: int, surplus_bytes: int, *models: Model) -> list[str]:
    """Return the versions to evict, if the versions of model a are resident."""
    replaced = versions_to_replace(models, surplus, surplus_bytes, lambda key: key[0] == "a", now=1000.0)
    return [model.id for model in replaced]


def test_the_least_recently_used_versions_are_replaced() -> None:
    models = (
        loaded("b", 1, last_used_at=3),
        loaded("a", 1, last_used_at=1),
        loaded("b", 2, last_used_at=2),
        loaded("b", 3, last_used_at=4),
    )
    assert to_replace(0, 0, *models) == to_replace(-1, -5, *models) == []
    assert to_replace(1, 0, *models) == ["b@2"]
    assert to_replace(2, 0, *models) == ["b@2", "b@1"]
    assert to_replace(0, 1, *models) == ["a@1"]  # to free memory, resident versions are evicted too
    assert to_replace(1, 10, *models) == ["b@2"]
    assert to_replace(1, 11, *models) == ["b@2", "a@1"]
    assert to_replace(1, 40, *models) == ["b@2", "a@1", "b@1", "b@3"]


@pytest.mark.parametrize(
    ("surplus", "surplus_bytes", "last_used_at", "retry_after"),
    [
        (1, 0, 997.5, 8),  # 7.5 s of the 10 s are left
        (0, 5, 997.5, 8),
        (3, 0, 0.0, 1),  # there are only two versions
        (1, 0, 990.5, 1),
    ],
)
def test_a_version_in_use_is_not_replaced(
    surplus: int, surplus_bytes: int, last_used_at: float, retry_after: int
) -> None:
    models = loaded("b", 1, last_used_at=last_used_at), loaded("b", 2, last_used_at=last_used_at + 0.25)
    with pytest.raises(TooManyVersions) as raised:
        to_replace(surplus, surplus_bytes, *models)
    assert (
        raised.value.message
        == "this version cannot be loaded now: all versions that it could replace are in use; retry later"
    )
    assert raised.value.headers()["retry-after"] == str(retry_after)


def test_a_version_exceeds_the_memory_limit_only_if_no_other_version_is_being_loaded() -> None:
    models, nothing_resident = [loaded("b", 1), loaded("b", 2)], frozenset[VersionKey]().__contains__
    for surplus_bytes, loading in ((20, [("b", 3)]), (21, [])):
        assert versions_to_replace(models, 0, surplus_bytes, nothing_resident, 1000.0, loading) == models
    with pytest.raises(TooManyVersions) as raised:
        versions_to_replace(models, 0, 21, nothing_resident, 1000.0, [("b", 3)])
    assert raised.value.headers()["retry-after"] == "1"


def test_a_default_model_of_another_task_is_rejected_and_a_missing_or_unloaded_one_is_reported() -> None:
    cards = {"a": card("a"), "b": card("b", task="forecast")}
    names: Any = {"sample": "a", "classify": "b", "forecast": "missing", "continue": "unloaded"}
    defaults, reasons = check_defaults(names, cards.get, {"a", "b", "unloaded"}, {"unloaded"})
    assert defaults == {"sample": "a", "forecast": "missing", "continue": "unloaded"}
    assert reasons == [
        "defaults.json: 'b' is for 'forecast', expected one for 'classify'",
        "defaults.json names 'missing', which is not in the store",
        "defaults.json names 'unloaded', which is unloaded",
    ]


class Observers:
    """An observer factory that records the bytes that are reported as loaded."""

    def __init__(self) -> None:
        self.sizes: dict[VersionKey, int] = {}

    def for_version(self, model: str, version: int) -> Any:
        observers, key = self, (model, version)

        class Observer:
            def on_memory(self, size: int) -> None:
                observers.sizes[key] = size

        return Observer()

    def on_versions(self, ready: int, failed: int, known: frozenset[VersionKey]) -> None: ...


def test_each_version_has_exactly_one_state() -> None:
    async def check() -> None:
        observers = Observers()
        cache = ModelCache(observers)
        assert cache.state("a", 1) is VersionState.UNLOADED
        finish = asyncio.Event()

        async def load() -> Model | LoadFailure:
            await finish.wait()
            cache.add(loaded("a", 1), must_stay=lambda _: False)
            return loaded("a", 1)

        task = asyncio.create_task(load())
        cache.set_loading("a", 1, task)
        assert cache.state("a", 1) is VersionState.LOADING
        assert cache.load_task("a", 1) is task
        assert cache.get("a", 1) is None
        finish.set()
        await task
        await asyncio.sleep(0)
        assert cache.state("a", 1) is VersionState.READY
        assert cache.load_task("a", 1) is None
        assert observers.sizes == {("a", 1): 10}
        cache.evict(cache.models()[0], "test")
        assert cache.state("a", 1) is VersionState.UNLOADED
        assert observers.sizes == {("a", 1): 0}

        failure = LoadFailure("a", 1, "damaged")
        cache.set_failed(failure)
        assert cache.state("a", 1) is VersionState.FAILED
        assert cache.failures() == {("a", 1): failure}
        cache.reset_failed("a", 1)
        assert cache.state("a", 1) is VersionState.UNLOADED

        cancelled = asyncio.create_task(load())
        cache.set_loading("a", 1, cancelled)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        await asyncio.sleep(0)
        assert cache.state("a", 1) is VersionState.UNLOADED

    asyncio.run(check())


def test_past_the_limit_the_least_recently_used_version_is_evicted_but_no_pinned_one() -> None:
    cache = ModelCache(Observers(), max_bytes=25)
    for model in (loaded("a", 1, last_used_at=1), loaded("a", 2, last_used_at=3), loaded("a", 3, last_used_at=2)):
        cache.add(model, must_stay=lambda model: model.card.version == 1)
    assert [model.id for model in cache.models()] == ["a@1", "a@3"]
    cache.add(loaded("b", 1, size=30), must_stay=lambda model: model.card.version == 1)
    assert [model.id for model in cache.models()] == ["a@1", "b@1"]


def test_among_several_versions_the_least_recently_used_one_is_evicted() -> None:
    cache = ModelCache(Observers(), max_bytes=20)
    for model in (loaded("a", 1, last_used_at=3), loaded("a", 2, last_used_at=1), loaded("a", 3, last_used_at=2)):
        cache.add(model, must_stay=lambda _: False)
    assert [model.id for model in cache.models()] == ["a@1", "a@3"]


def test_without_a_limit_no_version_is_evicted() -> None:
    cache = ModelCache(Observers())
    for number in (1, 2):
        cache.add(loaded("a", number), must_stay=lambda _: False)
    assert [model.id for model in cache.models()] == ["a@1", "a@2"]


def test_a_version_that_is_loading_is_named_with_the_task_that_loads_it() -> None:
    async def check() -> None:
        task: Any = asyncio.create_task(asyncio.sleep(0))
        loading = ModelLoading("a@1", task)
        assert (loading.message, loading.task) == ("a@1 is being loaded", task)
        await task

    asyncio.run(check())


def test_the_reason_of_each_change_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "quartet")
    cache = ModelCache(Observers(), max_bytes=15)
    for model in (loaded("a", 1), loaded("a", 2), loaded("b", 1)):
        cache.add(model, must_stay=lambda model: model.card.name == "b")
    cache.add(loaded("b", 2), must_stay=lambda model: True)
    assert [record.getMessage() for record in caplog.records] == [
        "a@1 is loaded",
        "a@2 is loaded",
        "a@1 is evicted: QUARTET_MODEL_BYTES is exceeded",
        "b@1 is loaded",
        "a@2 is evicted: QUARTET_MODEL_BYTES is exceeded",
        "b@2 is loaded",
        "QUARTET_MODEL_BYTES is 15, but the versions in use need 20 bytes",
    ]


def test_a_limit_that_is_just_reached_evicts_nothing() -> None:
    cache = ModelCache(Observers(), max_bytes=20)
    for model in (loaded("a", 10), loaded("a", 9)):
        cache.add(model, must_stay=lambda _: False)
    assert [model.id for model in cache.models()] == ["a@9", "a@10"]  # sorted by number
    assert cache.bytes() == 20


def test_failures_stay_in_order_and_only_failed_versions_are_reset() -> None:
    cache = ModelCache(Observers())
    for name in "abca":
        cache.set_failed(LoadFailure(name, 1, name))
    assert [key[0] for key in cache.failures()] == ["b", "c", "a"]
    cache.add(loaded("d", 1), must_stay=lambda _: False)
    cache.reset_failed("d", 1)
    cache.reset_failed("b", 1)
    cache.reset_failed("nothing", 1)
    assert cache.get("d", 1) is cache.models()[0]
    assert [key[0] for key in cache.failures()] == ["c", "a"]
    assert (cache.loading(), cache.load_tasks()) == ([], [])


def test_a_later_load_of_the_same_version_is_not_forgotten_with_the_earlier_one() -> None:
    async def check() -> None:
        cache = ModelCache(Observers())
        failure = LoadFailure("a", 1, "damaged")

        async def load(started: asyncio.Event) -> LoadFailure:
            await started.wait()
            return failure

        start_first, start_second = asyncio.Event(), asyncio.Event()
        first, second = asyncio.create_task(load(start_first)), asyncio.create_task(load(start_second))
        cache.set_loading("a", 1, first)
        assert (cache.loading(), cache.load_tasks()) == ([("a", 1)], [first])
        cache.set_loading("a", 1, second)
        start_first.set()
        await first
        await asyncio.sleep(0)
        assert cache.load_task("a", 1) is second
        start_second.set()
        await second
        await asyncio.sleep(0)
        assert cache.state("a", 1) is VersionState.UNLOADED

    asyncio.run(check())
