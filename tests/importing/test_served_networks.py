"""Imported networks are normal versions: served as tensors or as classifiers, batched and archived."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper
from PIL import Image
from support import processes
from support.imported.onnx_models import forest, linear_model, onnx_model, square_classifier
from support.service import TEST, run_models_command, serving
from support.waiting import wait_until
from tritonclient import http as triton

from app.settings import Settings
from app.store import Card, Store, StoreError
from app.tasks import check_loading

LABELS = ["cat", "dog", "bird"]
Import = Callable[..., str]  # imports a model under a name with options, and returns the error message
Declared = list[str | int | None]


def image(colour: str | tuple[int, ...], size: tuple[int, int] = (20, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def infer(client: httpx.Client, model: str, **tensors: np.ndarray) -> triton.InferResult:
    inputs = []
    for name, array in tensors.items():
        inputs.append(triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    return triton.InferenceServerClient(client.base_url.netloc.decode()).infer(model, inputs)


def probabilities(client: httpx.Client, model: str, content: bytes) -> list[float]:
    answer = client.post(f"/v1/images/classify?model={model}", content=content)
    assert answer.status_code == 200, answer.text
    found = {each["label"]: each["probability"] for each in answer.json()["results"][0]["predictions"]}
    return [found[label] for label in LABELS]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    (tmp_path / "labels.txt").write_text("cat\ndog\n\nbird\n", "utf-8-sig")  # Windows writes a byte order mark
    return tmp_path / "store"


@pytest.fixture
def add(store: Path, capsys: pytest.CaptureFixture[str]) -> Import:
    def run(model: ModelProto | bytes, name: str = "net", *options: str, labels: str = "labels.txt") -> str:
        file = store.parent / f"{name}.onnx"
        file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        if "classify" in options:
            options = (*options, "--labels", str(store.parent / labels))
        return run_models_command(capsys, store, "add", str(file), "--name", name, *options)[2]

    return run


@pytest.fixture
def client(store: Path) -> Iterator[Callable[[], httpx.Client]]:
    """Yield a function that starts the service after the imports."""
    opened = []

    def start() -> httpx.Client:
        opened.append(serving(Settings(store=store, **TEST)))
        return opened[-1].__enter__()

    yield start
    for context in opened:
        context.__exit__(None, None, None)


def card(store: Path) -> Card:
    return Store(store).read("net", 1).card


def test_scikit_learn_models_are_served(add: Import, client: Callable[[], httpx.Client], store: Path) -> None:
    forests = {"numbers": forest(), "texts": forest(texts=True)}
    for name, (_, _, content) in forests.items():
        assert add(content, name, "--licence", "MIT") == ""
    running = client()
    described = running.get("/v1/models/texts").json()["card"]
    assert (described["kind"], described["licence"], described["sizes"]["batched"]) == ("onnx", "MIT", True)
    assert described["speed"]["per_second"] > 0
    metadata = running.get("/v2/models/texts").json()
    assert (metadata["platform"], metadata["inputs"][0]["shape"]) == ("onnxruntime_onnx", [-1, 4])
    for name, (model, rows, _) in forests.items():
        result, expected = infer(running, name, X=rows), model.predict(rows)
        labels = result.as_numpy("label")
        assert [each.decode() if name == "texts" else each for each in labels] == list(expected)
        np.testing.assert_allclose(result.as_numpy("probabilities"), model.predict_proba(rows), atol=1e-5)
    with pytest.raises(triton.InferenceServerException, match="expected \\[-1, 4\\]"):
        infer(running, "numbers", X=rows[:, :3])
    answer = running.post("/v1/series/forecast", json={"values": [1.0] * 9, "model": "texts"})
    assert "model 'texts' is for the task 'infer'" in answer.json()["error"]["message"]


def colours(*shape: str | int, softmax: bool = False) -> ModelProto:
    """Return a classifier of images of any size, whose outputs are the means of the three channels."""
    axes = [1, 2] if shape[-1] == 3 else [2, 3]
    nodes = [helper.make_node("ReduceMean", ["x"], ["mean" if softmax else "y"], axes=axes, keepdims=0)]
    nodes += [helper.make_node("Softmax", ["mean"], ["y"])] if softmax else []
    return onnx_model(nodes, {"x": ["batch", *shape]}, {"y": ["batch", 3]})


def test_images_are_cropped_normalised_and_classified(add: Import, client: Callable[[], httpx.Client]) -> None:
    scaled = ("--resize", "10", "--mean", "0.5", "--std", "0.5,0.4,0.3", "--interpolation", "bicubic")
    assert add(colours(3, 8, 8), "scaled", "--task", "classify", *scaled) == ""
    assert add(colours(8, 8, 3, softmax=True), "last", "--task", "classify", "--no-softmax") == (
        "assumed: pixels are scaled to 0 to 1 and not normalised further; --mean and --std set another scaling\n"
    )
    running = client()
    picture = Image.new("RGB", (45, 30), "white")
    picture.paste((255, 0, 51), (15, 0, 30, 30))  # the crop has the height and width 24 of the middle
    file = io.BytesIO()
    picture.save(file, "PNG")
    resized = np.asarray(picture.resize((15, 10), Image.Resampling.BICUBIC).crop((4, 1, 12, 9))) / 255
    logits = ((resized - 0.5) / [0.5, 0.4, 0.3]).mean((0, 1))
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert probabilities(running, "scaled", file.getvalue()) == pytest.approx(softmax, abs=1e-2)
    red = np.exp([1, 0, 0]) / np.exp([1, 0, 0]).sum()
    assert probabilities(running, "last", image("red")) == pytest.approx(red, abs=1e-4)
    explained = running.post("/v1/images/classify?model=last&explain=true", content=image("red"))
    assert "heat maps are not supported for imported networks" in explained.json()["error"]["message"]
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 8, 8, 3], "data": [1.0, 0.0, 2.0] * 64}
    best = {"name": "y", "parameters": {"classification": 2}}
    output = running.post("/v2/models/last/infer", json={"inputs": [tensor], "outputs": [best]}).json()["outputs"][0]
    assert output["data"] == ["0.665241:2:bird", "0.244728:0:cat"]  # the softmax of 1, 0 and 2


def test_an_input_without_finite_probabilities_is_the_callers_error(
    add: Import, client: Callable[[], httpx.Client]
) -> None:
    """Such inputs do not make the process report that it is not ready."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["means"]),
        helper.make_node("Flatten", ["means"], ["mean"]),
        helper.make_node("ReduceMax", ["mean"], ["most"], axes=[1]),
        helper.make_node("Div", ["mean", "most"], ["y"]),
    ]
    assert "assumed" in add(onnx_model(nodes, {"x": ["n", 3, 4, 4]}, {"y": ["n", 3]}), "net", "--task", "classify")
    running = client()
    for _ in range(4):
        answer = running.post("/v1/images/classify", content=image("black"))
        assert answer.status_code == 400
        assert "returns no finite probabilities" in answer.json()["error"]["message"]
    assert probabilities(running, "net", image("red"))[0] > 0.5
    assert running.get("/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("declared", "fixed"),
    [
        (["batch_size", "num_channels", "height", "width"], [-1, 3, 24, 24]),
        (["batch_size", None, None, None], [-1, 3, 24, 24]),
        (["batch_size", "height", "width", 3], [-1, 24, 24, 3]),
        ([1, 3, 24, 24], [1, 3, 24, 24]),
    ],
)
def test_varying_sizes_of_a_classifier_are_fixed(
    add: Import, client: Callable[[], httpx.Client], store: Path, declared: Declared, fixed: list[int]
) -> None:
    assert "assumed" in add(square_classifier(declared, 24, 3), "net", "--task", "classify", "--size", "24")
    assert card(store).inputs[0].shape == fixed
    running = client()
    assert sum(probabilities(running, "net", image("red"))) == pytest.approx(1)
    names = ("file", ("a.png", image("red"))), ("file", ("b.png", image("blue")))
    assert len(running.post("/v1/images/classify", files=names).json()["results"]) == 2
    zeros = np.zeros([1, *fixed[1:]], np.float32)
    assert infer(running, "net", x=zeros).as_numpy("y").tolist() == [[0, 0, 0]]


