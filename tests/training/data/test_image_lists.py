"""Lists of image files: the labels and parts that folders, file names and CSV files give."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.data.datasets import DataError
from training.data.image_lists import list_images


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def listed(path: Path) -> set[tuple[str, str, str]]:
    """Return the name, the label and the part of each image in a list."""
    return {(image.path.name, " ".join(image.labels), image.part) for image in list_images(path).images}


SPLIT = {("0.jpg", "cat", "train"), ("1.jpg", "dog", "train"), ("2.jpg", "cat", "test"), ("3.jpg", "dog", "test")}
SPLIT_FILES = ("train/cat/0.jpg", "train/dog/1.jpg", "test/cat/2.jpg", "test/dog/3.jpg")


@pytest.mark.parametrize(
    "names",
    [
        ["train/cat/0.jpg", "train/dog/1.jpg", "test/2.jpg"],
        ["train/cat/0.jpg", "train/dog/1.jpg", "test/image_2.jpg", "test/image_3.jpg"],
        ["train/cat.0.jpg", "train/dog.1.jpg", "test/2.jpg"],
        ["train/cat/0.jpg", "train/dog/1.jpg", "val/cat/2.jpg", "test/3.jpg", "test/notes/a.txt", "labels/a.xml"],
    ],
)
def test_a_part_of_a_split_without_classes_is_rejected_by_name(tmp_path: Path, names: list[str]) -> None:
    path = write_files(tmp_path / "pets", *names)
    with pytest.raises(DataError, match=rf"the images in test have no class: move test out of {path}, or put"):
        list_images(path)


def test_folders_without_images_do_not_change_a_split(tmp_path: Path) -> None:
    path = write_files(tmp_path, *SPLIT_FILES, "annotations/a.xml", "readme.txt")
    assert listed(path) == SPLIT
    assert list_images(path).skipped == [
        f"{path}/annotations: in none of the folders test, train",
        f"{path}/readme.txt: in none of the folders test, train",
    ]
    (path / "val").mkdir()
    assert listed(path) == SPLIT
    write_files(path, "more/4.jpg")  # now the folders are classes
    assert {label for _, label, _ in listed(path)} == {"train", "test", "more", "annotations"}


def test_a_loose_image_beside_the_classes_of_a_part_is_skipped(tmp_path: Path) -> None:
    path = write_files(tmp_path, *SPLIT_FILES, "train/cover.jpg")
    assert listed(path) == SPLIT
    assert list_images(path).skipped == [f"{path}/train/cover.jpg: not in a sub-folder, so it has no class"]


@pytest.mark.parametrize("stem", ["", "image_"])
def test_folders_of_images_may_be_classes_called_train_and_test(tmp_path: Path, stem: str) -> None:
    path = write_files(tmp_path, f"train/{stem}0.jpg", f"train/{stem}1.jpg", f"test/{stem}2.jpg")
    assert {(label, part) for _, label, part in listed(path)} == {("train", ""), ("test", "")}


def test_the_parts_of_a_split_may_have_labels_in_file_names(tmp_path: Path) -> None:
    path = write_files(tmp_path, "train/cat.0.jpg", "train/dog.1.jpg", "test/cat.2.jpg", "test/dog.3.jpg")
    assert {(label, part) for _, label, part in listed(path)} == {
        (label, part) for label in ("cat", "dog") for part in ("train", "test")
    }
