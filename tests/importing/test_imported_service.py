"""An imported network is a normal version.

It is served under its own tensor names, and can be batched, archived and rolled out.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from support.imported.programs import export, export_cnn, export_transformer
from support.service import TEST, serving
from torch import Tensor, nn
from tritonclient import http as triton

from app import store
from app.api.open_inference.encode import encode_response
from app.cli import models
from app.importing.memory import check_archived
from app.networks.imported.exported_program import GRAPH, ExportedProgram, graph_tensor, read_graph
from app.settings import Settings
from app.store import StoreError, archive, catalogue


class Cumulative(nn.Module):
    """A network whose outputs depend on several rows, so that requests cannot be batched."""

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"total": x.sum(0) * scale, "share": x / x.sum(0)}


def add(store: Path, content: bytes, name: str, *options: str) -> None:
    """Import a file as the command line does."""
    path = store.parent / f"{name}.pt2"
    path.write_bytes(content)
    store.mkdir(exist_ok=True)
    assert models.main(["add", str(path), "--name", name, "--store", str(store), *options]) == 0


@pytest.fixture(scope="module")
def networks() -> dict[str, tuple[nn.Module, bytes]]:
    mixing = Cumulative()
    rows = torch.export.Dim("rows", min=1, max=100)
    sizes: dict[str, Any] = {"x": {0: rows}, "scale": {}}
    return {
        "cnn": export_cnn(),
        "transformer": export_transformer(),
        "fixed": (nn.Softmax(0), export(nn.Softmax(0), torch.ones(3, 2))),
        "mixing": (mixing, export(mixing, torch.ones(4, 2), torch.ones(2), sizes=sizes)),
    }


@pytest.fixture(scope="module")
def folder(networks: dict[str, tuple[nn.Module, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("imported") / "store"
    origin = ("--licence", "MIT", "--source", "https://example.org/cnn", "--title", "A CNN")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.tasks.speed.SECONDS", 0.0)
        for name, (_, content) in networks.items():
            add(store, content, name, *(origin if name == "cnn" else ()))
    return store


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    with serving(Settings(store=folder, **TEST)) as client:
        yield client


def infer(client: httpx.Client, model: str, **tensors: np.ndarray) -> dict[str, np.ndarray]:
    """Send binary tensors with Triton's client, and return the outputs by name."""
    server = triton.InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}")
    inputs = []
    for name, array in tensors.items():
        inputs.append(triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    result = server.infer(model, inputs)
    return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}


def test_the_card_describes_the_network(client: httpx.Client) -> None:
    card = client.get("/v1/models/cnn").json()["card"]
    assert (card["kind"], card["task"], card["title"]) == ("exported-program", "infer", "A CNN")
    assert (card["licence"], card["source"]) == ("MIT", "https://example.org/cnn")
    assert card["inputs"] == [{"name": "image", "dtype": "float32", "shape": [-1, 3, 8, 8]}]
    assert card["outputs"] == [{"name": "linear", "dtype": "float32", "shape": [-1, 3]}]
    assert card["sizes"]["batched"] is True
    assert card["sizes"]["max_rows"] == 64
    assert card["speed"]["per_second"] > 0
    assert [name for name in card["metrics"] if name.startswith("milliseconds")] == [
        f"milliseconds_for_{rows}_rows" for rows in (1, 8, 64)
    ]
    metadata = client.get("/v2/models/cnn").json()
    assert metadata["platform"] == "pytorch_pt2"
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 8, 8]}]
    assert client.get("/v2/models/cnn/config").json()["max_batch_size"] > 0
    assert client.get("/v2/models/mixing/config").json()["max_batch_size"] == 0


