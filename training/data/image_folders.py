"""Read users' images in the same way as the service, and remove duplicates. Unreadable files are skipped and listed."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from app.errors import QuartetError
from app.tasks.image_codecs import ImageDecoder
from training.data.datasets import DataError
from training.data.image_dataset import MAX_PIXELS, ImageDataset, ImageFiles, Pixels, subset
from training.data.image_lists import ImageList, list_images
from training.limits import limits

HELD_SIDE = 64  # images of at most this side length in pixels are always held in memory
SIZED_FILES = 200  # number of files whose image sizes decide between the network for small and for large images


def read(path: Path, side: int, name: str = "", group: str | None = None) -> ImageDataset:
    """Read all images of a folder or CSV file, and resize them to ``side`` pixels.

    Args:
        path: a folder or CSV file; see ``training.data.image_lists``.
        side: height and width in pixels.
        name: the class of all images in a folder without sub-folders. If it is empty, the labels come from file names
            such as cat.0.jpg or, if the files have no such names, from the name of the folder.
        group: a regular expression. If it matches the same text in the paths of several images, these images are in the
            same part of a split.

    Raises:
        DataError: ``path`` or ``group`` cannot be used, or no file is an image.
    """
    listed = list_images(path, name)
    files = [image.path for image in listed.images]
    groups = _groups(path, files, group) if group else [""] * len(files)
    images, digests, errors = _decode_all(files, side)
    dataset = _deduplicate(path.resolve().name, listed, images, digests, errors, groups)
    if dataset.digests and not dataset.classes:
        raise DataError(f"{path}: none of its {len(listed.images):,} images has a label")
    if not dataset.labels.numel():
        first = dataset.skipped[0] if dataset.skipped else "all images have contradictory labels"
        raise DataError(f"{path}: none of its {len(listed.images):,} files is an image; first error: {first}")
    return dataset


def largest_side(path: Path) -> int:
    """Return the length in pixels of the longer side of an image: the median over a sample of the images.

    If no image can be opened, return 0. Raises DataError if there are no images.
    """
    files = list_images(path).images
    decoder, sides = ImageDecoder(3, 1), []
    for image in files[:: -(-len(files) // SIZED_FILES)]:
        with contextlib.suppress(QuartetError, OSError, ValueError):  # a path with a NUL is a ValueError
            opened = decoder.open(image.path.read_bytes(), MAX_PIXELS)
            sides.append(max(opened.size if isinstance(opened, Image.Image) else opened.shape[:2]))
    return round(statistics.median(sides)) if sides else 0


def _groups(path: Path, files: list[Path], pattern: str) -> list[str]:
    """Return the group of each file: the text that the regular expression ``pattern`` matches in its path.

    If the expression has a group (...), only the text of the first group is returned. Files without a match get "".
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"--group {pattern!r} is not a regular expression: {error}") from error
    root = path if path.is_dir() else path.parent
    matches = [compiled.search(os.path.relpath(file, root)) for file in files]
    if not any(matches):
        example = os.path.relpath(files[0], root)
        raise DataError(f"--group {pattern!r} matches none of the {len(files):,} paths, such as {example!r}")
    return [(match[1] if compiled.groups else match[0]) or "" if match else "" for match in matches]


def _decode_all(files: list[Path], side: int) -> tuple[Pixels, list[str], list[str]]:
    """Return three values: the images, a digest of the pixels of each file, and an error message for each file.

    The error message is empty if the file could be read. Otherwise, the pixels and the digest are undefined.
    """
    undecoded = ImageFiles(files, side)
    held = None
    if side <= HELD_SIDE or math.prod(undecoded.shape) <= limits().image_bytes:
        held = torch.empty(undecoded.shape, dtype=torch.uint8)

    def digest(index: int) -> tuple[str, str]:
        try:
            pixels = undecoded.decode(index)
        except QuartetError as failure:
            return "", failure.message
        except (OSError, ValueError) as error:  # ValueError: the path has a NUL character
            return "", f"{files[index]}: {getattr(error, 'strerror', error)}"
        if held is not None:
            held[index] = pixels
        return hashlib.sha256(pixels.numpy().tobytes()).hexdigest(), ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(tqdm(pool.map(digest, range(len(files))), "reading", len(files), unit="file", leave=False))
    digests, errors = map(list, zip(*results, strict=True)) if results else ([], [])
    return (undecoded if held is None else held), digests, errors


def _deduplicate(
    name: str, listed: ImageList, images: Pixels, digests: list[str], errors: list[str], groups: list[str]
) -> ImageDataset:
    """Remove duplicate images, and skip images that have two different labels."""
    first: dict[str, int] = {}
    ambiguous: set[str] = set()
    files, skipped = listed.images, listed.skipped
    for index, (image, error) in enumerate(zip(files, errors, strict=True)):
        if error:
            skipped.append(error)
            continue
        digest = digests[index]
        known = files[first.setdefault(digest, index)]
        if known.labels != image.labels:
            ambiguous.add(digest)
            names = " and ".join("+".join(labels) or "none" for labels in (known.labels, image.labels))
            skipped.append(f"{known.path} and {image.path}: the same image with the labels {names}")
        elif known.path != image.path:
            skipped.append(f"{image.path}: duplicate of {known.path}")
    distinct = sorted(digest for digest in first if digest not in ambiguous)
    chosen = [first[digest] for digest in distinct]
    readable = {label for image, error in zip(files, errors, strict=True) if not error for label in image.labels}
    classes = sorted(readable)
    unread = Counter(label for image in files for label in image.labels if label not in readable)
    if classes:  # if no file could be read, only the error of the first file is shown
        unreadable = (
            f"class {label}: none of its {count:,} files could be read" for label, count in sorted(unread.items())
        )
        skipped[:0] = unreadable  # at the beginning, so that these lines are printed
    if listed.several:
        labels = torch.tensor([[label in files[index].labels for label in classes] for index in chosen])
    else:
        labels = torch.tensor([classes.index(files[index].labels[0]) for index in chosen], dtype=torch.int64)
    return ImageDataset(
        name,
        classes,
        subset(images, torch.tensor(chosen, dtype=torch.int64)),
        labels,
        distinct,
        skipped,
        tuple(files[index].part for index in chosen),
        tuple(groups[index] for index in chosen),
    )
