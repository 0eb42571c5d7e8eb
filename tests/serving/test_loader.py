"""Loading a version: the engines that are created, and failures."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onnx import ModelProto
from support.engine import RecordingObserver
from support.imported.onnx_models import linear_classifier
from support.networks import publish_small, publish_tiny, rewrite_weights

from app.engine.batcher import Batcher
from app.engine.executor import Executor
from app.engine.text_engine import TextEngine
from app.importing.add import Description, add
from app.serving.model import (
    RETRY_SECONDS,
    Loader,
    LoadFailure,
    Model,
    PreparedModel,
    check_store,
    file_stamps,
)
from app.settings import Settings, SettingsError
from app.store import CARD, WEIGHTS, Store, StoreError
from app.store.weights_size import weights_size
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


def loaded(loader: Loader, name: str) -> Model:
    publish_tiny(loader.settings.store, name)
    model = loader.load(name, 1)
    assert isinstance(model, Model), model
    return model


def test_a_version_gets_the_engine_of_its_task_and_the_limits_of_the_settings(loader: Loader) -> None:
    model = loaded(loader, NAME)
    observers: Any = loader.observers
    version = Store(loader.settings.store).read(NAME, 1)
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
    assert engine._step_seconds == model.predictor.seconds
    assert engine._executor is loader.executor
    observers: Any = loader.observers
    assert observers.keys == [("tiny-rnn", 1)]
    assert isinstance(engine.observer, RecordingObserver)
    assert model.predictor.max_prompt_seconds == 9.0
    assert model.tensors is None


@pytest.mark.anyio
async def test_a_text_model_streams_texts(loader: Loader) -> None:
    model: Any = loaded(loader, "tiny-rnn")
    prompt, _ = model.predictor.parse("abc")
    text = model.predictor.begin(prompt, 5, 1.0, None, None, (), seed=0)
    lengths = [len(text.text) async for _ in model.stream([text])]
    assert lengths == sorted(lengths)
    assert (lengths[-1], text.finish_reason) == (5, "length")
    await model.engine.close(1.0)
    loader.executor.close()


@pytest.mark.parametrize("tta", [False, True])
def test_a_predictor_gets_the_settings_of_its_task(loader: Loader, tta: bool) -> None:
    publish_small(loader.settings.store, "whitened-net", "net")
    loader.settings = loader.settings.model_copy(update={"tta": tta})
    model: Any = loader.load("net", 1)
    assert model.predictor.tta is tta


def test_a_classifier_also_explains_with_its_own_durations_and_is_not_split(loader: Loader) -> None:
    model = loaded(loader, "tiny-cnn")
    explainer: Any = model.explainer
    engine: Any = model.engine
    assert explainer._predict == model.predictor.explain
    assert explainer._expected_seconds == model.predictor.explain_seconds
    assert (explainer._splitter, engine._splitter) == (None, None)


def test_weights_stored_in_float16_are_counted_as_loaded_in_float32(loader: Loader) -> None:
    size = weights_size(loader.settings.store, publish_tiny(loader.settings.store, NAME).card)
    folder = publish_tiny(loader.settings.store, NAME).folder
    rewrite_weights(folder, lambda tensors: tensors.update({key: each.half() for key, each in tensors.items()}))
    model = loader.load(NAME, 2)
    assert isinstance(model, Model), model
    assert model.bytes == size


def imported(loader: Loader, content: ModelProto, description: Description) -> Any:
    """Import an ONNX model into the store, and load it."""
    file = loader.settings.store / "model.onnx"
    file.write_bytes(content.SerializeToString())
    add(loader.settings.store, file, description, max_bytes=2**20)
    model = loader.load(description.name, 1)
    assert isinstance(model, Model), model
    return model


def test_an_imported_classifier_also_computes_requests_of_tensors(loader: Loader) -> None:
    model = imported(loader, linear_classifier(), Description("net", task="classify", labels=["a", "b"]))
    assert (model.tensors._predict, model.tensors._splitter) == (
        model.predictor.tensors.predict,
        model.predictor.tensors,
    )
    assert (model.engine._splitter, model.explainer) == (None, None)
    version = Store(loader.settings.store).read("net", 1)
    assert model.bytes == sum(tensor.nbytes for tensor in version.tensors.values())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
@pytest.mark.parametrize(("niceness", "lowered"), [(3, 10), (15, 15)])
def test_a_thread_that_loads_in_the_background_gets_a_low_priority(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, niceness: int, lowered: int
) -> None:
    """The functions of the system are replaced, because only root could raise the priority again."""
    publish_tiny(loader.settings.store, NAME)
    thread, changes = threading.get_native_id(), list[tuple[int, int, int]]()
    known = {(os.PRIO_PROCESS, thread): niceness}
    monkeypatch.setattr(os, "getpriority", lambda which, who: known[which, who])
    monkeypatch.setattr(os, "setpriority", lambda *change: changes.append(change))
    assert isinstance(loader.load(NAME, 1), Model)
    assert changes == []
    assert isinstance(loader.load(NAME, 1, in_background=True), Model)
    assert changes == [(os.PRIO_PROCESS, thread, lowered)]


def test_a_system_without_priorities_of_threads_loads_in_the_background(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny(loader.settings.store, NAME)
    monkeypatch.setattr("app.serving.model.sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(os, "setpriority", lambda *_: pytest.fail("this would change the priority of a process"))
    assert isinstance(loader.load(NAME, 1, in_background=True), Model)


def test_a_version_is_loaded_in_the_background_if_the_system_forbids_other_priorities(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    publish_tiny(loader.settings.store, NAME)
    monkeypatch.setattr(os, "setpriority", forbidden)
    assert isinstance(loader.load(NAME, 1, in_background=True), Model)


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
        (RuntimeError("could not create a primitive"), "RuntimeError: could not create a primitive", True),
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
    assert isinstance(model, Model)
    assert model.predictor is not prepared.predictor


def test_a_prepared_version_is_used_once(loader: Loader) -> None:
    publish_tiny(loader.settings.store, NAME)
    prepared = PreparedModel.load(loader.settings, loader.device, NAME, 1)
    loader.prepared[NAME, 1] = prepared
    first, second = loader.load(NAME, 1), loader.load(NAME, 1)
    assert isinstance(first, Model)
    assert isinstance(second, Model)
    assert first.predictor is prepared.predictor
    assert second.predictor is not prepared.predictor


def test_file_stamps_are_sizes_and_times_of_the_files_that_there_are(tmp_path: Path) -> None:
    folder = publish_tiny(tmp_path, NAME).folder
    stats = [(folder / file).stat() for file in (CARD, WEIGHTS)]
    stamps = tuple((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)
    assert file_stamps(tmp_path, NAME, 1) == stamps
    (folder / CARD).unlink()
    assert file_stamps(tmp_path, NAME, 1) == stamps[1:]
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
    with pytest.raises(SettingsError, match=r"it cannot be read: File name too long$"):
        check_store(tmp_path / ("x" * 300))
