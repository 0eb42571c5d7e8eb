"""Compute image features once, and store them on disk.

The features of an image are the input of a pretrained network's last layer.
"""

from __future__ import annotations

import hashlib
import sqlite3
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
CREATE = "CREATE TABLE IF NOT EXISTS features (key TEXT PRIMARY KEY, content BLOB)"
DELETE = """DELETE FROM features WHERE key NOT GLOB ? || '*' AND rowid IN (
    SELECT rowid FROM (SELECT rowid, sum(length(content)) OVER (ORDER BY rowid DESC) AS size FROM features)
    WHERE size > ?)"""


class FeatureCache:
    """Computes features of images, and stores them in the SQLite database ``folder/features.sqlite``.

    So a command that is repeated after an interruption, or with additional images, computes only the missing features.
    If the features of other networks exceed ``Limits.feature_bytes``, the oldest are deleted.
    """

    def __init__(self, folder: Path, network: EfficientNetLite, device: str) -> None:
        self.network, self.device = network, device
        tensors = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("head.")}
        content = f"{weights_digest(tensors)} {network.stem.weight.dtype} {network.sizes.image}"
        self.key = hashlib.sha256(content.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self.database = sqlite3.connect(folder / "features.sqlite", timeout=60)
        self.database.execute("PRAGMA auto_vacuum = FULL")
        with self.database:
            self.database.execute(CREATE)
            self.database.execute(DELETE, (self.key, limits().feature_bytes))

    def __call__(self, dataset: ImageDataset, indices: Tensor, name: str, view: View) -> Tensor:
        """Return the features [len(indices), D] of the images after ``view``. ``name`` identifies the view on disk."""
        keys = {index: f"{self.key} {name} {dataset.digests[index]}" for index in indices.tolist()}
        missing = [index for index, key in keys.items() if self._stored(key) is None]
        with tqdm(total=len(missing), desc=f"features, {name}", unit="image", leave=False, disable=not missing) as bar:
            for start in range(0, len(missing), BATCH):
                batch = missing[start : start + BATCH]
                with torch.inference_mode():
                    features = self.network.features(view(dataset.images[batch]).to(self.device)).float().cpu().numpy()
                with self.database:
                    rows = [(keys[index], row.tobytes()) for index, row in zip(batch, features, strict=True)]
                    self.database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)
                bar.update(len(batch))
        return torch.from_numpy(np.stack([np.frombuffer(self._stored(key) or b"", "<f4") for key in keys.values()]))

    def _stored(self, key: str) -> bytes | None:
        found = self.database.execute("SELECT content FROM features WHERE key = ?", (key,)).fetchone()
        return found[0] if found else None
