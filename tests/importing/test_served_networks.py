"""Imported networks are normal versions: served as tensors or as classifiers, batched and archived."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import ModelProto, TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from PIL import Image
from support.imported.onnx_models import add, forest, linear_model, onnx_model, square_classifier
from support.service import TEST, run_models_command, serving
from tritonclient import http as triton

from app.settings import Settings
from app.store import Store

LABELS = ["cat", "dog", "bird"]
OPSETS = [make_opsetid("", 17), make_opsetid("ai.onnx.ml", 3)]


def add_classifier(store: Path, model: ModelProto, name: str, *options: str, labels: str = "cat\ndog\n\nbird\n") -> str:
    file = store.parent / "labels.txt"
    file.write_text(labels, "utf-8-sig")  # Windows writes a byte order mark
    return add(store, model, name, "--task", "classify", "--labels", str(file), *options)


FORESTS = {"numbers": forest(), "texts": forest(texts=True)}
LINEAR, MATRIX = linear_model()
COLUMNS = [f"column_{index}" for index in range(60)]


def colours(*shape: str | int, softmax: bool = False) -> ModelProto:
    """Return a classifier of images of any size, whose outputs are the means of the three channels."""
    axes = [1, 2] if shape[-1] == 3 else [2, 3]
    nodes = [make_node("ReduceMean", ["x"], ["mean" if softmax else "y"], axes=axes, keepdims=0)]
    nodes += [make_node("Softmax", ["mean"], ["y"])] if softmax else []
    return onnx_model(nodes, {"x": ["batch", *shape]}, {"y": ["batch", 3]})


def relative_colours() -> ModelProto:
    """Return a classifier that divides by 0 if an image is black."""
    nodes = [
        make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
        make_node("ReduceMax", ["mean"], ["most"], axes=[1]),
        make_node("Div", ["mean", "most"], ["y"]),
    ]
    return onnx_model(nodes, {"x": ["n", 3, 4, 4]}, {"y": ["n", 3]})


def rescaling() -> ModelProto:
    """Return a model that scales images down and up again, so it fails unless the size is a multiple of 32."""
    nodes = [
        make_node("MaxPool", ["x"], ["small"], kernel_shape=[32, 32], strides=[32, 32]),
        make_node("Resize", ["small", "", "factors"], ["whole"]),
        make_node("Add", ["x", "whole"], ["y"]),
    ]
    shape = ["batch", 1, "height", "width"]
    return onnx_model(nodes, {"x": shape}, {"y": shape}, {"factors": np.array([1, 1, 32, 32], np.float32)})


def copied_texts() -> ModelProto:
    text, same = (make_tensor_value_info(name, TensorProto.STRING, ["batch", 1]) for name in ("text", "same"))
    graph = make_graph([make_node("Identity", ["text"], ["same"])], "graph", [text], [same])
    return make_model(graph, opset_imports=OPSETS, ir_version=8)


def negated_columns() -> ModelProto:
    nodes = [make_node("Neg", [name], [f"negative_{name}"]) for name in COLUMNS]
    shapes: dict[str, list[Any]] = {name: ["batch", 1] for name in COLUMNS}
    return onnx_model(nodes, shapes, {f"negative_{name}": shape for name, shape in shapes.items()})


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Import networks and serve them."""
    store = tmp_path_factory.mktemp("imported") / "store"
    store.mkdir()
    for name, (_, _, content) in FORESTS.items():
        assert add(store, content, name, "--licence", "MIT") == ""
    for name, model in {
        "linear": LINEAR, "rescaling": rescaling(), "copied-texts": copied_texts(), "columns": negated_columns(),
    }.items():  # fmt: skip
        assert add(store, model, name) == ""
    scaling = ("--resize", "10", "--mean", "0.5", "--std", "0.5,0.4,0.3", "--interpolation", "bicubic")
    assert add_classifier(store, colours(3, 8, 8), "scaled", *scaling) == ""
    assert add_classifier(store, colours(8, 8, 3, softmax=True), "last", "--no-softmax") == (
        "assumed: pixels are scaled to 0 to 1 and not normalised further; --mean and --std set another scaling\n"
    )
    add_classifier(store, relative_colours(), "relative")
    for name, shape in {
        "channels-first": ["batch_size", "num_channels", "height", "width"],
        "channels-last": ["batch_size", "height", "width", 3],
        "one-image": [1, 3, 24, 24],
    }.items():
        add_classifier(store, square_classifier(shape, 24, 3), name, "--size", "24")
    with serving(Settings(store=store, **TEST)) as client:
        yield client


