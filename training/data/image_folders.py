"""Read users' images in the same way as the service, and remove duplicates. Unreadable files are skipped and listed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from app.errors import QuartetError
from app.tasks.image_codecs import ImageDecoder
from training.data.datasets import DataError
from training.data.image_dataset import ImageDataset
from training.data.image_lists import ImageList, list_images

MAX_PIXELS = 10**8  # images with more pixels are skipped
SIZED_FILES = 200  # number of files whose image sizes decide between the network for small and for large images


def read(path: Path, side: int, channels: int = 3, name: str = "", group: str | None = None) -> ImageDataset:
    """Read all images of a folder or CSV file, and resize them to ``side`` pixels.

    Args:
        path: a folder or CSV file; see ``training.data.image_lists``.
        side: height and width in pixels.
        channels: 1 for grey, 3 for colours.
        name: the class of all images in a folder without sub-folders. If it is empty, the labels come from file names
            such as cat.0.jpg or, if the files have no such names, from the name of the folder.
        group: a regular expression. If it matches the same text in the paths of several images, these images are in the
            same part of a split.

    Raises:
        DataError: ``path`` or ``group`` cannot be used, or no file is an image.
    """
    listed = list_images(path, name)
    groups = _groups(path, [image.path for image in listed.images], group) if group else []
    images, errors = _decode_all([image.path for image in listed.images], side, channels)
    dataset = _deduplicate(path.resolve().name, listed, images, errors, groups)
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


def _decode_all(files: list[Path], side: int, channels: int) -> tuple[Tensor, list[str]]:
    """Return the pixels of the images uint8 [files, channels, side, side], and an error message for each file.

    The error message is empty if the file could be read. Otherwise the pixels are undefined.
    """
    decoder = ImageDecoder(channels, side)
    images = torch.empty(len(files), channels, side, side, dtype=torch.uint8)

    def decode(index: int) -> str:
        file = files[index]
        try:
            images[index] = decoder.parse(file.read_bytes(), MAX_PIXELS, str(file))
        except QuartetError as failure:
            return failure.message
        except OSError as error:
            return f"{file}: {error.strerror}"
        except ValueError as error:  # the path has a NUL character
            return f"{file}: {error}"
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads help, because decoding releases the GIL
        bar = tqdm(total=len(files), desc="reading", unit="file", leave=False)
        errors = []
        for error in pool.map(decode, range(len(files))):
            errors.append(error)
            bar.update()
        bar.close()
    return images, errors


def _deduplicate(name: str, listed: ImageList, images: Tensor, errors: list[str], groups: list[str]) -> ImageDataset:
    """Remove duplicate images, and skip images that have two different labels. The images are reordered in place."""
    first: dict[str, int] = {}
    ambiguous: set[str] = set()
    files, skipped = listed.images, listed.skipped
    for index, (image, error) in enumerate(zip(files, errors, strict=True)):
        if error:
            skipped.append(error)
            continue
        digest = hashlib.sha256(images[index].numpy().tobytes()).hexdigest()
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
    if listed.labels is None:
        labels = torch.tensor([classes.index(files[index].labels[0]) for index in chosen], dtype=torch.int64)
    else:
        labels = torch.tensor([[label in files[index].labels for label in classes] for index in chosen])
    parts = tuple(files[index].part for index in chosen)
    return ImageDataset(
        name,
        classes,
        _reordered(images, chosen),
        labels,
        distinct,
        skipped,
        parts if any(parts) else (),
        tuple(groups[index] for index in chosen) if groups else (),
    )


def _reordered(images: Tensor, indices: list[int]) -> Tensor:
    """Return ``images[indices]`` without a copy, because a copy would need the memory of all images again.

    The images are swapped in place. ``indices`` must not contain an index twice.
    """
    for target, source in enumerate(indices):
        while source < target:  # an earlier swap has moved this image
            source = indices[source]
        if source != target:
            images[[target, source]] = images[[source, target]]
    return images[: len(indices)]
