"""Loading a version: warm-up, options of the task, failures, and the number of threads that compute."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_network import fake_networks, publish_fake
from support.networks import publish_small
from support.service import make_settings

from app.main import create_app
from app.observability.metrics import Metrics
from app.serving.model import is_transient, prepare
from app.serving.models import Models
from app.settings import Settings
from app.store import StoreError

CPU = torch.device("cpu")


def test_a_network_is_warmed_up_and_measured(tmp_path: Path) -> None:
    with fake_networks() as control:
        publish_fake(tmp_path, "a", 1)
        predictor = prepare(make_settings(store=tmp_path, batch_rows=16), CPU, "a", 1).predictor
        assert len(set(control.rows)) > 1
        assert predictor.latency(16) > 0


@pytest.mark.parametrize("tta", [False, True])
def test_a_predictor_gets_the_settings_of_its_task(tmp_path: Path, tta: bool) -> None:
    publish_small(tmp_path, "whitened-net", "net")
    assert prepare(Settings(store=tmp_path, tta=tta), CPU, "net", 1).predictor.tta is tta


def store_error(cause: Exception) -> StoreError:
    error = StoreError("cannot be read")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (StoreError("the card is wrong"), False),
        (MemoryError(), True),
        (RuntimeError("you tried to allocate memory"), True),
        (OSError(5, "disk"), True),
        (store_error(OSError(5, "disk")), True),
        (store_error(FileNotFoundError()), False),
    ],
)
def test_only_errors_that_may_pass_are_transient(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient


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


@pytest.mark.anyio
async def test_every_thread_computes_with_the_chosen_number_of_threads(tiny_store: Path, openmp: ctypes.CDLL) -> None:
    """oneDNN reads the number of OpenMP threads, which each new thread takes from the number of cores."""
    models = Models(Settings(store=tiny_store, device="cpu"), Metrics())
    await models.start()
    executors: list[Any] = [models.executor, models.parse_executor, models.load_executor]
    assert [await executor.run(openmp.omp_get_max_threads) for executor in executors] == [5, 5, 5]
    await models.close()


def test_an_event_loop_in_another_thread_computes_with_the_chosen_number_of_threads(
    tiny_store: Path, openmp: ctypes.CDLL
) -> None:
    app = create_app(Settings(store=tiny_store, threads=5))

    async def threads_while_running() -> int:
        async with app.router.lifespan_context(app):
            return openmp.omp_get_max_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: asyncio.run(threads_while_running())).result() == 5