def image(colour: str, size: tuple[int, int] = (20, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def infer(client: httpx.Client, model: str, **tensors: np.ndarray) -> triton.InferResult:
    inputs = []
    for name, array in tensors.items():
        inputs.append(triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    with triton.InferenceServerClient(client.base_url.netloc.decode()) as server:
        return server.infer(model, inputs)


def probabilities(client: httpx.Client, model: str, content: bytes) -> list[float]:
    answer = client.post(f"/v1/images/classify?model={model}", content=content)
    assert answer.status_code == 200, answer.text
    found = {each["label"]: each["probability"] for each in answer.json()["results"][0]["predictions"]}
    return [found[label] for label in LABELS]


def test_scikit_learn_models_are_served(client: httpx.Client) -> None:
    described = client.get("/v1/models/texts").json()["card"]
    assert (described["kind"], described["licence"], described["sizes"]["batched"]) == ("onnx", "MIT", True)
    assert described["speed"]["per_second"] > 0
    metadata = client.get("/v2/models/texts").json()
    assert (metadata["platform"], metadata["inputs"][0]["shape"]) == ("onnxruntime_onnx", [-1, 4])
    for name, (model, rows, _) in FORESTS.items():
        result, expected = infer(client, name, X=rows), model.predict(rows)
        labels = result.as_numpy("label")
        assert [each.decode() if name == "texts" else each for each in labels] == list(expected)
        np.testing.assert_allclose(result.as_numpy("probabilities"), model.predict_proba(rows), atol=1e-5)
    with pytest.raises(triton.InferenceServerException, match="expected \\[-1, 4\\]"):
        infer(client, "numbers", X=rows[:, :3])
    answer = client.post("/v1/series/forecast", json={"values": [1.0] * 9, "model": "texts"})
    assert "model 'texts' is for the task 'infer'" in answer.json()["error"]["message"]


def test_images_are_cropped_normalised_and_classified(client: httpx.Client) -> None:
    picture = Image.new("RGB", (45, 30), "white")
    picture.paste((255, 0, 51), (15, 0, 30, 30))  # the crop has the height and width 24 of the middle
    file = io.BytesIO()
    picture.save(file, "PNG")
    resized = np.asarray(picture.resize((15, 10), Image.Resampling.BICUBIC).crop((4, 1, 12, 9))) / 255
    logits = ((resized - 0.5) / [0.5, 0.4, 0.3]).mean((0, 1))
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert probabilities(client, "scaled", file.getvalue()) == pytest.approx(softmax, abs=1e-2)
    red = np.exp([1, 0, 0]) / np.exp([1, 0, 0]).sum()
    assert probabilities(client, "last", image("red")) == pytest.approx(red, abs=1e-4)
    explained = client.post("/v1/images/classify?model=last&explain=true", content=image("red"))
    assert "heat maps are not supported for imported networks" in explained.json()["error"]["message"]
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 8, 8, 3], "data": [1.0, 0.0, 2.0] * 64}
    best = {"name": "y", "parameters": {"classification": 2}}
    output = client.post("/v2/models/last/infer", json={"inputs": [tensor], "outputs": [best]}).json()["outputs"][0]
    assert output["data"] == ["0.665241:2:bird", "0.244728:0:cat"]  # the softmax of 1, 0 and 2


def test_an_input_without_finite_probabilities_is_the_callers_error(client: httpx.Client) -> None:
    """Such inputs do not make the process report that it is not ready."""
    for _ in range(4):
        answer = client.post("/v1/images/classify?model=relative", content=image("black"))
        assert answer.status_code == 400
        assert "returns no finite probabilities" in answer.json()["error"]["message"]
    assert probabilities(client, "relative", image("red"))[0] > 0.5
    assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("name", "fixed"),
    [("channels-first", [-1, 3, 24, 24]), ("channels-last", [-1, 24, 24, 3]), ("one-image", [1, 3, 24, 24])],
)
def test_varying_sizes_of_a_classifier_are_fixed(client: httpx.Client, name: str, fixed: list[int]) -> None:
    assert client.get(f"/v2/models/{name}").json()["inputs"][0]["shape"] == fixed
    assert sum(probabilities(client, name, image("red"))) == pytest.approx(1)
    files = [("file", (f"{colour}.png", image(colour))) for colour in ("red", "blue")]
    assert len(client.post(f"/v1/images/classify?model={name}", files=files).json()["results"]) == 2


