"""The guides for importing a model, and for moving from TorchServe and Triton, work with small networks."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.imported.onnx_models import forest, square_classifier
from support.service import ROOT, TEST, serving
from torch import Tensor, nn
from tritonclient import http as triton

from app.cli import models
from app.settings import Settings
from app.store import Store

GUIDES = ROOT / "docs" / "how-to"
MODEL = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(676, 10))

    def forward(self, image):
        return self.layers(image)
"""


def run_add_commands(page: Path, store: Path) -> None:
    """Run the `add` commands of a page on files in the current folder."""
    store.mkdir()
    text = page.read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"^    \.venv/bin/quartet models (add .*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        assert models.main([*shlex.split(command), "--store", str(store)]) == 0


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


@pytest.mark.slow
def test_the_guide_for_importing_a_model_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = GUIDES / "networks" / "import-a-model.md"
    blocks = re.findall(r"^(?:    .*\n|\n)+", page.read_text("utf-8"), re.MULTILINE)
    scripts = [textwrap.dedent(block) for block in blocks if "torch.export.save" in block or "to_onnx" in block]
    model, rows, _ = forest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own code
        for script in scripts:
            exec(script, {"network": Pooled(), "forest": model, "rows": rows, "Path": Path})
    (tmp_path / "resnet.onnx").write_bytes(square_classifier(["n", 3, 224, 224], 224, 5).SerializeToString())
    (tmp_path / "imagenet.txt").write_text("a\nb\nc\nd\ne\n")
    (tmp_path / "vit").mkdir()
    vit = square_classifier(["batch_size", "num_channels", "height", "width"], 224, 5)
    (tmp_path / "vit" / "model.onnx").write_bytes(vit.SerializeToString())
    run_add_commands(page, tmp_path / "store")
    assert models.main(["add", "forest.onnx", "--name", "forest", "--store", "store"]) == 0
    assert Store(tmp_path / "store").numbers("resnet") == [1, 2]
    assert sorted(Store(tmp_path / "store").names()) == ["forest", "resnet", "vit"]


@pytest.mark.slow
def test_a_torchserve_archive_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "model", raising=False)
    space: dict[str, object] = {}
    exec(MODEL, space)
    torch.manual_seed(0)
    network = space["Net"]()  # type: ignore[operator]
    weights = io.BytesIO()
    torch.save(network.state_dict(), weights)
    manifest = {"model": {"modelName": "digits", "serializedFile": "digits.pth", "modelFile": "model.py"}}
    with zipfile.ZipFile("digits.mar", "w") as archive:  # as torch-model-archiver writes it
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("digits.pth", weights.getvalue())
        archive.writestr("model.py", MODEL)
        names: dict[str, str | list[str]] = {str(digit): f"digit {digit}" for digit in range(10)}
        names["9"] = ["n09", "digit 9"]  # archives for ImageNet have lists
        archive.writestr("index_to_name.json", json.dumps(names))
    page = GUIDES / "from-torchserve.md"
    (script,) = re.findall(r"^```py\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code, and the script does not close its files
        exec(script, {})
    sys.modules.pop("model", None)
    run_add_commands(page, tmp_path / "store")
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    with serving(Settings(store=tmp_path / "store", **TEST)) as client:
        path = "/v1/images/classify?model=digits&top_k=10"
        answer = client.post(path, content=file.getvalue(), headers={"content-type": "image/png"}).raise_for_status()
    predictions = {each["label"]: each["probability"] for each in answer.json()["results"][0]["predictions"]}
    with torch.inference_mode():
        image = (torch.from_numpy(pixels)[None, None] / 255 - 0.1307) / 0.3081
        expected = network.eval()(image)[0].softmax(0)
    for digit, probability in enumerate(expected.tolist()):
        assert predictions[f"digit {digit}"] == pytest.approx(probability, abs=1e-5)


def test_a_triton_repository_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, rows, content = forest()
    folder = tmp_path / "repository" / "forest" / "1"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(content)
    (folder.parent / "config.pbtxt").write_text('name: "forest"\nplatform: "onnxruntime_onnx"\nmax_batch_size: 64\n')
    run_add_commands(GUIDES / "from-triton.md", tmp_path / "store")
    with serving(Settings(store=tmp_path / "store", **TEST)) as service:
        client = triton.InferenceServerClient(service.base_url.netloc.decode())
        tensor = triton.InferInput("X", list(rows.shape), "FP32")
        tensor.set_data_from_numpy(rows)
        result = client.infer("forest", [tensor], model_version="1")
        np.testing.assert_allclose(result.as_numpy("probabilities"), model.predict_proba(rows), atol=1e-5)
        config = client.get_model_config("forest")
        assert (config["platform"], config["max_batch_size"] > 1) == ("onnxruntime_onnx", True)
        assert client.is_model_ready("forest", "1")
