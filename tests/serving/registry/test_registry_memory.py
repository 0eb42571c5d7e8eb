"""The models: which versions it loads, and evicts to load others. A stub replaces loading."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.networks import publish_tiny
from support.stubs.registry import (
    BYTES,
    CNN,
    NAME,
    OTHER,
    RESIDENT,
    Start,
    ids,
    load_on_demand,
    rejection,
    resolved,
    scanned,
)

from app import store
from app.errors import TooManyVersions, UnknownModel
from app.serving.model import LoadFailure, Model
from app.serving.model_cache import ModelLoading, VersionState
from app.serving.models import Models
from app.serving.reconcile import IN_USE_SECONDS
from app.store import Store
from app.store.weights_size import weights_size
from app.tasks import GENERATE_IMAGES

pytestmark = pytest.mark.anyio
IN_USE = "this version cannot be loaded now: all versions that it could replace are in use; retry later"


def leave_unused(models: Models, names: Sequence[str]) -> None:
    """Let the last requests for all versions in memory be long ago; those for ``names`` came first, in this order."""
    for model in models.loaded():
        position = names.index(model.id) if model.id in names else len(names)
        model.last_used_at = time.monotonic() - IN_USE_SECONDS - 60 + position


def evictions(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "evicted" in record.getMessage()]


async def test_a_version_on_demand_replaces_one_that_is_not_in_use(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "quartet")
    publish_tiny(folder, NAME)
    models = start(max_on_demand_versions=1)
    await models.load()
    await load_on_demand(models, "tiny-gan@1")
    assert rejection(models.resolve, GENERATE_IMAGES, "tiny-gan@2")[:2] == (TooManyVersions, IN_USE)
    leave_unused(models, [])
    await load_on_demand(models, "tiny-gan@2")
    assert evictions(caplog) == ["tiny-gan@1 is evicted: tiny-gan@2 replaces it"]
    assert ids(models) == ["tiny-cgan@1", "tiny-cgan@2", "tiny-gan@2", "tiny-gan@4"]


async def test_versions_that_are_being_loaded_count_as_versions_on_demand(start: Start, folder: Path) -> None:
    publish_tiny(folder, NAME)
    hold = threading.Event()
    models = start(hold=hold, max_on_demand_versions=1)
    await models.load()
    with pytest.raises(ModelLoading):
        models.resolve(GENERATE_IMAGES, "tiny-gan@1")
    assert rejection(models.resolve, GENERATE_IMAGES, "tiny-gan@2")[0] is TooManyVersions
    models.settings = models.settings.model_copy(update={"max_on_demand_versions": 0})
    with pytest.raises(ModelLoading):  # it is being loaded already
        models.resolve(GENERATE_IMAGES, "tiny-gan@1")
    hold.set()
    await asyncio.gather(*models.cache.load_tasks())


@pytest.mark.parametrize("missing_bytes", [0, 1])
async def test_versions_that_are_being_loaded_count_towards_the_memory_limit(
    start: Start, folder: Path, missing_bytes: int
) -> None:
    publish_tiny(folder, NAME)
    size = weights_size(folder, Store(folder).card(NAME, 1))
    hold = threading.Event()
    resident = ["tiny-cgan@1", "tiny-cgan@2", "tiny-gan@4"]
    models = start(hold=hold, model_bytes=BYTES * len(resident) + 2 * size - missing_bytes)
    await models.load()
    assert ids(models) == resident
    with pytest.raises(ModelLoading):
        models.resolve(GENERATE_IMAGES, "tiny-gan@1")
    error = rejection(models.resolve, GENERATE_IMAGES, "tiny-gan@3")[0]
    assert error is (TooManyVersions if missing_bytes else ModelLoading)
    hold.set()
    await asyncio.gather(*models.cache.load_tasks())


@pytest.mark.parametrize(("model_bytes", "free"), [(1, None), (0, 0)])
async def test_only_one_version_on_demand_is_loaded_above_the_memory_limit(
    start: Start, monkeypatch: pytest.MonkeyPatch, model_bytes: int, free: int | None
) -> None:
    """The limit is ``model_bytes`` on the CPU, and follows from the free memory of a GPU."""
    monkeypatch.setattr("app.serving.models.free_bytes", lambda device: free)
    hold = threading.Event()
    models = start(hold=hold, model_bytes=model_bytes)
    await models.load()
    with pytest.raises(ModelLoading):
        models.resolve(GENERATE_IMAGES, "tiny-gan@1")
    assert rejection(models.resolve, GENERATE_IMAGES, "tiny-cgan@1")[:2] == (TooManyVersions, IN_USE)
    hold.set()
    await asyncio.gather(*models.cache.load_tasks())
    assert ids(models) == ["tiny-gan@1", "tiny-gan@3"]


@pytest.mark.parametrize(("free_bytes", "expected"), [(0, VersionState.LOADING), (-1, VersionState.UNLOADED)])
async def test_an_evicted_version_is_loaded_again_only_if_it_fits_beside_versions_being_loaded(
    start: Start, folder: Path, free_bytes: int, expected: VersionState
) -> None:
    """The store is scanned while the version that a request needs is being loaded."""
    size, other_size = (weights_size(folder, Store(folder).card(name, 1)) for name in (NAME, OTHER))
    hold = threading.Event()
    models = start(hold=hold, model_bytes=BYTES * 3 + size + other_size + free_bytes)
    await models.load()
    assert ids(models) == RESIDENT
    models.cache.evict(models.loaded()[1], "test")
    with pytest.raises(ModelLoading):
        models.resolve(GENERATE_IMAGES, "tiny-gan@1")
    await models.watcher.refresh()
    await asyncio.sleep(0)
    assert models.state(OTHER, 2) is expected
    hold.set()
    await asyncio.gather(*models.cache.load_tasks())


@pytest.mark.parametrize(("missing_bytes", "replaced"), [(0, 0), (1, 1), (BYTES, 1), (BYTES + 1, 2)])
async def test_a_version_on_demand_replaces_others_only_if_memory_is_short(
    start: Start, folder: Path, missing_bytes: int, replaced: int
) -> None:
    """tiny-cgan@2 is the only version that may be replaced: the others are in use, or serve requests by default."""
    size = weights_size(folder, Store(folder).card(NAME, 1))
    models = start(model_bytes=size + BYTES * len(RESIDENT) - missing_bytes)
    await models.load()
    assert ids(models) == RESIDENT
    leave_unused(models, ["tiny-gan@3", "tiny-cgan@2"])
    models.loaded()[0].last_used_at = models.loaded()[2].last_used_at = time.monotonic()
    if replaced > 1:
        assert rejection(models.resolve, GENERATE_IMAGES, "tiny-gan@1")[:2] == (TooManyVersions, IN_USE)
        assert ids(models) == RESIDENT
        return
    await load_on_demand(models, "tiny-gan@1")
    assert ids(models) == sorted({*RESIDENT, "tiny-gan@1"} - ({"tiny-cgan@2"} if replaced else set()))


@pytest.mark.parametrize("missing_bytes", [0, 2])
async def test_the_free_memory_of_a_gpu_limits_the_versions_in_memory(
    start: Start, folder: Path, missing_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the free memory is for weights. Unlike ``model_bytes``, it does not count the versions in memory."""
    size = weights_size(folder, Store(folder).card(NAME, 1))
    free = [2 * size]
    monkeypatch.setattr("app.serving.models.free_bytes", lambda device: free[0])
    models = start()
    await models.load()
    assert ids(models) == RESIDENT
    free[0] -= missing_bytes
    leave_unused(models, ["tiny-cgan@2"])
    await load_on_demand(models, "tiny-gan@1")
    assert ids(models) == sorted({*RESIDENT, "tiny-gan@1"} - ({"tiny-cgan@2"} if missing_bytes else set()))