def test_a_model_may_read_only_some_sizes(client: httpx.Client) -> None:
    card = client.get("/v1/models/rescaling").json()["card"]
    assert (card["outputs"][0]["shape"], card["sizes"]["test_size"]) == ([-1, 1, -1, -1], 32)
    result = infer(client, "rescaling", x=np.ones((3, 1, 64, 96), np.float32)).as_numpy("y")
    assert result.tolist() == [[[[2] * 96] * 64]] * 3
    with pytest.raises(triton.InferenceServerException, match="cannot read this input"):
        infer(client, "rescaling", x=np.ones((1, 1, 33, 33), np.float32))


def test_texts_and_many_columns_are_served(client: httpx.Client) -> None:
    texts = ["a, b" + ", c" * 12] * 100
    tensor = {"name": "text", "shape": [len(texts), 1], "datatype": "BYTES", "data": texts}
    answer = client.post("/v2/models/copied-texts/infer", json={"inputs": [tensor]})
    assert answer.json()["outputs"][0]["data"] == texts
    result = infer(client, "columns", **{name: np.full((1, 1), i, np.float32) for i, name in enumerate(COLUMNS)})
    assert [result.as_numpy(f"negative_{name}").item() for name in COLUMNS] == [-i for i in range(60)]


def test_requests_of_several_rows_and_callers_equal_single_rows(client: httpx.Client) -> None:
    rows = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    np.testing.assert_allclose(infer(client, "linear", x=rows).as_numpy("y"), rows @ MATRIX, atol=1e-5)
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda part: infer(client, "linear", x=part).as_numpy("y"), np.split(rows, 60))
        np.testing.assert_allclose(np.concatenate(list(parts)), rows @ MATRIX, atol=1e-5)


def masked() -> ModelProto:
    nodes = [
        make_node("Mul", ["x", "mask"], ["masked"]),
        make_node("ReduceMean", ["masked"], ["y"], axes=[2, 3], keepdims=0),
    ]
    shape = ["batch", 3, 8, 8]
    return onnx_model(nodes, {"x": shape, "mask": shape}, {"y": ["batch", 3]})


def centred() -> ModelProto:
    """Return a classifier that subtracts the mean of all images of a batch."""
    nodes = [
        make_node("ReduceMean", ["x"], ["colour"], axes=[2, 3], keepdims=0),
        make_node("ReduceMean", ["colour"], ["mean"], axes=[0]),
        make_node("Sub", ["colour", "mean"], ["y"]),
    ]
    return onnx_model(nodes, {"x": ["batch", 3, 8, 8]}, {"y": ["batch", 3]})


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (colours(3, 8, 8), "--size 9", "tensor 'x' should have height and width 9"),
        (colours(3, 8, 8), "--resize 7", "option resize is 7; it should be at least the size 8"),
        (colours(3, 8, 8), "--mean 1,2", "option mean is [1.0, 2.0]; it should be one value, or 3"),
        (colours(3, 8, 8), "--std 0", "option std is [0.0]; it should be one value, or 3"),
        (colours(3, "h", "w"), "", "has a varying height and width; option size sets them"),
        (colours(3, 16, 24), "", "should have equal height and width"),
        (colours(4, 16, 16), "", "should have 1 or 3 channels"),
        (LINEAR, "", "tensor 'x' should be float or uint8, with 4 dimensions"),
        (square_classifier(["n", 3, "h", "w"], 24, 3), "", "tried the sizes 16, 32, 64, 128, 256 for all varying"),
        (masked(), "--input x", "tensor 'mask' is not an input of this task; it is float32"),
        (masked(), "", "option input is None; known tensors: x, mask"),
        (centred(), "", "first dimension that is 1, or that counts rows which do not affect each other"),
    ],
)
def test_a_mismatch_names_the_tensor(store: Path, model: ModelProto, options: str, message: str) -> None:
    assert message in add_classifier(store, model, "net", *options.split())
    assert not (store / "net").exists()


