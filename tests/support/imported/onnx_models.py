"""Small ONNX models for tests of the import, and the command that imports them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from app.cli import models

OPSET = 17


def add(store: Path, model: ModelProto | bytes | Path, name: str = "net", *options: str) -> str:
    """Import a model or file with the command line, and return the messages of the command."""
    file = model if isinstance(model, Path) else store.parent / f"{name}.onnx"
    if not isinstance(model, Path):
        file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as messages, suppress(SystemExit):
        models.main(["add", "--store", str(store), str(file), "--name", name, *options])
    return messages.getvalue()


def onnx_model(
    nodes: Sequence[NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, np.ndarray] | None = None,
    **options: Any,
) -> ModelProto:
    """Return an ONNX model that has float32 inputs and outputs of these shapes."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in each.items()]
        for each in (inputs, outputs)
    ]
    graph = helper.make_graph(list(nodes), "graph", *values, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, **options)


def linear_model() -> tuple[ModelProto, np.ndarray]:
    """Return a model that multiplies rows by a matrix, and this matrix [4, 3]."""
    matrix = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "matrix"], ["y"])]
    return onnx_model(nodes, {"x": ["batch", 4]}, {"y": ["batch", 3]}, {"matrix": matrix}), matrix


def linear_classifier() -> ModelProto:
    """Return a model that computes the logits of two classes from images [N, 3, 2, 2]."""
    matrix = np.random.default_rng(0).standard_normal((12, 2)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "matrix"], ["y"])]
    return onnx_model(nodes, {"image": ["batch", 3, 2, 2]}, {"y": ["batch", 2]}, {"matrix": matrix})


def square_classifier(shape: list[Any], side: int, labels: int) -> ModelProto:
    """Return a classifier of RGB images of ``side`` x ``side`` pixels. Its input declares the shape ``shape``."""
    matrix = np.random.default_rng(0).standard_normal((3 * side * side, labels)).astype(np.float32)
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("MatMul", ["flat", "matrix"], ["y"])]
    return onnx_model(nodes, {"x": shape}, {"y": ["n", labels]}, {"matrix": matrix})


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
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


def function_model(domain: str) -> ModelProto:
    """Return a model that calls the function ``F0`` of a domain, which negates its input."""
    model = onnx_model([helper.make_node("F0", ["x"], ["y"], domain=domain)], {"x": ["n", 1]}, {"y": ["n", 1]})
    model.opset_import.append(helper.make_opsetid(domain, 1))
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    model.functions.append(helper.make_function(domain, "F0", ["x"], ["y"], nodes, list(model.opset_import)))
    return model
