"""The import accepts usual ONNX files and rejects files that are harmful or cannot be served, with the reason."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper
from support.imported.onnx_models import add, externalise, forest, function_model, linear_model, onnx_model

from app.store import Store


def assert_multiplies(store: Path, matrix: np.ndarray) -> None:
    """Check that the imported network multiplies its input by a matrix."""
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(Store(store).read("net", 1).network().run({"x": x})["y"], x @ matrix, rtol=1e-5)


@pytest.mark.parametrize("location", ["Größe (1)/my model~a.onnx.data", "onnx::MatMul_7", "漢" * 66])
def test_external_data_below_the_folder_is_imported(store: Path, tmp_path: Path, location: str) -> None:
    model, matrix = linear_model()
    externalise(model, location, length=matrix.nbytes)
    (tmp_path / location).parent.mkdir(exist_ok=True)
    (tmp_path / location).write_bytes(matrix.tobytes())
    assert add(store, model) == ""
    assert_multiplies(store, matrix)


def test_a_model_and_its_external_data_may_be_links(store: Path, tmp_path: Path) -> None:
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
    assert add(store, snapshot / "model.onnx") == ""
    data.unlink()
    (tmp_path / "secret").write_bytes(matrix.tobytes())
    data.symlink_to(tmp_path / "secret")
    assert "'model.onnx_data' is not a file below the folder" in add(store, snapshot / "model.onnx")


def test_an_archive_has_a_model_and_its_external_data(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, matrix = linear_model()
    externalise(model, "weights/matrix ü.bin", length=matrix.nbytes)
    content, path = model.SerializeToString(), tmp_path / "upload"

    def add_archive(entries: dict[str, bytes]) -> str:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        return add(store, path)

    whole = {"net/net.onnx": content, "net/weights/matrix ü.bin": matrix.tobytes(), "__MACOSX/net/._net.onnx": b"?"}
    assert add_archive({**whole, "net/notes.txt": b"not read"}) == ""
    assert_multiplies(store, matrix)
    for entries, reason in (
        ({"net/net.onnx": content, "weights/matrix ü.bin": matrix.tobytes()}, "ü.bin' is not a file below the folder"),
        ({"net.onnx": content, "a.onnx": content}, "one file with a name that ends in .onnx; it has 2"),
        ({"model/models/model.json": b"{}"}, "only the command line imports .pt2 files"),
    ):
        assert reason in add_archive(entries)
    monkeypatch.setenv("QUARTET_LIMITS", '{"max_import_bytes": 2000}')
    assert "the maximum is 2,000" in add_archive({"a.onnx": bytes(10**6)})  # compressed to 1,000 bytes
    assert "the maximum is 2,000" in add(store, bytes(2001))
    monkeypatch.delenv("QUARTET_LIMITS")
    add_archive(whole)
    damaged = bytearray(path.read_bytes())
    damaged[60:80] = bytes(20)
    for _ in range(2):
        path.write_bytes(damaged)
        assert "cannot be unpacked: " in add(store, path)
        damaged[-5:-3] = b"\xff\xff"  # makes the offsets of the entries negative


@pytest.mark.parametrize(
    ("location", "entries", "reason"),
    [
        ("/etc/passwd", {}, "'/etc/passwd', which is not below the folder"),
        ("weights/../../secret", {}, "which is not below the folder"),
        ("*/_ORT_MEM_ADDR_/*", {"offset": 94000000000000}, "which is not below the folder"),
        ("in\\side", {}, "or contains *, a backslash"),
        ("in\0side", {}, "or a control character"),
        ("漢" * 67, {}, "longer than 200 bytes"),
        ("link", {}, "'link' is not a file below the folder"),
        ("missing", {}, "'missing' is not a file below the folder"),
        ("inside", {"length": 10**12}, "is missing, or has less than 1,000,000,000,000 bytes"),
        ("inside", {"length": 2}, "claims 12 values"),
        ("inside", {"offset": -1}, "has the offset '-1'"),
        ("inside", {"offset": 4}, "is missing, or has less than 52 bytes"),
    ],
)
def test_foreign_files_and_addresses_are_never_read(
    location: str, entries: dict[str, int], reason: str, store: Path, tmp_path: Path
) -> None:
    model, _ = linear_model()
    externalise(model, location, **{"length": 48, **entries})
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(48))
    (folder / "inside").write_bytes(bytes(48))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    assert reason in add(store, folder / "net.onnx")


LOOP = """(float[1] x) => (float[1] y) {
    y = Loop<body = body (int64 i, bool go) => (bool go_on) { go_on = Identity(go) }>("", x)
}"""
FILLING = """(float[n,1] x) => (float[n,1] y) <int64[1] shape = {274877906944}> {
    large = ConstantOfShape(shape)
    most = ReduceMax<keepdims=0>(large)
    y = Add(x, most)
}"""
RANDOM = "(float[n,1] x) => (float[n,1] y) { noise = RandomNormalLike(x) y = Add(x, noise) }"


def changed(change: Callable[[ModelProto], object]) -> ModelProto:
    """Return a valid model after a change."""
    model, _ = linear_model()
    change(model)
    return model


def file_in_a_function() -> ModelProto:
    tensor = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    model = function_model("own")
    model.functions[0].node[0].attribute.append(helper.make_attribute("secret", tensor))
    return model


def loop_in_a_default() -> ModelProto:
    model = function_model("own")
    model.functions[0].attribute_proto.append(helper.make_attribute("branch", onnx_model(LOOP).graph))
    return model


REJECTED: dict[str, tuple[Callable[[], ModelProto | bytes], str]] = {
    "a loop in a default": (loop_in_a_default, "operator 'Loop' is not allowed: it may run forever"),
    "a file in a function": (file_in_a_function, "external data is in '../secret'"),
    "a custom operator": (
        lambda: changed(lambda model: setattr(model.graph.node[0], "domain", "custom.native")),
        "operator 'MatMul' of the domain 'custom.native' is a custom operator",
    ),
    "a function of onnxruntime": (
        lambda: function_model("com.microsoft"),
        "function 'F0' has the domain 'com.microsoft', which is reserved for onnxruntime",
    ),
    "too many values": (
        lambda: changed(lambda model: model.graph.initializer[0].dims.__setitem__(0, 2**40)),
        "a tensor claims 3,298,534,883,328 values; the file holds",
    ),
    "a sparse tensor": (
        lambda: changed(lambda model: model.graph.sparse_initializer.add()),
        "an initializer is sparse",
    ),
    "a large result": (lambda: onnx_model(FILLING), "needs too much memory"),
    "random numbers": (lambda: onnx_model(RANDOM), "two runs on the same input differ"),
    "no inputs": (
        lambda: onnx_model("() => (float y) { y = Constant<value_float=1.0>() }"),
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
    "nothing": (lambda: b"", "not an ONNX model"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_models_that_cannot_be_served_are_rejected(name: str, store: Path) -> None:
    make, reason = REJECTED[name]
    error = add(store, make())
    assert reason in error
    assert error.count("\n") == 1
    assert not (store / "net").exists()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--mean=0,nan,0", "'0,nan,0' should be numbers that are not infinite or NaN, separated by commas"),
        ("--size=0", "'0' should be a number of pixels above 0"),
        ("--name=My_Net", "is not a model name; a name has 1 to 64 lower-case letters"),
        ("--name=stats", "is not a model name"),
        ("--name=\udcff", "is not a model name"),
    ],
)
def test_options_are_checked_before_the_file(option: str, reason: str, store: Path) -> None:
    assert reason in add(store, b"", "net", option)


def test_texts_on_the_command_line_may_not_be_utf8(store: Path, tmp_path: Path) -> None:
    """Python decodes other bytes of arguments and file names to surrogates, which no JSON file can contain."""
    path = tmp_path / "m\udcfcdel.onnx"
    path.write_bytes(linear_model()[0].SerializeToString())
    assert add(store, path, "net", "--licence", "\udcff") == ""
    card = Store(store).read("net", 1).card
    assert (card.title, card.licence) == ("Imported from m?del.onnx", "?")
