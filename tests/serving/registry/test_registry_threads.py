"""The models: its engines, its threads and its shutdown. A stub replaces loading."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.networks import publish_tiny
from support.stubs.registry import (
    NAME,
    OTHER,
    RESIDENT,
    Observers,
    Start,
    StubEngine,
    ids,
    load_on_demand,
)

from app.main import create_app
from app.serving import recovery
from app.serving.model import LoadFailure, Model, PreparedModel
from app.serving.models import PARSE_NICENESS, Models
from app.settings import Settings, SettingsError
from app.tasks import GENERATE_IMAGES

pytestmark = pytest.mark.anyio


async def test_all_engines_of_a_version_are_reported_and_closed(start: Start) -> None:
    models = start(shutdown_grace_seconds=7)
    load, engines = models.loader.load, list[Any]()

    def load_with_engines(name: str, number: int, in_background: bool = False) -> Model | LoadFailure:
        model: Any = load(name, number, in_background)
        model.explainer, model.tensors = StubEngine(model.engine.observer), StubEngine(model.engine.observer)
        for waiting, engine in enumerate((model.engine, model.explainer, model.tensors), start=1):
            engine.row_counts = (waiting, 10 * waiting)
            engines.append(engine)
        return model  # type: ignore[no-any-return]

    models.loader.load = load_with_engines  # type: ignore[method-assign]
    await models.load()
    models.report()
    observers: Any = models.observers
    assert sorted(observers.loads) == [(OTHER, 1, 6, 60), (OTHER, 2, 6, 60), (NAME, 2, 6, 60), (NAME, 3, 6, 60)]
    assert {number for _, _, known in observers.versions for _, number in known} == {1, 2, 3}
    await models.close()
    assert [engine.closed_within for engine in engines] == [7.0] * 12


async def test_versions_are_loaded_in_the_background_as_soon_as_requests_are_served(start: Start) -> None:
    models = start()
    load, loads = models.loader.load, list[tuple[str, int, bool]]()

    def record_load(name: str, number: int, in_background: bool = False) -> Model | LoadFailure:
        loads.append((name, number, in_background))
        return load(name, number, in_background)

    models.loader.load = record_load  # type: ignore[method-assign]
    await models.load()
    await load_on_demand(models, "tiny-gan@1")
    assert loads == [(NAME, 3, False), (OTHER, 2, False), (NAME, 2, False), (OTHER, 1, False), (NAME, 1, True)]


async def test_shutdown_ends_the_loading_of_new_versions(start: Start, folder: Path) -> None:
    hold = threading.Event()
    models = start(hold=hold)
    await models.load()
    publish_tiny(folder, NAME)
    await models.watcher.refresh()
    await asyncio.sleep(0)
    task = models._reconcile_task
    await models.watcher.refresh()
    assert models._reconcile_task is task  # only one task loads versions
    await models.close()
    hold.set()
    assert task is not None
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert ids(models) == RESIDENT


async def test_threads_have_names_and_those_that_parse_a_low_priority(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: dict[str, int] = {}
    monkeypatch.setattr(
        "app.engine.executor.lower_priority",
        lambda niceness: added.__setitem__(threading.current_thread().name, niceness),
    )
    models = start(parse_threads=3)
    together = threading.Barrier(3)  # passed only if three jobs run at the same time
    await asyncio.gather(*(models.parse_executor.run(together.wait, 10) for _ in range(3)))
    await models.executor.run(int)
    await models.load_executor.run(int)
    assert added == {"compute_0": 0, "load_0": 0, **{f"parse_{i}": PARSE_NICENESS for i in range(3)}}
    assert await models._picture_disk.run(lambda: threading.current_thread().name) == "pictures"
    with pytest.raises(threading.BrokenBarrierError):
        await models.executor.run(together.wait, 0)


async def test_parsing_is_limited_and_short_computations_run_inline(start: Start, folder: Path) -> None:
    models = start(parse_threads=1, queue_rows=2, inline_seconds=0.03)
    hold = threading.Event()
    jobs = [asyncio.create_task(models.parse_executor.run(hold.wait, 30)) for _ in range(4)]
    await asyncio.sleep(0)
    done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
    assert [type(job.exception()).__name__ for job in done] == ["Overloaded"]
    hold.set()
    await asyncio.gather(*jobs, return_exceptions=True)
    assert models.executor._inline_seconds == 0.03
    assert models.parse_executor._inline_seconds == models.load_executor._inline_seconds == 0.0


async def test_a_registry_uses_the_versions_loaded_before_the_fork(folder: Path) -> None:
    settings, observers = Settings(store=folder, device="cpu"), Observers()
    first = Models(settings, observers)  # type: ignore[arg-type]
    assert first.loader.prepared == {}
    assert first.device == first.loader.device == torch.device("cpu")
    prepared = {(NAME, 3): PreparedModel.load(settings, first.device, NAME, 3)}
    await first.close()
    models = Models(settings, observers, prepared)  # type: ignore[arg-type]
    predictor = prepared[NAME, 3].predictor
    await models.load()
    model: Any = models.resolve(GENERATE_IMAGES, None)
    assert model.predictor is predictor
    assert model.engine._executor is models.executor
    await models.close()


async def test_a_network_of_the_registry_that_cannot_recover_is_found_on_the_compute_thread(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "CHECK_SECONDS", 0.0)
    models = start()
    await models.load()

    def dummy_run(rows: int) -> None:
        raise RuntimeError(f"lost on {threading.current_thread().name}")

    model: Any = models.loaded()[-1]
    model.predictor = SimpleNamespace(dummy_run=dummy_run)
    model.engine.circuit_breaker.failed_recoveries = recovery.MAX_FAILED_RECOVERIES
    await asyncio.wait_for(models.recovery.watch(), 10)
    assert models.recovery.failure.startswith("tiny-gan@3 fails on every input, failed 3 recoveries")
    assert "(RuntimeError: lost on compute_0)" in models.recovery.failure


def test_a_registry_needs_a_store(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"there is no such folder$"):
        Models(Settings(store=tmp_path / "none", device="cpu"), Observers())  # type: ignore[arg-type]


@pytest.fixture
def openmp() -> Iterator[ctypes.CDLL]:
    """Return the OpenMP library of torch, which now computes with 5 threads in the current thread."""
    libraries = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not libraries:
        pytest.skip("torch uses another OpenMP library")
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    yield ctypes.CDLL(str(libraries[0]))
    torch.set_num_threads(threads)


async def test_every_thread_computes_with_the_chosen_number_of_threads(start: Start, openmp: ctypes.CDLL) -> None:
    """oneDNN reads the number of OpenMP threads, which each new thread takes from the number of cores."""
    models = start()
    executors = models.executor, models.parse_executor, models.load_executor
    assert [await executor.run(openmp.omp_get_max_threads) for executor in executors] == [5, 5, 5]


def test_an_event_loop_in_another_thread_computes_with_the_chosen_number_of_threads(
    tiny_store: Path, openmp: ctypes.CDLL
) -> None:
    app = create_app(Settings(store=tiny_store, threads=5))

    async def threads_while_running() -> int:
        async with app.router.lifespan_context(app):
            return openmp.omp_get_max_threads()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: asyncio.run(threads_while_running())).result() == 5
