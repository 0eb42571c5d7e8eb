"""A new architecture needs one file in app/networks, one file in training, and one line in each of two tables."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.service import TEST, serving
from support.toy import network, training

from app.networks import KINDS, Kind
from app.settings import Settings
from app.store import Store
from training.evaluation import evaluate
from training.evaluation.evaluate import SCRIPTS


@pytest.fixture
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add the two lines that register the toy architecture."""
    monkeypatch.setitem(KINDS, "toy-net", Kind(network.ToyNet, network.ToyNetSizes, "classify"))
    monkeypatch.setitem(SCRIPTS, "support.toy.training", training)


@pytest.fixture
def toy_store(_toy: None, tmp_path: Path) -> Path:
    """Return a store with the toy network, which its script has trained and published."""
    folder = tmp_path / "store"
    training.main(
        ["--threads", "1", "--device", "cpu", "--runs", str(tmp_path / "runs"), "--store", str(folder), "--seed", "3"]
    )
    return folder


def test_a_toy_architecture_is_trained_published_and_served(toy_store: Path) -> None:
    card = Store(toy_store).read("toy", 1).card
    assert card.kind == "toy-net"
    assert card.command.startswith("python -m support.toy.training ")
    assert card.metrics["accuracy"].value > 0.9
    images, labels = training.draw_bars(16, seed=2)
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, "PNG")
        files.append(("file", ("bar.png", file.getvalue(), "image/png")))
    with serving(Settings(store=toy_store, **TEST)) as client:
        assert [model["task"] for model in client.get("/v1/models").json()["data"]] == ["classify"]
        answer = client.post("/v1/images/classify?explain=true", files=files).raise_for_status().json()
        predictions = torch.tensor([result["predictions"][0]["index"] for result in answer["results"]])
        assert (predictions == labels).double().mean() > 0.8
        assert all(result["explanation"] for result in answer["results"])
        metadata = client.get("/v2/models/toy").json()
        assert metadata["inputs"][0]["shape"] == [-1, 1, 8, 8]
        tensor = {"name": "image", "datatype": "UINT8", "shape": list(images.shape), "data": images.flatten().tolist()}
        outputs = client.post("/v2/models/toy/infer", json={"inputs": [tensor]}).raise_for_status().json()["outputs"]
        assert outputs[0]["shape"] == [16, 2]


def test_a_toy_architecture_is_evaluated(
    toy_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--store", str(toy_store)]) == 0
    assert "accuracy" in capsys.readouterr().out
    monkeypatch.delitem(SCRIPTS, "support.toy.training")
    assert evaluate.main(["--store", str(toy_store)]) == 1
    assert "command names the module 'support.toy.training'; allowed are training.cnn" in capsys.readouterr().out