def masked() -> ModelProto:
    nodes = [
        helper.make_node("Mul", ["x", "mask"], ["masked"]),
        helper.make_node("ReduceMean", ["masked"], ["y"], axes=[2, 3], keepdims=0),
    ]
    shape = ["batch", 3, 8, 8]
    return onnx_model(nodes, {"x": shape, "mask": shape}, {"y": ["batch", 3]})


def centred() -> ModelProto:
    """Return a classifier that subtracts the mean of all images of a batch."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["colour"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMean", ["colour"], ["mean"], axes=[0]),
        helper.make_node("Sub", ["colour", "mean"], ["y"]),
    ]
    return onnx_model(nodes, {"x": ["batch", 3, 8, 8]}, {"y": ["batch", 3]})


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (colours(3, 8, 8), "two.txt", "tensor 'y' should have one value for each of the 2 labels"),
        (colours(3, 8, 8), "--size 9", "tensor 'x' should have height and width 9"),
        (colours(3, 8, 8), "--resize 7", "option resize is 7; it should be at least the size 8"),
        (colours(3, 8, 8), "--mean 1,2", "option mean is [1.0, 2.0]; it should be one value, or 3"),
        (colours(3, 8, 8), "--std 0", "option std is [0.0]; it should be one value, or 3"),
        (colours(3, 8, 8), "--input z", "option input is 'z'; known tensors: x"),
        (colours(3, "h", "w"), "", "has a varying height and width; option size sets them"),
        (colours(3, 16, 24), "", "should have equal height and width"),
        (colours(4, 16, 16), "", "should have 1 or 3 channels"),
        (linear_model()[0], "", "tensor 'x' should be float or uint8, with 4 dimensions"),
        (square_classifier(["n", 3, "h", "w"], 24, 3), "", "tried the sizes 16, 32, 64, 128, 256 for all varying"),
        (masked(), "--input x", "tensor 'mask' is not an input of this task; it is float32"),
        (masked(), "", "option input is None; known tensors: x, mask"),
        (centred(), "", "first dimension that is 1, or that counts rows which do not affect each other"),
    ],
)
def test_a_mismatch_names_the_tensor(add: Import, store: Path, model: ModelProto, options: str, message: str) -> None:
    (store.parent / "two.txt").write_text("zero\none\n")
    arguments = options.split() if options.startswith("--") else []
    labels = options if options.endswith(".txt") else "labels.txt"
    assert message in add(model, "net", "--task", "classify", *arguments, labels=labels)
    assert not (store / "net").exists()


def test_labels_belong_to_classifiers(add: Import, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--size is not an option of the task 'infer'; add --task classify" in add(
        linear_model()[0], "net", "--size=8"
    )
    arguments = ("add", str(store.parent / "net.onnx"), "--name", "net", "--task", "classify")
    assert "needs --labels FILE, a text file with one label" in run_models_command(capsys, store, *arguments)[2]
    assert "assumed" in add(colours(3, 8, 8), "net", "--task", "classify")
    version = Store(store).read("net", 1)
    changed = version.card.model_copy(update={"thresholds": [0.5]})
    with pytest.raises(StoreError, match=r"^net@1: there are 1 thresholds, expected 3$"):
        check_loading(type(version)(version.folder, changed, version.tensors))


def two_inputs(operator: str, *names: str | None) -> ModelProto:
    """Return a model of two inputs whose first dimensions have the names ``names``."""
    nodes = {
        "Add": [helper.make_node("Add", ["x", "y"], ["z"])],
        "Einsum": [helper.make_node("Einsum", ["x", "y"], ["z"], equation="ij,kj->ik")],  # depends on all columns
        "TopK": [  # fails if y has the two rows of the first test
            helper.make_node("TopK", ["y", "count"], ["best", "indices"], axis=0),
            helper.make_node("MatMul", ["x", "best"], ["z"]),
        ],
    }
    columns = 8 if operator == "TopK" else 4
    inputs = {"x": [names[0], columns], "y": [names[1], 4]}
    return onnx_model(nodes[operator], inputs, {"z": [None, None]}, {"count": np.array([columns])})


def unique() -> ModelProto:
    """Return a model that removes repeated rows."""
    node = helper.make_node("Unique", ["x"], ["y"], axis=0, sorted=0)
    return onnx_model([node], {"x": ["n", 1]}, {"y": ["k", 1]})


def relative() -> ModelProto:
    """Return a model that divides integers by their maximum, which is 1 for rows of 0 and 1."""
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["float"], ["most"], keepdims=0),
        helper.make_node("Max", ["most", "one"], ["divisor"]),
        helper.make_node("Div", ["float", "divisor"], ["y"]),
    ]
    model = onnx_model(nodes, {"x": ["n", 1]}, {"y": ["n", 1]}, {"one": np.ones(1, np.float32)})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


def graph_convolution() -> ModelProto:
    nodes = [helper.make_node("MatMul", ["adjacency", "x"], ["y"])]
    return onnx_model(nodes, {"x": ["n", 4], "adjacency": ["n", "n"]}, {"y": ["n", 4]})


def averaging(dtype: type) -> ModelProto:
    """Return a model that adds a small mean of all rows, as rounding errors that depend on the batch size do."""
    nodes = [
        helper.make_node("Cast", ["weight"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0]),
        helper.make_node("Mul", ["mean", "factor"], ["error"]),
        helper.make_node("Add", ["x", "error"], ["y"]),
    ]
    return onnx_model(nodes, {"x": ["n", 3]}, {"y": ["n", 3]}, {"weight": np.array([0.005], dtype)})


@pytest.mark.parametrize(
    ("model", "batched"),
    [
        (unique(), False),
        (relative(), False),
        (graph_convolution(), False),
        (onnx_model([helper.make_node("MatMul", ["x", "x"], ["y"])], {"x": [None, None]}, {"y": [None, None]}), False),
        (averaging(np.float32), False),
        (averaging(np.float16), True),
        (two_inputs("Add", "unk__1", "unk__2"), True),
        (two_inputs("Add", None, None), True),
        (two_inputs("Add", "batch-1", "batch_0"), True),
        (two_inputs("TopK", "rows", "columns"), False),
        (two_inputs("Einsum", "rows", "columns"), False),
        (two_inputs("Einsum", None, "batch_0"), False),
    ],
)
def test_rows_are_batched_only_if_they_do_not_affect_each_other(
    add: Import, store: Path, model: ModelProto, batched: bool
) -> None:
    assert add(model) == ""
    assert card(store).sizes["batched"] is batched


def test_a_model_may_read_only_some_sizes(add: Import, client: Callable[[], httpx.Client], store: Path) -> None:
    """The network scales images down and up again, so it fails unless the size is a multiple of 32."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["small"], kernel_shape=[32, 32], strides=[32, 32]),
        helper.make_node("Resize", ["small", "", "factors"], ["whole"]),
        helper.make_node("Add", ["x", "whole"], ["y"]),
    ]
    shape = ["batch", 1, "height", "width"]
    factors = {"factors": np.array([1, 1, 32, 32], np.float32)}
    assert add(onnx_model(nodes, {"x": shape}, {"y": shape}, factors)) == ""
    assert (card(store).outputs[0].shape, card(store).sizes["test_size"]) == ([-1, 1, -1, -1], 32)
    running = client()
    result = infer(running, "net", x=np.ones((3, 1, 64, 96), np.float32)).as_numpy("y")
    assert result.tolist() == [[[[2] * 96] * 64]] * 3
    with pytest.raises(triton.InferenceServerException, match="cannot read this input"):
        infer(running, "net", x=np.ones((1, 1, 33, 33), np.float32))


