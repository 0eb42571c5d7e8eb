"""Versions that the supervisor loads before it forks workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support.networks import TINY, publish_tiny

from app.observability.metrics import Metrics
from app.serving.models import Models
from app.serving.preload import Preloaded, worker_bytes
from app.settings import Settings
from app.store import CARD, WEIGHTS
from app.store.snapshot import read_stamp

pytestmark = pytest.mark.anyio
NAME = "tiny-gan"


def preloaded(folder: Path, threads: int = 1) -> Preloaded:
    versions = Preloaded()
    versions.load(Settings(store=folder, threads=threads))
    return versions


async def worker(folder: Path, versions: Preloaded) -> Models:
    models = Models(Settings(store=folder, threads=1), Metrics(), versions)
    await models.start()
    return models


def test_resident_versions_are_loaded_before_the_fork(tiny_store: Path) -> None:
    others = {(name, 1) for name in TINY if name != NAME}
    publish_tiny(tiny_store, NAME)
    assert preloaded(tiny_store).keys() == others | {(NAME, 2)}
    (tiny_store / NAME / "2" / WEIGHTS).unlink()  # each worker reports the reason
    assert preloaded(tiny_store).keys() == others
    assert preloaded(tiny_store, threads=2).keys() == set()


def test_versions_are_loaded_with_one_compute_thread(tiny_store: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        preloaded(tiny_store)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


async def test_a_worker_uses_a_preloaded_version_unless_its_files_have_changed(tiny_store: Path) -> None:
    versions = preloaded(tiny_store)
    os.utime(tiny_store / "tiny-cnn" / "1" / WEIGHTS, ns=(1, 1))
    models = await worker(tiny_store, versions)
    assert versions.keys() == set()  # each version is used once, because a text predictor has a state
    await models.close()


def test_the_supervisor_releases_versions_that_a_worker_has_evicted(tiny_store: Path) -> None:
    supervisor = preloaded(tiny_store)
    worker = os.fork()
    if not worker:
        taken = supervisor.take(NAME, 1, read_stamp(tiny_store / NAME / "1"))
        supervisor.on_evicted()
        os._exit(0 if taken else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
    publish_tiny(tiny_store, NAME)
    before = supervisor.keys()
    supervisor.release_evicted(tiny_store)
    assert before - supervisor.keys() == {(NAME, 1)}
    supervisor.load(Settings(store=tiny_store, threads=1))  # the next worker shares the new version
    assert supervisor.keys() - before == {(NAME, 2)}
    (tiny_store / NAME / "2" / WEIGHTS).unlink()
    (tiny_store / NAME / "2" / CARD).unlink()
    supervisor.release_evicted(tiny_store)  # no worker has evicted a version since
    assert {(NAME, 2)} <= supervisor.keys()


def test_the_memory_of_a_worker_depends_on_the_resident_versions(tiny_store: Path) -> None:
    publish_tiny(tiny_store, NAME)
    weights = [tiny_store / name / ("2" if name == NAME else "1") / WEIGHTS for name in TINY]
    assert worker_bytes(tiny_store) == 100 * 2**20 + 3 * sum(path.stat().st_size for path in weights)
