"""Image files for requests, and blank pictures in place of figures."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image


def image_bytes(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (32, 32), **options: Any) -> bytes:
    """Return an image file with random pixels."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 256, (*reversed(size), channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.squeeze(-1) if channels == 1 else noise, mode=None).convert(mode).save(file, kind, **options)
    return file.getvalue()


def save_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def save_blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a blank picture for each figure of matplotlib, except for SVG files.

    Drawing figures took a quarter of the time of trainings in tests.
    """
    from matplotlib.figure import Figure  # imported here, because few tests need it

    draw = Figure.savefig

    def save(figure: Figure, file: Any, **options: Any) -> None:
        if "format" in options:
            draw(figure, file, **options)
        else:
            Image.new("L", (1, 1)).save(file, "PNG")

    monkeypatch.setattr(Figure, "savefig", save)