def test_labels_belong_to_classifiers(store: Path) -> None:
    assert "--size is not an option of the task 'infer'; add --task classify" in add(store, LINEAR, "net", "--size=8")
    model = colours(3, 8, 8)
    assert "needs --labels FILE, a text file with one label" in add(store, model, "net", "--task", "classify")
    message = "tensor 'y' should have one value for each of the 2 labels"
    assert message in add_classifier(store, model, "net", labels="zero\none\n")


def unique() -> ModelProto:
    """Return a model that removes repeated rows."""
    node = make_node("Unique", ["x"], ["y"], axis=0, sorted=0)
    return onnx_model([node], {"x": ["n", 1]}, {"y": ["k", 1]})


def relative() -> ModelProto:
    """Return a model that divides integers by their maximum, which is 1 for rows of 0 and 1."""
    nodes = [
        make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        make_node("ReduceMax", ["float"], ["most"], keepdims=0),
        make_node("Max", ["most", "one"], ["divisor"]),
        make_node("Div", ["float", "divisor"], ["y"]),
    ]
    model = onnx_model(nodes, {"x": ["n", 1]}, {"y": ["n", 1]}, {"one": np.ones(1, np.float32)})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


def averaging(dtype: type) -> ModelProto:
    """Return a model that adds a small mean of all rows, as rounding errors that depend on the batch size do."""
    nodes = [
        make_node("Cast", ["weight"], ["factor"], to=TensorProto.FLOAT),
        make_node("ReduceMean", ["x"], ["mean"], axes=[0]),
        make_node("Mul", ["mean", "factor"], ["error"]),
        make_node("Add", ["x", "error"], ["y"]),
    ]
    return onnx_model(nodes, {"x": ["n", 3]}, {"y": ["n", 3]}, {"weight": np.array([0.005], dtype)})


def pair(operator: str, *shapes: list[Any], **attributes: Any) -> ModelProto:
    """Return a model of two inputs with these shapes."""
    node = make_node(operator, ["x", "y"], ["z"], **attributes)
    return onnx_model([node], dict(zip("xy", shapes, strict=True)), {"z": [None, None]})


@pytest.mark.parametrize(
    ("model", "batched"),
    [
        (unique(), False),
        (relative(), False),
        (averaging(np.float32), False),
        (averaging(np.float16), True),
        (pair("MatMul", ["n", "n"], ["n", 4]), False),  # a graph convolution
        (pair("Add", ["unk__1", 4], ["unk__2", 4]), True),
        (pair("Add", [None, 4], [None, 4]), True),
        (pair("Einsum", ["rows", 4], ["columns", 4], equation="ij,kj->ik"), False),
    ],
)
def test_rows_are_batched_only_if_they_do_not_affect_each_other(store: Path, model: ModelProto, batched: bool) -> None:
    assert add(store, model) == ""
    assert Store(store).read("net", 1).card.sizes["batched"] is batched


def test_an_encoder_must_allow_unknown_categories(store: Path) -> None:
    text = make_tensor_value_info("text", TensorProto.STRING, ["batch", 1])
    code = make_tensor_value_info("code", TensorProto.FLOAT, ["batch", 1, 2])
    errors = []
    for zeros in (0, 1):
        options = {"cats_strings": ["red", "blue"], "zeros": zeros}
        node = make_node("OneHotEncoder", ["text"], ["code"], domain="ai.onnx.ml", **options)
        graph = make_graph([node], "graph", [text], [code])
        errors.append(add(store, make_model(graph, opset_imports=OPSETS, ir_version=8)))
    assert 'train the encoder with OneHotEncoder(handle_unknown="ignore")' in errors[0]
    assert errors[1] == ""


def test_versions_are_archived(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(store, LINEAR) == ""
    other = tmp_path / "other"
    other.mkdir()
    assert run_models_command(capsys, store, "export", "net", str(tmp_path / "net.zip"))[0] == 0
    for options in ([], ["--renumber"]):
        assert run_models_command(capsys, other, "import", str(tmp_path / "net.zip"), *options)[0] == 0
    assert run_models_command(capsys, other, "verify")[1].endswith("versions checked: all valid\n")
    assert "imported" in run_models_command(capsys, other, "export", "net", "--onnx")[2]
    assert Store(other).read("net", 2).network().run({"x": np.zeros((1, 4), np.float32)})["y"].shape == (1, 3)
