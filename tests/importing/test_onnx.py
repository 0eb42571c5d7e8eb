"""ONNX files: scikit-learn models are served; custom operators and foreign files are rejected."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper
from PIL import Image
from support.imported.onnx_models import externalise, forest, linear_model, onnx_model, square_classifier
from support.service import TEST, serving
from tritonclient import http as triton

from app import store
from app.cli import models
from app.importing.add import Description, add
from app.importing.draft import Draft
from app.importing.pt2_graph import BadProgram
from app.networks.imported import ImportedSizes
from app.networks.imported.onnx_format import OnnxContent, _check_attributes
from app.networks.imported.onnx_network import MODEL, OnnxNetwork
from app.settings import Settings
from app.store import StoreError, archive, catalogue

MAX_BYTES = 2**24


def infer(port: str, model: str, **tensors: np.ndarray) -> triton.InferResult:
    inputs = []
    for name, array in tensors.items():
        inputs.append(triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    return triton.InferenceServerClient(port).infer(model, inputs)


def test_scikit_learn_models_are_served(tmp_path: Path) -> None:
    forests = {"numbers": forest(), "texts": forest(texts=True)}
    for name, (_, _, content) in forests.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
        card = add(tmp_path / "store", tmp_path / f"{name}.onnx", Description(name), MAX_BYTES)
        assert (card.kind, card.sizes["batched"], card.inputs[0].shape) == ("onnx", True, [-1, 4])
    assert all(not row["problem"] for row in catalogue.verify(tmp_path / "store"))
    with serving(Settings(store=tmp_path / "store", **TEST)) as client:
        port = client.base_url.netloc.decode()
        assert client.get("/v2/models/texts").json()["platform"] == "onnxruntime_onnx"
        for name, (model, rows, _) in forests.items():
            result = infer(port, name, X=rows)
            labels = result.as_numpy("label")
            expected = model.predict(rows)
            assert (
                [label.decode() for label in labels] == list(expected)
                if name == "texts"
                else (labels == expected).all()
            )
            np.testing.assert_allclose(result.as_numpy("probabilities"), model.predict_proba(rows), atol=1e-5)
        with pytest.raises(triton.InferenceServerException, match="expected \\[-1, 4\\]"):
            infer(port, "numbers", X=rows[:, :3])


def test_an_encoder_must_allow_unknown_categories(tmp_path: Path) -> None:
    text = helper.make_tensor_value_info("text", TensorProto.STRING, ["batch", 1])
    code = helper.make_tensor_value_info("code", TensorProto.FLOAT, ["batch", 1, 2])

    def encoder(zeros: int) -> ModelProto:
        options = {"cats_strings": ["red", "blue"], "zeros": zeros}
        node = helper.make_node("OneHotEncoder", ["text"], ["code"], domain="ai.onnx.ml", **options)
        graph = helper.make_graph([node], "graph", [text], [code])
        versions = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
        return helper.make_model(graph, opset_imports=versions, ir_version=8)

    with pytest.raises(
        StoreError, match=r'Unknown Category.*; train the encoder with OneHotEncoder\(handle_unknown="ig'
    ):
        add_model(tmp_path, encoder(zeros=0))
    assert add_model(tmp_path, encoder(zeros=1)).outputs[0].shape == [-1, 1, 2]


def test_only_the_body_limits_the_length_and_commas_of_texts(tmp_path: Path) -> None:
    text, same = (helper.make_tensor_value_info(name, TensorProto.STRING, ["batch", 1]) for name in ("text", "same"))
    graph = helper.make_graph([helper.make_node("Identity", ["text"], ["same"])], "graph", [text], [same])
    (tmp_path / "store").mkdir()
    add_model(tmp_path, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))

    def send(*texts: str) -> httpx.Response:
        tensor = {"name": "text", "shape": [len(texts), 1], "datatype": "BYTES", "data": texts}
        return client.post("/v2/models/net/infer", json={"inputs": [tensor]})

    with serving(Settings(store=tmp_path / "store", max_body_bytes=200_000, **TEST)) as client:
        for texts in (["a, b" + ", c" * 12] * 100, ["a," * 90_000]):
            answer = send(*texts)
            assert answer.status_code == 200, answer.text
            assert answer.json()["outputs"][0]["data"] == texts
        assert send("a," * 100_000).status_code == 413


@pytest.mark.parametrize("rows", [1, "batch"])
def test_a_model_may_have_an_input_and_an_output_for_each_column(rows: int | str, tmp_path: Path) -> None:
    columns = [f"column_{index}" for index in range(60)]
    shapes: dict[str, list[int | str]] = {name: [rows, 1] for name in columns}
    nodes = [helper.make_node("Neg", [name], [f"negative_{name}"]) for name in columns]
    (tmp_path / "store").mkdir()
    add_model(tmp_path, onnx_model(nodes, shapes, {f"negative_{name}": shape for name, shape in shapes.items()}))
    values = {name: np.full((1, 1), index, np.float32) for index, name in enumerate(columns)}
    with serving(Settings(store=tmp_path / "store", **TEST)) as client:
        result = infer(client.base_url.netloc.decode(), "net", **values)
        assert [result.as_numpy(f"negative_{name}").item() for name in columns] == [-index for index in range(60)]
        inputs = [{"name": name, "shape": [1, 1], "datatype": "FP32", "data": [[1.5]]} for name in columns]
        answer = client.post(
            "/v2/models/net/infer", json={"inputs": inputs, "outputs": [{"name": "negative_column_9"}]}
        )
        assert answer.json()["outputs"][0]["data"] == [-1.5]


def test_a_model_may_read_only_some_sizes(tmp_path: Path) -> None:
    """The network scales images down and up again, so it fails unless the size is a multiple of 32."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["small"], kernel_shape=[32, 32], strides=[32, 32]),
        helper.make_node("Resize", ["small", "", "factors"], ["whole"]),
        helper.make_node("Add", ["x", "whole"], ["y"]),
    ]
    shape = ["batch", 1, "height", "width"]
    model = onnx_model(nodes, {"x": shape}, {"y": shape}, {"factors": np.array([1, 1, 32, 32], np.float32)})
    card = add_model(tmp_path, model)
    assert (card.outputs[0].shape, card.sizes["test_size"]) == ([-1, 1, -1, -1], 32)
    with serving(Settings(store=tmp_path / "store", **TEST)) as client:
        port = client.base_url.netloc.decode()
        assert (
            infer(port, "net", x=np.ones((3, 1, 64, 96), np.float32)).as_numpy("y").tolist() == [[[[2] * 96] * 64]] * 3
        )
        with pytest.raises(triton.InferenceServerException, match="cannot read this input"):
            infer(port, "net", x=np.ones((1, 1, 33, 33), np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_may_differ_by_the_rounding_of_the_weights(tmp_path: Path, dtype: type) -> None:
    """A mean of all rows simulates rounding errors that depend on the batch size."""
    nodes = [
        helper.make_node("Cast", ["weight"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0]),
        helper.make_node("Mul", ["mean", "factor"], ["error"]),
        helper.make_node("Add", ["x", "error"], ["y"]),
    ]
    weights = {"weight": np.array([0.005], dtype)}
    card = add_model(tmp_path, onnx_model(nodes, {"x": ["n", 3]}, {"y": ["n", 3]}, weights))
    assert card.sizes["batched"] is (dtype is np.float16)
    assert card.sizes["ranges"] == ({} if card.sizes["batched"] else {"n": [1, 2**20]})


def test_inputs_that_need_too_much_memory_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = [f"size_{axis}" for axis in range(10)]  # with the size 16: 512 GiB
    model = onnx_model([helper.make_node("Neg", ["x"], ["y"])], {"x": shape}, {"y": shape})
    with pytest.raises(
        StoreError, match=r"inputs of the shapes x \[2, 16, .* need too much memory; the maximum is 2,147"
    ):
        add_model(tmp_path, model)
    monkeypatch.setattr("app.importing.draft.MAX_RUN_BYTES", 2**20)
    weights = {"weight": np.ones([1, *[17] * 4], np.float32)}
    model = onnx_model([helper.make_node("Add", ["x", "weight"], ["y"])], {"x": shape[:5]}, {"y": shape[:5]}, weights)
    with pytest.raises(
        StoreError, match=r"(?s)fails on inputs of the shapes x \[2, 16, .*tried the sizes 16, 32, 64, "
    ):
        add_model(tmp_path, model)


def colour_model() -> ModelProto:
    """Return a classifier whose logits are the means of the three channels."""
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["mean"]), helper.make_node("Flatten", ["mean"], ["y"])]
    return onnx_model(nodes, {"x": ["batch", 3, "height", "width"]}, {"y": ["batch", 3]})


