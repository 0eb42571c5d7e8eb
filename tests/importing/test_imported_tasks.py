"""Imported networks serve the tasks that their tensors fit.

The import rejects other networks with a message that names the unsuitable tensor.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from onnx import helper
from PIL import Image
from support.imported.onnx_models import bigram_model, onnx_model
from support.imported.programs import SmallTransformer, export, export_cnn, export_transformer
from support.service import TEST, serving
from torch import Tensor, nn

from app.cli import models
from app.settings import Settings
from app.store import StoreError, read_version
from app.tasks import check_loading
from app.tasks.imported import ImportedTextGenerator
from app.tasks.imported.text_generation import ByteContinuation
from app.tasks.latency_model import LatencyModel
from app.tasks.text_generation import Prompt

BATCH = torch.export.Dim("batch", max=64)
VOCABULARY = list("\n abcdefghi")
LABELS = ["cat", "dog", "bird"]


class Sampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3 * 16)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        classes = nn.functional.one_hot(y, 2).to(z.dtype)
        return torch.tanh(self.linear(torch.cat([z, classes], 1))).reshape(-1, 3, 4, 4)


class Forecaster(nn.Module):
    """A forecaster that adds 1 to the last value at each step. Its quantiles have these distances to the forecast."""

    def __init__(self, *quantiles: int) -> None:
        super().__init__()
        self.quantiles = quantiles

    def forward(self, series: Tensor) -> Tensor:
        points = series[:, -1:] + torch.arange(1, 7)
        return torch.stack([points + distance for distance in self.quantiles], 2) if self.quantiles else points


class CharacterGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.cell = nn.GRUCell(6, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, token: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.cell(self.embedding(token), hidden)
        return self.head(hidden), hidden


@pytest.fixture(scope="module")
def networks() -> dict[str, tuple[nn.Module, bytes]]:
    torch.manual_seed(0)
    sampler, points, quantiles, gru = Sampler(), Forecaster(), Forecaster(-1, 0, 1), CharacterGRU()
    latents, classes, series = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 12)
    rows = {0: BATCH}
    return {
        "cnn": export_cnn(),
        "gan": (sampler, export(sampler, latents, classes, sizes={"z": rows, "y": rows})),
        "points": (points, export(points, series, sizes={"series": rows})),
        "quantiles": (quantiles, export(quantiles, series, sizes={"series": rows})),
        "median": (Forecaster(0), export(Forecaster(0), series, sizes={"series": rows})),
        "gru": (gru, export(gru, classes, torch.zeros(2, 8), sizes={"token": rows, "hidden": rows})),
        "transformer": export_transformer(),
    }


@pytest.fixture(scope="module")
def files(networks: dict[str, tuple[nn.Module, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the networks, labels and a vocabulary."""
    folder = tmp_path_factory.mktemp("files")
    for name, (_, content) in networks.items():
        (folder / f"{name}.pt2").write_bytes(content)
    (folder / "labels.txt").write_text("\n".join(LABELS))
    (folder / "two.txt").write_text("zero\none\n")
    (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY))
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Softmax", ["mean"], ["y"]),
    ]
    model = onnx_model(nodes, {"x": ["batch", 8, 8, 3]}, {"y": ["batch", 3]})
    (folder / "mean.onnx").write_bytes(model.SerializeToString())
    return folder


OPTIONS: dict[str, list[str]] = {
    "cnn": ["--task", "classify", "--labels", "labels.txt", "--resize", "10", "--mean", "0.5", "--std", "0.5,0.4,0.3"],
    "gan": ["--task", "sample", "--classes", "y", "--labels", "two.txt"],
    "points": ["--task", "forecast"],
    "quantiles": ["--task", "forecast", "--quantiles", "0.1,0.5,0.9", "--standardise"],
    "median": ["--task", "forecast", "--quantiles", "0.5"],
    "gru": ["--task", "continue", "--vocabulary", "vocabulary.json", "--states", "hidden", "--next-states", "NEXT"],
    "transformer": ["--task", "continue", "--vocabulary", "vocabulary.json", "--context", "16"],
}


