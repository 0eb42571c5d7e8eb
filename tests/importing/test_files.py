"""The import accepts usual ONNX files and rejects files that are harmful or cannot be served, with the reason."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper
from support.imported.onnx_models import externalise, forest, function_model, linear_model, message, onnx_model
from support.service import run_models_command

from app.store import Card, Store

Add = Callable[..., tuple[Card | None, str]]


@pytest.fixture
def add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Add:
    """Return a function that runs the import command, and returns the card of the new version and the error message."""
    (tmp_path / "store").mkdir()

    def run(model: ModelProto | bytes | Path, *options: str) -> tuple[Card | None, str]:
        path = model if isinstance(model, Path) else tmp_path / "net.onnx"
        if not isinstance(model, Path):
            path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        arguments = ("add", str(path), "--name", "net", *options)
        status, printed, error = run_models_command(capsys, tmp_path / "store", *arguments)
        if status:
            return None, error
        number = int(printed.split("@")[1].split(",")[0])
        return Store(tmp_path / "store").read("net", number).card, error

    return run


def predict(tmp_path: Path, card: Card | None, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    assert card
    outputs: dict[str, np.ndarray] = Store(tmp_path / "store").read("net", card.version).network().run(arrays)
    return outputs


@pytest.mark.parametrize(
    "location", ["weights/matrix.bin", "Größe (1)/my model~a.onnx.data", "onnx::MatMul_7", "漢" * 66]
)
def test_external_data_below_the_folder_is_imported(add: Add, tmp_path: Path, location: str) -> None:
    model, matrix = linear_model()
    externalise(model, location, length=matrix.nbytes)
    (tmp_path / location).parent.mkdir(exist_ok=True)
    (tmp_path / location).write_bytes(matrix.tobytes())
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(predict(tmp_path, add(model)[0], x=x)["y"], x @ matrix, rtol=1e-5)


def test_a_model_and_its_external_data_may_be_links(add: Add, tmp_path: Path) -> None:
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
    assert add(snapshot / "model.onnx")[0]
    data.unlink()
    (tmp_path / "secret").write_bytes(matrix.tobytes())
    data.symlink_to(tmp_path / "secret")
    assert "'model.onnx_data' is not a file below the folder" in add(snapshot / "model.onnx")[1]


def test_an_archive_has_a_model_and_its_external_data(
    add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, matrix = linear_model()
    externalise(model, "weights/matrix ü.bin", length=matrix.nbytes)
    content, path = model.SerializeToString(), tmp_path / "upload"

    def add_archive(entries: dict[str, bytes]) -> tuple[Card | None, str]:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        return add(path)

    whole = {"net/net.onnx": content, "net/weights/matrix ü.bin": matrix.tobytes(), "__MACOSX/net/._net.onnx": b"?"}
    card, _ = add_archive({**whole, "net/notes.txt": b"not read"})
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(predict(tmp_path, card, x=x)["y"], x @ matrix, rtol=1e-5)
    error = add_archive({"net/net.onnx": content, "weights/matrix ü.bin": matrix.tobytes()})[1]
    assert "external data 'weights/matrix ü.bin' is not a file below the folder" in error
    assert (
        "one file with a name that ends in .onnx; it has 2" in add_archive({"net.onnx": content, "a.onnx": content})[1]
    )
    assert "only the command line imports .pt2 files" in add_archive({"model/models/model.json": b"{}"})[1]
    monkeypatch.setenv("QUARTET_LIMITS", '{"max_import_bytes": 2000}')
    assert "the maximum is 2,000" in add_archive({"a.onnx": bytes(10**6)})[1]  # compressed to 1,000 bytes
    assert "the maximum is 2,000" in add(bytes(2001))[1]
    monkeypatch.delenv("QUARTET_LIMITS")
    add_archive(whole)
    damaged = bytearray(path.read_bytes())
    damaged[60:80] = bytes(20)
    path.write_bytes(damaged)
    assert "cannot be unpacked: " in add(path)[1]
    damaged[-5:-3] = b"\xff\xff"  # makes the offsets of the entries negative
    path.write_bytes(damaged)
    assert "cannot be unpacked: " in add(path)[1]


@pytest.mark.parametrize(
    ("location", "entries", "reason"),
    [
        ("../secret", {"length": 48}, "'../secret', which is not below the folder"),
        ("/etc/passwd", {"length": 48}, "'/etc/passwd', which is not below the folder"),
        ("weights/../../secret", {"length": 48}, "which is not below the folder"),
        (".hidden", {"length": 48}, "or has a name that is longer than 200 bytes, begins with a dot, or contains *"),
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
        ("inside", {"offset": 4, "length": 48}, "is missing, or has less than 52 bytes"),
    ],
)
def test_foreign_files_and_addresses_are_never_read(
    location: str, entries: dict[str, int | str], reason: str, add: Add, tmp_path: Path
) -> None:
    model, _ = linear_model()
    externalise(model, location, **entries)
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(48))
    (folder / "inside").write_bytes(bytes(48))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    assert reason in add(folder / "net.onnx")[1]


def loop() -> ModelProto:
    values = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        *(helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "go_on")),
    ]
    body = helper.make_graph([helper.make_node("Identity", ["go"], ["go_on"])], "body", values[:2], values[2:])
    return onnx_model([helper.make_node("Loop", ["", "x"], [], body=body)], {"x": [1]}, {"y": [1]})


def changed(change: Callable[[ModelProto], object]) -> ModelProto:
    """Return a valid model after a change."""
    model, _ = linear_model()
    change(model)
    return model


def hidden(attribute: AttributeProto, as_default: bool) -> ModelProto:
    """Return a model with a function that has an attribute, or has it as a default value."""
    node = helper.make_node("Neg", ["x"], ["y"])
    model = function_model("own", [node])
    owner = model.functions[0].attribute_proto if as_default else model.functions[0].node[0].attribute
    owner.add().CopyFrom(attribute)
    return model


def secret() -> AttributeProto:
    tensor = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    tensor.external_data.add(key="length", value="4")
    return helper.make_attribute("secret", tensor)


def nested(depth: int) -> bytes:
    """Return an ONNX file with nested graphs: each is an attribute of a node. The package onnx cannot write it."""
    graph = b""
    for _ in range(depth):
        graph = message(1, message(5, message(6, graph)))
    return message(7, graph) + message(8, b"")


def filling() -> ModelProto:
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["most"], keepdims=0),
        helper.make_node("Add", ["x", "most"], ["y"]),
    ]
    return onnx_model(nodes, {"x": ["n", 1]}, {"y": ["n", 1]}, {"shape": np.array([2**38])})


def random_numbers() -> ModelProto:
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["noise"]), helper.make_node("Add", ["x", "noise"], ["y"])]
    return onnx_model(nodes, {"x": ["n", 1]}, {"y": ["n", 1]})


REJECTED: dict[str, tuple[Callable[[], ModelProto | bytes], str]] = {
    "a loop": (loop, "operator 'Loop' is not allowed: it may run forever"),
    "a loop in a default": (
        lambda: hidden(helper.make_attribute("branch", loop().graph), as_default=True),
        "operator 'Loop' is not allowed",
    ),
    "a custom operator": (
        lambda: changed(lambda model: setattr(model.graph.node[0], "domain", "custom.native")),
        "operator 'MatMul' of the domain 'custom.native' is a custom operator",
    ),
    "an unknown function": (
        lambda: function_model("own", [helper.make_node("Gelu", ["x"], ["y"], domain="own")]),
        "operator 'Gelu' of the domain 'own' is a custom operator",
    ),
    "a function of onnxruntime": (
        lambda: function_model("com.microsoft", [helper.make_node("Neg", ["x"], ["y"])]),
        "function 'F0' has the domain 'com.microsoft', which is reserved for onnxruntime",
    ),
    "a file in a function": (lambda: hidden(secret(), as_default=False), "external data is in '../secret'"),
    "a file in a default": (lambda: hidden(secret(), as_default=True), "external data is in '../secret'"),
    "deep nesting": (lambda: nested(40), "is not an ONNX model, or too large"),
    "too many values": (
        lambda: changed(lambda model: model.graph.initializer[0].dims.__setitem__(0, 2**40)),
        "a tensor claims 3,298,534,883,328 values; the file holds",
    ),
    "a sparse tensor": (
        lambda: changed(lambda model: model.graph.sparse_initializer.add()),
        "an initializer is sparse",
    ),
    "a large result": (filling, "needs too much memory"),
    "random numbers": (random_numbers, "two runs on the same input differ"),
    "no inputs": (
        lambda: onnx_model([helper.make_node("Constant", [], ["y"], value_float=1.0)], {}, {"y": []}),
        "the model should have at least one tensor as input",
    ),
    "no shape": (
        lambda: changed(lambda model: model.graph.input[0].type.tensor_type.ClearField("shape")),
        "input 'x' has no shape; state it in the file",
    ),
    "a new format": (
        lambda: changed(lambda model: setattr(model, "ir_version", 99)),
        "cannot read the model: Unsupported model IR version: 99, max supported",
    ),
    "maps": (lambda: forest(zipmap=True)[2], "output 'output_probability' is seq(map("),
    "no end": (lambda: linear_model()[0].SerializeToString()[:-9], "not an ONNX model"),
    "nothing": (lambda: b"", "not an ONNX model"),
    "a pickle": (lambda: b"\x80\x04cos\nsystem\n.", "not an ONNX model"),
    "zeros": (lambda: bytes(100 * 2**20), "not an ONNX model"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_models_that_cannot_be_served_are_rejected(name: str, add: Add) -> None:
    make, reason = REJECTED[name]
    card, error = add(make())
    assert (card, error.count("\n")) == (None, 1)
    assert reason in error


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("mean", "0,nan,0", "numbers that are not infinite or NaN, separated by commas"),
        ("std", "1;2", "numbers that are not infinite or NaN, separated by commas"),
        ("size", str(2**63), "a number of pixels above 0"),
    ],
)
def test_a_wrong_number_is_rejected_with_its_option(option: str, value: str, expected: str, add: Add) -> None:
    assert f"argument --{option}: {value!r} should be {expected}" in add(b"", f"--{option}={value}")[1]


@pytest.mark.parametrize("name", ["My_Net", "-net", "stats", "", "a" * 65, "\udcff"])
def test_the_name_is_checked_before_the_file(add: Add, name: str) -> None:
    assert "is not a model name; a name has 1 to 64 lower-case letters" in add(b"", f"--name={name}")[1]


def test_texts_on_the_command_line_may_not_be_utf8(add: Add, tmp_path: Path) -> None:
    """Python decodes other bytes of arguments and file names to surrogates, which no JSON file can contain."""
    path = tmp_path / "m\udcfcdel.onnx"
    path.write_bytes(linear_model()[0].SerializeToString())
    card, _ = add(path, "--licence", "\udcff")
    assert card
    assert (card.title, card.licence) == ("Imported from m?del.onnx", "?")
