"""Convert networks to `torch.export` programs (.pt2) and ONNX files, which run without this project.

The metadata of an exported file contain the labels, the preprocessing and the model card as JSON.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from app.exporting.signatures import SIGNATURES, Signature
from app.networks import is_imported
from app.store import Card, StoreError
from app.store.version import Version

MAX_DIFFERENCE = 1e-3  # largest difference of outputs, absolute and relative


class ExportRefused(StoreError):
    """The network cannot be exported. The message states the reason."""


def to_pt2(version: Version) -> bytes:
    """Return the content of a ``.pt2`` file for ``torch.export.load``. Its ``extra_files`` contain the metadata.

    Raises ExportRefused for an imported network, and StoreError for an invalid network.
    """
    signature = _signature(version)
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # torch warns about its own code
        program = _program(signature)
        old = list(program.graph_signature.user_outputs)
        nodes = {node.name: node for node in program.graph.nodes}
        _name(nodes.values(), [nodes[str(name)] for name in old], signature.outputs)
        for before, after in zip(old, signature.outputs, strict=True):
            program.graph_signature.replace_all_uses(str(before), after)
        torch.export.save(program, file, extra_files=_metadata(version.card, signature))
    return file.getvalue()


def to_onnx(version: Version) -> bytes:
    """Return the content of an ONNX file, which onnxruntime has run once.

    Raises ExportRefused for an imported network, if the extra ``[onnx]`` is not installed, and if the file does not
    give the outputs of the network. Raises StoreError for an invalid network.
    """
    signature = _signature(version)
    try:
        import onnxruntime  # noqa: F401  # for the check of the file
        import onnxscript  # noqa: F401  # torch.onnx needs it
    except ImportError as error:
        raise ExportRefused(f"--onnx needs the package {error.name!r}, which the extra [onnx] installs") from None
    with warnings.catch_warnings(action="ignore"):
        axes = tuple({0: "batch"} for _ in signature.examples)
        onnx = to_model(_program(signature), signature.outputs, axes)
    onnx.model.metadata_props.update(_metadata(version.card, signature))
    content: bytes = onnx.model_proto.SerializeToString()
    with torch.inference_mode():
        expected = signature.module(*signature.examples)
    check_outputs(content, signature.examples, expected, version.label)
    return content


def to_model(program: torch.export.ExportedProgram, names: Sequence[str], axes: Any = None) -> Any:
    """Return a program as an ONNX model of torch whose outputs have the names ``names``.

    ``axes`` names the varying dimensions of each input; by default, they keep the names in the program.
    """
    operators: dict[Any, Any] = {torch.ops.aten.asinh.default: _asinh}
    onnx = torch.onnx.export(
        program, dynamic_shapes=axes, dynamo=True, verbose=False, custom_translation_table=operators
    )
    assert onnx is not None
    _name([value for node in onnx.model.graph for value in node.outputs], onnx.model.graph.outputs, names)
    return onnx


def check_outputs(
    onnx: bytes | str, examples: Sequence[torch.Tensor], expected: Mapping[str, torch.Tensor], label: str
) -> None:
    """Compare the outputs of an ONNX file with those of the network, because torch can write files with errors.

    Raises ExportRefused if the file cannot be run, or if the outputs for the example inputs differ.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        inputs = {name: example.numpy() for name, example in zip(names, examples, strict=True)}
        outputs = session.run(list(expected), inputs)
    except Exception as error:  # onnxruntime raises errors of many classes
        raise ExportRefused(f"torch cannot export {label}: onnxruntime rejects the file: {error}") from None
    for name, output in zip(expected, outputs, strict=True):
        if not np.allclose(output, expected[name].numpy(), rtol=MAX_DIFFERENCE, atol=MAX_DIFFERENCE, equal_nan=True):
            raise ExportRefused(f"torch cannot export {label}: the file's output {name!r} differs from the network's")


def _signature(version: Version) -> Signature:
    if is_imported(version.card.kind):
        raise ExportRefused(
            f"{version.label} was imported, so it can only be exported to an archive, without --onnx and --pt2"
        )
    return SIGNATURES[version.card.task](version)


def _program(signature: Signature) -> torch.export.ExportedProgram:
    """Trace the network with gradients enabled. Without gradients, some networks choose kernels by the batch size."""
    module = signature.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    batch = torch.export.Dim("batch")
    with torch.enable_grad():
        program = torch.export.export(
            module, signature.examples, dynamic_shapes=tuple({0: batch} for _ in signature.examples)
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    return program


def _name(values: Iterable[Any], outputs: Iterable[Any], names: Sequence[str]) -> None:
    """Give the outputs of a graph their ``names``. Rename other ``values`` that already have one of these names."""
    for value in values:
        if value.name in names:
            value.name = f"{value.name}_inner"
    for output, name in zip(outputs, names, strict=True):
        output.name = name


def _asinh(x: Any) -> Any:
    """Return asinh(x), computed with other ONNX operators, because onnxruntime has no asinh for float64."""
    from onnxscript import opset18

    op: Any = opset18
    one = op.CastLike(op.Constant(value_float=1.0), x)
    return op.Mul(op.Sign(x), op.Log(op.Add(op.Abs(x), op.Sqrt(op.Add(op.Mul(x, x), one)))))


def _metadata(card: Card, signature: Signature) -> dict[str, str]:
    """Return the metadata of an exported file. Each value is a JSON text."""
    content: dict[str, Any] = {
        "model": f"{card.name}@{card.version}",
        "task": card.task,
        "labels": card.labels,
        "vocabulary": card.vocabulary,
        "preprocessing": signature.preprocessing,
        "postprocessing": signature.postprocessing,
        "card": card.model_dump(exclude_none=True),
    }
    return {key: json.dumps(value, ensure_ascii=False) for key, value in content.items() if value is not None}
