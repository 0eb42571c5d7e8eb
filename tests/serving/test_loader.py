"""Loading a version: the engines that are created, and failures."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine import RecordingObserver
from support.networks import publish_tiny

from app import store
from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.engine.text_engine import TextEngine
from app.serving.loader import (
    RETRY_SECONDS,
    LoadedModel,
    Loader,
    LoadFailure,
    PreparedModel,
    check_store,
    file_stamps,
)
from app.settings import Settings, SettingsError
from app.store import CARD, WEIGHTS, StoreError
from app.tasks.image_generation import ImageSampler

NAME = "tiny-gan"
SETTINGS: dict[str, Any] = {"batch_rows": 5, "queue_rows": 7, "max_running_texts": 3, "max_prompt_seconds": 9.0}


class Observers:
    """An observer factory that records the versions for which observers were created."""

    def __init__(self) -> None:
        self.keys: list[tuple[str, int]] = []

    def for_version(self, model: str, version: int) -> RecordingObserver:
        self.keys.append((model, version))
        return RecordingObserver()


@pytest.fixture
def loader(tmp_path: Path) -> Loader:
    observers: Any = Observers()
    return Loader(Settings(store=tmp_path, **SETTINGS), observers, Executor("compute"), torch.device("cpu"))


def loaded(loader: Loader, name: str) -> LoadedModel:
    publish_tiny(loader.settings.store, name)
    model = loader.load(name, 1)
    assert isinstance(model, LoadedModel), model
    return model


def test_a_version_gets_the_engine_of_its_task_and_the_limits_of_the_settings(loader: Loader) -> None:
    model = loaded(loader, NAME)
    observers: Any = loader.observers
    version = store.read_version(loader.settings.store, NAME, 1)
    engine: Any = model.engine
    assert (model.id, observers.keys) == ("tiny-gan@1", [(NAME, 1)])
    assert (model.explainer, model.tensors, model.last_used_at) == (None, None, 0.0)
    assert model.bytes == sum(tensor.nbytes for tensor in version.tensors.values())
    assert isinstance(engine, Batcher)
    assert engine.name == "tiny-gan@1"
    assert (engine._batch_rows, engine._admission._max_rows) == (5, 7)
    assert engine._splitter is model.predictor
    assert engine._predict == model.predictor.predict
    assert engine._rows == model.predictor.rows
    assert engine._expected_seconds == model.predictor.seconds
    assert engine._executor is loader.executor


def test_a_text_model_gets_a_text_engine(loader: Loader) -> None:
    model = loaded(loader, "tiny-rnn")
    engine: Any = model.engine
    assert isinstance(engine, TextEngine)
    assert (engine.name, engine._max_running, engine._admission._max_rows) == ("tiny-rnn@1", 3, 7)
    assert engine._step == model.predictor.step
    assert model.predictor.max_prompt_seconds == 9.0
    assert model.tensors is None


def test_a_classifier_also_explains_with_its_own_durations_and_is_not_split(loader: Loader) -> None:
    model = loaded(loader, "tiny-cnn")
    explainer: Any = model.explainer
    engine: Any = model.engine
    assert explainer._predict == model.predictor.explain
    assert explainer._expected_seconds == model.predictor.explain_seconds
    assert (explainer._splitter, engine._splitter) == (None, None)


@pytest.mark.parametrize(("name", "rows"), [(NAME, 5), ("tiny-rnn", 3)])
def test_a_network_is_warmed_up_for_its_largest_batch(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    model, warmed_up = loaded(loader, name), list[int]()
    monkeypatch.setattr(type(model.predictor), "warm_up", lambda self, rows: warmed_up.append(rows))
    loader.load(name, 1)
    assert warmed_up == [rows]


def failure(loader: Loader, monkeypatch: pytest.MonkeyPatch, error: Exception) -> LoadFailure:
    def fail(*_: object) -> None:
        raise error

    publish_tiny(loader.settings.store, NAME)
    monkeypatch.setattr(ImageSampler, "warm_up", fail)
    result = loader.load(NAME, 1)
    assert isinstance(result, LoadFailure)
    assert (result.name, result.version, result.label) == (NAME, 1, "tiny-gan@1")
    assert result.files == file_stamps(loader.settings.store, NAME, 1)
    return result


def store_error(cause: Exception) -> StoreError:
    error = StoreError("cannot be read")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason", "transient"),
    [
        (StoreError("the card is wrong"), "the card is wrong", False),
        (ValueError("no"), "ValueError: no", False),
        (MemoryError(), "MemoryError: ", True),
        (torch.OutOfMemoryError("cuda"), "OutOfMemoryError: cuda", True),
        (RuntimeError("you tried to allocate memory"), "RuntimeError: you tried to allocate memory", True),
        (RuntimeError("shapes"), "RuntimeError: shapes", False),
        (OSError(5, "disk"), "OSError: [Errno 5] disk", True),
        (store_error(OSError(5, "disk")), "cannot be read", True),
        (store_error(FileNotFoundError()), "cannot be read", False),
        (store_error(PermissionError()), "cannot be read", False),
    ],
)
def test_a_failed_version_is_tried_again_if_the_error_may_pass(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, transient: bool
) -> None:
    before = time.monotonic()
    result = failure(loader, monkeypatch, error)
    assert result.reason == reason
    if transient:
        assert before + RETRY_SECONDS <= result.retry_at <= time.monotonic() + RETRY_SECONDS
    else:
        assert result.retry_at == math.inf


def test_a_prepared_version_whose_files_have_changed_is_read_again(loader: Loader) -> None:
    publish_tiny(loader.settings.store, NAME)
    prepared = PreparedModel.load(loader.settings, loader.device, NAME, 1)
    card = loader.settings.store / NAME / "1" / CARD
    loader.prepared[NAME, 1] = prepared
    card.write_text(card.read_text() + "\n")
    model = loader.load(NAME, 1)
    assert isinstance(model, LoadedModel)
    assert model.predictor is not prepared.predictor


def test_file_stamps_are_sizes_and_times_of_the_files_that_there_are(tmp_path: Path) -> None:
    folder = publish_tiny(tmp_path, NAME).folder
    stats = [(folder / file).stat() for file in (CARD, WEIGHTS)]
    assert file_stamps(tmp_path, NAME, 1) == tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    (folder / CARD).unlink()
    assert file_stamps(tmp_path, NAME, 1) == ((stats[1].st_size, stats[1].st_mtime_ns),)
    assert file_stamps(tmp_path, NAME, 2) == ()


def test_a_failure_is_logged_with_its_version_or_path(caplog: pytest.LogCaptureFixture) -> None:
    LoadFailure("a", 2, "damaged").log()
    LoadFailure("defaults.json", 0, "wrong").log()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "a@2 is not served: damaged"),
        ("ERROR", "defaults.json is not served: wrong"),
    ]


def test_a_store_must_be_a_folder(tmp_path: Path) -> None:
    check_store(tmp_path)
    with pytest.raises(SettingsError) as raised:
        check_store(tmp_path / "none")
    assert str(raised.value) == f"QUARTET_STORE is '{tmp_path}/none': there is no such folder"
