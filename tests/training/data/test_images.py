"""Folders and lists of images: what is read, skipped and rejected, and the split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.trainings import train_own

from app.tasks.image_codecs import ImageDecoder
from training import cnn, gan
from training.data import image_dataset, image_folders
from training.data.datasets import DataError


def save_noise(folder: Path, name: str, seed: int = 0, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8, generator=generator).numpy()
    Image.fromarray(pixels).save(folder / name, **options)
    return folder / name


def test_training_reads_images_of_any_size_and_mode_like_the_service(tmp_path: Path) -> None:
    for number, mode in enumerate(("1", "L", "P", "RGBA", "CMYK")):
        folder = tmp_path / "all" / mode
        folder.mkdir(parents=True)
        shades = Image.linear_gradient("L").rotate(number * 40).resize((40 + number, 25))
        shades.convert("RGB").convert(mode).save(folder / "a.tiff")
    pictures = image_folders.read(tmp_path / "all", 32)
    assert pictures.classes == ["1", "CMYK", "L", "P", "RGBA"]
    for image, label in zip(pictures.images, pictures.labels, strict=True):
        content = (tmp_path / "all" / pictures.classes[label] / "a.tiff").read_bytes()
        assert torch.equal(image, ImageDecoder(3, 32).parse(content))


def test_unreadable_files_are_listed_and_skipped(tmp_path: Path) -> None:
    valid = save_noise(tmp_path / "pets" / "cat", "a.png")
    save_noise(tmp_path / "pets" / "dog" / "deeper", "b.png", 1)
    (tmp_path / "pets" / "cat" / "half.png").write_bytes(valid.read_bytes()[:500])
    (tmp_path / "pets" / "cat" / "note.txt").write_text("not an image")
    (tmp_path / "pets" / "cat" / ".DS_Store").write_text("hidden")
    (tmp_path / "pets" / "cat" / "empty.jpg").touch()
    save_noise(tmp_path / "pets", "loose.png", 2)
    pictures = image_folders.read(tmp_path / "pets", 32)
    assert pictures.describe_classes() == "cat (1), dog (1)"
    remarks = "\n".join(pictures.skipped)
    for sentence in (
        "loose.png: not in a sub-folder, so it has no class",
        "half.png: the PNG image is damaged",
        "note.txt: its 12 bytes are not an image; allowed formats: PNG",
        "empty.jpg has 0 bytes",
    ):
        assert sentence in remarks
    assert len(pictures.skipped) == 4


def test_duplicates_and_contradictory_labels_are_skipped(tmp_path: Path) -> None:
    save_noise(tmp_path / "pets" / "cat", "a.png")
    save_noise(tmp_path / "pets" / "cat", "again.bmp")
    save_noise(tmp_path / "pets" / "cat", "both.png", 1)
    save_noise(tmp_path / "pets" / "dog", "both.png", 1)
    save_noise(tmp_path / "pets" / "dog", "c.png", 2)
    pictures = image_folders.read(tmp_path / "pets", 32)
    assert pictures.describe_classes() == "cat (1), dog (1)"
    assert any("the same image with the labels cat and dog" in remark for remark in pictures.skipped)
    assert any("again.bmp: duplicate of" in remark for remark in pictures.skipped)


def test_the_split_does_not_depend_on_names_and_adding_images_moves_none_out_of_training(tmp_path: Path) -> None:
    for number in range(60):
        save_noise(tmp_path / "one" / ("cat" if number < 40 else "dog"), f"{number}.png", number)
        save_noise(tmp_path / "two" / ("cat" if number < 40 else "dog"), f"{99 - number}.bmp", number)
    first, second = (image_folders.read(tmp_path / name, 32) for name in ("one", "two"))
    assert first.sha256 == second.sha256
    parts = [{first.digests[index] for index in part} for part in first.split()]
    assert parts == [{second.digests[index] for index in part} for part in second.split()]
    assert sum(map(len, parts)) == 60
    assert all(first.labels[part].unique().numel() == 2 for part in first.split())
    for number in range(60, 80):
        save_noise(tmp_path / "two" / ("cat" if number < 65 else "dog"), f"{99 - number}.bmp", number)
    for count in (20, 10, 4):  # so few that a class may have no image below a threshold
        few = first.select(torch.arange(60) < count)
        more = image_folders.read(tmp_path / "two", 32)
        train = {few.digests[index] for index in few.split()[0]}
        assert train.isdisjoint(more.digests[index] for index in more.split()[2])


def test_a_table_of_paths_and_labels_equals_class_folders(workspace: Path) -> None:
    rows = [f"{file.stem};{file.parent.name};{file}" for file in Path("shapes").rglob("*.png")]
    Path("list.csv").write_text("\n".join(["id;label;path", *rows, "9;circle;shapes/none.png", "10;;x.png"]))
    listed, folder = image_folders.read(Path("list.csv"), 32), image_folders.read(Path("shapes"), 32)
    assert listed.sha256 == folder.sha256
    assert any("shapes/none.png: No such file" in remark for remark in listed.skipped)
    assert any("row 75: expected a path and a label, not '10;;x.png'" in remark for remark in listed.skipped)


def test_a_first_row_without_a_file_is_a_header_and_an_empty_class_is_dropped(tmp_path: Path) -> None:
    for number in range(2):
        save_noise(tmp_path, f"{number}.png", number)
    (tmp_path / "note.txt").write_text("not an image")
    rows = ["0.png,cat", "1.png,dog", "gone.png,bird", "note.txt,bird"]
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["photo,species", *rows]))
    pictures = image_folders.read(path, 32)
    assert pictures.describe_classes() == "cat (1), dog (1)"
    assert pictures.skipped[:2] == [
        "class bird: none of its 2 files could be read",
        f"{path}, row 1: names no file, so it counts as a header: 'photo,species'",
    ]
    assert len(pictures.skipped) == 4
    path.write_text("\n".join(["gone.png,cat", *rows[:2]]))  # the first row is no header
    assert any("gone.png: No such file" in skipped for skipped in image_folders.read(path, 32).skipped)


def test_folders_of_two_years_are_not_taken_for_classes(tmp_path: Path) -> None:
    pets = tmp_path / "pets"
    for number, part in enumerate(("2023", "2024")):
        save_noise(pets / part / "cat", "a.png", number)
        save_noise(pets / part / "dog", "b.png", 2 + number)
        (pets / part / "labels.txt").write_text("cat dog")
    with pytest.raises(DataError, match=rf"pets holds 2023, 2024, each with cat, dog: use {pets}/2023; name the"):
        image_folders.read(pets, 32)
    assert image_folders.read(pets / "2023", 32).describe_classes() == "cat (1), dog (1)"
    save_noise(pets / "2023", "c.png", 4)
    assert "2023 (3)" in image_folders.read(pets, 32).describe_classes()


def test_classes_may_have_sub_folders_of_the_same_name(tmp_path: Path) -> None:
    for number, label in enumerate(("cat", "dog")):
        save_noise(tmp_path / "pets" / label / "photos", "a.png", number)
        save_noise(tmp_path / "pets" / label / (label * 2), "b.png", 2 + number)
    assert image_folders.read(tmp_path / "pets", 32).describe_classes() == "cat (2), dog (2)"


def test_unusable_images_are_rejected_with_a_summary(workspace: Path) -> None:
    for images, sentence in (
        ("nowhere", "nowhere does not exist"),
        ("shapes/circle", r"holds only one class, circle \(24\); at least two"),
        ("data", r"none of its \d+ files is an image"),
    ):
        with pytest.raises(DataError, match=sentence):
            cnn.main(["--images", images, "--name", "mine"])
    with pytest.raises(DataError, match="shapes: no images are left for training; --group makes only 3 groups; use"):
        train_own("cnn", "--group", r"00\d")
    for number in range(18):
        for label in ("square", "triangle"):
            (workspace / "shapes" / label / f"{number:04}.png").unlink()
    few = r"too few images of square \(6\), triangle \(6\); each class needs 8 different images, and at least 2 classes"
    with pytest.raises(DataError, match=rf"circle \(24\), square \(6\), triangle \(6\): {few}"):
        train_own("cnn")
    Path("empty").mkdir()
    with pytest.raises(DataError, match="empty holds no files"):
        image_folders.read(Path("empty"), 32)
    with pytest.raises(DataError, match=r"at least 64 different images are needed"):
        gan.main(["--images", "shapes/circle", "--name", "mine"])
    Path("tags.csv").write_text("path,tags\nshapes/circle/0000.png,round;dark\nshapes/circle/0001.png,round\n")
    with pytest.raises(DataError, match=r"tags\.csv has several labels for an image, but image generators need one"):
        gan.main(["--images", "tags.csv", "--name", "mine"])
    with pytest.raises(DataError, match="--from efficientnet-lite0 needs --size 96 or more, not --size 64"):
        train_own("cnn", "--from", "efficientnet-lite0", "--size", "64")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("several", "groups", "hint"),
    [
        (True, False, "move images of each class to train, or remove these classes"),
        (False, True, "use smaller groups in --group, or add images of each class, or remove these classes"),
    ],
)
def test_a_class_without_images_for_training_is_rejected(several: bool, groups: bool, hint: str) -> None:
    labels = torch.arange(40) % 2 + 2 * (torch.arange(40) >= 30)  # classes 2 and 3 have five images each
    labels = torch.cat([labels, torch.tensor([2, 3] * 5)])
    in_test = labels >= 2
    test_group = next(name for name in map(str, range(99)) if image_dataset._position(f"\0{name}") < 0.15)
    dataset = image_dataset.ImageDataset(
        "pets",
        ["cat", "dog", "cow", "pig"],
        torch.zeros(50, 1, 1, 1),
        torch.nn.functional.one_hot(labels).bool() if several else labels,
        [f"{number:064}" for number in range(50)],
        [],
        ("",) * 50 if groups else tuple("test" if own else "train" for own in in_test.tolist()),
        tuple(test_group if own else f"film {number}" for number, own in enumerate(in_test.tolist()))
        if groups
        else ("",) * 50,
    )
    with pytest.raises(DataError, match=f"^pets: no images for training of cow, pig; {hint}$"):
        image_dataset.keep_trainable(dataset, Path("pets"))
    if not several:
        kept = dataset.select(~in_test)
        assert image_dataset.keep_trainable(kept, Path("pets")).classes == ["cat", "dog"]


def test_the_channels_of_generated_images_follow_the_training_images(workspace: Path) -> None:
    for file in Path("shapes").rglob("*.png"):
        target = Path("grey") / file.relative_to("shapes")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).convert("L").save(target)
    assert gan.read(Path("grey"), 28, "mine").images.shape == (72, 1, 28, 28)
    assert gan.read(Path("shapes"), 32, "mine").images.shape == (72, 3, 32, 32)
