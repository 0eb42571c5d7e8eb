"""A set of distinct images with labels. A hash of each image decides whether it is for training, validation or test."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.tasks.image_codecs import ImageDecoder
from training.data.datasets import DataError, print_first

MAX_PIXELS = 10**8  # images with more pixels are skipped


class ImageFiles:
    """Image files that are used like a tensor uint8 [N, 3, side, side].

    Attributes:
        shape: the shape of this tensor.
    """

    def __init__(self, files: Sequence[Path], side: int) -> None:
        self.files, self._decoder = files, ImageDecoder(3, side)
        self.shape = torch.Size((len(files), 3, side, side))

    def decode(self, index: int) -> Tensor:
        """Return the pixels [3, side, side] of one image."""
        file = self.files[index]
        return self._decoder.parse(file.read_bytes(), MAX_PIXELS, str(file))

    def __getitem__(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pixels of the images with these indices."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads help, because decoding releases the GIL
            return torch.stack(list(pool.map(self.decode, torch.as_tensor(indices).tolist())))

    def subset(self, indices: Tensor | Sequence[int]) -> ImageFiles:
        """Return the images with these indices, without decoding them."""
        files = [self.files[index] for index in torch.as_tensor(indices).tolist()]
        return ImageFiles(files, self.shape[-1])

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield the pixels of at most ``size`` images at a time."""
        for start in range(0, len(self.files), size):
            yield self[range(start, min(start + size, len(self.files)))]


Pixels = Tensor | ImageFiles


def subset(images: Pixels, indices: Tensor) -> Pixels:
    """Return the images with these indices. Image files are not decoded."""
    return images.subset(indices) if isinstance(images, ImageFiles) else images[indices]


MAX_PRINTED = 10  # largest number of skipped files that are printed; skipped.txt in the run's folder lists all
TEST_SHARE = 0.15  # share of the images for testing; the share for validation is the same
MIN_IMAGES_PER_CLASS = 8  # classes with fewer different images are skipped
MIN_GROUPS = 3  # a class with fewer groups of images may be missing in the test or validation part


