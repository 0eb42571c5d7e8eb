"""A new architecture needs one file in app/networks, one file in training, and one line in each of two tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.service import TEST, serving
from support.toy import network, training

from app.networks import KINDS, Kind
from app.settings import Settings
from app.store import Store
from app.tasks.image_codecs import png
from training.evaluation import evaluate
from training.evaluation.evaluate import SCRIPTS


def test_a_toy_architecture_is_trained_published_served_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # These are the two lines that register the architecture.
    monkeypatch.setitem(KINDS, "toy-net", Kind(network.ToyNet, network.ToyNetSizes, "classify"))
    monkeypatch.setitem(SCRIPTS, "support.toy.training", training)
    folder = tmp_path / "store"
    training.main(
        ["--threads", "1", "--device", "cpu", "--runs", str(tmp_path / "runs"), "--store", str(folder), "--seed", "3"]
    )
    assert Store(folder).card("toy", 1).metrics["accuracy"].value > 0.9
    images, labels = training.draw_bars(16, seed=2)
    files = [("file", ("bar.png", png(image), "image/png")) for image in images.numpy()]
    with serving(Settings(store=folder, **TEST)) as client:
        answer = client.post("/v1/images/classify?explain=true", files=files).raise_for_status().json()
        predictions = torch.tensor([result["predictions"][0]["index"] for result in answer["results"]])
        assert (predictions == labels).double().mean() > 0.8
        assert all(result["explanation"] for result in answer["results"])
        tensor = {"name": "image", "datatype": "UINT8", "shape": list(images.shape), "data": images.flatten().tolist()}
        outputs = client.post("/v2/models/toy/infer", json={"inputs": [tensor]}).raise_for_status().json()["outputs"]
        assert outputs[0]["shape"] == [16, 2]
    assert evaluate.main(["--store", str(folder)]) == 0
    assert "accuracy" in capsys.readouterr().out
    monkeypatch.delitem(SCRIPTS, "support.toy.training")
    assert evaluate.main(["--store", str(folder)]) == 1
    assert "command names the module 'support.toy.training'; allowed are training.cnn" in capsys.readouterr().out
