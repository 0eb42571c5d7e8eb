"""Exported files compute the same outputs as the networks, for every kind of network and any number of rows."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.images import image_bytes
from support.networks import SMALL, publish_small, publish_tiny
from support.service import ROOT, run_models_command
from torch import Tensor

from app.cli import models
from app.exporting.files import ExportRefused, check_outputs
from app.exporting.signatures import SIGNATURES
from app.networks import KINDS, is_imported
from app.store import Store
from app.store.version import Version
from app.tasks import TASKS
from app.tasks.imported.tensors import TensorPredictor

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
MAX_DIFFERENCE = 1e-4
# Exports take long, so `make test-all` tests the other kinds.
EXPORTED = ("lenet",)


def inputs_like(example: Tensor, rows: int) -> Tensor:
    """Return random inputs with the type and the row width of an example."""
    shape, generator = (rows, *example.shape[1:]), torch.Generator().manual_seed(rows)
    if example.dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if example.dtype == torch.int64:  # characters, classes or seasons
        return torch.randint(1, 3, shape, generator=generator)
    if example.dtype == torch.float64:
        series = torch.randn(shape, dtype=torch.float64, generator=generator).cumsum(1)
        series[-1, : shape[1] // 4] = torch.nan
        return series
    return torch.rand(shape, generator=generator) * 2 - 1


def largest_difference(actual: Any, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    assert str(actual.dtype).removeprefix("torch.") == str(expected.dtype).removeprefix("torch.")
    return float(np.abs(np.asarray(actual) - expected.numpy()).max())


def test_every_kind_is_tested() -> None:
    assert set(SMALL) == {kind for kind in KINDS if not is_imported(kind)}


class Exports:
    """Small networks of all kinds. Each network is published once, and exported once to each format.

    The forecaster is the one of this repository. Other tests export it too, and an export takes up to 40 seconds.
    """

    def __init__(self, folder: Path, exported: Callable[[str], Path]) -> None:
        self.folder, self.exported = folder, exported
        self.version = cache(self._publish)
        self.file = cache(self._export)

    def _publish(self, kind: str) -> Version:
        if kind == "forecaster":
            return Store(ROOT / "models_store").read("series-lstm", 3)
        return publish_small(self.folder / kind, kind, "small")

    def _export(self, kind: str, suffix: str) -> Path:
        if kind == "forecaster":
            return self.exported(f"series-lstm-3.{suffix}")
        self.version(kind)
        path = self.folder / f"{kind}.{suffix}"
        assert models.main(["export", "--store", str(self.folder / kind), "small", str(path), f"--{suffix}"]) == 0
        return path


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, exported: Callable[[str], Path]) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"), exported)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.10
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in EXPORTED else pytest.mark.slow) for kind in SMALL]
)
def test_both_files_have_the_outputs_of_the_network(kind: str, exports: Exports) -> None:
    version, onnx_file, pt2_file = exports.version(kind), exports.file(kind, "onnx"), exports.file(kind, "pt2")
    signature = SIGNATURES[version.card.task](version)
    session = onnxruntime.InferenceSession(onnx_file)
    metadata = dict.fromkeys(("model", "task", "preprocessing", "postprocessing", "card", "labels", "vocabulary"), "")
    program = torch.export.load(pt2_file, extra_files=metadata).module()
    for rows in (1, 5):
        inputs = [inputs_like(example, rows) for example in signature.examples]
        with torch.inference_mode():
            expected = signature.module(*inputs)
            loaded = program(*inputs)
        named = zip(session.get_inputs(), inputs, strict=True)
        answers = session.run(list(expected), {each.name: value.numpy() for each, value in named})
        for name, answer in zip(expected, answers, strict=True):
            assert largest_difference(answer, expected[name]) < MAX_DIFFERENCE
            assert largest_difference(loaded[name], expected[name]) < MAX_DIFFERENCE
    assert [each.shape[0] for each in (*session.get_inputs(), *session.get_outputs())] == ["batch"] * (
        len(inputs) + len(answers)
    )
    for content in (metadata, session.get_modelmeta().custom_metadata_map):
        assert json.loads(content["model"]) == f"{version.card.name}@{version.card.version}"
        assert json.loads(content["card"])["weights_sha256"] == version.card.weights_sha256
        assert json.loads(content["preprocessing"]) == signature.preprocessing
        assert json.loads(content.get("labels") or "null") == version.card.labels
        assert json.loads(content.get("vocabulary") or "null") == version.card.vocabulary
    for file in (onnx_file, pt2_file):
        assert str(ROOT).encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("lenet", "onnx"),
        pytest.param("character-rnn", "onnx", marks=pytest.mark.slow),
        *(pytest.param(kind, "pt2", marks=pytest.mark.slow) for kind in ("lenet", "series-lstm")),
    ],
)
def test_an_exported_file_can_be_imported_again(
    kind: str, suffix: str, exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_import(exports.version(kind), exports.file(kind, suffix), tmp_path, capsys)


@pytest.mark.slow
def test_a_forecaster_without_smoothing_is_exported_as_a_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = publish_tiny(tmp_path, "tiny-forecaster")
    assert version.network().sizes.smoothings == 0
    assert run_models_command(capsys, tmp_path, "export", "tiny-forecaster", str(tmp_path / "x.pt2"), "--pt2")[0] == 0


def check_import(version: Version, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Import an exported file, and compare its outputs with those of the version."""
    assert run_models_command(capsys, tmp_path, "add", str(path), "--name", "again")[::2] == (0, "")
    signature = SIGNATURES[version.card.task](version)
    inputs = [inputs_like(example, 3) for example in signature.examples]
    with torch.inference_mode():
        expected = signature.module(*inputs)
    predictor = TensorPredictor(Store(tmp_path).read("again", 1), torch.device("cpu"))
    arrays = {spec.name: value.numpy() for spec, value in zip(predictor.card.inputs, inputs, strict=True)}
    (outputs,) = predictor.predict([predictor.parse_tensors(arrays)])
    for output, value in expected.items():
        assert largest_difference(outputs[output], value) < MAX_DIFFERENCE
    assert run_models_command(capsys, tmp_path, "export", "again", "--pt2") == (
        *(1, "", "error: again@1 was imported, so it can only be exported to an archive, without --onnx and --pt2\n"),
    )