def test_texts_and_many_columns_are_served(add: Import, client: Callable[[], httpx.Client], store: Path) -> None:
    text, same = (helper.make_tensor_value_info(name, TensorProto.STRING, ["batch", 1]) for name in ("text", "same"))
    graph = helper.make_graph([helper.make_node("Identity", ["text"], ["same"])], "graph", [text], [same])
    assert add(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "texts") == ""
    columns = [f"column_{index}" for index in range(60)]
    shapes: dict[str, list[Any]] = {name: ["batch", 1] for name in columns}
    nodes = [helper.make_node("Neg", [name], [f"negative_{name}"]) for name in columns]
    assert add(onnx_model(nodes, shapes, {f"negative_{name}": shape for name, shape in shapes.items()})) == ""
    running = client()
    texts = ["a, b" + ", c" * 12] * 100
    tensor = {"name": "text", "shape": [len(texts), 1], "datatype": "BYTES", "data": texts}
    answer = running.post("/v2/models/texts/infer", json={"inputs": [tensor]})
    assert answer.json()["outputs"][0]["data"] == texts
    result = infer(running, "net", **{name: np.full((1, 1), i, np.float32) for i, name in enumerate(columns)})
    assert [result.as_numpy(f"negative_{name}").item() for name in columns] == [-i for i in range(60)]


