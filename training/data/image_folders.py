"""Own images: a folder with one sub-folder per class, or a CSV file with paths and labels.

Images of any size and mode are decoded as in the service. Unreadable files are skipped and listed.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from app.errors import QuartetError
from app.tasks.image_codecs import ImageDecoder
from training.data.datasets import DataError
from training.loops import distributed

MAX_PIXELS = 10**8  # of one image; larger images are skipped
MAX_PRINTED = 10  # skipped files that are printed; all are listed in the run's folder
TEST_SHARE = 0.15  # share of each class for testing, and the same share for validation
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # of image files
PATH_COLUMNS = ("path", "file", "filename", "image")  # possible headers of the column with paths
LABEL_COLUMNS = ("label", "class", "category")  # possible headers of the column with labels
MIN_IMAGES_PER_CLASS = 8  # different ones: six for training, one for validation, one for testing


@dataclass(frozen=True)
class ImageDataset:
    """Distinct images of the classes.

    Attributes:
        name: name of the folder or file.
        classes: names of the classes.
        images: uint8 [N, C, side, side], in the order of ``digests``.
        labels: indices [N] into ``classes``.
        digests: sha256 of the pixels of each image, sorted; duplicates are removed.
        skipped: one line for each skipped file or class.
    """

    name: str
    classes: list[str]
    images: Tensor
    labels: Tensor
    digests: list[str]
    skipped: list[str]

    @property
    def sha256(self) -> str:
        """Digest of all images and classes; independent of file names and order."""
        lines = sorted(
            f"{self.classes[label]}\0{digest}" for label, digest in zip(self.labels.tolist(), self.digests, strict=True)
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def counts(self) -> list[int]:
        """The number of images of each class."""
        return self.labels.bincount(minlength=len(self.classes)).tolist()

    def describe_classes(self) -> str:
        """The classes with their numbers of images, such as "cat (200), dog (3)"."""
        return ", ".join(f"{name} ({count:,})" for name, count in zip(self.classes, self.counts, strict=True))

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """The indices of the images for training, validation and testing.

        In each class the images with the smallest digests are for testing, the next ones for validation. So the parts
        are the same in every run, and change little when images are added.
        """
        parts: tuple[list[int], list[int], list[int]] = ([], [], [])
        for label in range(len(self.classes)):
            own = [index for index, other in enumerate(self.labels.tolist()) if other == label]
            own.sort(key=lambda index: self.digests[index])
            held = max(1, round(len(own) * TEST_SHARE))
            for part, indices in zip(parts, (own[2 * held :], own[held : 2 * held], own[:held]), strict=True):
                part.extend(indices)
        train, validation, test = (torch.tensor(part, dtype=torch.int64) for part in parts)
        return train, validation, test


def read(path: Path, side: int, channels: int = 3, name: str = "") -> ImageDataset:
    """Read all images of a folder or CSV file and resize them to ``side`` pixels. Raises DataError.

    A folder without sub-folders is one class, named ``name``. A class without readable files is skipped.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    skipped: list[str] = []
    listed = list(_files_of_csv(path, skipped) if path.is_file() else _files_of_folder(path, name, skipped))
    if not listed:
        raise DataError(f"{path} holds no files: put the images of each class into its own sub-folder")
    dataset = _deduplicate(
        path.resolve().name, listed, _decode_all([file for file, _ in listed], side, channels), skipped
    )
    if not dataset.labels.numel():
        raise DataError(f"{path}: none of its {len(listed):,} files is an image; first error: {skipped[0]}")
    return dataset


def check_trainable(dataset: ImageDataset, path: Path, classes: int = 2) -> None:
    """Raise DataError if there are fewer than ``classes`` classes, or too few images of a class."""
    if len(dataset.classes) < classes:
        raise DataError(f"{path} holds only one class, {dataset.describe_classes()}; at least two are needed")
    few = [name for name, count in zip(dataset.classes, dataset.counts, strict=True) if count < MIN_IMAGES_PER_CLASS]
    if few:
        raise DataError(
            f"{path} holds {dataset.describe_classes()}: too few of {', '.join(few)}; "
            f"each class needs {MIN_IMAGES_PER_CLASS} different images at least"
        )


def print_summary(dataset: ImageDataset) -> None:
    """Print the classes and the first skipped files."""
    distributed.print_once(
        f"{len(dataset.labels):,} different images of {len(dataset.classes)} classes: {dataset.describe_classes()}"
    )
    for reason in dataset.skipped[:MAX_PRINTED]:
        distributed.print_once(f"  skipped: {reason}")
    if len(dataset.skipped) > MAX_PRINTED:
        distributed.print_once(
            f"  ... and {len(dataset.skipped) - MAX_PRINTED:,} more, listed in skipped.txt in the run's folder"
        )