@pytest.mark.parametrize(("free", "model_bytes"), [(0, 0), (0, 10**9), (10**9, 1)])
async def test_without_free_memory_only_default_models_are_loaded(
    start: Start, monkeypatch: pytest.MonkeyPatch, free: int, model_bytes: int
) -> None:
    monkeypatch.setattr("app.serving.models.free_bytes", lambda device: free)
    models = start(model_bytes=model_bytes)
    await models.load()
    assert ids(models) == ["tiny-gan@3"]


async def test_the_version_of_a_default_model_is_loaded_even_if_memory_is_short(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = start(max_on_demand_versions=0)
    await models.load()
    models.cache.evict(models.loaded()[-1], "test")
    monkeypatch.setattr(models.cache, "limit", lambda: 1)
    await load_on_demand(models, NAME)
    assert ids(models) == RESIDENT


async def test_a_resident_version_replaces_no_version_on_demand(start: Start) -> None:
    models = start(max_on_demand_versions=1)
    await models.load()
    await load_on_demand(models, "tiny-gan@1")
    leave_unused(models, [])
    models.cache.evict(models.loaded()[1], "test")
    models.settings = models.settings.model_copy(update={"max_on_demand_versions": 0})
    await load_on_demand(models, OTHER)
    assert ids(models) == sorted([*RESIDENT, "tiny-gan@1"])


async def test_the_active_version_of_a_default_model_is_never_replaced(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    models = start(model_bytes=1)
    await models.load()
    assert ids(models) == ["tiny-gan@3"]
    for model, others in ((OTHER, ["tiny-cgan@2"]), ("tiny-gan@1", ["tiny-gan@1"]), ("tiny-gan@2", ["tiny-gan@2"])):
        leave_unused(models, ["tiny-gan@3"])
        await load_on_demand(models, model)
        assert ids(models) == [*others, "tiny-gan@3"]
    assert "QUARTET_MODEL_BYTES is 1, but the versions in use need 20 bytes" in caplog.text


async def test_a_new_model_is_logged_when_it_serves(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "quartet")
    models = start()
    await models.load()
    publish_tiny(folder, CNN)
    await scanned(models)
    assert [message for message in caplog.messages if "active" in message] == ["tiny-cnn: version 1 is active"]


async def test_a_version_that_will_be_active_is_not_on_demand(start: Start, folder: Path) -> None:
    publish_tiny(folder, OTHER)
    hold = threading.Event()
    models = start(hold=hold, max_on_demand_versions=0)
    await models.load()
    Store(folder).activate(OTHER, 1)
    Store(folder).activate(NAME, 1)
    await models.watcher.refresh()  # loads the default model first, and waits
    await asyncio.sleep(0)
    assert models.state(OTHER, 1) is VersionState.UNLOADED
    with pytest.raises(ModelLoading):
        models.resolve(GENERATE_IMAGES, "tiny-cgan@1")
    hold.set()
    while models._reconcile_task and not models._reconcile_task.done():
        await models._reconcile_task
    assert (resolved(models, OTHER), resolved(models, NAME)) == ("tiny-cgan@1", "tiny-gan@1")


async def test_a_failed_canary_ends_and_a_failed_active_version_is_replaced(start: Start, folder: Path) -> None:
    publish_tiny(folder, OTHER)
    Store(folder).activate(OTHER, 3)
    Store(folder).activate(NAME, 1, share=50)
    models = start(damaged=((NAME, 1), (OTHER, 3)))
    await models.load()
    assert {resolved(models, NAME, request_id=f"r{i}") for i in range(20)} == {"tiny-gan@3"}
    assert resolved(models, OTHER) == "tiny-cgan@2"
    assert [(failure.label, failure.reason) for failure in models.failures] == [
        ("tiny-cgan@3", "damaged"),
        ("tiny-gan@1", "damaged"),
    ]


async def test_if_an_active_version_cannot_be_loaded_again_the_next_one_serves(start: Start) -> None:
    damaged: set[tuple[str, int]] = set()
    models = start(damaged=damaged)
    await models.load()
    models.cache.evict(models.loaded()[-1], "test")
    damaged.add((NAME, 3))
    deadline = asyncio.get_running_loop().time() + 60
    assert (await models.wait_for(GENERATE_IMAGES, NAME, "", deadline)).id == "tiny-gan@2"


async def test_a_failed_version_on_demand_does_not_replace_the_active_version(start: Start, folder: Path) -> None:
    """The failure of version 1 is recorded while version 2, which will be active, is not loaded yet."""
    for _ in range(2):
        publish_tiny(folder, OTHER)
    models = start(damaged=((OTHER, 1),))
    await models.load()
    load, gates = models.loader.load, {(OTHER, 1): threading.Event(), (OTHER, 2): threading.Event()}

    def load_later(name: str, number: int, in_background: bool = False) -> Model | LoadFailure:
        assert gates[name, number].wait(30)
        return load(name, number, in_background)

    models.loader.load = load_later  # type: ignore[method-assign]
    with pytest.raises(ModelLoading) as loading:
        models.resolve(GENERATE_IMAGES, "tiny-cgan@1")
    Store(folder).activate(OTHER, 2)
    await models.watcher.refresh()
    gates[OTHER, 1].set()
    assert isinstance(await loading.value.task, LoadFailure)
    assert resolved(models, OTHER) == "tiny-cgan@4"
    gates[OTHER, 2].set()
    await scanned(models)
    assert resolved(models, OTHER) == "tiny-cgan@2"


async def test_an_idle_version_is_evicted(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "quartet")
    models = start()
    await models.load()
    await load_on_demand(models, "tiny-gan@1")
    for model in models.loaded():
        model.last_used_at = time.monotonic() - 301
    await scanned(models)
    assert evictions(caplog) == ["tiny-gan@1 is evicted: no request for 300 s"]
    assert ids(models) == RESIDENT


async def test_a_version_whose_card_is_unreadable_has_failed(start: Start, folder: Path) -> None:
    (folder / NAME / "1" / store.CARD).write_text("{")
    models = start()
    await models.load()
    assert (models.state(NAME, 1), models.state(NAME, 2)) == (VersionState.FAILED, VersionState.READY)
    reasons = {row.label: row.reason for row in models.versions()}
    assert reasons.pop("tiny-gan@1").startswith("tiny-gan/1/card.json: ")
    assert reasons == dict.fromkeys(RESIDENT, "")


async def test_a_request_without_an_id_gets_the_version_of_the_empty_id(start: Start, folder: Path) -> None:
    Store(folder).activate(NAME, 1, share=60)
    models = start()
    await models.load()
    assert models.resolve(GENERATE_IMAGES, NAME) is models.resolve(GENERATE_IMAGES, NAME, "")
    assert models.resolve_name(NAME) == models.resolve_name(NAME, "") == (NAME, 1)


async def test_a_version_that_was_just_removed_serves_only_from_memory(start: Start) -> None:
    models = start()
    await models.load()
    unknown = "is not served here; served models: tiny-cgan, tiny-gan"
    del models.watcher.snapshot.cards[NAME, 1]
    message = f"model 'tiny-gan@1' {unknown}"
    assert rejection(models.resolve, GENERATE_IMAGES, "tiny-gan@1") == (UnknownModel, message, "model")
    del models.watcher.snapshot.cards[NAME, 3]
    assert resolved(models) == "tiny-gan@3"
    models.cache.evict(models.loaded()[-1], "test")
    assert rejection(models.resolve, GENERATE_IMAGES, None) == (UnknownModel, f"model 'tiny-gan' {unknown}", "model")


async def test_a_rollout_that_cannot_be_read_causes_no_scan(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    models = start()
    await models.load()
    scans: list[float] = []

    async def is_unloaded(name: str) -> bool | None:
        return {NAME: None, OTHER: True}[name]

    async def refresh(deadline: float) -> None:
        scans.append(deadline)

    monkeypatch.setattr(models.watcher, "is_unloaded", is_unloaded)
    monkeypatch.setattr(models, "refresh", refresh)
    await models.recheck(NAME, 1.0)
    assert scans == []
    await models.recheck(OTHER, 2.0)
    assert scans == [2.0]


@pytest.mark.parametrize("model", [OTHER, f"{OTHER}@2"])
async def test_a_request_for_an_unloaded_model_reads_its_rollout_again(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    Store(folder).unload(OTHER)
    models = start()
    await models.load()
    Store(folder).load(OTHER)  # by another process
    refresh, deadlines = models.refresh, list[float]()

    async def record_refresh(deadline: float) -> None:
        deadlines.append(deadline)
        await refresh(deadline)

    monkeypatch.setattr(models, "refresh", record_refresh)
    deadline = asyncio.get_running_loop().time() + 60
    assert (await models.wait_for(GENERATE_IMAGES, model, "", deadline)).id == "tiny-cgan@2"
    assert deadlines == [deadline]


async def test_a_removed_version_is_reported_while_it_finishes_requests(start: Start, folder: Path) -> None:
    models = start()
    await models.load()
    engines = [model.engine for model in models.loaded()]
    (folder / OTHER).rename(folder / ".removed")
    await scanned(models)
    models.report()
    observers: Any = models.observers
    assert len(engines) == 4
    assert observers.versions == [(2, 0, frozenset({(OTHER, 1), (OTHER, 2), (NAME, 1), (NAME, 2), (NAME, 3)}))]
