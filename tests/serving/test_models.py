"""Rules of the versions in one process, each with an example. ``test_lifecycle.py`` tests their combinations."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from shutil import move
from typing import Any

import pytest
from support.disk import WatchedDisk
from support.fake_network import Control, fake_networks, publish_fake
from support.service import make_settings

from app.errors import (
    NotFound,
    NotReady,
    QuartetError,
    TimedOut,
    TooManyVersions,
    UnloadedModel,
)
from app.observability.metrics import Metrics
from app.serving.models import Models
from app.serving.plan import State, VersionSet
from app.store import CARD, WEIGHTS, Canary
from app.tasks import SAMPLE

pytestmark = pytest.mark.anyio


@pytest.fixture
def control() -> Iterator[Control]:
    with fake_networks() as control:
        yield control


@pytest.fixture
def folder(control: Control, tmp_path: Path) -> Path:
    """Return a store with three versions of the default model a, and one of b. The versions of a answer with 1 to 3."""
    for number in (1, 2, 3):
        publish_fake(tmp_path / "store", "a", number)
    publish_fake(tmp_path / "store", "b", 11)
    return tmp_path / "store"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


Start = Callable[..., Awaitable[Models]]


@pytest.fixture
async def start(folder: Path, clock: Clock) -> AsyncIterator[Start]:
    """Yield a function that starts a process with the store and the given settings."""
    started: list[Models] = []

    async def start(**settings: Any) -> Models:
        quick = {"device": "cpu", "inline_seconds": 0, "recovery_check_seconds": 0.001}
        values = {"store": folder, **quick, **settings}
        models = Models(make_settings(**values), Metrics(), clock=clock)
        started.append(models)
        await models.start()
        return models

    yield start
    for models in started:
        await models.close()


def deadline(seconds: float = 60) -> float:
    return asyncio.get_running_loop().time() + seconds


async def version(models: Models, model: str | None = None) -> str:
    return (await models.resolve(SAMPLE, model, "", deadline())).id


async def error(models: Models, model: str | None) -> tuple[type[QuartetError], str]:
    with pytest.raises(QuartetError) as raised:
        await version(models, model)
    return type(raised.value), raised.value.message


async def scan(models: Models) -> None:
    await models.refresh(deadline())
    await models.settled()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - conditions such as freed memory have no event
            await asyncio.sleep(0)


def roll_out(folder: Path, name: str, **content: Any) -> None:
    (folder / name / "active.json").write_text(json.dumps(content))


def failures(models: Models) -> list[tuple[str, str]]:
    return [(entry.label, entry.reason) for entry in models.failures]


# Which version answers


async def test_a_request_without_a_model_needs_a_default_model(start: Start, folder: Path) -> None:
    (folder / "defaults.json").write_text("{}")
    models = await start()
    message = "the task 'sample' has no default model; set model to one of: a, b"
    assert await error(models, None) == (NotFound, message)
    for content, reason in (
        ('{"sample": "b"}', ""),
        ("{", "defaults.json: the file: Invalid JSON: "),
        ('{"sample": "x"}', "defaults.json names 'x', which is not in the store"),
        ('{"sample": "b", "classify": "a"}', "defaults.json: 'a' is for 'sample', expected one for 'classify'"),
    ):
        (folder / "defaults.json").write_text(content)
        await scan(models)
        assert [text.startswith(reason) for _, text in failures(models)] == [True] * bool(reason)
        if "x" in content:
            assert await error(models, None) == (NotReady, f"no model serves the task 'sample' ({reason})")
        else:  # an unreadable file changes nothing
            assert await version(models) == "b@1"
    roll_out(folder, "b", unloaded=True)
    await scan(models)
    assert (await error(models, None))[1].startswith("no model serves the task 'sample' (")


def test_the_choice_for_a_request_id_never_changes() -> None:
    """Other processes and later releases choose the same version for the same request."""
    canary = VersionSet(name="a", active=3, canary=Canary(version=2, share=25.0))
    assert "".join(str(canary.version_for(f"r{i}")) for i in range(24)) == "323333323333332233333232"
    assert (canary.version_for("r18344"), canary.version_for("r9441")) == (2, 3)  # the two sides of the share
    small = VersionSet(name="a", active=1, canary=Canary(version=2, share=0.01))
    assert Counter(small.version_for(f"r{i}") for i in range(50_000))[2] == 2


async def test_an_unloaded_model_that_another_process_has_loaded_is_found_at_once(start: Start, folder: Path) -> None:
    roll_out(folder, "b", unloaded=True)
    models = await start()
    assert (await error(models, "b"))[0] is UnloadedModel
    (folder / "b" / "active.json").write_text("{")  # an unreadable file changes nothing
    assert (await error(models, "b"))[0] is UnloadedModel
    for name in ("b", "b@1"):
        (folder / "b" / "active.json").unlink()
        assert await version(models, name) == "b@1"
        roll_out(folder, "b", unloaded=True)
        await models.recheck("b", deadline())
        assert (await error(models, name))[0] is UnloadedModel


async def test_a_request_waits_for_its_version_until_its_deadline(start: Start, control: Control) -> None:
    models = await start()
    control.held.add(1)
    for _ in range(2):
        with pytest.raises(TimedOut, match=r"^the deadline passed before the model was in memory$"):
            await models.resolve(SAMPLE, "a@1", "", deadline(0.01))
    assert models.entry("a", 1).state is State.LOADING
    assert await version(models, "a") == "a@3"  # other requests do not wait
    control.release(1)


async def test_the_number_of_versions_on_demand_is_limited(start: Start, clock: Clock) -> None:
    models = await start(max_on_demand_versions=1)
    assert await version(models, "a@1") == "a@1"
    clock.now += 3
    with pytest.raises(TooManyVersions) as raised:
        await version(models, "a@2")
    assert raised.value.headers()["retry-after"] == "7"
    clock.now += 7
    assert await version(models, "a@2") == "a@2"
    assert [model.id for model in models.loaded()] == ["a@2", "a@3", "b@1"]


# The store changes


async def test_active_versions_and_default_models_are_loaded_first_and_reasons_are_logged(
    start: Start, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "quartet")
    (folder / "defaults.json").write_text('{"sample": "b"}')
    publish_fake(folder, "b", 12)
    roll_out(folder, "b", active=1, canary={"version": 2, "share": 5})
    models = await start()
    roll_out(folder, "b", active=1, retired=[2])
    await scan(models)
    roll_out(folder, "a", active=2, canary={"version": 3, "share": 5})
    await scan(models)
    roll_out(folder, "a", active=2, retired=[3])
    await scan(models)
    (folder / "a" / "2" / WEIGHTS).rename(folder / "a" / "2" / "moved")
    roll_out(folder, "b", unloaded=True)
    await scan(models)
    assert [record.getMessage() for record in caplog.records if record.levelname == "INFO"] == [
        "b@1 is loaded",
        "a@3 is loaded",
        "b@2 is loaded",
        "b: b@1 is active; retired: 2",
        "b@2 is evicted: it is not served any more",
        "a@2 is loaded",
        "a: a@2 is active, a@3 is the canary (5 %)",
        "a: a@2 is active; retired: 3",
        "a@3 is evicted: it is not served any more",
        "b: b is unloaded",
        "b@1 is evicted: it is not served any more",
    ]


async def test_a_file_that_cannot_be_read_changes_nothing(start: Start, folder: Path) -> None:
    roll_out(folder, "a", active=2)
    models = await start()
    (folder / "a" / "active.json").write_text("{")
    await scan(models)
    assert await version(models, "a") == "a@2"
    assert [place for place, _ in failures(models)] == ["a/active.json"]
    roll_out(folder, "a", active=9)
    await scan(models)
    assert failures(models) == [("a/active.json", "a/active.json names version 9, which is not in the store")]
    move(folder / "b" / "1" / CARD, folder / "b" / "1" / "moved")  # the version is in memory
    await scan(models)
    assert (await version(models, "b"), len(failures(models))) == ("b@1", 1)
    move(folder, folder.with_name("away"))
    await scan(models)
    assert await version(models, "a") == "a@3"
    move(folder.with_name("away"), folder)


async def test_an_evicted_version_leaves_memory_without_garbage_collection(start: Start, clock: Clock) -> None:
    models = await start()
    await version(models, "a@1")
    predictor = weakref.ref(models.loaded()[0].predictor)
    assert predictor()
    clock.now += 301
    gc.disable()
    try:
        await scan(models)
        await until(lambda: predictor() is None)
    finally:
        gc.enable()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
async def test_versions_are_loaded_with_a_low_priority_while_requests_are_served(start: Start) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    models = await start()
    assert await models.load_executor.run(niceness) == min(niceness() + 10, 19)
    assert await models.executor.run(niceness) == niceness()


# Health


async def test_a_process_reports_why_it_should_get_no_requests(start: Start, folder: Path) -> None:
    models = await start()
    assert models.problems() == []
    model = models.loaded()[0]
    for engine in model.engines:
        while not engine.circuit_breaker.is_open():
            engine.circuit_breaker.record_failure()
    assert models.problems() == models.problems([model]) == ["a@3 fails on every input"]
    assert models.problems(models.loaded()[1:]) == []
    models.stopping = True
    assert models.problems() == ["the service is stopping"]
    roll_out(folder, "a", unloaded=True)
    roll_out(folder, "b", unloaded=True)
    assert (await start()).problems() == ["no model in the store can be served"]


@pytest.mark.parametrize(("works", "full"), [(True, False), (False, False), (False, True)])
async def test_a_network_that_cannot_recover_is_tried_with_a_dummy_input(
    start: Start, control: Control, works: bool, full: bool, caplog: pytest.LogCaptureFixture
) -> None:
    models = await start()
    (a, *_), (b, *_) = (model.engines for model in models.loaded())
    (control.full if full else control.broken).update(set() if works else {11})
    a.circuit_breaker.failed_recoveries, b.circuit_breaker.failed_recoveries = 2, 3
    watching = asyncio.create_task(models.recovery.watch())
    await until(lambda: watching.done() or not b.circuit_breaker.failed_recoveries)
    watching.cancel()
    assert a.circuit_breaker.failed_recoveries == 2  # too few for a check
    if works or full:  # memory may be free later
        assert models.recovery.failure == ""
        return
    assert models.recovery.failure == (
        "b@1 fails on every input, failed 3 recoveries, and fails on a dummy input "
        "(RuntimeError: broken on compute_0): the process must be restarted"
    )
    assert [record.getMessage() for record in caplog.records] == [models.recovery.failure]
    assert await error(models, "a") == (NotReady, "the service is stopping")


async def test_a_disk_that_does_not_answer_delays_no_request(start: Start, folder: Path) -> None:
    models = await start(rollout_check_seconds=0.01, request_seconds=0.01)
    released = threading.Event()
    models.store.disk = WatchedDisk(lambda *_: released.wait(60))
    with pytest.raises(TimedOut, match=r"^the deadline passed before the store answered$"):
        await models.refresh(deadline(0.01))
    await models.recheck("b", deadline())
    roll_out(folder, "b", unloaded=True)
    released.set()
    await scan(models)
    assert (await error(models, "b"))[0] is UnloadedModel


async def test_the_age_of_the_last_scan_is_measured(start: Start, clock: Clock, control: Control) -> None:
    control.held.add(11)
    starting = asyncio.ensure_future(start())
    await asyncio.to_thread(control.wait_until_held, 11)
    clock.now += 100
    control.release(11)
    models = await starting
    metrics: Any = models.observers

    def age() -> float:
        models.report()
        return float(metrics.registry.get_sample_value("quartet_store_scan_age_seconds"))

    assert age() == 0.0  # also after a slow start
    clock.now += 18
    assert age() == 18.0
    await scan(models)
    assert age() == 0.0


async def test_the_rows_of_a_version_are_reported_also_after_it_was_evicted(
    start: Start, folder: Path, control: Control
) -> None:
    models = await start()
    metrics: Any = models.observers
    model = await models.resolve(SAMPLE, "b", "", deadline())
    control.held.add(11)
    images = [model.predictor.parse(1, None, seed) for seed in range(3)]
    running = [asyncio.create_task(model.engine.submit([image])) for image in images]
    await asyncio.to_thread(control.wait_until_held, 11)
    roll_out(folder, "b", unloaded=True)
    await scan(models)
    labels = {"model": "b", "version": "1"}

    def rows() -> float:
        models.report()
        names = ("quartet_queued_rows", "quartet_running_rows")
        return sum(metrics.registry.get_sample_value(name, labels) for name in names)

    assert rows() == 3
    control.release(11)
    await asyncio.gather(*running)
    assert rows() == 0