@dataclass(frozen=True)
class ImageDataset:
    """Distinct images with their labels.

    Attributes:
        name: name of the folder or file.
        classes: names of the classes.
        images: uint8 [N, C, side, side], in the order of ``digests``: a tensor, or image files above 64 pixels.
        labels: indices [N] into ``classes``. If images may have several labels, booleans [N, classes].
        digests: sha256 of the pixels of each image, sorted; duplicates are removed.
        skipped: one line for each skipped file or class.
        parts: for each image, the part that the user chose: "train", "val" or "test", or "" if the user chose none.
        groups: the group of each image, or "". A group is never divided between parts.
    """

    name: str
    classes: list[str]
    images: Any
    labels: Tensor
    digests: list[str]
    skipped: list[str]
    parts: tuple[str, ...]
    groups: tuple[str, ...]

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    @property
    def label_names(self) -> list[str]:
        """The label of each image; several labels are joined by a line break."""
        if not self.multi_label:
            return [self.classes[label] for label in self.labels.tolist()]
        return ["\n".join(self.classes[at] for at in row.nonzero().flatten().tolist()) for row in self.labels]

    @property
    def sha256(self) -> str:
        """Digest of all images, their labels and the parts that the user chose. File names and order do not matter."""
        lines = sorted(
            f"{label}\0{digest}" + (f"\0{part}" if part else "")
            for label, digest, part in zip(self.label_names, self.digests, self.parts, strict=True)
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def data(self) -> dict[str, str]:
        """The digest by its key in the field ``data`` of a card."""
        return {f"images:{self.name}": self.sha256}

    @property
    def counts(self) -> list[int]:
        """The number of images of each class."""
        if self.multi_label:
            return self.labels.sum(dim=0).tolist()
        return self.labels.bincount(minlength=len(self.classes)).tolist()

    def describe_classes(self) -> str:
        """Return the classes with their numbers of images, such as "cat (200), dog (3)"."""
        return ", ".join(f"{name} ({count:,})" for name, count in zip(self.classes, self.counts, strict=True))

    def select(self, keep: Tensor) -> ImageDataset:
        """Return the images where ``keep`` [N] is true, of a dataset with one label for each image.

        Classes without images are removed.
        """
        indices = keep.nonzero().flatten().tolist()
        used, labels = self.labels[keep].unique(return_inverse=True)
        return replace(
            self,
            classes=[self.classes[index] for index in used.tolist()],
            images=subset(self.images, torch.tensor(indices)),
            labels=labels,
            digests=[self.digests[index] for index in indices],
            parts=tuple(self.parts[index] for index in indices),
            groups=tuple(self.groups[index] for index in indices),
        )

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return three tensors of image indices: for training, for validation and for testing.

        A hash of the image or of its group, a number from 0 to 1, decides to which part an image belongs. Images with a
        hash below 0.15 are for testing, and images with a hash from 0.15 to 0.3 are for validation. So the parts are
        the same in every run, and no image moves from training to another part when images are added.

        If a class would have no image for testing or for validation, its image with the lowest hash is used for this
        part. With groups or several labels, this rule applies to all images together, not to each class.

        Parts that the user chose are kept. If the user chose no test part or no validation part, the hash selects the
        images for the missing part.
        """
        part_of = self._parts_by_hash()
        train, validation, test = (
            torch.tensor([at for at, unit in enumerate(self._units) if part_of[unit] == part], dtype=torch.int64)
            for part in ("train", "val", "test")
        )
        return train, validation, test

    def folds(self, indices: Tensor, count: int) -> Tensor:
        """Return the cross-validation fold of each image: integers [len(indices)] from 0 to ``count`` - 1.

        Each class is spread evenly over the folds. With groups, the groups of all classes are numbered together,
        because each class may have only one group.
        """
        fold_of: dict[str, int] = {}
        positions: Counter[str] = Counter()
        units, names, grouped = self._units, self.label_names, any(self.groups)
        for index in sorted(indices.tolist(), key=lambda index: _position(units[index])):
            unit = units[index]
            if unit not in fold_of:
                fold_of[unit] = (len(fold_of) if grouped else positions[names[index]]) % count
                positions[names[index]] += 1
        return torch.tensor([fold_of[units[index]] for index in indices.tolist()])

    @property
    def _units(self) -> list[str]:
        """The unit of each image. Images of the same unit stay in the same part.

        The unit is the part that the user chose, followed by the image's group or, without a group, its digest.
        """
        given = zip(self.parts, self.groups, self.digests, strict=True)
        return [f"{part}\0{group or digest}" for part, group, digest in given]

    def _parts_by_hash(self) -> dict[str, str]:
        """Return the part of each unit."""
        given = set(self.parts)
        shares = [part for part in ("test", "val") if part not in given]
        part_of: dict[str, str] = {}
        classes: dict[str, list[str]] = {}
        divisible = not self.multi_label and not any(self.groups)  # otherwise, a unit may belong to several classes
        for own, unit, label in zip(self.parts, self._units, self.label_names, strict=True):
            if own in ("val", "test"):
                part_of[unit] = own
                continue
            at = int(_position(unit) / TEST_SHARE)
            part_of[unit] = shares[at] if at < len(shares) else "train"
            classes.setdefault(label if divisible else "", []).append(unit)
        for units in classes.values():
            free = sorted(set(units), key=_position)
            for number, part in enumerate(shares if len(free) >= MIN_GROUPS else []):
                if not any(part_of[unit] == part for unit in free):
                    part_of[next(unit for unit in free if part_of[unit] not in shares[:number])] = part
        return part_of


def _position(unit: str) -> float:
    """Return a hash of a text, as a number from 0 to 1. Groups may be parts of file names that are not UTF-8."""
    return int.from_bytes(hashlib.sha256(unit.encode(errors="surrogateescape")).digest()[:6]) / 2**48


def keep_trainable(dataset: ImageDataset, path: Path, classes: int = 2) -> ImageDataset:
    """Skip the classes with too few images.

    Raises DataError if fewer than ``classes`` classes are left, if a part of the split has no images, or if a class has
    no images for training.
    """
    kept = _keep_large_classes(dataset, path, classes)
    split = kept.split()
    for part, indices in zip(("training", "validation", "testing"), split, strict=True):
        if not len(indices):
            groups = len(set(kept.groups)) if any(kept.groups) else 0
            hint = f"--group makes only {groups} groups; use smaller groups" if groups else "add images to this part"
            raise DataError(f"{path}: no images are left for {part}; {hint}")
    counts = replace(kept, labels=kept.labels[split[0]]).counts
    if untrained := ", ".join(name for name, count in zip(kept.classes, counts, strict=True) if not count):
        hint = "move images of each class to train" if any(kept.parts) else "add images of each class"
        hint = f"use smaller groups in --group, or {hint}" if any(kept.groups) else hint
        raise DataError(f"{path}: no images for training of {untrained}; {hint}, or remove these classes")
    return kept


def _keep_large_classes(dataset: ImageDataset, path: Path, classes: int) -> ImageDataset:
    few = [count < MIN_IMAGES_PER_CLASS for count in dataset.counts]
    names = ", ".join(
        f"{name} ({count})" for name, count, small in zip(dataset.classes, dataset.counts, few, strict=True) if small
    )
    if len(dataset.classes) - sum(few) < classes:
        if names:
            raise DataError(
                f"{path} holds {dataset.describe_classes()}: too few images of {names}; "
                f"each class needs {MIN_IMAGES_PER_CLASS} different images, and at least {classes} classes are needed"
            )
        raise DataError(f"{path} holds only one class, {dataset.describe_classes()}; at least two are needed")
    if not names:
        return dataset
    large = torch.tensor(few).logical_not()
    if dataset.multi_label:  # no image is removed, because an image of a skipped class may have other labels
        kept = replace(
            dataset,
            labels=dataset.labels[:, large],
            classes=[name for name, small in zip(dataset.classes, few, strict=True) if not small],
        )
    else:
        kept = dataset.select(large[dataset.labels])
    remark = f"classes with fewer than {MIN_IMAGES_PER_CLASS} different images: {names}"
    return replace(kept, skipped=[remark, *dataset.skipped])


def print_summary(dataset: ImageDataset) -> None:
    """Print the classes and the first skipped files."""
    print(f"{len(dataset.labels):,} different images of {len(dataset.classes)} classes: {dataset.describe_classes()}")
    print_first([f"skipped: {reason}" for reason in dataset.skipped], MAX_PRINTED, "skipped.txt")
