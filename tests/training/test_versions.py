"""Versions that start from other versions: fine-tuning, teachers, calibration, and data that a version has seen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.networks import FORECASTER, publish_network, tiny_card
from support.trainings import KINDS, TEXT, WHITENED, only_entry, train_own

from app import store
from app.networks import build
from app.store.card import is_worse
from training import cards, cnn, rnn
from training.configs.classifiers import CnnFinetuneConfig
from training.data import datasets, image_folders, texts
from training.data.datasets import DataError
from training.evaluation import evaluate
from training.loops import cnn_finetune, language_model
from training.loops.fit import Batches
from training.loops.language_model import Teachers


@pytest.mark.slow
def test_a_classifier_gets_the_calibration_of_another_training(
    finished: Callable[[str], Path], workspace: Path
) -> None:
    whole, kind = store.Store(finished("accurate") / "models_store").read("cifar10-accurate", 1), KINDS["accurate"]
    own = workspace / "own"
    other = kind.command(own, "--no-publish", "--seed", "4", "--set", "validation=80")
    cnn.main(other)
    folder = only_entry(own / "runs" / "cifar10-accurate")
    kind.train(own, "--calibration", str(folder))
    calibrated = store.Store(own / "models_store").read("cifar10-accurate", 1)
    changed = {key for key in whole.tensors if not torch.equal(whole.tensors[key], calibrated.tensors[key])}
    assert changed == {"temperature", "views_temperature"}
    assert calibrated.card.sizes == json.loads((folder / "card.json").read_text())["sizes"]
    tensors = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensors[key], calibrated.tensors[key]) for key in changed)
    assert calibrated.card.metrics["accuracy"] == whole.card.metrics["accuracy"]
    assert "was fitted to 80 images that a training with seed 4 held out" in calibrated.card.notes
    (line,) = calibrated.card.ancestors or []
    assert (line.name, line.role) == ("cifar10-accurate, seed 4", "calibration")
    assert evaluate.main(["cifar10-accurate", "--store", str(own / "models_store")]) == 0
    for options, message in (
        (["--calibration", str(workspace)], "not the folder of a finished run"),
        (["--calibration", str(folder), "--set", "cutout=3"], "this run had another cutout"),
    ):
        with pytest.raises(SystemExit, match=message):
            kind.train(own, *options)


@pytest.mark.slow
def test_a_network_learns_from_the_mean_predictions_of_teachers(workspace: Path) -> None:
    """The teachers are two finished runs. A network that learns only from their predictions becomes similar to them."""
    command = KINDS["gated"].command(workspace, "--no-publish")
    folders = []
    for seed in ("1", "2"):
        rnn.main([*command, "--seed", seed, "--name", f"teacher-{seed}"])
        folders.append(str(only_entry(workspace / "runs" / f"teacher-{seed}")))
    vocabulary = texts.vocabulary_of(datasets.tinyshakespeare().train)
    teachers = Teachers([Path(folder) for folder in folders], vocabulary, "cpu", {})
    characters = torch.randint(0, len(vocabulary) - 1, (3, 7))
    probabilities, _ = teachers.predict(characters, teachers.zero_states(3))
    assert probabilities.sum(dim=-1).numpy() == pytest.approx(1)
    whole = teachers.predict(characters, teachers.zero_states(3))[0][:, 4:]
    _, first = teachers.predict(characters[:, :4], teachers.zero_states(3))
    assert torch.allclose(teachers.predict(characters[:, 4:], first)[0], whole, atol=0.01)  # bfloat16
    published = [option for option in command if option != "--no-publish"]
    rnn.main([*published, "--name", "student", "--teachers", *folders, "--set", "distillation_weight=1"])
    card = json.loads((only_entry(workspace / "runs" / "student") / "card.json").read_text())
    teachers = [(each["role"], each["name"]) for each in card["ancestors"]]
    assert teachers == [("teacher", "teacher-1, seed 1"), ("teacher", "teacher-2, seed 2")]
    assert evaluate.main(["student", "--store", "models_store"]) == 0
    Teachers([only_entry(workspace / "runs" / "student")], vocabulary, "cpu", {})
    with pytest.raises(datasets.DataError, match="teacher-1 has another vocabulary"):
        Teachers([Path(folders[0])], vocabulary[1:], "cpu", {})
    shutil.copytree(folders[0], workspace / "damaged")
    (workspace / "damaged" / store.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(datasets.DataError, match="not the folder of a finished run"):
        Teachers([workspace / "damaged"], vocabulary, "cpu", {})
    with pytest.raises(datasets.DataError, match="not the folder of a finished run"):
        rnn.main([*command, "--name", "other", "--teachers", str(workspace)])


def test_a_published_network_is_calibrated_without_training(workspace: Path) -> None:
    command = KINDS["gated"].command(workspace)
    rnn.main(command)
    first = store.Store(Path("models_store")).read("shakespeare-rnn", 1)
    rnn.main([*command, "--from", "shakespeare-rnn@1", "--epochs", "0", "--set", "validation=0.3"])
    second = store.Store(Path("models_store")).read("shakespeare-rnn", 2)
    changed = {key for key, tensor in first.tensors.items() if not torch.equal(tensor, second.tensors[key])}
    assert changed == {"head.bias", "head.weight"}
    temperature = (first.tensors["head.weight"] / second.tensors["head.weight"]).mean().item()
    assert list(second.card.data) == ["tinyshakespeare"]
    (base,) = second.card.ancestors or []
    assert (base.name, base.role, base.weights_sha256) == ("shakespeare-rnn@1", "base", first.card.weights_sha256)
    assert base.minutes == first.card.minutes
    (reading,) = second.card.earlier_readings or []
    assert list(reading.metrics) == ["nats_per_character"]
    assert second.card.notes == (
        "About 30% of the training part was held out for validation. "
        f"The logits were divided by {temperature:.3g}, which gives the lowest loss on the held-out characters."
    )


def test_the_preset_accurate_stores_the_weights_of_convolutions_in_float16(finished: Callable[[str], Path]) -> None:
    tensors = store.Store(finished("accurate") / "models_store").read("cifar10-accurate", 1).tensors
    half = {key for key, tensor in tensors.items() if tensor.dtype == torch.float16}
    assert half == {key for key in tensors if re.search(r"conv[123]\.weight", key)}
    assert len(half) == 9


def publish_refitted(stem: str, folder: Path, **data: str) -> None:
    """Publish a network ``seen`` whose card says that it was trained again on all of these data."""
    kind, sizes = {
        "cnn": ("whitened-net", WHITENED),
        "rnn": ("gated-rnn", {"vocabulary": 3, "hidden": 8, "layers": 1}),
        "lstm": ("forecaster", FORECASTER),
    }[stem]
    labels: dict[str, Any] = {
        "cnn": {"labels": [str(i) for i in range(10)]},
        "rnn": {"vocabulary": ["a", "b", "<unk>"]},
    }
    publish_network(folder, "seen", kind, sizes, **labels.get(stem, {}), data=data, refit_steps=3)


@pytest.mark.parametrize("stem", ["cnn", "rnn", "lstm"])
def test_a_version_that_was_trained_on_all_of_the_data_is_no_start(stem: str, workspace: Path) -> None:
    key = {"cnn": "images:shapes", "rnn": "text:novel.txt", "lstm": "csv:sales.csv"}[stem]
    name = {"cnn": "shapes", "rnn": r"novel\.txt", "lstm": r"sales\.csv"}[stem]
    publish_refitted(stem, Path("models_store"), **{key: "digest of less data"})
    with pytest.raises(DataError, match=f"--from seen@1: this version of seen, .* trained on all of {name}, also on"):
        train_own(stem, "--from", "seen")
    if stem == "rnn":
        with pytest.raises(DataError, match=r"--teachers models_store/seen/1: this version .* trained on all"):
            Teachers([Path("models_store/seen/1")], ["a", "b", "<unk>"], "cpu", {"text:novel.txt": "other"})
    assert not (workspace / "runs").exists()


def test_a_version_for_another_size_of_the_same_images_is_no_start(workspace: Path) -> None:
    fields = {"labels": [str(i) for i in range(10)], "data": {"images:shapes": "digest"}}
    publish_network(Path("models_store"), "small", "whitened-net", WHITENED, **fields)
    message = (
        r"--from small@1: this version of small was trained on images of shapes with --size 32\. .* Use --size 32$"
    )
    with pytest.raises(DataError, match=message):
        train_own("cnn", "--from", "small", "--size", "64")
    assert not Path("runs").exists()


def test_data_are_the_same_if_their_name_or_their_digest_is_the_same() -> None:
    def seen(data: dict[str, str], refit_steps: int | None = 3, **own: str) -> list[str]:
        card = tiny_card("a", "forecast", "forecaster", FORECASTER, {"data": data, "refit_steps": refit_steps})
        return cards.seen_data(store.Card(version=1, weights_sha256="", **card), own)

    assert seen({"csv:a.csv": "1", "series-lstm@1": "5"}, **{"csv:b.csv": "1"}) == ["b.csv"]
    assert seen({"csv:a.csv": "1"}, **{"csv:a.csv": "2"}) == ["a.csv"]
    assert seen({"csv:a.csv": "1"}, None, **{"csv:a.csv": "1"}) == []
    assert seen({"csv:my a.csv": "1"}, **{"csv:a.csv": "2"}) == []
    assert seen({"text:my a.txt": "1"}, **{"text:my a.txt": "2", "text:c.txt": "2"}) == ["my a.txt"]
    assert seen({"text:a": "1"}, **{"images:a": "2", "tinyshakespeare": "3"}) == []
    assert seen({"text:abc.txt": "1"}, **{"text:c.txt": "2"}) == []
    assert seen({"text:tinyshakespeare.txt": "3"}, tinyshakespeare="3") == ["tinyshakespeare"]


def test_the_data_of_all_ancestors_count() -> None:
    """The child of a network that was trained on all of a table has learned from its test part, too."""
    fields = {"data": {"csv:a.csv": "1"}, "refit_steps": 3}
    card = tiny_card("a", "forecast", "forecaster", FORECASTER, fields)
    parent = store.Card(version=1, weights_sha256="", **card)
    child = parent.model_copy(update={"data": {"csv:b.csv": "2"}, "refit_steps": None})
    own = {"csv:a.csv": "1", "csv:b.csv": "2"}
    assert cards.seen_data(child, own) == []
    ancestors = [store.Ancestor(**each) for each in cards.ancestors(parent, "base")]
    assert cards.seen_data(child.model_copy(update={"ancestors": ancestors}), own) == ["a.csv"]
    parent = parent.model_copy(update={"refit_layers": "last"})
    ancestors = [store.Ancestor(**each) for each in cards.ancestors(parent, "base")]
    assert cards.seen_data(child.model_copy(update={"ancestors": ancestors}), own) == []


@pytest.mark.parametrize("side", [32, 64])
def test_fine_tuning_starts_with_all_layers_but_the_last(workspace: Path, side: int) -> None:
    base = store.Store(Path("models_store")).read("cifar10-whitened", 1)
    pictures = image_folders.read(workspace / "shapes", side)
    network = cnn_finetune.initial_network(CnnFinetuneConfig(), pictures, pictures.split()[0], base)
    state = network.state_dict()
    assert state["head.weight"].shape == (3, 8)
    assert all(torch.equal(tensor, base.tensors[key]) for key, tensor in state.items() if key != "head.weight")
    assert network.sizes.label_smoothing == 0
    assert network.eval()(pictures.images[:2]).shape == (2, 3)


def test_the_last_layer_is_trained_alone_at_first(workspace: Path) -> None:
    base = store.Store(Path("models_store")).read("cifar10-whitened", 1)
    pictures = image_folders.read(workspace / "shapes", 32)
    network = cnn_finetune.initial_network(CnnFinetuneConfig(), pictures, pictures.split()[0], base)
    every = Batches(torch.arange(16), 16, 0)
    recipe = cnn_finetune.FinetuneRecipe(
        CnnFinetuneConfig(), network, True, pictures.images, pictures.labels, every, torch.arange(0)
    )
    for step in range(4):
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        recipe.update(step, (step + 1) / 20)
        changed = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
        assert (changed == {"head.weight"}) == (step < 3)


@pytest.mark.slow
def test_training_from_scratch_needs_no_published_network(workspace: Path) -> None:
    shutil.rmtree("models_store")
    with pytest.raises(SystemExit, match="--from other: models_store: No such file or directory; or use --from"):
        train_own("cnn", "--from", "other")
    train_own("cnn", "--from", "scratch", "--set", "first_width=8", "later_width=8", "--epochs", "1", "--size", "64")
    assert store.Store(Path("models_store")).card("mine", 1).sizes["image"] == 64


def test_fine_tuning_a_text_network_keeps_the_weights_of_shared_characters(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = [*sorted(set(TEXT) - {"q"}), store.UNKNOWN_CHARACTER]
    sizes = {"vocabulary": len(vocabulary), "hidden": 8, "layers": 1}
    base = publish_network(Path("models_store"), "other", "character-rnn", sizes, vocabulary=vocabulary)
    own = texts.vocabulary_of(TEXT, 1)
    network = language_model.transfer_weights(build("character-rnn", {**sizes, "vocabulary": len(own)}), own, base)
    for character, base_index in (("t", vocabulary.index("t")), ("q", len(vocabulary) - 1)):
        row = network.embedding.weight[own.index(character)]
        assert torch.equal(row, base.tensors["embedding.weight"][base_index])
    train_own("rnn", "--from", "other@1")
    card = store.Store(Path("models_store")).card("mine", 1)
    assert card.kind == "character-rnn"
    assert [each.weights_sha256 for each in card.ancestors or []] == [base.card.weights_sha256]
    train_own("rnn", "--from", "other@1", "--epochs", "0")  # only calibrated
    card = store.Store(Path("models_store")).card("mine", 2)
    assert "About 5% of the training part was held out" in card.notes
    assert "averaged" not in card.notes
    assert "The logits were divided by" in card.notes
    assert card.refit_steps is None
    with pytest.raises(SystemExit, match="--epochs is 0; it should be at least 1, or 0 with --from"):
        train_own("rnn", "--epochs", "0")
    with pytest.raises(SystemExit, match="hidden is 9, but the network in --from other@1 has 8; omit it"):
        train_own("rnn", "--from", "other", "--set", "hidden=9")
    Path("novel.txt").write_text("ПРИВЕТ\n" * 3000)
    with pytest.raises(DataError, match="--from other: its vocabulary covers 14% of the text's characters"):
        train_own("rnn", "--from", "other")
    with pytest.raises(SystemExit, match="the network kind is character-rnn; this command can start from whitened-net"):
        train_own("cnn", "--from", "other", name="pets")


@pytest.mark.parametrize(
    ("before", "option", "active"), [(0.9, "", 1), (0.9, "--activate", 2), (0.0, "", 2), (0.0, "--no-activate", 1)]
)
def test_a_version_that_is_clearly_worse_is_not_activated(
    before: float,
    option: str,
    active: int,
    finished: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = shutil.copytree(finished("cnn") / "models_store", tmp_path / "models_store")
    path = models / "cifar10-lenet" / "1" / "card.json"
    card = json.loads(path.read_text())
    card["metrics"]["accuracy"]["value"] = before
    path.write_text(json.dumps(card))
    capsys.readouterr()
    KINDS["cnn"].train(tmp_path, "--seed", "4", *option.split())
    published = store.Store(models)
    assert published.active("cifar10-lenet") == active
    accuracy = published.card("cifar10-lenet", 2).metrics["accuracy"].value
    worse = "cifar10-lenet@2 is worse than cifar10-lenet@1 by more than its uncertainty\n" if before else ""
    role = "active and replaces cifar10-lenet@1" if active == 2 else "not active; cifar10-lenet@1 is"
    verb, command = ("undo", "rollback cifar10-lenet") if active == 2 else ("activate", "activate cifar10-lenet 2")
    assert capsys.readouterr().out.endswith(
        f"published cifar10-lenet@2, which is {role} (accuracy {accuracy:g}, cifar10-lenet@1 has {before:g})\n{worse}"
        f"to {verb} it: quartet models {command} --store {models}\n"
    )


def test_figures_on_other_data_are_not_compared() -> None:
    metric = {"value": 0.5, "split": "test", "decimals": 2, "interval": [0.4, 0.6]}

    def card(name: str, data: str = "a", **changed: Any) -> store.Card:
        fields = {"data": {"csv:a": data}, "metrics": {name: metric | changed}}
        return store.Card(version=1, weights_sha256="", **tiny_card("a", "forecast", "forecaster", FORECASTER, fields))

    for name, worse in (("accuracy", [False, False, True]), ("mase", [True, False, False])):
        assert [is_worse(card(name), card(name, value=value)) for value in (0.3, 0.5, 0.7)] == worse
        for value in (0.0, 1.0):
            for other in (card(name, "b", value=value), card(name, value=value, split="other"), card("b", value=value)):
                assert not is_worse(card(name), other)
            assert not is_worse(card(name, interval=None), card(name, value=value))
