"""Small ONNX models for tests of the import, and the command that imports them."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto
from onnx.parser import parse_model

from app.cli import models


def add(store: Path, model: ModelProto | bytes | Path, name: str = "net", *options: str) -> str:
    """Import a model or file with the command line, and return the messages of the command."""
    file = model if isinstance(model, Path) else store.parent / f"{name}.onnx"
    if not isinstance(model, Path):
        file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as messages, suppress(SystemExit):
        models.main(["add", "--store", str(store), str(file), "--name", name, *options])
    return messages.getvalue()


def onnx_model(graph: str, opsets: str = "", functions: str = "") -> ModelProto:
    """Return an ONNX model for the text of a graph, such as ``(float[n,1] x) => (float[n,1] y) { y = Neg(x) }``."""
    return parse_model(f'<ir_version: 8, opset_import: ["": 17{opsets}]> graph {graph} {functions}')


def linear_model() -> tuple[ModelProto, np.ndarray]:
    """Return a model that multiplies rows by a matrix, and this matrix [4, 3]."""
    matrix = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    numbers = ", ".join(map(str, matrix.ravel().tolist()))
    graph = f"(float[batch,4] x) => (float[batch,3] y) <float[4,3] matrix = {{{numbers}}}> {{ y = MatMul(x, matrix) }}"
    return onnx_model(graph), matrix


def square_classifier(shape: str, side: int, labels: int) -> ModelProto:
    """Return a classifier of RGB images of ``side`` x ``side`` pixels. Its input declares the shape ``shape``."""
    matrix = np.random.default_rng(0).standard_normal(3 * side * side * labels).astype(np.float32)
    weights = f"float[{3 * side * side},{labels}] matrix = {{{', '.join(map(str, matrix.tolist()))}}}"
    nodes = "flat = Flatten(x) y = MatMul(flat, matrix)"
    return onnx_model(f"(float[{shape}] x) => (float[n,{labels}] y) <{weights}> {{ {nodes} }}")


def forest(texts: bool = False, **options: Any) -> tuple[Any, np.ndarray, bytes]:
    """Return a random forest of scikit-learn, its training data, and the forest as an ONNX file."""
    from skl2onnx import to_onnx
    from sklearn.ensemble import RandomForestClassifier

    rows = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    classes = (rows.sum(axis=1) > 0).astype(int)
    targets = np.array(["cold", "hot"])[classes] if texts else classes
    model = RandomForestClassifier(5, random_state=0).fit(rows, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, rows, to_onnx(model, rows[:1], options=options or {"zipmap": False}).SerializeToString()


def externalise(model: ModelProto, location: str, **entries: object) -> None:
    """Change the model so that it reads the data of its first weight from the file ``location``."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


def function_model(domain: str, node: str = "y = Neg(x)") -> ModelProto:
    """Return a model that calls the function ``F0`` of a domain, which has one node."""
    graph = f"(float[n,1] x) => (float[n,1] y) {{ y = {domain}.F0(x) }}"
    function = f'<domain: "{domain}", opset_import: ["": 17]> F0 (x) => (y) {{ {node} }}'
    return onnx_model(graph, f', "{domain}": 1', function)