def test_the_card_tells_the_memory_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory includes the weights, although they are read before the measurement."""
    monkeypatch.setattr("app.tasks.speed.SECONDS", 0.0)
    weights_mib = 8
    network = nn.Linear(1024, weights_mib * 256)
    sizes = {"input": {0: torch.export.Dim("batch", max=64)}}
    add(tmp_path / "store", export(network, torch.zeros(2, 1024), sizes=sizes), "large")
    assert store.read_version(tmp_path / "store", "large", 1).card.metrics["memory_mib"].value >= weights_mib


class RunningTotal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


@pytest.mark.parametrize(
    ("low", "high", "size"), [(2, 8, -1), (2, 3, -1), (2, 16, -1), (16, 17, -1), (17, 18, -1), (32, 64, -1), (5, 5, 5)]
)
def test_the_card_tells_varying_sizes_of_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low: int, high: int, size: int
) -> None:
    monkeypatch.setattr("app.tasks.speed.SECONDS", 0.0)
    length: dict[int, Any] = {} if low == high else {1: torch.export.Dim("length", min=low, max=high)}
    sizes = {"x": {0: torch.export.Dim("batch", max=64), **length}}
    add(tmp_path / "store", export(RunningTotal(), torch.zeros(2, high), sizes=sizes), "total")
    card = store.read_version(tmp_path / "store", "total", 1).card
    assert [spec.shape for spec in (*card.inputs, *card.outputs)] == [[-1, size], [-1, size]]


class LargestOfPairs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x[:, None], (1, 2))[:, 0]


@pytest.mark.parametrize(("task", "width"), [("infer", -1), ("forecast", 8)])  # a task needs the size of the output
def test_an_output_with_half_the_size_of_the_input_varies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, width: int
) -> None:
    """The outputs for the two sizes of the test, 16 and 17, have the same size."""
    monkeypatch.setattr("app.tasks.speed.SECONDS", 0.0)
    sizes = {"x": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=4, max=64)}}
    options = ("--task", task, *(("--context", "16") if task == "forecast" else ()))
    add(tmp_path / "store", export(LargestOfPairs(), torch.zeros(2, 8), sizes=sizes), "pairs", *options)
    assert store.read_version(tmp_path / "store", "pairs", 1).card.outputs[0].shape == [-1, width]


def test_outputs_equal_those_of_torch(client: httpx.Client, networks: dict[str, tuple[nn.Module, bytes]]) -> None:
    images = torch.randn(5, 3, 8, 8)
    tokens = torch.randint(0, 11, (3, 7))
    x, scale = torch.rand(6, 2), torch.tensor([2.0, 3.0])
    with torch.inference_mode():
        expected = networks["cnn"][0](images).numpy()
        logits = networks["transformer"][0](tokens).numpy()
        mixed = networks["mixing"][0](x, scale)
    np.testing.assert_allclose(infer(client, "cnn", image=images.numpy())["linear"], expected, atol=1e-5)
    (output,) = infer(client, "transformer", tokens=tokens.numpy()).values()
    np.testing.assert_allclose(output, logits, atol=1e-5)
    outputs = infer(client, "mixing", x=x.numpy(), scale=scale.numpy())
    assert list(outputs) == ["total", "share"]
    for name, output in outputs.items():
        np.testing.assert_allclose(output, mixed[name].numpy(), atol=1e-5)


def test_a_network_without_rows_reads_a_body_without_json(client: httpx.Client) -> None:
    x = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    answer = client.post(
        "/v2/models/fixed/infer", content=x.tobytes(), headers={"inference-header-content-length": "0"}
    )
    assert answer.status_code == 200, answer.text
    expected = torch.from_numpy(x).softmax(0).numpy()
    np.testing.assert_allclose(np.frombuffer(answer.content[-24:], "<f4").reshape(3, 2), expected, atol=1e-6)


def test_large_outputs_of_small_inputs_are_encoded_on_another_thread(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def encode(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return encode_response(*arguments)

    monkeypatch.setattr("app.api.open_inference.infer.encode_response", encode)
    for rows in (1, 40):  # with 330 and 13,200 values in the output
        tokens = {"name": "tokens", "datatype": "INT64", "shape": [rows, 30], "data": [1] * 30 * rows}
        assert client.post("/v2/models/transformer/infer", json={"inputs": [tokens]}).status_code == 200
    assert threads[0] is not threads[1]


def test_requests_of_several_shapes_at_a_time_get_their_own_outputs(
    client: httpx.Client, networks: dict[str, tuple[nn.Module, bytes]]
) -> None:
    requests = [torch.randint(0, 11, (1 + index % 3, 2 + index % 5)) for index in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda tokens: infer(client, "transformer", tokens=tokens.numpy()), requests))
    for tokens, answer in zip(requests, answers, strict=True):
        with torch.inference_mode():
            expected = networks["transformer"][0](tokens).numpy()
        np.testing.assert_allclose(next(iter(answer.values())), expected, atol=1e-5)
    statistics = client.get("/v2/models/transformer/stats").json()["model_stats"][0]
    assert statistics["inference_count"] >= sum(map(len, requests))
    assert 'quartet_batch_rows_count{model="transformer"' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("model", "tensors", "message"),
    [
        ("cnn", {"image": np.zeros((1, 3, 8, 9), np.float32)}, "expected [-1, 3, 8, 8]"),
        ("cnn", {"image": np.zeros((1, 3, 8, 8), np.float64)}, "is of FP64; allowed types: FP32"),
        ("cnn", {"picture": np.zeros((1, 3, 8, 8), np.float32)}, "unknown input 'picture'; known inputs: image"),
        ("transformer", {"tokens": np.zeros((1, 33), np.int64)}, "expected 1 to 32 in dimension 1"),
        ("transformer", {"tokens": np.full((1, 3), 11, np.int64)}, "transformer cannot read this input: index out of"),
        ("mixing", {"x": np.ones((3, 2), np.float32)}, "input 'scale' is missing"),
        (
            "mixing",
            {"x": np.ones((101, 2), np.float32), "scale": np.ones(2, np.float32)},
            "all inputs together should have 1 to 202 values",
        ),
    ],
)
def test_wrong_inputs_are_rejected_by_name(
    client: httpx.Client, model: str, tensors: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(triton.InferenceServerException) as caught:
        infer(client, model, **tensors)
    assert caught.value.status() == "400"
    assert message in caught.value.message()
    assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("error", "status", "ready"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), 503, 503),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), 500, 503),
        (RuntimeError("index out of bounds"), 400, 200),
        (RuntimeError("could not create a primitive"), 400, 200),  # also raised for tensors that are too large
    ],
)
def test_errors_of_the_device_are_not_the_callers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, ready: int
) -> None:
    """They count as failures of the network, so that requests go to another process."""
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [0.0] * 192}

    def fail(*_: Any) -> None:
        raise error

    with serving(Settings(store=folder, **TEST)) as client:
        monkeypatch.setattr(ExportedProgram, "run", fail)
        for _ in range(3):
            answer = client.post("/v2/models/cnn/infer", json={"inputs": [tensor]})
            assert answer.status_code == status, answer.text
        assert client.get("/health/ready").status_code == ready


class Standardising(nn.Module):
    """A forecaster that returns NaN for a constant series."""

    def forward(self, series: Tensor) -> Tensor:
        return ((series - series.mean(1, keepdim=True)) / series.std(1, keepdim=True))[:, -4:]


class Brightest(nn.Module):
    """A classifier that returns NaN for a black image."""

    def forward(self, image: Tensor) -> Tensor:
        colours = image.mean((2, 3))
        return colours / colours.amax(1, keepdim=True)


class Repeating(nn.Module):
    """A text network that repeats the last character. It returns NaN after the character of index 2."""

    def forward(self, tokens: Tensor) -> Tensor:
        same = nn.functional.one_hot(tokens, 3).float()
        return same * 50 / (tokens != 2)[..., None]


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def test_an_input_without_a_finite_output_is_the_callers_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such inputs do not make the process report that it is not ready, and other requests are answered."""
    monkeypatch.setattr("app.tasks.speed.SECONDS", 0.0)
    folder, batch, length = tmp_path / "store", torch.export.Dim("batch", max=64), torch.export.Dim("length", max=32)
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "characters.json").write_text('["a", "b", "c"]')
    series, image, tokens = torch.zeros(2, 8), torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, dtype=torch.int64)
    add(folder, export(Standardising(), series, sizes={"series": {0: batch}}), "series", "--task", "forecast")
    options = ("--task", "classify", "--labels", str(tmp_path / "labels.txt"))
    add(folder, export(Brightest(), image, sizes={"image": {0: batch}}), "colours", *options)
    options = ("--task", "continue", "--vocabulary", str(tmp_path / "characters.json"))
    add(folder, export(Repeating(), tokens, sizes={"tokens": {0: batch, 1: length}}), "texts", *options)
    forecast: dict[str, Any] = {"horizon": 2, "levels": []}
    requests: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        (
            "/v1/series/forecast",
            {"json": {"values": [5.0] * 8, **forecast}},
            {"json": {"values": [*range(8)], **forecast}},
        ),
        ("/v1/images/classify", {"content": png("black")}, {"content": png("red")}),
        ("/v1/text/continue", {"json": {"prompt": "abc"}}, {"json": {"prompt": "ab"}}),
    ]
    with serving(Settings(store=folder, **TEST)) as client, ThreadPoolExecutor(8) as pool:
        for path, wrong, right in requests:
            futures = [pool.submit(client.post, path, **body) for body in [wrong, right] * 8]
            answers = [future.result() for future in futures]
            assert [answer.status_code for answer in answers] == [400, 200] * 8, answers[0].text
            assert "returns no finite" in answers[0].json()["error"]["message"]
            for _ in range(4):
                assert client.post(path, **wrong).status_code == 400
            assert client.get("/health/ready").status_code == 200


