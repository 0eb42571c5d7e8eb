"""Inputs for the tiny networks in the format of the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

import numpy as np
import tritonclient.http as triton

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
SINE = np.sin(np.arange(60) / 6).reshape(3, 20)
INPUTS: dict[str, dict[str, tuple[str, np.ndarray]]] = {
    "tiny-cnn": {"image": ("UINT8", PIXELS)},
    "tiny-lstm": {"values": ("FP64", SINE)},
    "tiny-forecaster": {"values": ("FP64", SINE)},
    "tiny-gan": {"latents": ("FP32", np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32))},
    "tiny-cgan": {
        "latents": ("FP64", np.random.default_rng(2).standard_normal((3, 4))),
        "classes": ("INT64", np.array([2, 0, 1])),
    },
    "tiny-rnn": {"prompt": ("BYTES", np.array([b"abc", "é".encode(), b""], dtype=object))},
}

SHAPES = {
    "tiny-cnn": {"probabilities": (3, 10)},
    "tiny-lstm": {"mean": (3, 24), "lower": (3, 2, 24), "upper": (3, 2, 24)},
    "tiny-forecaster": {"mean": (3, 24), "lower": (3, 2, 24), "upper": (3, 2, 24)},
    "tiny-gan": {"images": (3, 1, 28, 28)},
    "tiny-cgan": {"images": (3, 1, 28, 28)},
    "tiny-rnn": {"text": (3,), "log_probabilities": (3, 13)},
}


def infer_inputs(name: str, binary: bool, module: Any = triton) -> list[Any]:
    inputs = []
    for tensor, (datatype, values) in INPUTS[name].items():
        inputs.append(module.InferInput(tensor, list(values.shape), datatype))
        inputs[-1].set_data_from_numpy(values, binary_data=binary)
    return inputs
