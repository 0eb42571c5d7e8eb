"""Small programs that ``torch.export`` has written."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3


class SmallCNN(nn.Module):
    """A CNN with the layers of the workshop's CNN, for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc = nn.Linear(36, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(torch.relu(self.conv(image))), 1))


def export(
    module: nn.Module, *inputs: Tensor, sizes: Mapping[str, dict[int, Any]] | None = None, **options: Any
) -> bytes:
    """Return the ``.pt2`` file of a module. ``sizes`` names the variable dimensions of each input."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own code causes warnings
        file = io.BytesIO()
        torch.export.save(torch.export.export(module.eval(), inputs, dynamic_shapes=sizes, **options), file)
    return file.getvalue()


def export_cnn() -> tuple[SmallCNN, bytes]:
    torch.manual_seed(0)
    network = SmallCNN()
    batch = {"image": {0: torch.export.Dim("batch", max=64)}}
    return network, export(network, torch.zeros(2, 3, 8, 8), sizes=batch)
