"""Seeds to images."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from app.errors import BadValue, shown
from app.store import Version


class ImageSampler:
    """A generator of the store.

    It computes in double precision, so that no pixel's rounding hangs on how many images are drawn together.
    """

    def __init__(self, version: Version, device: torch.device) -> None:
        self.card = version.card
        self.labels = version.card.labels or []
        self.device = device
        self.network = version.network().to(device).double()
        self.latent: int = self.network.sizes.latent

    def parse(self, count: int, label: str | None, seed: int) -> np.ndarray:
        """What to draw -> latents [count, latent]. Image i of a seed is the same for every count. Raises BadValue."""
        if label is not None and label not in self.labels:
            allowed = (
                f"allowed are {', '.join(self.labels)}" if self.labels else f"{self.card.name} draws without labels"
            )
            raise BadValue(f"label is {shown(label)}; {allowed}", "label")
        return np.random.Generator(np.random.Philox(seed)).standard_normal((count, self.latent))

    def predict(self, items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Latents [count, latent] of each request -> pixels [count, channels, side, side] of each, uint8."""
        with torch.inference_mode():
            latents = torch.from_numpy(np.concatenate(items)).to(self.device)
            pixels = self.network.pixels(latents).cpu().numpy()
        return np.split(pixels, np.cumsum([len(item) for item in items])[:-1])

    def rows(self, item: np.ndarray) -> int:
        """How much of a batch an item takes."""
        return len(item)

    def warm_up(self, rows: int) -> None:
        """Compute once alone and once in a full batch."""
        for count in (1, rows):
            self.predict([np.zeros((count, self.latent))])


def png(pixels: np.ndarray) -> bytes:
    """Pixels [channels, height, width], uint8 -> a PNG file."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def sheet(images: np.ndarray, gap: int = 2) -> np.ndarray:
    """Images [N, channels, height, width] -> one picture of them in rows, as nearly square as may be."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    picture = np.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        picture[:, top : top + height, left : left + width] = image
    return picture
