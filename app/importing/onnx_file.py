"""Read an ONNX file and its external data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from app.importing.onnx_division import reject_overflowing_divisions
from app.importing.pt2_graph import BadProgram, InputSpec
from app.networks.imported.onnx_format import inputs_without_shape, read_onnx
from app.networks.imported.onnx_network import EXTERNAL, MODEL, OnnxNetwork

CHANNELS = 3  # of an image if the file does not state their number
TYPES = {  # types of inputs and outputs; the keys are onnxruntime's names
    "tensor(bool)": "bool", "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64", "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32",
    "tensor(int64)": "int64", "tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64",
    "tensor(string)": "string",
}  # fmt: skip


def read_onnx_file(path: Path, max_bytes: int) -> dict[str, Tensor]:
    """Read an ONNX file and its external data. Return the files as the tensors of a version.

    The files of external data must be in the folder of the ONNX file or below it. If ``path`` is a link, the folder of
    its target is allowed too: in the cache of Hugging Face, the model and its data are links to another folder.

    Raises:
        BadProgram: the file is invalid, or its external data is elsewhere or too large.
    """
    content = _tensor(path)
    external = external_files(path.name, content)
    folders, total = (path.parent.resolve(), path.resolve().parent), content.numel()
    tensors = {MODEL: content}
    for name in external:
        paths = [(folder / name).resolve() for folder in folders]  # follows links
        allowed = [each for each in paths if each.is_file() and any(map(each.is_relative_to, folders))]
        if not allowed:
            raise BadProgram(
                f"{path.name}: external data {name!r} is not a file below the folder of the model; over HTTP, send a "
                "ZIP archive of the model and its data"
            )
        total += allowed[0].stat().st_size
        if total > max_bytes:
            raise BadProgram(f"{path.name} and its external data have {total:,} bytes; the maximum is {max_bytes:,}")
        tensors[f"{EXTERNAL}{name}"] = _tensor(allowed[0])
    return tensors


def external_files(label: str, content: Tensor) -> list[str]:
    """Return the file names of the external data of an ONNX file. Raises BadProgram if the ONNX file is invalid.

    ``content`` holds the bytes of the ONNX file. ``label`` is its name for error messages.
    """
    try:
        return list(read_onnx(content.numpy().data).external)
    except ValueError as error:
        raise BadProgram(f"{label}: {error}") from None


def _tensor(path: Path) -> Tensor:
    return torch.from_numpy(np.fromfile(path, np.uint8))


def read_signature(tensors: Mapping[str, Tensor]) -> tuple[list[InputSpec], dict[str, list[object]]]:
    """Return the inputs of an ONNX model, and the declared shapes of its outputs in the notation of onnxruntime.

    Raises BadProgram if the model is invalid, or if an input or output is not a tensor of a known type.
    """
    try:
        network = OnnxNetwork(tensors)
    except ValueError as error:
        raise BadProgram(str(error)) from None
    try:
        reject_overflowing_divisions(network, tensors)
    except ValueError as error:
        raise BadProgram(str(error)) from None
    for name, output in network.outputs.items():
        if output.type not in TYPES:
            hint = "; convert it with the option zipmap=False" if "map(" in output.type else ""
            raise BadProgram(f"output {name!r} is {output.type}; allowed types: {', '.join(TYPES)}{hint}")
    specs = []
    unshaped = inputs_without_shape(tensors[MODEL].numpy().data)
    for name, kind, shape in network.signature():
        if kind not in TYPES:
            raise BadProgram(f"input {name!r} is {kind}; allowed types: {', '.join(TYPES)}")
        if name in unshaped:
            raise BadProgram(f"input {name!r} has no shape; state it in the file")
        specs.append(InputSpec(name, TYPES[kind], tuple(map(_dimension, shape))))
    return _with_named_rows(specs), {name: output.shape for name, output in network.outputs.items()}


def fix_image_sizes(inputs: Sequence[InputSpec], images: str | None, side: int | None) -> list[InputSpec]:
    """Return the inputs of a classifier. The varying sizes of the input ``images``, or of any input, are fixed.

    Exporters such as Hugging Face Optimum declare all dimensions as varying, although the network reads only one number
    of channels and one image size. A varying number of channels becomes ``CHANNELS``. A varying height and width become
    ``side``, unless it is None. If all dimensions vary, the channels are taken to come first.
    """

    def fixed(spec: InputSpec) -> InputSpec:
        if spec.name != (images or spec.name) or len(spec.shape) != 4:
            return spec
        last = spec.shape[3] in (1, CHANNELS) and spec.shape[1] not in (1, CHANNELS)
        known = (None, side, side, None) if last else (None, CHANNELS, side, side)
        pairs = zip(spec.shape, known, strict=True)
        return replace(spec, shape=tuple(new if isinstance(size, str) and new else size for size, new in pairs))

    return [fixed(spec) for spec in inputs]


def _dimension(size: object) -> int | str:
    """Return the size of a dimension: a number, a name if it varies, or ``?`` if it varies and has no name."""
    return size if isinstance(size, int) or (isinstance(size, str) and size.isidentifier()) else "?"


def _with_named_rows(inputs: Sequence[InputSpec]) -> list[InputSpec]:
    """Return the inputs with a new name for each first dimension that has none, because it may be a batch dimension."""
    known = {size for spec in inputs for size in spec.shape}
    names = (name for index in count() if (name := f"batch_{index}") not in known)
    return [
        replace(spec, shape=(next(names), *spec.shape[1:])) if spec.shape[:1] == ("?",) else spec for spec in inputs
    ]
