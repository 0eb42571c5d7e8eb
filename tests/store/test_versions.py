"""Versions of imported networks in the store, and networks without initial weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.imported.onnx_models import linear_model
from support.networks import publish_tiny, rewrite_card, rewrite_weights, tiny_card
from support.service import run_models_command
from torch.overrides import TorchFunctionMode

from app import store
from app.networks.imported.onnx_runner import MODEL
from app.store import rollout
from app.store.rollout import RolloutRefused

FLOAT8 = torch.float8_e4m3fn  # a type that versions may not have
SIZES: dict[str, Any] = {"inputs": {"x": ["?", 4]}, "batched": True, "max_rows": 64}


def publish_linear(folder: Path) -> tuple[store.Version, np.ndarray]:
    """Publish an ONNX model of the task ``infer`` that multiplies rows by a matrix. Return both."""
    model, matrix = linear_model()
    tensors = {MODEL: torch.tensor(list(model.SerializeToString()), dtype=torch.uint8)}
    return store.publish(folder, tiny_card("linear", "infer", "onnx", SIZES, {}), tensors), matrix


def test_an_imported_network_computes_with_the_stored_tensors(tmp_path: Path) -> None:
    version, matrix = publish_linear(tmp_path)
    rows = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(version.network().run({"x": rows})["y"], rows @ matrix, rtol=1e-5)


def test_an_imported_network_of_the_task_infer_is_never_a_default(tmp_path: Path) -> None:
    publish_linear(tmp_path)
    assert not (tmp_path / "defaults.json").exists()
    publish_tiny(tmp_path, "tiny-gan")
    publish_linear(tmp_path)
    with pytest.raises(RolloutRefused, match=r"^linear is for the task 'infer', which has no default model$"):
        rollout.make_default(tmp_path, "linear")
    assert store.read_defaults(tmp_path) == {"sample": "tiny-gan"}


def test_an_imported_network_gets_a_task_but_does_not_lose_it(tmp_path: Path) -> None:
    publish_linear(tmp_path)
    tensors = store.read_version(tmp_path, "linear", 1).tensors
    for task in ("classify", "classify"):  # version 1 for the task infer does not count
        store.publish(tmp_path, tiny_card("linear", task, "onnx", SIZES, {}), tensors)
    assert store.read_defaults(tmp_path) == {"classify": "linear"}
    for change in (publish_linear, lambda folder: rollout.activate(folder, "linear", 1)):
        with pytest.raises(store.StoreError, match=r"^linear@\d: task is 'infer', expected 'classify' as for linear@2"):
            change(tmp_path)
    assert rollout.activate(tmp_path, "linear", 2).active == 2


def test_an_invalid_imported_network_is_rejected_with_a_reason(tmp_path: Path) -> None:
    folder = publish_linear(tmp_path)[0].folder
    rewrite_card(folder, sizes={**SIZES, "max_rows": 0})
    with pytest.raises(store.StoreError, match=r"^linear/1/card\.json: sizes do not fit: .*a number from 1 on$"):
        store.read_version(tmp_path, "linear", 1).network()
    rewrite_card(folder, sizes=SIZES)
    rewrite_weights(folder, lambda tensors: tensors.update(more=torch.ones(1)))
    with pytest.raises(store.StoreError, match=r"^linear/1/model\.safetensors: tensor 'more' should be uint8"):
        store.read_version(tmp_path, "linear", 1).network()


def test_only_imported_networks_may_have_values_that_are_not_finite(tmp_path: Path) -> None:
    folder = publish_linear(tmp_path)[0].folder
    rewrite_weights(folder, lambda tensors: tensors.update(mask=torch.tensor([-torch.inf, torch.nan])))
    assert torch.isneginf(store.read_version(tmp_path, "linear", 1).tensors["mask"][0])


def test_all_tensors_of_an_imported_network_have_a_known_type(tmp_path: Path) -> None:
    folder = publish_linear(tmp_path)[0].folder
    rewrite_weights(folder, lambda tensors: tensors.update(a=torch.ones(1), z=torch.ones(1).to(FLOAT8)))
    with pytest.raises(store.StoreError, match=r"^linear/1/model\.safetensors: tensor 'z' has dtype float8_e4m3fn, "):
        store.read_version(tmp_path, "linear", 1)


def test_an_unreadable_folder_does_not_hide_the_versions_of_other_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny-cnn", "tiny-gan", "tiny-rnn"):
        publish_tiny(tmp_path, name)
    read = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        if folder.name == "tiny-gan":
            raise PermissionError(13, "Permission denied")
        return read(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert list(store.all_versions(tmp_path)) == [("tiny-cnn", 1), ("tiny-rnn", 1)]


def test_the_command_line_does_not_call_an_unreadable_store_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def iterdir(folder: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    result = run_models_command(capsys, tmp_path, "list")
    assert result == (1, "", "error: the store cannot be read or written: Permission denied\n")


class Calls(TorchFunctionMode):
    """A mode of torch that notes the names of the functions that are called."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_without_initialisation_tensors_of_zeros_and_ones_are_not_filled() -> None:
    with Calls() as calls, store.SkipInit():
        tensors = torch.zeros(2, 3), torch.ones(4, dtype=torch.int8)
    assert calls.names == ["empty", "empty"]
    assert [(tensor.shape, tensor.dtype) for tensor in tensors] == [((2, 3), torch.float32), ((4,), torch.int8)]


def test_without_initialisation_weights_keep_their_values() -> None:
    weights = torch.full((3, 3), 7.0)
    with store.SkipInit():
        assert torch.nn.init.normal_(weights) is weights
        assert torch.nn.init.kaiming_uniform_(tensor=weights) is weights
        assert torch.add(weights, weights, alpha=2).unique().tolist() == [21.0]  # other functions work as before
    assert weights.unique().tolist() == [7.0]
