"""Versions that the supervisor loads before it forks workers."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
import torch
from support.networks import TINY, publish_tiny
from support.processes import serving as serving_process

from app.engine.executor import Executor
from app.observability.metrics import Metrics
from app.serving.loader import LoadedModel, Loader
from app.serving.preload import preload
from app.settings import Settings
from app.store import rollout

NAME = "tiny-gan"


@pytest.fixture
def loader(tiny_store: Path) -> Loader:
    settings = Settings(store=tiny_store, threads=1)
    executor = Executor("compute", inline_seconds=settings.inline_seconds)
    return Loader(settings, Metrics(None), executor, torch.device("cpu"), preload(settings))


def test_the_versions_that_stay_in_memory_are_loaded_before_the_fork(tiny_store: Path) -> None:
    for _ in range(2):
        publish_tiny(tiny_store, NAME)
    others = {(name, 1) for name in TINY if name != NAME}
    assert preload(Settings(store=tiny_store, threads=1)).keys() == others | {(NAME, 3)}
    rollout.activate(tiny_store, NAME, 2)
    assert preload(Settings(store=tiny_store, threads=1)).keys() == others | {(NAME, 2), (NAME, 3)}


def test_nothing_is_loaded_before_the_fork_with_several_threads(tiny_store: Path) -> None:
    """Otherwise, a forked process would wait for ever for compute threads that only its parent has."""
    assert not preload(Settings(store=tiny_store, threads=2))


def test_networks_that_may_start_threads_are_left_to_the_workers(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.serving.preload.is_imported", lambda kind: kind == TINY[NAME][1])
    others = {(name, 1) for name, (_, kind, *_) in TINY.items() if kind != TINY[NAME][1]}
    assert preload(Settings(store=tiny_store, threads=1)).keys() == others


def test_versions_are_loaded_with_one_compute_thread(tiny_store: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        preload(Settings(store=tiny_store, threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_a_damaged_version_is_left_to_the_workers(tiny_store: Path) -> None:
    (tiny_store / NAME / "1" / "model.safetensors").write_bytes(b"damaged")
    assert preload(Settings(store=tiny_store, threads=1)).keys() == {(name, 1) for name in TINY if name != NAME}


def test_no_more_weights_are_loaded_than_allowed(tiny_store: Path) -> None:
    publish_tiny(tiny_store, NAME)
    prepared = preload(Settings(store=tiny_store, threads=1, model_bytes=1))
    assert (NAME, 2) in prepared  # the default model
    assert (NAME, 1) not in prepared


def test_a_prepared_version_is_used_once(loader: Loader) -> None:
    """Two engines must not share a predictor, because a text predictor keeps the state of its running batch."""
    prepared = loader.prepared[NAME, 1]
    first, second = loader.load(NAME, 1), loader.load(NAME, 1)
    assert isinstance(first, LoadedModel)
    assert isinstance(second, LoadedModel)
    assert first.predictor is prepared.predictor
    assert second.predictor is not prepared.predictor


def test_a_version_whose_files_have_changed_since_is_loaded_again(loader: Loader, tiny_store: Path) -> None:
    prepared = loader.prepared[NAME, 1]
    os.utime(tiny_store / NAME / "1" / "model.safetensors", ns=(1, 1))
    loaded = loader.load(NAME, 1)
    assert isinstance(loaded, LoadedModel)
    assert loaded.predictor is not prepared.predictor


LOAD_IN_SUPERVISOR_ONLY = """
import os
from app.serving import loader
supervisor, load = os.getpid(), loader.PreparedModel.load
def load_in_supervisor(*arguments):
    assert os.getpid() == supervisor, "a worker has loaded a version"
    return load(*arguments)
loader.PreparedModel.load = load_in_supervisor
"""


def test_workers_use_the_versions_that_the_supervisor_has_loaded(tiny_store: Path) -> None:
    with serving_process(tiny_store, before=LOAD_IN_SUPERVISOR_ONLY, workers=2, threads=1) as service:
        for _ in range(4):
            body = {"count": 1, "model": NAME, "seed": 1}
            assert httpx.post(f"{service.url}/v1/images/sample", json=body).status_code == 200
