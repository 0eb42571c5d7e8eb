"""The models: which version serves a request, states, problems, reports and shutdown. A stub replaces loading."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.networks import publish_tiny, rewrite_card
from support.stubs.registry import CNN, NAME, OTHER, Start, StubEngine, ids, rejection, resolved, scanned

from app.errors import (
    BadValue,
    NotFound,
    NotReady,
    RetiredModel,
    TimedOut,
    TooManyVersions,
    UnknownModel,
    UnloadedModel,
)
from app.serving.model_cache import ModelLoading, VersionState
from app.store import Store
from app.tasks import CLASSIFY, GENERATE_IMAGES

pytestmark = pytest.mark.anyio


async def test_the_resident_versions_are_loaded_and_serve(start: Start) -> None:
    models = start()
    await models.load()
    assert ids(models) == ["tiny-cgan@1", "tiny-cgan@2", "tiny-gan@2", "tiny-gan@3"]
    assert models.defaults == {"sample": NAME}
    assert (resolved(models), resolved(models, NAME), resolved(models, "tiny-gan@2")) == (
        "tiny-gan@3",
        "tiny-gan@3",
        "tiny-gan@2",
    )
    before = time.monotonic()
    assert before <= models.resolve(GENERATE_IMAGES, OTHER).last_used_at <= time.monotonic()


async def test_a_name_that_no_version_has_is_rejected_with_those_that_there_are(start: Start) -> None:
    models = start()
    await models.load()
    versions = "served models: tiny-gan@1, tiny-gan@2, tiny-gan@3"
    for name, known in (
        ("nothing", "served models: tiny-cgan, tiny-gan"),
        ("nothing@1", "served models: tiny-cgan, tiny-gan"),
        ("tiny-gan@9", versions),
        ("tiny-gan@02", versions),
        ("tiny-gan@", versions),
        ("tiny-gan@1234567890", versions),
    ):
        assert rejection(models.resolve, GENERATE_IMAGES, name) == (
            UnknownModel,
            f"model '{name}' is not served here; {known}",
            "model",
        )
    assert rejection(models.resolve_name, "nothing", "", "name")[2] == "name"
    assert rejection(models.resolve_name, "tiny-gan@9", "", "name")[2] == "name"


async def test_a_retired_version_and_an_unloaded_model_are_rejected(start: Start, folder: Path) -> None:
    Store(folder).retire(NAME, 1)
    Store(folder).unload(OTHER)
    models = start()
    await models.load()
    assert rejection(models.resolve_name, "tiny-gan@1", "", "x") == (
        RetiredModel,
        "model 'tiny-gan@1' is retired; served models: tiny-gan@2, tiny-gan@3",
        "x",
    )
    assert rejection(models.resolve_name, "tiny-cgan@1", "", "x") == (
        UnloadedModel,
        "model 'tiny-cgan' is unloaded and must be loaded first",
        "x",
    )
    assert [(row.label, row.state.value) for row in models.versions()] == [
        ("tiny-cgan@1", "unloaded"),
        ("tiny-cgan@2", "unloaded"),
        ("tiny-gan@2", "ready"),
        ("tiny-gan@3", "ready"),
    ]


async def test_a_model_of_another_task_is_rejected_with_those_that_fit(start: Start, folder: Path) -> None:
    alone = start()
    await alone.load()
    assert rejection(alone.resolve, CLASSIFY, NAME)[1].endswith("models for that task: none")
    publish_tiny(folder, CNN)
    models = start()
    await models.load()
    assert rejection(models.resolve, CLASSIFY, NAME) == (
        BadValue,
        "model 'tiny-gan' is for the task 'sample', not 'classify'; models for that task: tiny-cnn",
        "model",
    )
    assert rejection(models.resolve, GENERATE_IMAGES, CNN)[1].endswith("models for that task: tiny-gan, tiny-cgan")
    models.defaults["classify"] = NAME
    assert rejection(models.resolve, CLASSIFY, None)[1].startswith("model 'tiny-gan' is for the task 'sample'")


async def test_a_task_without_a_model_is_not_ready_and_says_why(start: Start, folder: Path) -> None:
    models = start(damaged=((NAME, 1), (NAME, 2), (NAME, 3)))
    await models.load()
    assert rejection(models.resolve, CLASSIFY, None) == (
        NotReady,
        "no model serves the task 'classify' (tiny-gan@3: damaged; tiny-gan@2: damaged; tiny-gan@1: damaged)",
        None,
    )
    assert rejection(models.resolve, GENERATE_IMAGES, None)[0] is NotReady
    working = start()
    await working.load()
    assert rejection(working.resolve, CLASSIFY, None)[1] == "no model serves the task 'classify'"


async def test_a_task_with_models_but_without_a_default_model_needs_the_name_of_a_model(
    start: Start, folder: Path
) -> None:
    (folder / "defaults.json").write_text("{}")
    models = start()
    await models.watcher.scan()
    assert rejection(models.resolve, GENERATE_IMAGES, None)[0] is NotReady  # all models wait to be loaded
    await models.load()
    message = "the task 'sample' has no default model; set model to one of: tiny-cgan, tiny-gan"
    assert rejection(models.resolve, GENERATE_IMAGES, None) == (NotFound, message, "model")
    assert rejection(models.resolve, CLASSIFY, None)[0] is NotReady
    for name in (NAME, OTHER):
        Store(folder).unload(name)
    await scanned(models)
    assert rejection(models.resolve, GENERATE_IMAGES, None)[0] is NotReady


async def test_a_version_that_is_not_in_memory_is_loaded_once_for_all_requests(start: Start) -> None:
    hold = threading.Event()
    models = start(hold=hold)
    await models.load()
    with pytest.raises(ModelLoading, match=r"^tiny-gan@1 is being loaded$") as first:
        models.resolve(GENERATE_IMAGES, "tiny-gan@1")
    with pytest.raises(ModelLoading) as second:
        models.resolve(GENERATE_IMAGES, "tiny-gan@1")
    assert first.value.task is second.value.task
    assert models.state(NAME, 1) is VersionState.LOADING
    deadline = asyncio.get_running_loop().time() + 60
    waiting = asyncio.create_task(models.wait_for(GENERATE_IMAGES, "tiny-gan@1", "", deadline))
    await asyncio.sleep(0)
    with pytest.raises(TimedOut, match=r"^the deadline passed before the model was in memory$"):
        await models.wait_for(GENERATE_IMAGES, "tiny-gan@1", "", deadline - 60)  # does not end the loading
    hold.set()
    assert (await waiting).id == "tiny-gan@1"
    assert models.state(NAME, 1) is VersionState.READY
    assert models.loaded()[2].last_used_at > 0


async def test_versions_loaded_on_demand_are_limited(start: Start) -> None:
    models = start(max_on_demand_versions=0)
    await models.load()
    assert rejection(models.resolve, GENERATE_IMAGES, "tiny-gan@1")[0] is TooManyVersions
    assert resolved(models, "tiny-gan@2") == "tiny-gan@2"  # resident


async def test_a_version_that_fails_to_load_on_demand_is_left_out(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    models = start(damaged=((NAME, 1),))
    await models.load()
    deadline = asyncio.get_running_loop().time() + 60
    with pytest.raises(UnknownModel, match=r"served models: tiny-gan@2, tiny-gan@3$"):
        await models.wait_for(GENERATE_IMAGES, "tiny-gan@1", "", deadline)
    assert models.state(NAME, 1) is VersionState.FAILED
    (failed,) = (row for row in models.versions() if row.state is VersionState.FAILED)
    assert (failed.label, failed.reason) == ("tiny-gan@1", "damaged")
    assert "tiny-gan@1 is not served: damaged" in caplog.text


async def test_a_canary_serves_its_share_and_its_failure_ends_it(start: Start, folder: Path) -> None:
    Store(folder).activate(NAME, 1, share=50)
    models = start()
    await models.load()
    names = [f"r{i}" for i in range(40)]
    for model in (NAME, None):
        assert {resolved(models, model, request_id=name) for name in names} == {"tiny-gan@1", "tiny-gan@3"}
    deadline = asyncio.get_running_loop().time() + 60
    for name in names:  # wait_for returns the same version
        assert (await models.wait_for(GENERATE_IMAGES, NAME, name, deadline)).id == resolved(
            models, NAME, request_id=name
        )
    broken = start(damaged=((NAME, 1),))
    await broken.load()
    assert {resolved(broken, NAME, request_id=name) for name in names} == {"tiny-gan@3"}


async def test_a_model_that_another_process_loaded_is_found_by_a_waiting_request(start: Start, folder: Path) -> None:
    Store(folder).unload(OTHER)
    models = start()
    await models.load()
    deadline = asyncio.get_running_loop().time() + 60
    with pytest.raises(UnloadedModel):
        await models.wait_for(GENERATE_IMAGES, OTHER, "", deadline)
    Store(folder).load(OTHER)
    for model in (OTHER, f"{OTHER}@1"):
        assert (await models.wait_for(GENERATE_IMAGES, model, "", deadline)).card.name == OTHER
    Store(folder).unload(OTHER)
    await models.recheck("nothing", deadline)
    assert not models.version_sets[OTHER].unloaded
    await models.recheck(OTHER, deadline)
    assert models.version_sets[OTHER].unloaded


async def test_a_scan_that_takes_longer_than_the_deadline_is_rejected(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = start()
    await models.load()
    monkeypatch.setattr(models.watcher, "refresh", asyncio.Event().wait)
    with pytest.raises(TimedOut, match=r"^the deadline passed before the store answered$"):
        await models.refresh(asyncio.get_running_loop().time() + 0.01)


async def test_a_new_version_serves_when_it_is_loaded_and_an_old_one_is_evicted(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "quartet")
    models = start()
    await models.load()
    assert not [record for record in caplog.records if "is active" in record.getMessage()]
    Store(folder).activate(NAME, 1)
    await scanned(models)
    assert resolved(models) == "tiny-gan@1"
    Store(folder).retire(NAME, 2)
    await scanned(models)
    assert ids(models) == ["tiny-cgan@1", "tiny-cgan@2", "tiny-gan@1", "tiny-gan@3"]
    assert "tiny-gan@2 is evicted: it is not served any more" in caplog.text
    assert [record.getMessage() for record in caplog.records if "is active" in record.getMessage()] == [
        "tiny-gan: version 1 is active"
    ]
    (folder / OTHER).rename(folder / ".removed")
    await scanned(models)
    assert list(models.version_sets) == [NAME]


async def test_a_failed_version_is_tried_again_when_its_files_have_changed(start: Start, folder: Path) -> None:
    models = start(damaged=((NAME, 3),))
    await models.load()
    assert resolved(models) == "tiny-gan@2"
    models.loader.load, damaged = start().loader.load, models.loader.load  # type: ignore[method-assign]
    rewrite_card(folder / NAME / "3", notes="repaired")
    await scanned(models)
    assert resolved(models) == "tiny-gan@3"
    assert models.failures == []
    assert damaged is not models.loader.load


async def test_cards_and_pictures_come_from_the_store(start: Start, folder: Path) -> None:
    (folder / NAME / "3" / "curves.png").write_bytes(b"picture")
    models = start()
    await models.load()
    card = models.card(NAME)
    assert card is not None
    assert card == models.card(NAME, 3) == Store(folder).card(NAME, 3)
    assert (models.card(NAME, 9), models.card("nothing"), models.card("nothing", 1)) == (None, None, None)
    assert models.pictures(card) == ("curves.png",)
    assert models.pictures(card.model_copy(update={"version": 9})) == ()
    assert await models.read_picture(card, "curves.png") == b"picture"
    with pytest.raises(NotFound, match=r"^none\.png cannot be read: No such file or directory$") as missing:
        await models.read_picture(card, "none.png")
    assert missing.value.param == "file"
    release = threading.Event()
    models.settings = models.settings.model_copy(update={"request_seconds": 0.01})
    hanging = asyncio.create_task(models._picture_disk.run(release.wait, 30))
    await asyncio.sleep(0)
    with pytest.raises(TimedOut, match=r"^the deadline passed before the store answered$"):
        await models.read_picture(card, "curves.png")
    release.set()
    await hanging


async def test_defaults_of_another_task_and_unreadable_defaults_are_reported_once(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "defaults.json").write_text(json.dumps({"sample": NAME, "classify": NAME}))
    models = start()
    await models.load()
    reason = "defaults.json: 'tiny-gan' is for 'sample', expected one for 'classify'"
    assert models.defaults == {"sample": NAME}
    assert [(failure.label, failure.reason) for failure in models.failures] == [("defaults.json", reason)]
    await scanned(models)
    assert [record.getMessage() for record in caplog.records] == [reason]
    (folder / "defaults.json").write_text("{")
    await scanned(models)
    assert models.defaults == {"sample": NAME}  # unchanged
    (failure,) = models.failures
    assert failure.reason.startswith("defaults.json cannot be read: ")
    assert (failure.name, failure.version) == ("defaults.json", 0)
    assert len(caplog.records) == 2
    (folder / "defaults.json").write_text('{"sample": "tiny-cgan"}')
    await scanned(models)
    assert (models.failures, models.defaults) == ([], {"sample": OTHER})


async def test_an_unloaded_default_model_is_the_reason(start: Start, folder: Path) -> None:
    models = start()
    await models.load()
    (folder / NAME / "active.json").write_text('{"unloaded": true}')
    await scanned(models)
    reason = "defaults.json names 'tiny-gan', which is unloaded"
    assert rejection(models.resolve, GENERATE_IMAGES, None)[1] == f"no model serves the task 'sample' ({reason})"


async def test_a_default_model_that_has_left_the_store_is_the_reason(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = start()
    await models.load()
    reason = "defaults.json names 'tiny-gan', which is not in the store"
    (folder / NAME).rename(folder / ".removed")
    await scanned(models)
    assert rejection(models.resolve, GENERATE_IMAGES, None)[1] == f"no model serves the task 'sample' ({reason})"
    assert [(failure.label, failure.reason) for failure in models.failures] == [("defaults.json", reason)]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [reason]
    (folder / "defaults.json").write_text("{")
    await scanned(models)
    assert [failure.reason.partition(":")[0] for failure in models.failures] == [
        "defaults.json cannot be read", reason,
    ]  # fmt: skip
    (folder / "defaults.json").write_text('{"sample": "tiny-gan"}')
    (folder / ".removed").rename(folder / NAME)
    await scanned(models)
    assert (models.failures, resolved(models)) == ([], "tiny-gan@3")


async def test_unreadable_defaults_at_the_start_leave_the_tasks_without_a_default_model(
    start: Start, folder: Path
) -> None:
    (folder / "defaults.json").write_text("{")
    models = start()
    await models.load()
    assert models.defaults == {}
    assert [failure.label for failure in models.failures] == ["defaults.json"]
    assert rejection(models.resolve, GENERATE_IMAGES, None)[0] is NotReady
    assert resolved(models, NAME) == "tiny-gan@3"


async def test_a_process_without_models_or_with_a_broken_network_is_not_ready(start: Start, folder: Path) -> None:
    models = start()
    assert models.recovery.failure == ""
    assert models.problems() == ["no model in the store can be served"]
    await models.load()
    assert models.problems() == []
    model: Any = models.loaded()[0]
    model.explainer, model.tensors = StubEngine(model.engine.observer), StubEngine(model.engine.observer)
    for engine in (model.engine, model.explainer, model.tensors):
        while not engine.circuit_breaker.is_open():
            engine.circuit_breaker.record_failure()
        assert models.problems() == models.problems([model]) == ["tiny-cgan@1 fails on every input"]
        assert models.problems(models.loaded()[1:]) == []
        engine.circuit_breaker.record_success()
    await models.close()
    assert models.problems() == ["the service is stopping"]
    assert rejection(models.resolve, GENERATE_IMAGES, None)[:2] == (NotReady, "the service is stopping")


@pytest.mark.parametrize(
    ("executor", "problem"),
    [
        ("executor", "the compute thread has not answered for 6 s"),
        ("parse_executor", "the decoding threads have not answered for 6 s"),
    ],
)
async def test_a_process_whose_threads_hang_is_not_ready(start: Start, executor: str, problem: str) -> None:
    models = start(unready_after_seconds=5, liveness_timeout_seconds=30)
    await models.load()
    seconds = 5.0
    getattr(models, executor).stalled_seconds = lambda: seconds
    assert models.problems() == []
    seconds = 6.2
    assert models.problems() == [problem]
    models.settings = models.settings.model_copy(update={"unready_after_seconds": 9, "liveness_timeout_seconds": 6})
    assert models.problems() == [problem]
    models.settings = models.settings.model_copy(update={"liveness_timeout_seconds": 7})
    assert models.problems() == []


async def test_the_rows_of_all_engines_of_a_version_are_reported_and_then_zero(start: Start, folder: Path) -> None:
    models = start(damaged=((OTHER, 2),))
    await models.load()
    observers: Any = models.observers
    model = models.loaded()[-1]
    engine: Any = model.engine
    explainer = StubEngine(engine.observer)
    models._engines.add(explainer)  # type: ignore[arg-type]
    engine.row_counts, explainer.row_counts = (3, 1), (4, 2)
    models.report()
    assert (NAME, 3, 7, 3) in observers.loads
    assert observers.versions == [(3, 1, frozenset({(NAME, 1), (NAME, 2), (NAME, 3), (OTHER, 1), (OTHER, 2)}))]
    observers.loads.clear()
    models.cache.evict(model, "test")
    models._engines.discard(engine)
    models._engines.discard(explainer)  # type: ignore[arg-type]
    models.report()
    assert (NAME, 3, 0, 0) in observers.loads  # the last report of the evicted version
    observers.loads.clear()
    models.report()
    assert NAME in {name for name, *_ in observers.loads}
    assert (NAME, 3, 0, 0) not in observers.loads


async def test_shutdown_closes_all_engines_and_stops_loading(start: Start) -> None:
    hold = threading.Event()
    models = start(hold=hold, shutdown_grace_seconds=7)
    await models.load()
    with pytest.raises(ModelLoading) as loading:
        models.resolve(GENERATE_IMAGES, "tiny-gan@1")
    await asyncio.sleep(0)
    engines: list[Any] = [model.engine for model in models.loaded()]
    await models.close()
    hold.set()
    await asyncio.gather(loading.value.task, return_exceptions=True)
    assert loading.value.task.cancelled()
    assert [engine.closed_within for engine in engines] == [7.0] * 4
    for executor in (models.executor, models.parse_executor, models.load_executor):
        with pytest.raises(RuntimeError, match=re.escape("cannot schedule new futures after shutdown")):
            await executor.run(int)