def add(files: Path, store: Path, name: str, *options: str, suffix: str = ".pt2") -> int:
    """Run the import command. Options that are names of files are replaced by the paths of these files."""
    paths = [str(files / option) if (files / option).is_file() else option for option in options]
    store.mkdir(exist_ok=True)
    return models.main(["add", str(files / f"{name}{suffix}"), "--name", name, "--store", str(store), *paths])


@pytest.fixture(scope="module")
def client(files: Path) -> Iterator[httpx.Client]:
    store = files / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.tasks.speed.SECONDS", 0.0)
        assert add(files, store, "gru") == 0
        following = json.loads((store / "gru" / "1" / "card.json").read_text())["outputs"][1]["name"]
        for name, options in OPTIONS.items():
            assert add(files, store, name, *(following if option == "NEXT" else option for option in options)) == 0
        assert add(files, store, "mean", *OPTIONS["cnn"][:4], "--no-softmax", suffix=".onnx") == 0
    with serving(Settings(store=store, **TEST)) as client:
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_images_are_resized_cropped_and_normalised(
    client: httpx.Client, networks: dict[str, tuple[nn.Module, bytes]]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 45, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    answer = client.post(
        "/v1/images/classify?model=cnn", content=file.getvalue(), headers={"content-type": "image/png"}
    )
    predictions = {each["label"]: each["probability"] for each in answer.json()["results"][0]["predictions"]}
    assert set(predictions) == set(LABELS)
    resized = Image.fromarray(pixels).resize((15, 10), Image.Resampling.BILINEAR)  # the shorter side has 10 pixels
    cropped = torch.from_numpy(np.asarray(resized.crop((4, 1, 12, 9))).copy()).permute(2, 0, 1) / 255
    image = (cropped - 0.5) / torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    with torch.inference_mode():
        expected = networks["cnn"][0](image[None])[0].softmax(0)
    for label, probability in zip(LABELS, expected.tolist(), strict=True):
        assert predictions[label] == pytest.approx(probability, abs=0.01)
    explained = client.post("/v1/images/classify?model=cnn&explain=true", content=file.getvalue())
    assert explained.status_code == 400
    assert "heat maps are not supported for imported networks" in explained.json()["error"]["message"]


@pytest.mark.usefixtures("client")
def test_a_card_with_thresholds_has_one_for_each_label(files: Path) -> None:
    version = read_version(files / "store", "cnn", 1)
    version = replace(version, card=version.card.model_copy(update={"thresholds": [0.5]}))
    with pytest.raises(StoreError, match=r"^cnn@1: there are 1 thresholds, expected 3$"):
        check_loading(version)


def test_channels_may_come_last_and_outputs_be_probabilities(client: httpx.Client) -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (255, 0, 0)).save(file, "PNG")
    answer = client.post(
        "/v1/images/classify?model=mean", content=file.getvalue(), headers={"content-type": "image/png"}
    )
    predictions = {each["label"]: each["probability"] for each in answer.json()["results"][0]["predictions"]}
    expected = torch.tensor([1.0, 0.0, 0.0]).softmax(0).tolist()
    assert [predictions[label] for label in LABELS] == pytest.approx(expected, abs=1e-4)