def test_an_exported_classifier_is_imported_with_its_task(
    exports: Exports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version, path, labels = exports.version("lenet"), exports.file("lenet", "onnx"), tmp_path / "labels"
    labels.write_text("\n".join(version.card.labels or []))
    options = ["--task", "classify", "--labels", str(labels), "--no-softmax", "--interpolation", "bicubic"]
    assert run_models_command(capsys, tmp_path, "add", str(path), "--name", "again", *options)[0] == 0
    versions = version, Store(tmp_path).read("again", 1)
    first, again = (TASKS["classify"].load(each, torch.device("cpu")) for each in versions)
    image = image_bytes()
    (expected,), (actual,) = (each.predict([each.parse(image)]) for each in (first, again))
    assert actual == pytest.approx(expected, abs=MAX_DIFFERENCE)


def test_the_command_exports_the_active_version_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        publish_tiny(tmp_path, "tiny-gan")
    monkeypatch.chdir(tmp_path)
    status, printed, _ = run_models_command(capsys, tmp_path, "export", "tiny-gan", "--pt2", "--json")
    assert (status, json.loads(printed)) == (
        0,
        {"file": "tiny-gan-2.pt2", "bytes": (tmp_path / "tiny-gan-2.pt2").stat().st_size},
    )
    assert run_models_command(capsys, tmp_path, "export", "tiny-gan", "--pt2") == (
        *(1, "", "error: tiny-gan-2.pt2 already exists\n"),
    )
    assert run_models_command(capsys, tmp_path, "export", "tiny-gan@1")[:2][0] == 0
    assert (tmp_path / "tiny-gan-1.zip").is_file()
    assert run_models_command(capsys, tmp_path, "export", "tiny-gan", "--pt2", "--onnx")[0] == 2
    assert run_models_command(capsys, tmp_path, "export", "tiny-gan", "--pt2", "x.pt2")[0] == 0
    assert Path("x.pt2").exists()
    status, _, error = run_models_command(capsys, tmp_path, "export", "tiny-gan", "--json", "a.zip", "b.zip")
    assert status == 2
    assert re.fullmatch("quartet models: error: unrecognized arguments: (a.zip )?b.zip", error.splitlines()[-1])
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".export")]
    for number in (1, 2):
        (tmp_path / "tiny-gan" / str(number) / "card.json").write_text("{}")
    assert run_models_command(capsys, tmp_path, "export", "tiny-gan") == (
        *(1, "", "error: no version of tiny-gan is active; state a version, such as tiny-gan@1\n"),
    )


def test_a_file_with_other_outputs_than_the_network_is_refused(exports: Exports) -> None:
    version = exports.version("lenet")
    signature = SIGNATURES[version.card.task](version)
    content = exports.file("lenet", "onnx").read_bytes()
    with torch.inference_mode():
        expected = signature.module(*signature.examples)
    check_outputs(content, signature.examples, expected, "small@1")
    with pytest.raises(ExportRefused, match=r"^torch cannot export small@1: the file's output 'probabilities' differs"):
        check_outputs(content, signature.examples, {name: each + 0.1 for name, each in expected.items()}, "small@1")
    with pytest.raises(ExportRefused, match=r"^torch cannot export small@1: onnxruntime rejects the file: "):
        check_outputs(content[:-100], signature.examples, expected, "small@1")


def test_the_command_names_a_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # makes the import fail
    assert run_models_command(capsys, tmp_path, "export", "tiny-gan", str(tmp_path / "x.onnx"), "--onnx") == (
        *(1, "", "error: --onnx needs the package 'onnxscript', which the extra [onnx] installs\n"),
    )
    assert not (tmp_path / "x.onnx").exists()