def _files_of_folder(path: Path, name: str, skipped: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield the files of each sub-folder with its name as class.

    Raises:
        DataError: the sub-folders are parts of a data set, such as train and test, not classes.
    """
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))
    loose = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    if not folders:
        yield from ((file, name or path.resolve().name) for file in loose)
        return
    if shared := _shared_sub_folders(folders):
        names = _shorten([folder.name for folder in folders])
        example = next((folder for folder in folders if "train" in folder.name.lower()), folders[0])
        raise DataError(
            f"{path} holds {names}, each with {_shorten(shared)}: use {example}; "
            f"or, if {names} are the classes, put their images into them without sub-folders"
        )
    skipped += [f"{file}: not in a sub-folder, so it has no class" for file in loose]
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                yield file, folder.name


def _shared_sub_folders(folders: list[Path]) -> list[str]:
    """The names of two or more sub-folders that all folders have, if no folder has images; otherwise empty."""
    entries = [list(folder.iterdir()) for folder in folders]
    if len(folders) < 2 or any(entry.suffix.lower() in SUFFIXES for within in entries for entry in within):
        return []
    inside = [{entry.name for entry in within if entry.is_dir()} for within in entries]
    shared = sorted(name for name in set.intersection(*inside) if not name.startswith((".", "__")))
    return shared if len(shared) > 1 else []


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _files_of_csv(path: Path, skipped: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield path and label of each row; paths are relative to the CSV file.

    A header may name the columns, in any order. Any other first row that names no file also counts as a header.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
        delimiter = max(",;\t", key=lambda mark: lines[0].count(mark)) if lines else ","
        rows = list(csv.reader(lines, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is neither a folder nor a CSV file with paths and labels: {error}") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    columns = [
        next((header.index(name) for name in names if name in header), -1) for names in (PATH_COLUMNS, LABEL_COLUMNS)
    ]
    known = min(columns) >= 0
    file_at, label_at = columns if known else (0, 1)
    for number, row in enumerate(rows, 1):
        if not row or (number == 1 and known):
            continue
        cells = [cell.strip() for cell in row]
        if number == 1 and Path(cells[0]).suffix.lower() not in SUFFIXES and not os.path.isfile(path.parent / cells[0]):
            skipped.append(f"{path}, row 1: names no file, so it counts as a header: {delimiter.join(row)[:60]!r}")
            continue
        if len(cells) <= max(file_at, label_at) or not cells[file_at] or not cells[label_at]:
            skipped.append(f"{path}, row {number}: expected a path and a label, not {delimiter.join(row)[:60]!r}")
            continue
        yield path.parent / cells[file_at], cells[label_at]


def _decode_all(files: list[Path], side: int, channels: int) -> list[Tensor | str]:
    """The pixels of each file, or an error message."""
    decoder = ImageDecoder(channels, side)

    def decode(file: Path) -> Tensor | str:
        try:
            return decoder.parse(file.read_bytes(), MAX_PIXELS, str(file))
        except QuartetError as failure:
            return failure.message
        except OSError as error:
            return f"{file}: {error.strerror}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the GIL
        bar = tqdm(total=len(files), desc="reading", unit="file", leave=False, disable=distributed.rank() > 0)
        read = []
        for outcome in pool.map(decode, files):
            read.append(outcome)
            bar.update()
        bar.close()
    return read


def _deduplicate(
    name: str, listed: list[tuple[Path, str]], read: list[Tensor | str], skipped: list[str]
) -> ImageDataset:
    """Remove duplicate images, and skip images that have two different labels."""
    first: dict[str, tuple[Path, str, Tensor]] = {}
    ambiguous: set[str] = set()
    for (file, label), outcome in zip(listed, read, strict=True):
        if isinstance(outcome, str):
            skipped.append(outcome)
            continue
        digest = hashlib.sha256(outcome.numpy().tobytes()).hexdigest()
        known = first.setdefault(digest, (file, label, outcome))
        if known[1] != label:
            ambiguous.add(digest)
            skipped.append(f"{known[0]} and {file}: the same image with the labels {known[1]} and {label}")
        elif known[0] != file:
            skipped.append(f"{file}: duplicate of {known[0]}")
    distinct = sorted(digest for digest in first if digest not in ambiguous)
    readable = {label for (_, label), outcome in zip(listed, read, strict=True) if not isinstance(outcome, str)}
    classes = sorted(readable)
    unread = Counter(label for _, label in listed if label not in readable)
    if classes:  # otherwise the first file's error says more
        unreadable = (
            f"class {label}: none of its {count:,} files could be read" for label, count in sorted(unread.items())
        )
        skipped[:0] = unreadable  # first, so that they are printed
    labels = torch.tensor([classes.index(first[digest][1]) for digest in distinct], dtype=torch.int64)
    images = torch.stack([first[digest][2] for digest in distinct]) if distinct else torch.empty(0)
    return ImageDataset(name, classes, images, labels, distinct, skipped)