def test_a_classifier_is_tested_with_images_of_its_size(tmp_path: Path) -> None:
    options = {"task": "classify", "labels": ["red", "green", "blue"], "options": {"size": 24}}
    assert add_model(tmp_path, colour_model(), **options).sizes["test_size"] == 24


@pytest.mark.parametrize(
    ("declared", "fixed"),
    [
        (["batch_size", "num_channels", "height", "width"], [-1, 3, 24, 24]),
        (["batch_size", None, None, None], [-1, 3, 24, 24]),
        (["batch_size", "height", "width", 3], [-1, 24, 24, 3]),
    ],
)
def test_varying_sizes_of_a_classifier_are_fixed(tmp_path: Path, declared: list[Any], fixed: list[int]) -> None:
    model = square_classifier(declared, 24, 3)
    options = {"task": "classify", "labels": ["red", "green", "blue"]}
    card = add_model(tmp_path, model, **options, options={"size": 24})
    assert (card.inputs[0].shape, card.sizes["batched"]) == (fixed, True)
    file = io.BytesIO()
    Image.new("RGB", (30, 40), (255, 0, 0)).save(file, "PNG")
    image = np.zeros([1, *fixed[1:]], np.float32)
    with serving(Settings(store=tmp_path / "store", **TEST)) as client:
        client.post("/v1/images/classify", content=file.getvalue()).raise_for_status()
        assert infer(client.base_url.netloc.decode(), "net", x=image).as_numpy("y").tolist() == [[0, 0, 0]]
        with pytest.raises(triton.InferenceServerException, match="expected \\[-1, "):
            infer(client.base_url.netloc.decode(), "net", x=image[:, :2])
    with pytest.raises(StoreError, match="tried the sizes 16, 32, 64, 128, 256 for all varying dimensions"):
        add_model(tmp_path, model)


