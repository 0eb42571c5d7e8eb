"""A folder of pictures to try things with: circles, squares and triangles of any colour, size and place.

python -m training.data.shapes shapes --count 200      # shapes/circle, shapes/square, shapes/triangle
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 48  # pixels
FULL_TURN = 2 * np.pi


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, turn: float, colour: str) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _polygon(corners: int) -> Callable[..., None]:
    def polygon(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, turn: float, colour: str) -> None:
        angles = turn + np.arange(corners) * FULL_TURN / corners
        draw.polygon([(x + radius * np.cos(a), y + radius * np.sin(a)) for a in angles], fill=colour)

    return polygon


SHAPES: dict[str, Callable[..., None]] = {"circle": _circle, "square": _polygon(4), "triangle": _polygon(3)}


def draw_shape(shape: str, random: np.random.Generator) -> Image.Image:
    """One shape on a dark ground, turned, placed and coloured at random."""
    hue, ground = random.integers(0, 360), random.integers(0, 60)
    image = Image.new("RGB", (SIDE, SIDE), (int(ground),) * 3)
    radius = random.uniform(0.2, 0.38) * SIDE
    x, y = random.uniform(radius, SIDE - radius, 2)
    SHAPES[shape](ImageDraw.Draw(image), x, y, radius, random.uniform(0, FULL_TURN), f"hsl({hue}, 80%, 60%)")
    return image


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to draw them")
    parser.add_argument("--count", type=int, default=200, help="pictures of each shape (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    random = np.random.default_rng(chosen.seed)
    for shape in SHAPES:
        (chosen.folder / shape).mkdir(parents=True, exist_ok=True)
        for number in range(chosen.count):
            draw_shape(shape, random).save(chosen.folder / shape / f"{number:04}.png")
    print(f"drew {chosen.count} pictures each of {', '.join(SHAPES)} in {chosen.folder}")


if __name__ == "__main__":
    main()
