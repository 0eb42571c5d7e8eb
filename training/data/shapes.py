"""Generate example images: circles, squares and triangles of random colour, size and position.

    quartet train shapes shapes --count 200

This command writes the folders shapes/circle, shapes/square and shapes/triangle.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 48  # side length of the images in pixels
FULL_TURN = 2 * np.pi


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, angle: float, colour: str) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _polygon(corners: int) -> Callable[..., None]:
    def polygon(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, angle: float, colour: str) -> None:
        angles = angle + np.arange(corners) * FULL_TURN / corners
        draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=colour)

    return polygon


SHAPES: dict[str, Callable[..., None]] = {"circle": _circle, "square": _polygon(4), "triangle": _polygon(3)}


def draw_shape(shape: str, random: np.random.Generator) -> Image.Image:
    """Draw one shape with random rotation, position and colour on a dark background."""
    hue, grey = random.integers(0, 360), random.integers(0, 60)
    image = Image.new("RGB", (SIDE, SIDE), (int(grey),) * 3)
    radius = random.uniform(0.2, 0.38) * SIDE
    x, y = random.uniform(radius, SIDE - radius, 2)
    SHAPES[shape](ImageDraw.Draw(image), x, y, radius, random.uniform(0, FULL_TURN), f"hsl({hue}, 80%, 60%)")
    return image


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "quartet train shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="output folder, which gets one sub-folder per shape")
    parser.add_argument("--count", type=int, default=200, help="images per shape (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    options = parser.parse_args(argv)
    random = np.random.default_rng(options.seed)
    for shape in SHAPES:
        (options.folder / shape).mkdir(parents=True, exist_ok=True)
        for number in range(options.count):
            draw_shape(shape, random).save(options.folder / shape / f"{number:04}.png")
    print(f"wrote {options.count} images each of {', '.join(SHAPES)} to {options.folder}")


if __name__ == "__main__":
    main()
