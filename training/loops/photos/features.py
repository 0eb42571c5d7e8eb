"""Compute image features once, and store them on disk.

The features of an image are the input of a pretrained network's last layer.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from app.networks.efficientnet import EfficientNetLite
from app.store.version import weights_digest
from training.data.image_dataset import ImageDataset

BATCH = 16  # images in a forward pass
SAVE_EVERY = 20  # seconds between two writes to the disk
View = Callable[[Tensor], Tensor]  # a function that changes uint8 images [N, C, S, S], such as mirroring


class FeatureCache:
    """Computes features of images, and stores them in ``folder`` under the digest of each image.

    So a command that is repeated after an interruption, or with additional images, computes only the missing features.
    """

    def __init__(self, folder: Path, network: EfficientNetLite, device: str) -> None:
        self.folder, self.network, self.device = folder, network, device
        tensors = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("head.")}
        content = f"{weights_digest(tensors)} {network.stem.weight.dtype} {network.sizes.image}"
        self.key = hashlib.sha256(content.encode()).hexdigest()[:16]

    def __call__(self, dataset: ImageDataset, indices: Tensor, name: str, view: View) -> Tensor:
        """Return the features [len(indices), D] of the images after ``view``. ``name`` identifies the view on disk."""
        path = self.folder / f"{self.key}-{name}.safetensors"
        known = _read(path)
        missing = [index for index in indices.tolist() if dataset.digests[index] not in known]
        saved = time.monotonic()
        bar = tqdm(total=len(missing), desc=f"features, {name}", unit="image", leave=False, disable=not missing)
        try:
            for start in range(0, len(missing), BATCH):
                batch = missing[start : start + BATCH]
                for index, row in zip(batch, self._compute(view(dataset.images[batch])), strict=True):
                    known[dataset.digests[index]] = row
                bar.update(len(batch))
                if time.monotonic() - saved > SAVE_EVERY:
                    _write(path, known)
                    saved = time.monotonic()
        finally:
            bar.close()
            if missing:
                _write(path, known)
        return torch.stack([known[dataset.digests[index]] for index in indices.tolist()])

    def _compute(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            features: Tensor = self.network.features(images.to(self.device)).float().cpu()
        return features.clone()


def _read(path: Path) -> dict[str, Tensor]:
    """Return the features in a file by the digest of their image.

    If the file is missing or damaged, return an empty dictionary.
    """
    try:
        with safe_open(path, "pt") as file:
            digests: list[str] = json.loads(file.metadata()["digests"])
            return dict(zip(digests, file.get_tensor("features").unbind(), strict=True))
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}


def _write(path: Path, features: dict[str, Tensor]) -> None:
    if not features:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    save_file({"features": torch.stack(list(features.values()))}, part, {"digests": json.dumps(list(features))})
    part.replace(path)