def test_a_classifier_with_a_mask_is_rejected(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "mask"], ["masked"]),
        helper.make_node("GlobalAveragePool", ["masked"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["y"]),
    ]
    shape = ["batch", 3, 8, 8]
    model = onnx_model(nodes, {"x": shape, "mask": shape}, {"y": ["batch", 3]})
    with pytest.raises(StoreError, match="tensor 'mask' is not an input of this task; it is float32"):
        add_model(tmp_path, model, task="classify", labels=["red", "green", "blue"], options={"input": "x"})


@pytest.mark.parametrize(
    ("operator", "names", "output", "batched"),
    [
        ("Add", ("unk__1", "unk__2"), ["unk__3", 4], True),
        ("Add", ("unk__1", None), ["unk__3", 4], True),
        ("Add", (None, None), ["unk__3", 4], True),
        ("Add", ("batch-1", "batch_0"), [None, 4], True),
        ("TopK", ("rows", "columns"), ["rows", 4], False),  # fails if y has the two rows of the first test
        ("Einsum", ("rows", "columns"), ["rows", "columns"], False),  # each result depends on all columns
        ("Einsum", (None, None), [None, None], False),
        ("Einsum", (None, "batch_0"), [None, None], False),
        ("Einsum", ("batch-1", "batch-2"), [None, None], False),
    ],
)
def test_the_batch_dimension_may_have_several_names(
    tmp_path: Path, operator: str, names: tuple[str | None, str | None], output: list[Any], batched: bool
) -> None:
    columns = 8 if operator == "TopK" else 4
    nodes = {
        "Add": [helper.make_node("Add", ["x", "y"], ["z"])],
        "Einsum": [helper.make_node("Einsum", ["x", "y"], ["z"], equation="ij,kj->ik")],
        "TopK": [
            helper.make_node("TopK", ["y", "count"], ["best", "indices"], axis=0),
            helper.make_node("MatMul", ["x", "best"], ["z"]),
        ],
    }
    inputs, count = {"x": [names[0], columns], "y": [names[1], 4]}, {"count": np.array([columns])}
    card = add_model(tmp_path, onnx_model(nodes[operator], inputs, {"z": output}, count))
    assert card.sizes["batched"] is batched
    problem = ImportedSizes(**card.sizes).problem({"x": (2, columns), "y": (3, 4)})
    assert (problem is not None) is batched


@pytest.mark.parametrize("size", [None, "rows"])
def test_unnamed_sizes_may_have_to_be_equal(tmp_path: Path, size: str | None) -> None:
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"])]
    card = add_model(tmp_path, onnx_model(nodes, {"x": [size, None]}, {"y": [None, None]}))
    assert (card.sizes["batched"], card.outputs[0].shape) == (False, [-1, -1])


