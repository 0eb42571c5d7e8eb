"""Versions that the supervisor loads before it forks workers."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
import torch
from support.networks import TINY, make_invalid, publish_tiny
from support.processes import serving as serving_process

from app.engine.executor import Executor
from app.observability.metrics import Metrics
from app.serving.model import Loader, Model
from app.serving.preload import preload
from app.settings import Settings
from app.store import Store
from app.store.weights_size import weights_size

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
    Store(tiny_store).activate(NAME, 2)
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


def publish_canary_and_previous(folder: Path) -> None:
    """Give a model three versions that stay in memory: 2 is active, 3 is the canary, and 1 is the previous version."""
    for _ in range(2):
        publish_tiny(folder, NAME)
    for version in (1, 2):
        Store(folder).activate(NAME, version)
    Store(folder).activate(NAME, 3, share=10)


def test_no_more_weights_are_loaded_than_allowed(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_canary_and_previous(tiny_store)
    defaults = {(name, 1) for name in TINY if name != NAME} | {(NAME, 2)}
    sizes = {key: weights_size(tiny_store, Store(tiny_store).card(key[0], key[1])) for key in defaults}
    total, other = sum(sizes.values()), sizes[NAME, 2]
    for limit, others in ((1, []), (total + other, [3])):
        prepared = preload(Settings(store=tiny_store, threads=1, model_bytes=limit))
        assert prepared.keys() == defaults | {(NAME, number) for number in others}
    monkeypatch.setattr("app.serving.preload.is_imported", lambda kind: kind == TINY["tiny-cnn"][1])
    prepared = preload(Settings(store=tiny_store, threads=1, model_bytes=total + other))
    assert prepared.keys() == (defaults - {("tiny-cnn", 1)}) | {(NAME, 3)}  # the imported network is counted too


def test_a_damaged_version_does_not_use_the_allowed_memory(tiny_store: Path) -> None:
    publish_canary_and_previous(tiny_store)
    everything = preload(Settings(store=tiny_store, threads=1))
    limit = sum(model.bytes for key, model in everything.items() if key != (NAME, 3))
    make_invalid(tiny_store / NAME / "3")
    prepared = preload(Settings(store=tiny_store, threads=1, model_bytes=limit))
    assert prepared.keys() == everything.keys() - {(NAME, 3)}


def test_a_prepared_version_is_used_once(loader: Loader) -> None:
    """Two engines must not share a predictor, because a text predictor keeps the state of its running batch."""
    prepared = loader.prepared[NAME, 1]
    first, second = loader.load(NAME, 1), loader.load(NAME, 1)
    assert isinstance(first, Model)
    assert isinstance(second, Model)
    assert first.predictor is prepared.predictor
    assert second.predictor is not prepared.predictor


def test_a_version_whose_files_have_changed_since_is_loaded_again(loader: Loader, tiny_store: Path) -> None:
    prepared = loader.prepared[NAME, 1]
    os.utime(tiny_store / NAME / "1" / "model.safetensors", ns=(1, 1))
    loaded = loader.load(NAME, 1)
    assert isinstance(loaded, Model)
    assert loaded.predictor is not prepared.predictor


LOAD_IN_SUPERVISOR_ONLY = """
import os
from app.serving import model
from app.store import Store
supervisor, load = os.getpid(), model.PreparedModel.load
def load_in_supervisor(*arguments):
    assert os.getpid() == supervisor, "a worker has loaded a version"
    return load(*arguments)
model.PreparedModel.load = load_in_supervisor
"""


def test_workers_use_the_versions_that_the_supervisor_has_loaded(tiny_store: Path) -> None:
    with serving_process(tiny_store, before=LOAD_IN_SUPERVISOR_ONLY, workers=2, threads=1) as service:
        for _ in range(4):
            body = {"count": 1, "model": NAME, "seed": 1}
            assert httpx.post(f"{service.url}/v1/images/sample", json=body, timeout=60).status_code == 200
