"""Small programs that ``torch.export`` has written, and changed copies of their files."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
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


def entries(content: bytes) -> dict[str, bytes]:
    """Return the entries of an archive by name, without its root folder."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def pack(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive with the root folder ``model``."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(f"model/{name}", content)
    return path


def edited(content: bytes, name: str, edit: Callable[[Any], None]) -> dict[str, bytes]:
    """Return the entries of an archive after ``edit`` has changed the JSON document ``name``."""
    files = entries(content)
    document = json.loads(files[name])
    edit(document)
    return {**files, name: json.dumps(document).encode()}


class SmallTransformer(nn.Module):
    """A causal language model with a vocabulary of 11 tokens, position embeddings and one encoder layer."""

    def __init__(self, longest: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(11, 8)
        self.position = nn.Embedding(longest, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(count)
        x = self.token(tokens) + self.position(torch.arange(count))
        return self.head(self.encoder(x, src_mask=mask, is_causal=True))


def export_transformer() -> tuple[SmallTransformer, bytes]:
    torch.manual_seed(0)
    network = SmallTransformer()
    sizes = {"tokens": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=1, max=32)}}
    return network, export(network, torch.zeros(2, 5, dtype=torch.int64), sizes=sizes)