def test_an_encoder_must_allow_unknown_categories(add: Import) -> None:
    text = helper.make_tensor_value_info("text", TensorProto.STRING, ["batch", 1])
    code = helper.make_tensor_value_info("code", TensorProto.FLOAT, ["batch", 1, 2])
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    errors = []
    for zeros in (0, 1):
        options = {"cats_strings": ["red", "blue"], "zeros": zeros}
        node = helper.make_node("OneHotEncoder", ["text"], ["code"], domain="ai.onnx.ml", **options)
        graph = helper.make_graph([node], "graph", [text], [code])
        errors.append(add(helper.make_model(graph, opset_imports=versions, ir_version=8)))
    assert 'train the encoder with OneHotEncoder(handle_unknown="ignore")' in errors[0]
    assert errors[1] == ""


def test_versions_are_archived(add: Import, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(linear_model()[0]) == ""
    other = tmp_path / "other"
    other.mkdir()
    assert run_models_command(capsys, store, "export", "net", str(tmp_path / "net.zip"))[0] == 0
    for options in ([], ["--renumber"]):
        assert run_models_command(capsys, other, "import", str(tmp_path / "net.zip"), *options)[0] == 0
    assert run_models_command(capsys, other, "verify")[1].endswith("versions checked: all valid\n")
    assert "imported" in run_models_command(capsys, other, "export", "net", "--onnx")[2]
    with serving(Settings(store=other, **TEST)) as running:
        assert infer(running, "net", x=np.zeros((1, 4), np.float32)).as_numpy("y").shape == (1, 3)


def test_requests_of_several_rows_and_callers_equal_single_rows(
    add: Import, client: Callable[[], httpx.Client]
) -> None:
    model, matrix = linear_model()
    assert add(model) == ""
    running = client()
    rows = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    np.testing.assert_allclose(infer(running, "net", x=rows).as_numpy("y"), rows @ matrix, atol=1e-5)
    server = triton.InferenceServerClient(running.base_url.netloc.decode(), concurrency=8)
    sent = []
    for part in np.split(rows, 60):
        tensor = triton.InferInput("x", list(part.shape), "FP32")
        tensor.set_data_from_numpy(part)
        sent.append(server.async_infer("net", [tensor]))
    parts = [each.get_result().as_numpy("y") for each in sent]
    server.close()
    np.testing.assert_allclose(np.concatenate(parts), rows @ matrix, atol=1e-5)


def test_a_worker_that_a_division_ends_is_replaced(add: Import, store: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["integer"], to=TensorProto.INT64),
        helper.make_node("Div", ["integer", "minus"], ["quotient"]),
        helper.make_node("Cast", ["quotient"], ["y"], to=TensorProto.FLOAT),
    ]
    assert not add(onnx_model(nodes, {"x": ["n", 1]}, {"y": ["n", 1]}, {"minus": np.array([-1])}))
    with processes.serving(store, log_level="error") as service:

        def answer(x: float) -> httpx.Response:
            tensor = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [x]}
            url = f"{service.url}/v2/models/net/infer"
            return httpx.post(url, json={"inputs": [tensor]}, timeout=processes.TIMEOUT_SECONDS)

        before = service.workers
        with pytest.raises(httpx.RemoteProtocolError):
            answer(-(2.0**63))
        wait_until(lambda: len(service.workers) == 2 and service.workers != before)
        assert answer(3.0).json()["outputs"][0]["data"] == [-3.0]
