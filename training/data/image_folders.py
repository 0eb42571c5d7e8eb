"""The caller's own images: a folder with a sub-folder for each class, or a CSV of path and label.

Any size and mode, read as the service reads them. What cannot be read is listed and left out.
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

MAX_PIXELS = 10**8  # of one image; a larger one is left out
MAX_PRINTED = 10  # files that are named on the screen; all are in the run's folder
TEST_SHARE = 0.15  # share of each class for the test, and as much for validation
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # of what can be read, as it is called
PATH_COLUMNS = ("path", "file", "filename", "image")  # heads of a table's column of files
LABEL_COLUMNS = ("label", "class", "category")  # and of that of classes
MIN_IMAGES_PER_CLASS = 8  # different images of a class: then one validates, one tests and six teach


@dataclass(frozen=True)
class ImageDataset:
    """Different images [N, C, side, side], uint8, in the order of ``digests``, with labels [N] into ``classes``.

    ``digests`` are those of the pixels, so that a picture that lies there twice is one. ``remarks``: a line for each
    file that was left out.
    """

    name: str
    classes: list[str]
    images: Tensor
    labels: Tensor
    digests: list[str]
    skipped: list[str]

    @property
    def sha256(self) -> str:
        """Of all that was read: the same pictures under other names, or in another order, are the same data."""
        lines = sorted(
            f"{self.classes[label]}\0{digest}" for label, digest in zip(self.labels.tolist(), self.digests, strict=True)
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def counts(self) -> list[int]:
        """How many images each class has."""
        return self.labels.bincount(minlength=len(self.classes)).tolist()

    def describe_classes(self) -> str:
        """What there is, for sentences: cat (200), dog (3)."""
        return ", ".join(f"{name} ({count:,})" for name, count in zip(self.classes, self.counts, strict=True))

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which images teach, validate and test: of each class those with the least digests test, the next validate.

        So the parts are the same in every run, and stay nearly the same when images are added.
        """
        parts: tuple[list[int], list[int], list[int]] = ([], [], [])
        for label in range(len(self.classes)):
            own = [index for index, other in enumerate(self.labels.tolist()) if other == label]
            own.sort(key=lambda index: self.digests[index])
            held = max(1, round(len(own) * TEST_SHARE))
            for part, indices in zip(parts, (own[2 * held :], own[held : 2 * held], own[:held]), strict=True):
                part.extend(indices)
        learn, validate, test = (torch.tensor(part, dtype=torch.int64) for part in parts)
        return learn, validate, test


def read(path: Path, side: int, channels: int = 3, name: str = "") -> ImageDataset:
    """All images of a folder, or of a CSV of path and label, at ``side`` pixels. Raises DataError.

    A folder without sub-folders is one class, named ``name``. A class of which no file could be read is left out.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    remarks: list[str] = []
    listed = list(_files_of_csv(path, remarks) if path.is_file() else _files_of_folder(path, name, remarks))
    if not listed:
        raise DataError(f"{path} holds no files: put the images of each class into a sub-folder of its own")
    pictures = _deduplicate(
        path.resolve().name, listed, _decode_all([file for file, _ in listed], side, channels), remarks
    )
    if not pictures.labels.numel():
        raise DataError(f"{path}: none of its {len(listed):,} files is an image; {remarks[0]}")
    return pictures


def check_trainable(pictures: ImageDataset, path: Path, classes: int = 2) -> None:
    """Refuse, with what was found, what nothing can be learnt from. Raises DataError."""
    if len(pictures.classes) < classes:
        raise DataError(f"{path} holds one class only, {pictures.describe_classes()}: it takes two to tell them apart")
    few = [name for name, count in zip(pictures.classes, pictures.counts, strict=True) if count < MIN_IMAGES_PER_CLASS]
    if few:
        raise DataError(
            f"{path} holds {pictures.describe_classes()}: too few of {', '.join(few)}; "
            f"each class needs {MIN_IMAGES_PER_CLASS} different images at least"
        )


def print_summary(pictures: ImageDataset) -> None:
    """Print what was read, and the first of what was left out."""
    distributed.print_once(
        f"{len(pictures.labels):,} different images of {len(pictures.classes)} classes: {pictures.describe_classes()}"
    )
    for remark in pictures.skipped[:MAX_PRINTED]:
        distributed.print_once(f"  left out: {remark}")
    if len(pictures.skipped) > MAX_PRINTED:
        distributed.print_once(
            f"  ... and {len(pictures.skipped) - MAX_PRINTED:,} more, all in left-out.txt of the run's folder"
        )


def _files_of_folder(path: Path, name: str, remarks: list[str]) -> Iterator[tuple[Path, str]]:
    """The files of each sub-folder, which is their class. Raises DataError when they are parts, such as train."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))
    loose = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    if not folders:
        yield from ((file, name or path.resolve().name) for file in loose)
        return
    if shared := _shared_sub_folders(folders):
        names = _shorten([folder.name for folder in folders])
        whole = next((folder for folder in folders if "train" in folder.name.lower()), folders[0])
        raise DataError(
            f"{path} holds {names}, each with {_shorten(shared)}: give {whole}; "
            f"or, if {names} are the classes, put their images into them without sub-folders"
        )
    remarks += [f"{file}: lies beside the sub-folders, so it has no class" for file in loose]
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                yield file, folder.name