def test_a_size_in_two_dimensions_does_not_count_rows(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["adjacency", "x"], ["z"])]
    card = add_model(tmp_path, onnx_model(nodes, {"x": ["n", 4], "adjacency": ["n", "n"]}, {"z": ["n", 4]}))
    assert (card.sizes["batched"], card.sizes["ranges"], card.outputs[0].shape) == (False, {"n": [1, 2**20]}, [-1, 4])


@pytest.mark.parametrize(
    ("limit", "task", "width"),
    [(1e9, "infer", -1), (-1, "infer", -1), (-1, "forecast", 3)],  # NonZero finds 0 or 3 values
)
def test_the_card_tells_which_output_sizes_depend_on_values(
    tmp_path: Path, limit: float, task: str, width: int
) -> None:
    """NonZero returns the indices of all values above a limit. Their number is declared as varying."""
    nodes = [
        helper.make_node("Abs", ["x"], ["positive"]),
        helper.make_node("Greater", ["positive", "limit"], ["large"]),
        helper.make_node("NonZero", ["large"], ["indices"]),
        helper.make_node("Gather", ["indices", "second"], ["columns"]),
        helper.make_node("Cast", ["columns"], ["y"], to=TensorProto.FLOAT),
    ]
    weights = {"limit": np.array(limit, np.float32), "second": np.array([1])}
    model = onnx_model(nodes, {"x": [1, 3]}, {"y": [1, "count"]}, weights)
    assert add_model(tmp_path, model, task=task).outputs[0].shape == [1, width]


def unique() -> ModelProto:
    """Return a model that removes repeated rows."""
    node = helper.make_node("Unique", ["x"], ["y"], axis=0, sorted=0)
    return onnx_model([node], {"x": ["n", 1]}, {"y": ["k", 1]})


def relative() -> ModelProto:
    """Return a model that divides integers by their maximum, which is 1 for rows of 0 and 1."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["x"], ["float_x"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["most"], ["float_most"], to=TensorProto.FLOAT),
        helper.make_node("Max", ["float_most", "one"], ["divisor"]),
        helper.make_node("Div", ["float_x", "divisor"], ["y"]),
    ]
    model = onnx_model(nodes, {"x": ["n", 1]}, {"y": ["n", 1]}, {"one": np.ones(1, np.float32)})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


@pytest.mark.parametrize("make", [unique, relative])
def test_rows_that_depend_on_each_other_only_for_some_values_are_not_batched(
    make: Callable[[], ModelProto], tmp_path: Path
) -> None:
    assert add_model(tmp_path, make()).sizes["batched"] is False


def test_the_largest_batch_fits_into_memory() -> None:
    def run(rows: int) -> None:
        tried.append(rows)
        if rows > 10:
            raise BadProgram("it needs too much memory")

    tried: list[int] = []
    sizes = ImportedSizes({}, {}, batched=True, max_rows=1024)
    draft = Draft.start("onnx", [], sizes, {}, {}, {}, lambda: sizes)
    draft._limit_rows(run)
    assert (tried, draft.card["sizes"]["max_rows"]) == ([64, 32, 16, 8], 8)


def test_a_file_with_labels_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(colour_model().SerializeToString())
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n", "utf-8-sig")
    (tmp_path / "store").mkdir()
    options = ["--name", "net", "--task", "classify", "--labels", str(tmp_path / "labels.txt"), "--size", "24"]
    assert models.main(["add", str(tmp_path / "net.onnx"), *options, "--store", str(tmp_path / "store")]) == 0
    assert store.read_version(tmp_path / "store", "net", 1).card.labels == ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("mean", "0,nan,0", "numbers that are not infinite or NaN, separated by commas"),
        ("std", "1;2", "numbers that are not infinite or NaN, separated by commas"),
        ("quantiles", "inf", "numbers that are not infinite or NaN, separated by commas"),
        ("low", "-inf", "a number that is not infinite or NaN"),
        ("high", "1e999", "a number that is not infinite or NaN"),
        ("size", str(2**63), "an integer between -2**63 and 2**63"),
        ("context", "1.5", "an integer between -2**63 and 2**63"),
    ],
)
def test_a_wrong_number_is_rejected_with_its_option(
    option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        models.main(["add", "net.onnx", "--name", "net", f"--{option}={value}"])
    assert f"argument --{option}: {value!r} should be {expected}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["My_Net", "-net", "stats", "", "a" * 65, "\udcff"])
def test_the_name_is_checked_before_the_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        StoreError, match=r"is not a model name; a name has 1 to 64 lower-case letters, digits and hyph"
    ):
        add(tmp_path / "store", tmp_path / "missing.onnx", Description(name), MAX_BYTES)


def test_texts_on_the_command_line_may_not_be_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Python decodes other bytes of arguments and file names to surrogates, which no JSON file can contain."""
    (tmp_path / "store").mkdir()
    path = tmp_path / "m\udcfcdel.onnx"
    path.write_bytes(colour_model().SerializeToString())
    options = ["--store", str(tmp_path / "store"), "--licence", "\udcff", "--source", "\udcff"]
    for title in ([], ["--title", "\udcff"]):
        assert models.main(["add", str(path), "--name", "net", *options, *title]) == 0
    cards = [store.read_version(tmp_path / "store", "net", number).card for number in (1, 2)]
    assert [card.title for card in cards] == ["Imported from m?del.onnx", "?"]
    assert {(card.licence, card.source) for card in cards} == {("?", "?")}
    wrong = ["--task", "classify", "--input", "\udcff"]
    assert models.main(["add", str(path), "--name", "net", *options, *wrong]) == 1
    assert "the card of 'net' has a text that is not Unicode: " in capsys.readouterr().err


