"""Lists of image files: the labels and parts that folders, file names and CSV files give."""

from __future__ import annotations

import os
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


def test_hidden_folders_and_links_to_folders_in_a_class_are_skipped(tmp_path: Path) -> None:
    path = write_files(tmp_path / "pets", "cat/0.jpg", "cat/.thumbnails/1.jpg", "cat/a/.cache/b/2.jpg", "cat/a/3.jpg")
    write_files(tmp_path, "elsewhere/4.jpg")
    (path / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (path / "dog").symlink_to(tmp_path / "elsewhere")
    assert listed(path) == {("0.jpg", "cat", ""), ("3.jpg", "cat", ""), ("4.jpg", "dog", "")}
    remark = "a link to a folder; only links directly to the folder of a class are followed"
    assert list_images(path).skipped == [f"{path}/cat/linked: {remark}"]


@pytest.mark.parametrize("name", [b"K\xe4tz/1.jpg", b"K\xe4tz.1.jpg"])
def test_a_label_that_is_not_utf_8_is_rejected_by_name(tmp_path: Path, name: bytes) -> None:
    write_files(tmp_path, os.fsdecode(name), "dog/2.jpg" if b"/" in name else "dog.2.jpg")
    with pytest.raises(DataError, match=r"rename the folder or file b'K\\xe4tz'; its name is not UTF-8"):
        list_images(tmp_path)


SPLIT = {("0.jpg", "cat", "train"), ("1.jpg", "dog", "train"), ("2.jpg", "cat", "test"), ("3.jpg", "dog", "test")}
SPLIT_FILES = ("train/cat/0.jpg", "train/dog/1.jpg", "test/cat/2.jpg", "test/dog/3.jpg")


@pytest.mark.parametrize(
    "names",
    [
        ["train/cat/0.jpg", "train/dog/1.jpg", "test/2.jpg"],
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


@pytest.mark.parametrize(
    "rows",
    [
        ["image_path,label,split", "a.jpg,cat,train", "b.jpg,dog,test"],
        [",photo,label,split", "0,a.jpg,cat,train", "1,b.jpg,dog,test"],
        ["width,file_name,label,split", "640,a.jpg,cat,train", "480,b.jpg,dog,test"],
        ["subset,species,image", "train,cat,a.jpg", "test,dog,b.jpg"],
    ],
)
def test_columns_are_found_by_name(tmp_path: Path, rows: list[str]) -> None:
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert listed(tmp_path / "list.csv") == {("a.jpg", "cat", "train"), ("b.jpg", "dog", "test")}


def test_columns_of_0_and_1_may_stand_beside_other_columns(tmp_path: Path) -> None:
    rows = ["id,path,cat,dog,note,split", *(f"{i},{i}.jpg,1,0,{'x' * i},train" for i in range(6)), "7,,,,,"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert list_images(tmp_path / "list.csv").several
    assert listed(tmp_path / "list.csv") == {(f"{i}.jpg", "cat", "train") for i in range(6)}


@pytest.mark.parametrize("row", ["a.jpg,test", "a.jpg,label"])
def test_a_label_in_the_first_row_is_not_the_name_of_a_column(tmp_path: Path, row: str) -> None:
    (tmp_path / "list.csv").write_text(f"{row}\nb.jpg,cat\n")
    assert listed(tmp_path / "list.csv") == {("a.jpg", row.partition(",")[2], ""), ("b.jpg", "cat", "")}


def test_spaces_after_the_separator_are_not_part_of_a_label(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('a.jpg, "cat, grey"\nb.jpg, dog\n')
    assert listed(tmp_path / "list.csv") == {("a.jpg", "cat, grey", ""), ("b.jpg", "dog", "")}


@pytest.mark.parametrize(("encoding", "mark"), [("utf-8-sig", ";"), ("cp1252", ";"), ("utf-16", "\t")])
def test_a_list_that_excel_saved_is_read(tmp_path: Path, encoding: str, mark: str) -> None:
    (tmp_path / "list.csv").write_text(f"path{mark}label\na.jpg{mark}Kätzchen\n", encoding)
    assert listed(tmp_path / "list.csv") == {("a.jpg", "Kätzchen", "")}


@pytest.mark.parametrize("content", [b"PK\x03\x04\x14\0\x81\x8d", "path,label\na.jpg,Привет\n".encode("cp1251")])
def test_a_file_that_is_no_list_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"list\.csv is neither a folder nor a text file .*; save .* in UTF-8, or"):
        list_images(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["Path,Sex,Age,Edema", "a.jpg,Female,68,1.0", "b.jpg,Male,70,-1.0"],
         "has no column of labels; its columns are: Path, Sex, Age, Edema; call the columns path and label"),
        (["path,width,species", "a.jpg,640,cat", "b.jpg,480,dog"],
         "has no column of labels; its columns are: path, width, species; call"),
        (["path,cat,dog,bird", "a.jpg,1,0,0", "b.jpg,1,,0", "c.jpg,0,1,1"],
         "row 3: '' in column 'dog' should be 0 or 1; correct such cells, or delete the column if"),
        ([], "lists no images; expected rows of a path and a label"),
    ],
)  # fmt: skip
def test_an_unusable_list_is_rejected(tmp_path: Path, rows: list[str], message: str) -> None:
    (tmp_path / "list.csv").write_text("\n".join(rows))
    with pytest.raises(DataError) as rejection:
        list_images(tmp_path / "list.csv")
    assert message in str(rejection.value)
