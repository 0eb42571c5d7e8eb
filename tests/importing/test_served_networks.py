"""Imported networks are normal versions: served as tensors or as classifiers, batched and archived."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from onnx import ModelProto
from PIL import Image
from support.imported.onnx_models import add, forest, linear_model, onnx_model, square_classifier
from support.service import TEST, run_models_command, serving
from tritonclient import http as triton

from app.settings import Settings
from app.store import Store

LABELS = ["cat", "dog", "bird"]


def add_classifier(store: Path, model: ModelProto, name: str, *options: str, labels: str = "cat\ndog\n\nbird\n") -> str:
    file = store.parent / "labels.txt"
    file.write_text(labels, "utf-8-sig")  # Windows writes a byte order mark
    return add(store, model, name, "--task", "classify", "--labels", str(file), *options)


FORESTS = {"numbers": forest(), "texts": forest(texts=True)}
LINEAR, MATRIX = linear_model()
COLUMNS = [f"column_{index}" for index in range(60)]


def colours(shape: str) -> ModelProto:
    """Return a classifier of images of any size, whose outputs are the means of the three channels."""
    return onnx_model(f"(float[batch,{shape}] x) => (float[batch,3] y) {{ y = ReduceMean<axes=[2,3], keepdims=0>(x) }}")


MODELS = {  # that are served as tensors
    "linear": LINEAR,
    # scales images down and up again, so it fails unless the size is a multiple of 32
    "rescaling": onnx_model(
        """(float[batch,1,height,width] x) => (float[batch,1,height,width] y) <float[4] factors = {1, 1, 32, 32}> {
            small = MaxPool<kernel_shape=[32,32], strides=[32,32]>(x)
            whole = Resize(small, "", factors)
            y = Add(x, whole)
        }"""
    ),
    "copied-texts": onnx_model("(string[batch,1] text) => (string[batch,1] same) { same = Identity(text) }"),
    "columns": onnx_model(
        f"({', '.join(f'float[batch,1] {name}' for name in COLUMNS)}) => "
        f"({', '.join(f'float[batch,1] negative_{name}' for name in COLUMNS)}) "
        f"{{ {' '.join(f'negative_{name} = Neg({name})' for name in COLUMNS)} }}"
    ),
}
LAST = """(float[batch,8,8,3] x) => (float[batch,3] y) {
    mean = ReduceMean<axes=[1,2], keepdims=0>(x)
    y = Softmax(mean)
}"""
RELATIVE_COLOURS = """(float[n,3,4,4] x) => (float[n,3] y) {
    mean = ReduceMean<axes=[2,3], keepdims=0>(x)
    most = ReduceMax<axes=[1]>(mean)
    y = Div(mean, most)
}"""  # divides by 0 if an image is black


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Import networks and serve them."""
    store = tmp_path_factory.mktemp("imported") / "store"
    store.mkdir()
    for name, (_, _, content) in FORESTS.items():
        assert add(store, content, name, "--licence", "MIT") == ""
    for name, model in MODELS.items():
        assert add(store, model, name) == ""
    scaling = ("--resize", "10", "--mean", "0.5", "--std", "0.5,0.4,0.3", "--interpolation", "bicubic")
    assert add_classifier(store, colours("3,8,8"), "scaled", *scaling) == ""
    assert add_classifier(store, onnx_model(LAST), "last", "--no-softmax") == (
        "assumed: pixels are scaled to 0 to 1 and not normalised further; --mean and --std set another scaling\n"
    )
    add_classifier(store, onnx_model(RELATIVE_COLOURS), "relative")
    for name, shape in {
        "channels-first": "batch_size,num_channels,height,width",
        "channels-last": "batch_size,height,width,3",
        "one-image": "1,3,24,24",
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


MASKED = """(float[batch,3,8,8] x, float[batch,3,8,8] mask) => (float[batch,3] y) {
    masked = Mul(x, mask)
    y = ReduceMean<axes=[2,3], keepdims=0>(masked)
}"""
CENTRED = """(float[batch,3,8,8] x) => (float[batch,3] y) {
    colour = ReduceMean<axes=[2,3], keepdims=0>(x)
    mean = ReduceMean<axes=[0]>(colour)
    y = Sub(colour, mean)
}"""  # subtracts the mean of all images of a batch


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (colours("3,8,8"), "--size 9", "tensor 'x' should have height and width 9"),
        (colours("3,8,8"), "--resize 7", "option resize is 7; it should be at least the size 8"),
        (colours("3,8,8"), "--mean 1,2", "option mean is [1.0, 2.0]; it should be one value, or 3"),
        (colours("3,8,8"), "--std 0", "option std is [0.0]; it should be one value, or 3"),
        (colours("3,h,w"), "", "has a varying height and width; option size sets them"),
        (colours("3,16,24"), "", "should have equal height and width"),
        (colours("4,16,16"), "", "should have 1 or 3 channels"),
        (LINEAR, "", "tensor 'x' should be float or uint8, with 4 dimensions"),
        (square_classifier("n,3,h,w", 24, 3), "", "tried the sizes 16, 32, 64, 128, 256 for all varying"),
        (onnx_model(MASKED), "--input x", "tensor 'mask' is not an input of this task; it is float32"),
        (onnx_model(MASKED), "", "option input is None; known tensors: x, mask"),
        (onnx_model(CENTRED), "", "first dimension that is 1, or that counts rows which do not affect each other"),
    ],
)
def test_a_mismatch_names_the_tensor(store: Path, model: ModelProto, options: str, message: str) -> None:
    assert message in add_classifier(store, model, "net", *options.split())
    assert not (store / "net").exists()