def test_a_model_computes_with_the_threads_of_the_service() -> None:
    content = torch.frombuffer(bytearray(linear_model()[0].SerializeToString()), dtype=torch.uint8)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert OnnxNetwork({MODEL: content})._session.get_session_options().intra_op_num_threads == count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "location", ["weights/matrix.bin", "Größe (1)/my model~a.onnx.data", "onnx::MatMul_7", "漢" * 66]
)
def test_external_data_below_the_folder_is_imported(tmp_path: Path, location: str) -> None:
    model, matrix = linear_model()
    externalise(model, location, length=matrix.nbytes)
    (tmp_path / location).parent.mkdir(exist_ok=True)
    (tmp_path / location).write_bytes(matrix.tobytes())
    card = add_model(tmp_path, model)
    stored = store.read_version(tmp_path / "store", "net", card.version)
    assert sorted(stored.tensors) == [f"external/{location}", "model"]
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(stored.network().run({"x": x})["y"], x @ matrix, rtol=1e-5)
    content = io.BytesIO(b"".join(archive.export_version(tmp_path / "store", "net", 1)))
    (tmp_path / "other").mkdir()
    assert archive.import_archive(tmp_path / "other", content, MAX_BYTES).kind == "onnx"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_external_data_without_a_length_have_the_size_of_the_tensor(tmp_path: Path, dtype: type) -> None:
    values = np.arange(6).astype(dtype).reshape(2, 3)
    nodes = [
        helper.make_node("Cast", ["weight"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "number"], ["y"]),
    ]
    model = onnx_model(nodes, {"x": [2, 3]}, {"y": [2, 3]}, {"weight": values})
    externalise(model, "data.bin", offset=64)
    (tmp_path / "data.bin").write_bytes(bytes(64) + values.tobytes())
    add_model(tmp_path, model)
    network = store.read_version(tmp_path / "store", "net", 1).network()
    assert network.run({"x": np.zeros((2, 3), np.float32)})["y"].tolist() == values.tolist()
    (tmp_path / "data.bin").write_bytes(bytes(64) + values.tobytes()[:-1])
    with pytest.raises(StoreError, match=f"is missing, or has less than {64 + values.nbytes} bytes"):
        add_model(tmp_path, model)


def test_a_model_and_its_external_data_may_be_links(tmp_path: Path) -> None:
    """The cache of Hugging Face has links in snapshots/REVISION to files in blobs that are named by their hash."""
    model, matrix = linear_model()
    externalise(model, "model.onnx_data", length=matrix.nbytes)
    snapshot, blobs = tmp_path / "snapshots" / "revision", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_bytes(model.SerializeToString())
    (blobs / "2").write_bytes(matrix.tobytes())
    (snapshot / "model.onnx").symlink_to("../../blobs/1")
    data = snapshot / "model.onnx_data"
    data.symlink_to("../../blobs/2")

    def add_snapshot() -> store.Card:
        return add(tmp_path / "store", snapshot / "model.onnx", Description("net"), MAX_BYTES)

    network = store.read_version(tmp_path / "store", "net", add_snapshot().version).network()
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(network.run({"x": x})["y"], x @ matrix, rtol=1e-5)
    data.unlink()
    (tmp_path / "secret").write_bytes(matrix.tobytes())
    data.symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError, match=r"'model.onnx_data' is not a file below the folder"):
        add_snapshot()
    data.unlink()
    (blobs / "model.onnx_data").write_bytes(matrix.tobytes())  # next to the target of the link
    assert add_snapshot().version == 2