def test_an_imported_network_has_no_native_endpoint(client: httpx.Client) -> None:
    answer = client.post("/v1/series/forecast", json={"values": [1.0] * 9, "model": "cnn"})
    assert answer.status_code == 400
    assert "model 'cnn' is for the task 'infer'" in answer.json()["error"]["message"]


def test_versions_are_verified_archived_and_rolled_out(folder: Path, tmp_path: Path) -> None:
    assert all(not row["problem"] for row in catalogue.verify(folder))
    other = tmp_path / "store"
    other.mkdir()
    content = io.BytesIO(b"".join(archive.export_version(folder, "cnn", 1)))
    assert archive.import_archive(other, content, 2**20).kind == "exported-program"
    content.seek(0)
    archive.import_archive(other, content, 2**20, renumber=True)
    assert models.main(["activate", "cnn", "1", "--store", str(other)]) == 0
    assert models.main(["activate", "cnn", "2", "--share", "10", "--store", str(other)]) == 0
    assert models.main(["diff", "cnn", "1", "2", "--store", str(other)]) == 0
    with serving(Settings(store=other, **TEST)) as client:
        assert client.get("/v1/models/cnn").json()["canary"] == {"version": 2, "share": 10.0}
        assert infer(client, "cnn", image=np.zeros((1, 3, 8, 8), np.float32))["linear"].shape == (1, 3)


