"""List image files with their labels. The labels come from folders, file names or CSV files.

FOLDER/LABEL/...               a sub-folder for each class
FOLDER/train/LABEL/...         the user's own split into train, val and test; val or test may be missing
FOLDER/cat.0.jpg               labels in the names of the files
FILE.csv                       columns path and label; for several labels of an image, columns path and labels,
                               or path and a column of 0 and 1 for each label
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from app.tables.encodings import decode
from app.tables.messages import TableError
from training.data.datasets import DataError, is_hidden, shorten

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # endings of image files
# possible headers of the column with paths
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image_path", "image")
LABEL_COLUMNS = ("label", "class", "category")  # possible headers of the column with labels
SEVERAL_COLUMNS = ("labels", "tags", "classes", "categories")  # possible headers of a column with several labels
PART_COLUMNS = ("split", "part", "subset")  # possible headers of the column with the part
SEPARATORS = re.compile(r"[|;,]")  # separators of several labels in a cell; if a column has none, spaces separate
FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True, "no": False, "yes": True}
PARTS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}
NUMBERED = re.compile(r"(?P<label>.*[^\W\d_].*?)[ ._-]\(?\d+\)?")  # the stem of a file such as cat.0.jpg


@dataclass(frozen=True)
class ListedImage:
    """An image file, its labels, and its part: train, val, test, or "" if the user chose no part."""

    path: Path
    labels: tuple[str, ...]
    part: str = ""


@dataclass(frozen=True)
class ImageList:
    """The image files in a folder, or those that a CSV file lists.

    Attributes:
        images: the files, in a fixed order.
        several: whether an image may have any number of labels, instead of one.
        skipped: one line for each skipped file or row.
    """

    images: list[ListedImage]
    several: bool
    skipped: list[str]


def list_images(path: Path, name: str = "") -> ImageList:
    """List the images of a folder or CSV file. Raises DataError if there are no images, or if their labels are unclear.

    ``name``: the class of all images in a folder without sub-folders. If it is empty, the labels come from file names
    such as cat.0.jpg or, if the files have no such names, from the name of the folder.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    _check_name(path.resolve().name, path)
    if path.is_file():
        return _list_csv(path)
    skipped: list[str] = []
    parts = _parts(path)
    folders = parts or {path: ""}
    images = [
        replace(image, part=part)
        for folder, part in folders.items()
        for image in _list_folder(folder, name, skipped, bool(parts))
    ]
    skipped += [
        f"{entry}: in none of the folders {shorten(sorted(folder.name for folder in parts))}"
        for entry in _entries(path)
        if parts and entry not in parts
    ]
    if not images:
        raise DataError(f"{path} holds no files: put the images of each class into its own sub-folder")
    for label in sorted({label for image in images for label in image.labels}):
        _check_name(label, path)
    return ImageList(images, False, skipped)