def test_an_archive_has_a_model_and_its_external_data(tmp_path: Path) -> None:
    model, matrix = linear_model()
    externalise(model, "weights/matrix ü.bin", length=matrix.nbytes)
    content = model.SerializeToString()

    def add_archive(entries: dict[str, bytes], max_bytes: int = MAX_BYTES) -> store.Card:
        with zipfile.ZipFile(tmp_path / "upload", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        return add(tmp_path / "store", tmp_path / "upload", Description("net"), max_bytes)

    whole = {"net/net.onnx": content, "net/weights/matrix ü.bin": matrix.tobytes(), "__MACOSX/net/._net.onnx": b"?"}
    card = add_archive({**whole, "net/notes.txt": b"not read"})
    x = np.ones((2, 4), np.float32)
    network = store.read_version(tmp_path / "store", "net", card.version).network()
    np.testing.assert_allclose(network.run({"x": x})["y"], x @ matrix, rtol=1e-5)

    with pytest.raises(StoreError, match=r"'weights/matrix ü.bin' is not in the archive, where 'net/weights/"):
        add_archive({"net/net.onnx": content, "weights/matrix ü.bin": matrix.tobytes()})
    with pytest.raises(StoreError, match=r"has the ONNX files a.onnx, net.onnx; one is allowed"):
        add_archive({"net.onnx": content, "a.onnx": content})
    with pytest.raises(StoreError, match=r"net/net.onnx and its external data have [\d,]+ bytes; the maximum is 2,000"):
        add_archive({**whole, "net/weights/matrix ü.bin": bytes(10**6)}, 2000)  # compressed to 1,000 bytes
    damaged = bytearray((tmp_path / "upload").read_bytes())
    damaged[60:80] = bytes(20)
    (tmp_path / "upload").write_bytes(damaged)
    with pytest.raises(StoreError, match="the archive cannot be read: "):
        add(tmp_path / "store", tmp_path / "upload", Description("net"), MAX_BYTES)
    damaged[-5:-3] = b"\xff\xff"  # makes the offsets of the entries negative
    (tmp_path / "upload").write_bytes(damaged)
    with pytest.raises(StoreError, match=r"cannot be unpacked: its offset is outside the archive"):
        add(tmp_path / "store", tmp_path / "upload", Description("net"), MAX_BYTES)


def add_model(tmp_path: Path, model: ModelProto | bytes, max_bytes: int = MAX_BYTES, **description: Any) -> store.Card:
    path = tmp_path / "net.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return add(tmp_path / "store", path, Description("net", **description), max_bytes)


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("../secret", {"length": 48}, "'../secret', which is not below the folder"),
        ("/etc/passwd", {"length": 48}, "'/etc/passwd', which is not below the folder"),
        ("weights/../../secret", {"length": 48}, "which is not below the folder"),
        ("..", {"length": 48}, "which is not below the folder"),
        (".hidden", {"length": 48}, "or has a name that is longer than 200 bytes, begins with a dot, or contains *"),
        ("weights//inside", {"length": 48}, "which is not below the folder"),
        ("..\\secret", {"length": 48}, "begins with a dot, or contains *, a backslash"),
        ("in\0side", {"length": 48}, "or a control character"),
        ("漢" * 67, {"length": 48}, "longer than 200 bytes"),
        ("link", {"length": 48}, "'link' is not a file below the folder"),
        ("missing", {"length": 48}, "'missing' is not a file below the folder"),
        ("*/_ORT_MEM_ADDR_/*", {"offset": 94000000000000, "length": 48}, "which is not below the folder"),
        ("inside", {"length": 10**12}, "is missing, or has less than 1,000,000,000,000 bytes"),
        ("inside", {"length": 2}, "claims 12 values"),
        ("inside", {"offset": -1, "length": 48}, "has the offset '-1'"),
        ("inside", {"length": ""}, "has the offset '0' and the length ''"),
        ("inside", {"offset": 4}, "is missing, or has less than 52 bytes"),
    ],
)
def test_foreign_files_and_addresses_are_never_read(
    location: str, entries: dict[str, int | str], message: str, tmp_path: Path
) -> None:
    model, _ = linear_model()
    externalise(model, location, **entries)
    (tmp_path / "secret").write_bytes(bytes(48))
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "inside").write_bytes(bytes(48))
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError) as caught:
        add_model(folder, model)
    assert message in str(caught.value)