def _shared_sub_folders(folders: list[Path]) -> list[str]:
    """The sub-folders that all of several folders without images share, when these are two or more: so lie parts."""
    entries = [list(folder.iterdir()) for folder in folders]
    if len(folders) < 2 or any(entry.suffix.lower() in SUFFIXES for within in entries for entry in within):
        return []
    inside = [{entry.name for entry in within if entry.is_dir()} for within in entries]
    shared = sorted(name for name in set.intersection(*inside) if not name.startswith((".", "__")))
    return shared if len(shared) > 1 else []


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _files_of_csv(path: Path, remarks: list[str]) -> Iterator[tuple[Path, str]]:
    """Rows of path and label; paths are relative to the table. A head may name the columns, in any order.

    A first row of other words, which names no file, is a head too.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
        delimiter = max(",;\t", key=lambda mark: lines[0].count(mark)) if lines else ","
        rows = list(csv.reader(lines, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is neither a folder nor a CSV of path and label: {error}") from error
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    columns = [
        next((head.index(name) for name in names if name in head), -1) for names in (PATH_COLUMNS, LABEL_COLUMNS)
    ]
    known = min(columns) >= 0
    file_at, label_at = columns if known else (0, 1)
    for number, row in enumerate(rows, 1):
        if not row or (number == 1 and known):
            continue
        cells = [cell.strip() for cell in row]
        if number == 1 and Path(cells[0]).suffix.lower() not in SUFFIXES and not os.path.isfile(path.parent / cells[0]):
            remarks.append(f"{path}, row 1: names no file, so it counts as the head: {delimiter.join(row)[:60]!r}")
            continue
        if len(cells) <= max(file_at, label_at) or not cells[file_at] or not cells[label_at]:
            remarks.append(f"{path}, row {number}: has no path and label: {delimiter.join(row)[:60]!r}")
            continue
        yield path.parent / cells[file_at], cells[label_at]


def _decode_all(files: list[Path], side: int, channels: int) -> list[Tensor | str]:
    """The pixels of each file, or why there are none."""
    decoder = ImageDecoder(channels, side)

    def decode(file: Path) -> Tensor | str:
        try:
            return decoder.parse(file.read_bytes(), MAX_PIXELS, str(file))
        except QuartetError as failure:
            return failure.message
        except OSError as error:
            return f"{file}: {error.strerror}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding frees Python's lock
        bar = tqdm(total=len(files), desc="reading", unit="file", leave=False, disable=distributed.rank() > 0)
        read = []
        for outcome in pool.map(decode, files):
            read.append(outcome)
            bar.update()
        bar.close()
    return read


def _deduplicate(
    name: str, listed: list[tuple[Path, str]], read: list[Tensor | str], remarks: list[str]
) -> ImageDataset:
    """Each picture once. One that lies there under two labels is left out: nobody knows which is right."""
    first: dict[str, tuple[Path, str, Tensor]] = {}
    disputed: set[str] = set()
    again: Counter[str] = Counter()
    for (file, label), outcome in zip(listed, read, strict=True):
        if isinstance(outcome, str):
            remarks.append(outcome)
            continue
        digest = hashlib.sha256(outcome.numpy().tobytes()).hexdigest()
        known = first.setdefault(digest, (file, label, outcome))
        if known[1] != label:
            disputed.add(digest)
            remarks.append(f"{known[0]} and {file}: the same picture under {known[1]} and {label}")
        elif known[0] != file:
            again[digest] += 1
            remarks.append(f"{file}: the same picture as {known[0]}, which counts once")
    kept = sorted(digest for digest in first if digest not in disputed)
    readable = {label for (_, label), outcome in zip(listed, read, strict=True) if not isinstance(outcome, str)}
    classes = sorted(readable)
    unread = Counter(label for _, label in listed if label not in readable)
    if classes:  # otherwise what is wrong with the first file tells more
        whole = (f"class {label}: none of its {count:,} files could be read" for label, count in sorted(unread.items()))
        remarks[:0] = whole  # so that they are on the screen
    labels = torch.tensor([classes.index(first[digest][1]) for digest in kept], dtype=torch.int64)
    images = torch.stack([first[digest][2] for digest in kept]) if kept else torch.empty(0)
    return ImageDataset(name, classes, images, labels, kept, remarks)