def test_tensor_requests_get_the_classes_of_an_output(client: httpx.Client) -> None:
    image = {"name": "x", "datatype": "FP32", "shape": [1, 8, 8, 3], "data": [1.0, 0.0, 2.0] * 64}
    best = {"name": "y", "parameters": {"classification": 2}}
    output = post(client, "/v2/models/mean/infer", inputs=[image], outputs=[best])["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 2])
    assert output["data"] == ["0.665241:2:bird", "0.244728:0:cat"]  # the softmax of 1, 0 and 2
    series = {"name": "series", "datatype": "FP32", "shape": [1, 12], "data": [*range(12)]}
    name = client.get("/v2/models/points").json()["outputs"][0]["name"]
    largest = {"name": name, "parameters": {"classification": 1}}
    (output,) = post(client, "/v2/models/points/infer", inputs=[series], outputs=[largest])["outputs"]
    assert output["data"] == ["17.000000:5"]  # without labels


def test_images_are_generated_by_label_and_seed(
    client: httpx.Client, networks: dict[str, tuple[nn.Module, bytes]]
) -> None:
    body = {"model": "gan", "count": 3, "label": "one", "seed": 7}
    answers = [post(client, "/v1/images/sample", **body) for _ in range(2)]
    assert answers[0] == answers[1]
    assert [each["label"] for each in answers[0]["results"]] == ["one"] * 3
    latents = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    tensors = [
        {"name": "z", "datatype": "FP32", "shape": [2, 4], "data": latents.flatten().tolist()},
        {"name": "y", "datatype": "INT64", "shape": [2], "data": [0, 1]},
    ]
    output = post(client, "/v2/models/gan/infer", inputs=tensors)["outputs"][0]
    column = {**tensors[1], "shape": [2, 1]}
    assert post(client, "/v2/models/gan/infer", inputs=[tensors[0], column])["outputs"][0] == output
    with torch.inference_mode():
        expected = networks["gan"][0](torch.from_numpy(latents), torch.tensor([0, 1]))
    assert output["shape"] == [2, 3, 4, 4]
    assert output["data"] == pytest.approx(expected.flatten().tolist(), abs=1e-5)


class WideSampler(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z[:, :1, None, None].expand(-1, 1, 4, 6)


def test_openai_image_requests_get_the_size_of_the_output(files: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (files / "wide.pt2").write_bytes(export(WideSampler(), torch.zeros(2, 4), sizes={"z": {0: BATCH}}))
    assert add(files, store, "gan", *OPTIONS["gan"]) == 0
    for name in ("wide", "unknown"):
        (files / f"{name}.pt2").write_bytes((files / "wide.pt2").read_bytes())
        assert add(files, store, name, "--task", "sample") == 0
    path = store / "unknown" / "1" / "card.json"
    card = json.loads(path.read_text())
    card["outputs"][0]["shape"] = [-1, 1, -1, -1]
    path.write_text(json.dumps(card))
    with serving(Settings(store=store, **TEST)) as client:
        answer = post(client, "/v1/images/generations", model="gan", prompt="two zeros and a one", size="4x4")
        assert (len(answer["data"]), answer["size"]) == (3, "4x4")
        for name, message in (
            ("wide", "wide generates images of 6x4; auto"),
            ("unknown", "for unknown, only auto is allowed"),
        ):
            body = {"model": name, "prompt": "digits", "size": "auto"}
            assert post(client, "/v1/images/generations", **body)["size"] == "6x4"
            rejected = client.post("/v1/images/generations", json={**body, "size": "4x6"})
            assert rejected.status_code == 400
            assert message in rejected.json()["error"]["message"]


def test_points_and_quantiles_are_forecast(client: httpx.Client) -> None:
    series = [float(value) for value in range(20)]
    for name in ("median", "points"):
        body = {"values": series, "horizon": 4, "model": name}
        assert post(client, "/v1/series/forecast", **body, levels=[])["results"][0]["mean"] == [20, 21, 22, 23]
        rejected = client.post("/v1/series/forecast", json=body)
        assert rejected.status_code == 400
        assert "no intervals" in rejected.json()["error"]["message"]
    item = {"type": "univariate_time_series", "series": series, "frequency": "D", "start_timestamp": "2026-01-31"}
    kserve = {"model": "points", "inputs": [item], "options": {"horizon": 4, "quantiles": [0.1, 0.9]}}
    error = client.post("/v1/timeseries/forecast", json=kserve).json()["error"]
    assert error["param"] == "options.quantiles"
    assert error["message"] == "options.quantiles is [0.1, 0.9]; points forecasts no intervals, so send [] or [0.5]"
    far = client.post("/v1/timeseries/forecast", json={**kserve, "options": {"horizon": 7}}).json()["error"]
    assert far["param"] == "options.horizon"
    assert far["message"].startswith("options.horizon is 7; ")
    median = {**kserve, "options": {"horizon": 4, "quantiles": [0.5]}}
    assert len(post(client, "/v1/timeseries/forecast", **median)["outputs"][0]["content"]) == 1
    too_far = client.post("/v1/series/forecast", json={**body, "horizon": 7, "levels": []})
    assert "forecasts up to 6 steps" in too_far.json()["error"]["message"]
    result = post(client, "/v1/series/forecast", values=series, horizon=2, levels=[80], model="quantiles")["results"][0]
    scale = float(np.std(series[-12:]))
    assert result["median"] == pytest.approx([19 + scale, 19 + 2 * scale])
    assert result["intervals"]["80"]["upper"] == pytest.approx([19 + 2 * scale, 19 + 3 * scale])


def generate(network: nn.Module, prompt: str, count: int) -> str:
    """Return the most likely continuation of a prompt, computed by the network without the service."""
    indices = [VOCABULARY.index(character) for character in prompt]
    with torch.inference_mode():
        for _ in range(count):
            if isinstance(network, SmallTransformer):
                logits = network(torch.tensor([indices[-16:]]))[0, -1]
            else:
                state = torch.zeros(1, 8)
                for index in indices:
                    logits, state = network(torch.tensor([index]), state)
            indices.append(int(logits.argmax()))
    return "".join(VOCABULARY[index] for index in indices[len(prompt) :])


@pytest.mark.parametrize("name", ["gru", "transformer"])
def test_texts_are_continued(client: httpx.Client, networks: dict[str, tuple[nn.Module, bytes]], name: str) -> None:
    for prompt in ("a", "bad cab", "abc def ghi abc def ghi"):
        body = {"prompt": prompt, "max_characters": 20, "temperature": 0, "model": name}
        expected = generate(networks[name][0], prompt, 20)
        assert post(client, "/v1/text/continue", **body)["results"][0]["text"] == expected
    answer = post(client, "/v1/text/continue", prompt="xyz", max_characters=3, n=2, seed=1, model=name)
    assert answer["unknown_characters"] == ["x", "y", "z"]
    assert len(answer["results"]) == 2
    completion = post(client, "/v1/completions", model=name, prompt="abc", max_tokens=4, temperature=0)
    assert completion["choices"][0]["text"] == generate(networks[name][0], "abc", 4)


def test_text_models_are_served_as_tensors_too(client: httpx.Client) -> None:
    metadata = client.get("/v2/models/transformer").json()
    assert metadata["inputs"] == [{"name": "tokens", "datatype": "INT64", "shape": [-1, -1]}]
    tensor = {"name": "tokens", "datatype": "INT64", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]}
    assert post(client, "/v2/models/transformer/infer", inputs=[tensor])["outputs"][0]["shape"] == [2, 3, 11]
    answer = client.post("/v2/models/gru/generate", json={"text_input": "abc", "max_tokens": 3})
    assert answer.status_code == 200


class NextByte(nn.Module):
    """A network that predicts the next byte of a fixed cycle of bytes."""

    def __init__(self, cycle: bytes) -> None:
        super().__init__()
        following = torch.zeros(256, dtype=torch.int64)
        for byte, after in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            following[byte] = after
        self.register_buffer("following", following)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.one_hot(self.following[tokens], 256).float() * 50


def test_a_network_may_read_bytes(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cycle = "aé€!"  # characters of one, two and three bytes
    sizes = {"tokens": {0: BATCH, 1: torch.export.Dim("length", min=1, max=32)}}
    network = NextByte(cycle.encode())
    (files / "octets.pt2").write_bytes(export(network, torch.zeros(2, 5, dtype=torch.int64), sizes=sizes))
    assert add(files, tmp_path / "store", "octets", "--task", "continue", "--vocabulary", "bytes") == 0
    warm_up = ImportedTextGenerator.warm_up

    def warm_up_as_slow(predictor: ImportedTextGenerator, rows: int) -> None:
        warm_up(predictor, rows)
        predictor.prefill_latency = LatencyModel(0.01, 0.01)

    monkeypatch.setattr(ImportedTextGenerator, "warm_up", warm_up_as_slow)
    with serving(Settings(store=tmp_path / "store", max_prompt_seconds=0.25, **TEST)) as client:
        body = {"prompt": "a", "temperature": 0}
        whole = post(client, "/v1/text/continue", **body, max_characters=12)["results"][0]
        assert (whole["text"], whole["finish_reason"]) == ("é€!aé€", "length")
        cut = post(client, "/v1/text/continue", **body, max_characters=3)["results"][0]
        assert cut["text"] == "é\ufffd"  # the euro sign is incomplete
        stopped = post(client, "/v1/text/continue", **body, max_characters=20, stop="€")["results"][0]
        assert (stopped["text"], stopped["finish_reason"]) == ("é", "stop")
        with client.stream("POST", "/v1/text/continue", json={**body, "max_characters": 12, "stream": True}) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {")]
        assert "".join(json.loads(line)["text"] for line in lines) == "é€!aé€"
        check_completions_of_bytes(client)


def check_completions_of_bytes(client: httpx.Client) -> None:
    """Check that token ids are bytes in ``/v1/completions``, and that log-probabilities are rejected."""
    body: dict[str, Any] = {"model": "octets", "max_tokens": 4, "temperature": 0, "echo": True}
    texts = ["aé€!", "aé", "a"]
    answer = post(client, "/v1/completions", **body, prompt=[list(text.encode()) for text in texts])
    assert [choice["text"] for choice in answer["choices"]] == ["aé€!aé\ufffd", "aé€!", "aé\ufffd"]
    assert answer["usage"] == {"prompt_tokens": 11, "completion_tokens": 12, "total_tokens": 23}  # bytes
    stopped = post(client, "/v1/completions", **{**body, "echo": False}, prompt="aé", stop="!")
    assert (stopped["choices"][0]["text"], stopped["usage"]["completion_tokens"]) == ("€", 3)  # without the stop string
    for wrong, param, message in (
        ({"prompt": [97, 195]}, "prompt", "prompt has [97, 195]; the ids are bytes, and these are not valid UTF-8"),
        ({"prompt": [256]}, "prompt", "ids are 0 to 255"),
        (
            {"prompt": ["é€" * 3] * 2},
            "prompt",
            "prompt has 30 bytes, which octets reads in 0.3 s; the maximum is 0.25 s",
        ),
        ({"prompt": "aé", "logprobs": 0}, "logprobs", "logprobs is 0; octets reads bytes"),
        ({"prompt": "aé", "logprobs": 1, "stream": True}, "logprobs", "logprobs is 1; octets reads bytes"),
    ):
        rejected = client.post("/v1/completions", json={**body, **wrong})
        assert rejected.status_code == 400, rejected.text
        assert rejected.json()["error"]["param"] == param
        assert message in rejected.json()["error"]["message"]


@pytest.mark.parametrize(
    ("generated", "stop", "text", "size"),
    [
        (b"a\xe2\x82xc", "\ufffd", "a", 1),
        (b"a\xe2\x82xc", "x", "a\ufffd", 3),
        (b"a\xe2\x82xc", "\ufffdx", "a", 1),
        (b"a\xe2\x82\xe2\x82\xacx", "\u20ac", "a\ufffd", 3),
        (b"a\xe2\x82", "\ufffd", "a", 1),
        (b"\xff\xff\xff\xffab", "b", "\ufffd\ufffd\ufffd\ufffda", 5),
        ("aé€!".encode(), "!", "aé€", 6),
        (b"\xff\xe2\x82", "", "\ufffd\ufffd", 3),
    ],
)
def test_invalid_bytes_are_counted_and_may_be_a_stop_string(generated: bytes, stop: str, text: str, size: int) -> None:
    prompt = Prompt(np.zeros(1, np.int64), torch.zeros(1))
    continuation = ByteContinuation(prompt, np.zeros(len(generated)), 1.0, 1, 1.0, (stop,) if stop else (), 0)
    for byte in generated:
        if not continuation.finished:
            continuation.add(chr(byte))
    assert (continuation.text, continuation.finish_reason) == (text, "stop" if stop else "length")
    assert continuation.generated - continuation.stop_length == size


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "cnn",
            ["--task", "classify", "--labels", "two.txt"],
            "tensor 'linear' should have one value for each of the 2",
        ),
        ("cnn", ["--task", "classify"], "the task 'classify' needs labels"),
        ("cnn", [*OPTIONS["cnn"][:4], "--size", "9"], "tensor 'image' should have height and width 9"),
        ("cnn", [*OPTIONS["cnn"][:4], "--resize", "7"], "option resize is 7; it should be at least the size 8"),
        ("cnn", [*OPTIONS["cnn"][:4], "--mean", "1,2"], "option mean is [1.0, 2.0]; it should be one value, or 3"),
        ("cnn", [*OPTIONS["cnn"][:4], "--context", "3"], "--context is not an option of the task 'classify'"),
        ("points", [*OPTIONS["cnn"][:4]], "tensor 'series' should be float or uint8, with 4 dimensions"),
        ("cnn", ["--task", "forecast"], "tensor 'image' should be float, with 2 or 3 dimensions"),
        (
            "points",
            ["--task", "forecast", "--quantiles", "0.1,0.5,0.9"],
            "tensor 'add' should have the shape [N, horizon, 3]",
        ),
        *(
            (
                "quantiles",
                ["--task", "forecast", "--quantiles", levels],
                "include 0.5, a lower and a higher level; or only 0.5",
            )
            for levels in ("0.1,0.5", "0.5,0.9", "0.9", "0.1,0.4,0.9", "0.9,0.5,0.1", "0,0.5,0.9", "0.1,0.5,1")
        ),
        ("points", ["--task", "forecast", "--context", "9"], "tensor 'series' should be [N, 9]"),
        (
            "points",
            ["--task", "forecast", "--seasons", "series"],
            "tensor 'series' should be int, with 1 dimension",
        ),
        (
            "points",
            ["--task", "forecast", "--seasons", "series", "--standardise"],
            "option standardise does not go with option seasons",
        ),
        ("gan", ["--task", "sample", "--labels", "two.txt", "--latents", "z"], "option classes is None"),
        ("gan", ["--task", "sample", "--latents", "z"], "tensor 'y' is not an input of this task"),
        ("cnn", ["--task", "sample"], "tensor 'image' should have the shape [N, latent]"),
        ("transformer", OPTIONS["transformer"][:2], "the task 'continue' needs a vocabulary"),
        (
            "transformer",
            [*OPTIONS["transformer"][:4], "--context", "99"],
            "tensor 'tokens' does not take a context of 99",
        ),
        ("cnn", OPTIONS["transformer"][:4], "tensor 'image' should be int, with 2 dimensions"),
        ("gru", [*OPTIONS["gru"][:6], "--next-states", "none"], "tensor 'none' should be a float state"),
        ("cnn", ["--labels", "labels.txt"], "--labels is not an option of the task 'infer'"),
    ],
)
def test_a_mismatch_names_the_tensor(
    files: Path, tmp_path: Path, name: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(files, tmp_path / "store", name, *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store" / name).exists()


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        ("h", "w", "has a varying height and width; option size sets them"),
        (16, 24, "should have equal height and width"),
    ],
)
def test_a_classifier_reads_square_images(
    height: int | str, width: int | str, message: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    model = onnx_model([node], {"x": ["n", 3, height, width]}, {"y": ["n", 3]})
    (files / "means.onnx").write_bytes(model.SerializeToString())
    assert add(files, tmp_path / "store", "means", *OPTIONS["cnn"][:4], suffix=".onnx") == 1
    assert f"tensor 'x' {message}" in capsys.readouterr().err


def test_the_context_is_needed_if_the_length_varies(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The length has no name in the ONNX file, so nothing is known about it."""
    (files / "bigram.onnx").write_bytes(bigram_model(len(VOCABULARY), time=None).SerializeToString())
    options = ("--task", "continue", "--vocabulary", "vocabulary.json")
    assert add(files, tmp_path / "store", "bigram", *options, suffix=".onnx") == 1
    assert "tensor 'tokens' has no fixed length; option context sets the length" in capsys.readouterr().err
    assert add(files, tmp_path / "store", "bigram", *options, "--context", "64", suffix=".onnx") == 0


class Centring(nn.Module):
    """A forecaster that subtracts the mean of all series of a batch."""

    def forward(self, series: Tensor) -> Tensor:
        return series - series.mean(0)


def test_rows_may_not_affect_each_other(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "centring.pt2").write_bytes(export(Centring(), torch.zeros(2, 12), sizes={"series": {0: BATCH}}))
    assert add(files, tmp_path / "store", "centring", *OPTIONS["points"]) == 1
    assert "first dimension that is 1, or that counts rows which do not affect each other" in capsys.readouterr().err


class Repeats(nn.Module):
    """A causal network that repeats the last character. It predicts another character for other lengths."""

    def __init__(self, allows: Callable[[int], bool]) -> None:
        super().__init__()
        self.allows = allows

    def forward(self, tokens: Tensor) -> Tensor:
        logits = nn.functional.one_hot(tokens, len(VOCABULARY)).float() * 50
        return logits if self.allows(tokens.shape[1]) else logits.roll(1, dims=2)


@pytest.mark.parametrize(
    ("allows", "size"),
    [
        (lambda length: length > 3, torch.export.Dim("length", min=4, max=16)),
        (lambda length: length % 4 == 0, torch.export.Dim.AUTO),
    ],
    ids=["minimum", "multiple"],
)
def test_a_short_text_is_padded_to_a_length_that_the_network_takes(
    allows: Callable[[int], bool], size: Any, files: Path, tmp_path: Path
) -> None:
    content = export(Repeats(allows), torch.zeros(2, 8, dtype=torch.int64), sizes={"tokens": {0: BATCH, 1: size}})
    (files / "repeats.pt2").write_bytes(content)
    assert add(files, tmp_path / "store", "repeats", *OPTIONS["transformer"][:4], "--context", "16") == 0
    generator = ImportedTextGenerator(read_version(tmp_path / "store", "repeats", 1), torch.device("cpu"))
    for count in (1, 5):
        window = torch.tensor([[count, *[3] * count, *[0] * (16 - count)]])
        assert generator.steps.logits(window)[0, :-1].argmax() == 3
    assert add(files, tmp_path / "store", "repeats", *OPTIONS["transformer"][:4], "--context", "3") == 1


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return x + x.mean(1, keepdim=True)


def test_a_text_model_must_be_causal(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"tokens": {0: BATCH, 1: torch.export.Dim("length", min=1, max=32)}}
    (files / "both.pt2").write_bytes(export(Bidirectional(), torch.zeros(2, 5, dtype=torch.int64), sizes=sizes))
    assert add(files, tmp_path / "store", "both", *OPTIONS["transformer"]) == 1
    assert "should be causal" in capsys.readouterr().err
