"""Compute image features once, and store them on disk.

The features of an image are the input of a pretrained network's last layer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from app.networks.efficientnet import EfficientNetLite
from app.store.version import weights_digest
from training.data.image_dataset import ImageDataset
from training.limits import limits

BATCH = 16  # images in a forward pass
View = Callable[[Tensor], Tensor]  # a function that changes uint8 images [N, C, S, S], such as mirroring


class FeatureCache:
    """Computes features of images, and appends them to a file in ``folder``, with the digest of each image.

    So a command that is repeated after an interruption, or with additional images, computes only the missing features.
    The files that were used least recently are deleted if all files together exceed ``Limits.feature_bytes``.
    """

    def __init__(self, folder: Path, network: EfficientNetLite, device: str) -> None:
        self.folder, self.network, self.device = folder, network, device
        tensors = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("head.")}
        content = f"{weights_digest(tensors)} {network.stem.weight.dtype} {network.sizes.image}"
        self.key = hashlib.sha256(content.encode()).hexdigest()[:16]
        features = network.head.in_features
        self.record = np.dtype([("digest", "V32"), ("features", "<f4", (features,))])

    def __call__(self, dataset: ImageDataset, indices: Tensor, name: str, view: View) -> Tensor:
        """Return the features [len(indices), D] of the images after ``view``. ``name`` identifies the view on disk."""
        path = self.folder / f"{self.key}-{name}.features"
        path.parent.mkdir(parents=True, exist_ok=True)
        digests = [bytes.fromhex(dataset.digests[index]) for index in indices.tolist()]
        with path.open("ab") as file:
            file.truncate(
                file.tell() // self.record.itemsize * self.record.itemsize
            )  # a killed process may leave a part
            os.utime(path)
            known = {record.tobytes() for record in self._records(path)["digest"]}
            missing = [index for index, digest in zip(indices.tolist(), digests, strict=True) if digest not in known]
            bar = tqdm(total=len(missing), desc=f"features, {name}", unit="image", leave=False, disable=not missing)
            with bar:
                for start in range(0, len(missing), BATCH):
                    batch = missing[start : start + BATCH]
                    records = np.empty(len(batch), self.record)
                    records["digest"] = [bytes.fromhex(dataset.digests[index]) for index in batch]
                    records["features"] = self._compute(view(dataset.images[batch]))
                    file.write(records.tobytes())
                    file.flush()
                    bar.update(len(batch))
        self._delete_old()
        records = self._records(path)
        position = {record.tobytes(): at for at, record in enumerate(records["digest"])}
        return torch.from_numpy(records["features"][[position[digest] for digest in digests]])

    def _records(self, path: Path) -> np.ndarray:
        empty = path.stat().st_size < self.record.itemsize  # which cannot be mapped
        return np.empty(0, self.record) if empty else np.memmap(path, self.record, "r")

    def _delete_old(self) -> None:
        files = sorted(self.folder.glob("*.features"), key=lambda path: path.stat().st_mtime, reverse=True)
        size = 0
        for path in files:
            size += path.stat().st_size
            if size > limits().feature_bytes and not path.name.startswith(self.key):
                path.unlink()

    def _compute(self, images: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return self.network.features(images.to(self.device)).float().cpu().numpy()