@pytest.mark.parametrize("device", [{}, {"device": "cpu"}, {"device": {"device": ""}}])
def test_an_archive_cannot_exceed_the_memory_limit(folder: Path, tmp_path: Path, device: dict[str, Any]) -> None:
    version = store.read_version(folder, "cnn", 1)
    graph = read_graph(version.tensors)
    fill = {"op": "aten.full.default", "args": [[2**38], 1.0], "kwargs": device, "outputs": "large"}
    total = {"op": "aten.sum.default", "args": [{"value": "large"}], "kwargs": {}, "outputs": "total"}
    graph["nodes"] += [fill, total]
    card = version.card.model_dump(exclude={"version", "weights_sha256"})
    store.publish(tmp_path, card, {**version.tensors, GRAPH: graph_tensor(graph)})
    content = io.BytesIO(b"".join(archive.export_version(tmp_path, "cnn", 1)))
    (tmp_path / "cnn.zip").write_bytes(content.getvalue())
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(StoreError, match="one run needs 1,099,511,"):
        archive.import_archive(other, content, 2**20, check=check_archived)
    assert models.main(["import", str(tmp_path / "cnn.zip"), "--store", str(other)]) == 1
    assert not (other / "cnn").exists()


def test_a_changed_graph_is_not_served(folder: Path, tmp_path: Path) -> None:
    """The checks of the import also apply to versions that reach the store in another way."""
    source = folder / "cnn" / "1"
    target = tmp_path / "store" / "cnn" / "1"
    target.mkdir(parents=True)
    weights = (source / "model.safetensors").read_bytes().replace(b"aten.relu.default", b"aten.save.default")
    (target / "model.safetensors").write_bytes(weights)
    card = json.loads((source / "card.json").read_text()) | {"weights_sha256": hashlib.sha256(weights).hexdigest()}
    (target / "card.json").write_text(json.dumps(card))
    (row,) = (row for row in catalogue.verify(tmp_path / "store") if "@" in row["what"])
    assert "operator 'aten.save.default' is not allowed" in row["problem"]