def _check_name(name: str, path: Path) -> None:
    """Raise DataError if a name is not UTF-8, because the model card contains it. ``path``: the folder or CSV file."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{path}: rename the folder or file {os.fsencode(name)!r}; its name is not UTF-8") from None


def _entries(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "__")))


def _loose(path: Path) -> list[Path]:
    return [entry for entry in _entries(path) if entry.is_file()]


def _parts(path: Path) -> dict[Path, str]:
    """Return the part of each sub-folder.

    If the sub-folders are not the parts of a split, return an empty dictionary. The sub-folders are parts if there are
    at least two, all have names of parts, one is for training, and the images in at least one have classes. A
    sub-folder without image files may have any other name, and is left out.

    Raises:
        DataError: two sub-folders stand for the same part, or only some of the parts have classes.
    """
    folders = [entry for entry in _entries(path) if entry.is_dir()]
    parts = {folder: PARTS.get(folder.name.lower(), "") for folder in folders}
    parts = {folder: part for folder, part in parts.items() if part or _holds_images(folder)}
    if len(parts) < 2 or not all(parts.values()) or "train" not in parts.values():
        return {}
    filled = [folder for folder in parts if _holds_images(folder)]
    flat = [folder for folder in filled if not _has_classes(folder)]
    if flat and len(flat) == len(filled):
        return {}  # the folders hold images directly, so their names are classes
    if flat:
        without = ", ".join(folder.name for folder in flat)
        raise DataError(
            f"{path}: the images in {without} have no class: move {without} out of {path}, or put the images of each "
            "class into a sub-folder"
        )
    names = [folder.name for folder in parts]
    if len(set(parts.values())) < len(names):
        raise DataError(f"{path} holds {', '.join(names)}, two of which are the same part; merge them")
    order = ("test", "val", "train")  # an image in two parts stays in the first of them
    return dict(sorted(parts.items(), key=lambda item: order.index(item[1])))


def _holds_images(folder: Path) -> bool:
    return any(file.suffix.lower() in SUFFIXES for file in folder.rglob("*") if not is_hidden(file, folder))


def _has_classes(folder: Path) -> bool:
    """Return whether a part of a split has sub-folders with images, or labels in the names of its images."""
    if any(entry.is_dir() and _holds_images(entry) for entry in _entries(folder)):
        return True
    return _has_labels([file for file in _loose(folder) if file.suffix.lower() in SUFFIXES])


def _list_folder(path: Path, name: str, skipped: list[str], is_part: bool) -> Iterator[ListedImage]:
    """Yield the files of each sub-folder. The name of the sub-folder is their class.

    Without sub-folders, yield the files of the folder itself.

    Raises:
        DataError: the sub-folders are parts of a data set, such as 2023 and 2024, not classes.
    """
    folders, loose = [entry for entry in _entries(path) if entry.is_dir()], _loose(path)
    if not folders:
        yield from _list_flat(path, loose, name, skipped)
        return
    if not is_part and (shared := _shared_sub_folders(folders)):
        names = shorten([folder.name for folder in folders])
        raise DataError(
            f"{path} holds {names}, each with {shorten(shared)}: use {folders[0]}; "
            f"name the folders train, val and test if they are the parts of a split; "
            f"or, if {names} are the classes, put their images into them without sub-folders"
        )
    skipped += [f"{file}: not in a sub-folder, so it has no class" for file in loose]
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if is_hidden(file, folder):
                continue
            if file.is_file():
                yield ListedImage(file, (folder.name,))
            elif file.is_symlink() and file.is_dir():
                skipped.append(f"{file}: a link to a folder; only links directly to the folder of a class are followed")


def _list_flat(path: Path, files: list[Path], name: str, skipped: list[str]) -> Iterator[ListedImage]:
    """Yield the files of a folder without sub-folders, with their classes.

    If ``name`` is not empty, it is the class of all files. Otherwise, the classes come from the file names if these
    have labels. Otherwise, the name of the folder is the class.
    """
    if name or not _has_labels(files):
        yield from (ListedImage(file, (name or path.resolve().name,)) for file in files)
        return
    for file in files:
        if match := NUMBERED.fullmatch(file.stem):
            yield ListedImage(file, (match["label"],))
        else:
            skipped.append(f"{file}: its name has no label, such as cat in cat.0.jpg")


def _has_labels(files: list[Path]) -> bool:
    """Return whether at least half of the file names are like cat.0.jpg, and they have at least two labels."""
    names = [NUMBERED.fullmatch(file.stem) for file in files]
    return len({match["label"] for match in names if match}) > 1 and 2 * sum(map(bool, names)) >= len(files)


def _shared_sub_folders(folders: list[Path]) -> list[str]:
    """Return the names of the sub-folders that all ``folders`` have in common.

    The result is empty if there are fewer than two such names, or if one of ``folders`` holds images.
    """
    entries = [list(folder.iterdir()) for folder in folders]
    if len(folders) < 2 or any(entry.suffix.lower() in SUFFIXES for within in entries for entry in within):
        return []
    inside = [{entry.name for entry in within if entry.is_dir()} for within in entries]
    shared = sorted(name for name in set.intersection(*inside) if not name.startswith((".", "__")))
    return shared if len(shared) > 1 else []


def _list_csv(path: Path) -> ImageList:
    """List the images in the rows of a CSV file. Paths are relative to the CSV file. The encoding is detected.

    Rows without a path or a label, or with an unknown part, are skipped.

    Raises:
        DataError: the file cannot be read, or it has no images, no column of paths or no column of labels.
    """
    try:
        lines = decode(path.read_bytes())[0].splitlines()
    except TableError as error:  # its message names an option that only tables have
        raise DataError(
            f"{path} is neither a folder nor a text file in a known encoding; save the list of paths and labels as CSV "
            "in UTF-8, or unpack the images and name their folder"
        ) from error
    delimiter = max(",;\t", key=lambda mark: lines[0].count(mark)) if lines else ","
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, skipinitialspace=True)]
    except csv.Error as error:
        raise DataError(f"{path} is neither a folder nor a CSV file with paths and labels: {error}") from error
    columns = _columns(path, rows)
    several = columns.labels >= 0
    cells = [row[columns.labels] for row in rows[1:] if several and len(row) > columns.labels]
    separators = SEPARATORS if any(map(SEPARATORS.search, cells)) else re.compile(r"\s")
    label_at = columns.labels if several else columns.label
    needed = max(columns.path, label_at, columns.part, *columns.flags)
    images, skipped = [], []
    for number, row in enumerate(rows[columns.known :], 1 + columns.known):
        place, text = f"{path}, row {number}", repr(delimiter.join(row)[:60])
        part = row[columns.part].lower() if 0 <= columns.part < len(row) else ""
        if not row:
            continue
        if number == 1 and not (Path(row[0]).suffix.lower() in SUFFIXES or os.path.isfile(path.parent / row[0])):
            skipped.append(f"{place}: names no file, so it counts as a header: {text}")
        elif len(row) <= needed or not row[columns.path] or not (columns.flags or several or row[label_at]):
            skipped.append(f"{place}: expected a path and a label, not {text}")
        elif part and part not in PARTS:
            skipped.append(f"{place}: the part is {part!r}; allowed are train, val and test")
        else:
            labels: Iterable[str] = [row[label_at]]
            if columns.flags:
                labels = [label for at, label in columns.flags.items() if FLAGS[row[at].lower()]]
            elif several:
                labels = {label.strip() for label in separators.split(row[label_at])} - {""}
            images.append(ListedImage(path.parent / row[columns.path], tuple(sorted(labels)), PARTS.get(part, "")))
    if not images:
        raise DataError(f"{path} lists no images; expected rows of a path and a label")
    return ImageList(images, several or bool(columns.flags), skipped)


@dataclass(frozen=True)
class _Columns:
    """The positions of the columns of a CSV file; -1: there is no such column.

    ``labels``: the column with several labels in a cell. ``flags``: the label of each column of 0 and 1. ``known``:
    whether the first row is a header with a known name.
    """

    path: int
    label: int
    labels: int
    part: int
    flags: dict[int, str]
    known: bool


def _columns(path: Path, rows: list[list[str]]) -> _Columns:
    """Find the columns of a CSV file.

    With a header, the columns may be in any order. If no name stands for paths, the first column with an unknown name
    holds the paths. A column without a name is used only if there is no such column. If no name stands for labels, and
    only one column is left, this column holds the labels. Without any known name, the columns are path and label. If
    the first row then names no image file, it is skipped as a header.
    """
    header = [cell.lower() for cell in rows[0]] if rows else []
    if header and Path(header[0]).suffix in SUFFIXES:
        header = []  # the first row is an image, so a label such as "test" is not the name of a column
    file, label, labels, part = (
        next((header.index(name) for name in names if name in header), -1)
        for names in (PATH_COLUMNS, LABEL_COLUMNS, SEVERAL_COLUMNS, PART_COLUMNS)
    )
    if max(file, label, labels, part) < 0:
        return _Columns(0, 1, -1, -1, {}, False)
    if file < 0:
        free = [at for at in range(len(header)) if at not in (label, labels, part)]
        file = min(free, key=lambda at: not header[at], default=-1)  # pandas writes an index without a name
    flags: dict[int, str] = {}
    if max(label, labels) < 0:
        others = [at for at, name in enumerate(header) if name and at not in (file, part)]
        label = others[0] if len(others) == 1 else -1
        flags = _flags(path, rows, file, others) if label < 0 else {}
    if file < 0 or (max(label, labels) < 0 and not flags):
        raise DataError(
            f"{path} has no column of {'paths' if file < 0 else 'labels'}; its columns are: {', '.join(rows[0])}; call "
            "the columns path and label, or path and labels if a cell has several labels; or write 0 or 1 into a "
            "column for each label"
        )
    return _Columns(file, label, -1 if label >= 0 else labels, part, flags, True)


def _flags(path: Path, rows: list[list[str]], file: int, columns: list[int]) -> dict[int, str]:
    """Return the position and name of each of the ``columns`` that holds 0 and 1 (or no and yes).

    If there are fewer than two such columns, return an empty dictionary. ``file``: the column of the paths.

    Raises:
        DataError: most cells of a column are 0 or 1, but not all.
    """
    result = {}
    for at in columns:
        cells = {number: row[at] for number, row in enumerate(rows[1:], 2) if len(row) > max(at, file) and row[file]}
        others = {number: cell for number, cell in cells.items() if cell.lower() not in FLAGS}
        if not others and cells:
            result[at] = rows[0][at]
        elif 2 * (len(cells) - len(others)) > sum(map(bool, cells.values())):
            number, cell = next(iter(others.items()))
            raise DataError(
                f"{path}, row {number}: {cell!r} in column {rows[0][at]!r} should be 0 or 1; correct such cells, or "
                "delete the column if it does not stand for a label"
            )
    return result if len(result) > 1 else {}