def loop(_: Path) -> ModelProto:
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, [])],
    )
    return onnx_model([helper.make_node("Loop", ["", "x"], [], body=body)], {"x": [1]}, {"y": [1]})


def custom(_: Path) -> ModelProto:
    model, _ = linear_model()
    model.graph.node[0].domain = "custom.native"
    return model


def function_model(domain: str, node: NodeProto, default: AttributeProto | None = None) -> ModelProto:
    """Return a model that calls a function with one node. ``default`` is a default value of the function."""
    function = helper.make_function(domain, "Mine", ["x"], ["y"], [node], [helper.make_opsetid("", 17)])
    if default is not None:
        function.attribute_proto.add().CopyFrom(default)
    model = onnx_model([helper.make_node("Mine", ["x"], ["y"], domain=domain)], {"x": [1]}, {"y": [1]})
    model.opset_import.append(helper.make_opsetid(domain, 1))
    model.functions.append(function)
    return model


def reading_default(_: Path) -> ModelProto:
    """Return a model with a function whose default value is in another file."""
    tensor = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    tensor.external_data.add(key="length", value="4")
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.add(name="value", ref_attr_name="secret", type=AttributeProto.TENSOR)
    return function_model("own", node, helper.make_attribute("secret", tensor))


def looping_default(path: Path) -> ModelProto:
    node = helper.make_node("Identity", ["x"], ["y"])
    return function_model("own", node, helper.make_attribute("branch", loop(path).graph))


def native(_: Path) -> ModelProto:
    """Return a model whose function has the name of a domain of onnxruntime, and which calls another operator of it."""
    return function_model("com.microsoft", helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"))


def other_operator(_: Path) -> ModelProto:
    return function_model("own", helper.make_node("Gelu", ["x"], ["y"], domain="own"))


def nested(_: Path) -> bytes:
    """Return an ONNX file with 40 nested graphs: each is an attribute of a node. The package onnx cannot write it."""

    def field(number: int, content: bytes) -> bytes:
        length = len(content)
        return bytes([number << 3 | 2, length & 0x7F | 0x80, length >> 7]) + content

    graph = b""
    for _ in range(40):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph) + field(8, b"")


def claims(_: Path) -> ModelProto:
    model, _ = linear_model()
    model.graph.initializer[0].dims[0] = 2**40
    return model


def sparse(_: Path) -> ModelProto:
    model, _ = linear_model()
    model.graph.sparse_initializer.add()
    return model


def fills(_: Path) -> ModelProto:
    shape = np.array([2**38])
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["most"], keepdims=0),
        helper.make_node("Add", ["x", "most"], ["y"]),
    ]
    return onnx_model(nodes, {"x": ["n", 1]}, {"y": ["n", 1]}, {"shape": shape})


def random_model(_: Path) -> ModelProto:
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["noise"]), helper.make_node("Add", ["x", "noise"], ["y"])]
    return onnx_model(nodes, {"x": ["n", 1]}, {"y": ["n", 1]})


def renumbered(ir: int, opset: int) -> ModelProto:
    model, _ = linear_model()
    model.ir_version, model.opset_import[0].version = ir, opset
    return model


def without_inputs(_: Path) -> ModelProto:
    constant = helper.make_node("Constant", [], ["y"], value_float=1.0)
    return onnx_model([constant], {}, {"y": []})


def without_shape(_: Path) -> ModelProto:
    model = onnx_model([helper.make_node("Mul", ["x", "x"], ["y"])], {"x": [1]}, {"y": [1]})
    model.graph.input[0].type.tensor_type.ClearField("shape")
    return model


