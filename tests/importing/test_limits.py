"""An import has limited memory and time, and a process of its own. If the process ends, the reason is reported."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.imported.onnx_models import externalise, linear_model
from support.responses import ADMIN_HEADERS, ADMIN_KEY, assert_rejected
from support.service import ROOT, Serve, run_models_command
from support.waiting import wait_until
from torch import Tensor, nn

from app.importing.limits import run_limited
from app.store import Store

MAX_MIB = 1700


def zipped(path: Path, entries: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_small_upload_that_becomes_large_is_rejected_within_limited_memory(tmp_path: Path, store: Path) -> None:
    empty_nodes = b"\x3a\x80\x80\x80\x32" + b"\x0a\x00" * (50 * 2**20)  # a graph of 100 MiB
    zipped(tmp_path / "upload", {"net.onnx": b"\x42\x00" + empty_nodes})
    code = (
        "import resource, sys; from app.importing.limits import run_limited; status = run_limited(sys.argv[1:], 120); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024); sys.exit(status)"
    )
    options = ["--name", "net", "--store", str(store)]
    command = [sys.executable, "-c", code, "add", str(tmp_path / "upload"), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: net.onnx: the file is not an ONNX model, or too large: ")
    assert int(result.stdout) < MAX_MIB


@pytest.mark.parametrize(
    ("code", "seconds", "reason"),
    [
        ("import signal\nsignal.pause()", 0.1, "took more than 0.1 s"),
        (
            "import os\nos.kill(os.getpid(), 9)",  # as the operating system does
            60,
            "was ended by SIGKILL: it may need too much memory, or divide integers by 0",
        ),
    ],
)
def test_the_end_of_an_import_process_is_an_error(
    code: str,
    seconds: float,
    reason: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The code runs when the process starts, instead of the import."""
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_limited(["add", "net.onnx"], seconds) == 1
    assert capfd.readouterr().err == f"error: the import {reason}\n"


def test_an_uploaded_network_is_served(serve: Serve, tmp_path: Path) -> None:
    model, matrix = linear_model()
    externalise(model, "matrix.bin", length=matrix.nbytes)
    model.doc_string = "\x7f" * 2**21  # the upload is written in parts of 1 MiB
    file = model.SerializeToString()
    content = zipped(tmp_path / "net.zip", {"net.onnx": file, "matrix.bin": matrix.tobytes()})
    with serve(store_poll_seconds=0.02, admin_key=ADMIN_KEY) as client:
        client.headers.update(ADMIN_HEADERS)
        path = "/v1/admin/add?name=net&licence=MIT"
        rejected = client.post(path, content=file)
        assert_rejected(rejected, 400, "body", "over HTTP, send a ZIP archive of the model and its data")
        answer = client.post(path, content=content)
        assert answer.status_code == 200, answer.text
        assert (answer.json()["imported"], answer.json()["task"]) == (1, "infer")
        wait_until(lambda: client.get("/v1/models/net").status_code == 200)
        card = client.get("/v1/models/net").json()["card"]
        assert (card["licence"], card["title"]) == ("MIT", "net")


class Scores(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": x.sum(1), "cumsum": x * 2}


class Singular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


def export(module: nn.Module, *inputs: Tensor, sizes: dict[str, dict[int, Any]] | None = None) -> bytes:
    """Return the ``.pt2`` file of a module. ``sizes`` names the variable dimensions of each input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own code causes warnings
        file = io.BytesIO()
        torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=sizes), file)
    return file.getvalue()


@pytest.mark.slow
def test_a_program_of_torch_is_converted(tmp_path: Path) -> None:
    """The converted network has the outputs of torch, their names, and its varying dimensions."""
    sizes = {"x": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=64)}}
    (tmp_path / "net.pt2").write_bytes(export(Scores(), torch.ones(2, 5), sizes=sizes))
    assert run_limited(["add", str(tmp_path / "net.pt2"), "--name", "net", "--store", str(tmp_path)]) == 0
    version = Store(tmp_path).read("net", 1)
    assert version.card.sizes["batched"] is True
    assert [(spec.name, spec.shape) for spec in version.card.outputs] == [("scores", [-1]), ("cumsum", [-1, -1])]
    x = np.random.default_rng(0).random((3, 7), np.float32)
    outputs = version.network().run({"x": x})
    np.testing.assert_allclose(outputs["scores"], x.sum(1), rtol=1e-5)
    np.testing.assert_allclose(outputs["cumsum"], x * 2, rtol=1e-5)


@pytest.mark.slow
def test_a_program_that_cannot_be_converted_is_rejected_with_its_operator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "svd.pt2").write_bytes(export(Singular(), torch.ones(2, 4, 4)))
    (tmp_path / "empty.pt2").write_bytes(b"")
    reasons = {"svd": "torch cannot convert svd.pt2 to ONNX: No ONNX function found for ", "empty": "not a program"}
    for name, reason in reasons.items():
        error = run_models_command(capsys, tmp_path, "add", str(tmp_path / f"{name}.pt2"), "--name", "net")[2]
        assert reason in error
        assert error.count("\n") == 1
