"""Run an ONNX model with ``onnxruntime``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from app.networks.imported import ANY, Arrays, Shape
from app.networks.imported.onnx_check import check_onnx

MODEL = "model"  # key of the tensor uint8 [bytes] that holds the ONNX file
EXTERNAL = "external/"  # start of the keys of tensors that hold external data; the file name follows
MAX_MODEL_BYTES = 2**31 - 1  # largest size of a protocol buffer
ARENA_BYTES = 4 * 2**30  # limit for all ONNX models of this process together, without their weights
EXTEND_AS_NEEDED = 1  # value of arena_extend_strategy; 0 would round up to powers of two
OUT_OF_ARENA = "is smaller than requested bytes"  # part of onnxruntime's message when ARENA_BYTES are exceeded
UNKNOWN_CATEGORY = "Unknown Category"  # part of the message of an encoder that does not allow unknown categories
CATEGORY_HINT = '; train the encoder with OneHotEncoder(handle_unknown="ignore")'
# The start of a message: a status, and perhaps the name of a source file and the signature of a function in C++.
SOURCE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (?:/\S+:\d+ .*?\) (?=[A-Z]))?")
QUIET = 4  # log severity: only fatal errors, because all others are raised
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TYPES = {  # types of inputs and outputs; the keys are onnxruntime's names
    "tensor(bool)": "bool", "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64", "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32",
    "tensor(int64)": "int64", "tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64",
    "tensor(string)": "string",
}  # fmt: skip


class NamedTensor(NamedTuple):
    """The type and the declared shape of an input or output."""

    dtype: str
    shape: Shape


@cache
def _runtime() -> Any:
    """Return the module ``onnxruntime``, with a memory limit for all runs. Raises ValueError if it is missing."""
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("ONNX models need the package 'onnxruntime', which the extra [onnx] installs") from None
    arena = onnxruntime.OrtArenaCfg({"max_mem": ARENA_BYTES, "arena_extend_strategy": EXTEND_AS_NEEDED})
    kind, memory = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, memory), arena)
    return onnxruntime


class OnnxRunner:
    """An ONNX model with named inputs and outputs. It uses as many threads as torch does.

    Args:
        tensors: the ONNX file under the key ``MODEL``, and its external data under the keys ``EXTERNAL`` + file name.

    Raises:
        ValueError: the file is invalid, or uses custom operators or files that are not among the tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            if tensor.dtype != torch.uint8 or (key != MODEL and not key.startswith(EXTERNAL)):
                raise ValueError(f"tensor {key!r} should be uint8, and be named {MODEL!r} or {EXTERNAL}FILE")
        if MODEL not in tensors or not 0 < tensors[MODEL].numel() <= MAX_MODEL_BYTES:
            raise ValueError(f"tensor {MODEL!r} should have 1 to {MAX_MODEL_BYTES:,} bytes")
        files = {key.removeprefix(EXTERNAL): tensor.numpy() for key, tensor in tensors.items() if key != MODEL}
        self.content = check_onnx(tensors[MODEL].numpy().tobytes())
        for name, size in self.content.external.items():
            if name not in files or len(files[name]) < size:
                raise ValueError(f"external data {name!r} is missing, or has less than {size:,} bytes")
        self._tensors: Mapping[str, Tensor] = tensors
        self._files = files
        self._open("cpu")
        self.inputs = _named(self._session.get_inputs(), "input")
        self.outputs = _named(self._session.get_outputs(), "output")

    def _open(self, device: str) -> None:
        runtime = _runtime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = QUIET
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other threads need the cores
        if self._files:
            names, contents = list(self._files), list(self._files.values())
            options.add_external_initializers_from_files_in_memory(names, contents, list(map(len, contents)))
        preferred = dict.fromkeys((PROVIDERS[device], PROVIDERS["cpu"]))
        providers = [name for name in preferred if name in runtime.get_available_providers()]
        content = self._tensors[MODEL].numpy().tobytes()
        try:
            self._session = runtime.InferenceSession(content, options, providers=providers)
        except Exception as error:  # onnxruntime raises exceptions of a different class for each status
            raise ValueError(
                f"onnxruntime cannot read the model: {SOURCE.sub('', str(error), count=1).strip()[:500]}"
            ) from error

    def to(self, device: torch.device) -> Self:
        """Run on a GPU if onnxruntime has a provider for it. The model stays on the CPU otherwise."""
        if device.type != "cpu":
            self._open(device.type)
        self._tensors, self._files = {}, {}  # the session has copies
        return self

    def run(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs by name. Raises RuntimeError for inputs that the model cannot read."""
        try:
            results = self._session.run(None, dict(arrays))
        except Exception as error:  # onnxruntime raises exceptions of many classes
            message = str(error).rpartition("Status Message: ")[2]
            if UNKNOWN_CATEGORY in message:
                message = f"{message.strip()}{CATEGORY_HINT}"
            raise RuntimeError("it needs too much memory" if OUT_OF_ARENA in message else message) from error
        return dict(zip(self.outputs, results, strict=True))


def _named(values: Any, role: str) -> dict[str, NamedTensor]:
    """Return tensors by name. Raises ValueError for a value of another type, such as a sequence."""
    for each in values:
        if each.type not in TYPES:
            hint = "; convert it with the option zipmap=False" if "map(" in each.type else ""
            raise ValueError(f"{role} {each.name!r} is {each.type}; allowed types: {', '.join(TYPES)}{hint}")
    return {each.name: NamedTensor(TYPES[each.type], list(map(_dimension, each.shape))) for each in values}


def _dimension(size: object) -> int | str:
    return size if isinstance(size, int) or (isinstance(size, str) and size.isidentifier()) else ANY