def dividing(kind: int, *, by_input: bool = True, operator: str = "Div") -> ModelProto:
    """Return a model that casts its inputs to a type, and divides one by the difference of the other and 5."""
    nodes = [
        helper.make_node("Cast", ["x"], ["dividend"], to=kind),
        helper.make_node("Cast", ["z"], ["cast"], to=kind),
        helper.make_node("Cast", ["five"], ["number"], to=kind),
        helper.make_node("Sub", ["cast", "number"], ["difference"]),
        helper.make_node(operator, ["dividend", "difference" if by_input else "number"], ["quotient"]),
        helper.make_node("Cast", ["quotient"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["float", "z"], ["y"]),
    ]
    shape = ["n", 1]
    return onnx_model(nodes, {"x": shape, "z": shape}, {"y": shape}, {"five": np.full(1, 5, np.float32)})


@pytest.mark.parametrize(
    "model",
    [
        dividing(TensorProto.FLOAT),
        dividing(TensorProto.INT64, by_input=False),
        dividing(TensorProto.INT64, operator="Sub"),
    ],
)
def test_divisions_that_cannot_overflow_are_allowed(model: ModelProto, tmp_path: Path) -> None:
    assert add_model(tmp_path, model).sizes["batched"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda _: dividing(TensorProto.INT32),
            "operator 'Div' with the result 'quotient' divides integers by a value",
        ),
        (
            lambda _: dividing(TensorProto.INT64),
            "operator 'Div' with the result 'quotient' divides integers by a value",
        ),
        (lambda _: renumbered(99, 17), "cannot read the model: Unsupported model IR version: 99, max supported"),
        (lambda _: renumbered(8, 99), "Current official support for domain ai.onnx is till opset"),
        (without_inputs, "the model should have at least one tensor as input"),
        (without_shape, "input 'x' has no shape; state it in the file"),
        (loop, "operator 'Loop' is not allowed: it may run forever"),
        (custom, "operator 'MatMul' of the domain 'custom.native' is not allowed: it is a custom operator"),
        (reading_default, "external data is in '../secret', which is not below the folder"),
        (looping_default, "operator 'Loop' is not allowed: it may run forever"),
        (native, "function 'Mine' has the domain 'com.microsoft', which is reserved for onnxruntime"),
        (other_operator, "operator 'Gelu' of the domain 'own' is not allowed: it is a custom operator"),
        (nested, "graphs are nested more than 32 times"),
        (claims, "a tensor claims 3,298,534,883,328 values; the file holds"),
        (sparse, "an initializer is sparse"),
        (fills, "needs too much memory"),
        (random_model, "two runs on the same input differ"),
        (lambda _: forest(zipmap=True)[2], "output 'output_probability' is seq(map("),
        (lambda _: linear_model()[0].SerializeToString()[:-9], "not an ONNX model"),
        (lambda _: b"", "not an ONNX model"),
        (lambda _: b"\x80\x04cos\nsystem\n.", "not an ONNX model"),
        (lambda _: b"\xff" * 100, "not an ONNX model"),
    ],
)
def test_models_that_cannot_be_served_are_rejected(
    make: Callable[[Path], ModelProto | bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(StoreError) as caught:
        add_model(tmp_path, make(tmp_path))
    assert message in str(caught.value)


def test_long_lists_in_attributes_hide_no_field() -> None:
    """The check leaves out numbers and short texts, but not the fields before, between and after them."""
    secret = helper.make_tensor("secret", TensorProto.FLOAT, [1], [0.0])
    secret.data_location = TensorProto.EXTERNAL
    secret.external_data.add(key="location", value="/secret")
    field = AttributeProto(t=secret).SerializeToString()
    lists = AttributeProto(floats=[1.5] * 1500, ints=[-1, 0, 300] * 900, strings=[b"", b"LEAF", b"x" * 40, b"END"])
    values = lists.SerializeToString()
    _check_attributes("node", [memoryview(values)], set(), OnnxContent(), 0)
    for attribute in (field + values, values + field, values + field + values):
        with pytest.raises(ValueError, match="external data is in '/secret'"):
            _check_attributes("node", [memoryview(attribute)], set(), OnnxContent(), 0)
    with pytest.raises(IndexError):
        _check_attributes("node", [memoryview(values[:-1])], set(), OnnxContent(), 0)


def test_a_model_may_define_functions(tmp_path: Path) -> None:
    add_model(tmp_path, function_model("own", helper.make_node("Neg", ["x"], ["y"])))
    network = store.read_version(tmp_path / "store", "net", 1).network()
    assert network.run({"x": np.ones(1, np.float32)})["y"].tolist() == [-1]


def test_the_size_of_a_model_is_limited(tmp_path: Path) -> None:
    model, matrix = linear_model()
    externalise(model, "matrix.bin", length=matrix.nbytes)
    (tmp_path / "matrix.bin").write_bytes(bytes(2000))
    with pytest.raises(StoreError, match="the maximum is 1,000"):
        add_model(tmp_path, model, 1000)