def test_labels_belong_to_classifiers(store: Path) -> None:
    assert "--size is not an option of the task 'infer'; add --task classify" in add(store, LINEAR, "net", "--size=8")
    model = colours("3,8,8")
    assert "needs --labels FILE, a text file with one label" in add(store, model, "net", "--task", "classify")
    message = "tensor 'y' should have one value for each of the 2 labels"
    assert message in add_classifier(store, model, "net", labels="zero\none\n")


# divides integers by their maximum, which is 1 for rows of 0 and 1
RELATIVE = """(int64[n,1] x) => (float[n,1] y) <float[1] one = {1}> {
    number = Cast<to=1>(x)
    most = ReduceMax<keepdims=0>(number)
    divisor = Max(most, one)
    y = Div(number, divisor)
}"""
# adds a small mean of all rows, as rounding errors that depend on the batch size do
AVERAGING = """(float[n,3] x) => (float[n,3] y) <WEIGHT> {
    factor = Cast<to=1>(weight)
    mean = ReduceMean<axes=[0]>(x)
    error = Mul(mean, factor)
    y = Add(x, error)
}"""
HALF = "float16[1] weight = {7455}"  # the bits of 0.005


@pytest.mark.parametrize(
    ("graph", "batched"),
    [
        ("(float[n,1] x) => (float[k,1] y) { y = Unique<axis=0, sorted=0>(x) }", False),
        (RELATIVE, False),
        (AVERAGING.replace("WEIGHT", "float[1] weight = {0.005}"), False),
        (AVERAGING.replace("WEIGHT", HALF), True),
        ("(float[n,n] x, float[n,4] y) => (float[?,?] z) { z = MatMul(x, y) }", False),  # a graph convolution
        ("(float[unk__1,4] x, float[unk__2,4] y) => (float[?,?] z) { z = Add(x, y) }", True),
        ("(float[?,4] x, float[?,4] y) => (float[?,?] z) { z = Add(x, y) }", True),
        ('(float[a,4] x, float[b,4] y) => (float[?,?] z) { z = Einsum<equation="ij,kj->ik">(x, y) }', False),
    ],
)
def test_rows_are_batched_only_if_they_do_not_affect_each_other(store: Path, graph: str, batched: bool) -> None:
    assert add(store, onnx_model(graph)) == ""
    assert Store(store).read("net", 1).card.sizes["batched"] is batched


def test_an_encoder_must_allow_unknown_categories(store: Path) -> None:
    graph = """(string[batch,1] text) => (float[batch,1,2] code) {
        code = ai.onnx.ml.OneHotEncoder<cats_strings=["red","blue"], zeros=0>(text)
    }"""
    opsets = ', "ai.onnx.ml": 3'
    message = 'train the encoder with OneHotEncoder(handle_unknown="ignore")'
    assert message in add(store, onnx_model(graph, opsets))
    assert add(store, onnx_model(graph.replace("zeros=0", "zeros=1"), opsets)) == ""


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
