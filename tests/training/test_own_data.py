"""Training on users' images, texts and series: errors in the data, and the published versions."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.fake_device import fake_device
from support.images import drawn_figures, image_bytes
from support.networks import FORECASTER, publish_tiny, tiny_card
from support.processes import in_float64, start_pair, train_generators_in_float64

from app import store
from app.networks import build
from app.store import Store
from app.store.version import Version
from app.tasks.image_codecs import ImageDecoder
from training import cnn, gan, lstm, refit, rnn
from training import run as running
from training.configs import CNN_OWN, RNN_OWN
from training.data import image_dataset, image_folders, shapes, texts
from training.data.datasets import DataError
from training.evaluation import evaluate, generation
from training.loops import cnn_finetune, gan_finetune, time_budget
from training.loops import gan as gan_loop
from training.loops.best_weights import BestWeights
from training.loops.series import finetune
from training.loops.text import language_model
from training.loops.text.distillation import Teachers

WHITENED: dict[str, Any] = {"widths": [8, 8, 8], "label_smoothing": 0.2}
TEXT = "".join(f"line {i}: to be, or not to be, that is the question {i * i}\n" for i in range(300))
SALES = "sold\n" + "".join(f"{100 + 9 * (i % 7) + i * i % 11}\n" for i in range(90))
OWN: dict[str, list[str]] = {
    "cnn": ["--images", "shapes", "--epochs", "4", "--batch", "16"],
    "rnn": [
        "--text",
        "novel.txt",
        "--hidden",
        "8",
        "--layers",
        "1",
        "--epochs",
        "3",
        "--bptt",
        "16",
        "--dropout",
        "0",
    ],
    "gan": ["--images", "shapes", "--epochs", "3", "--batch", "16", "--latent", "4", "--size", "28"],
    "lstm": ["--csv", "sales.csv", "--season", "7", "--epochs", "3", "--batch", "16", "--force"],
}
SCRIPTS: dict[str, Any] = {"cnn": cnn, "rnn": rnn, "gan": gan, "lstm": lstm}
REFITTED = ("cnn", "rnn", "lstm")  # networks that are trained again on all data, after a first network was measured
SOURCES = {"cnn": "shapes/circle/0003.png", "rnn": "novel.txt", "gan": "shapes/circle/0003.png", "lstm": "sales.csv"}
CHANGED_DATA = {"rnn": TEXT.replace("7", "8").encode(), "lstm": SALES.replace("7", "8").encode()}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with shapes, a novel, sales, and a store with two tiny base networks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generation, "LABEL_CLASSIFIER_STEPS", 10)
    monkeypatch.setattr(gan_finetune, "SAMPLES", 50)
    monkeypatch.setattr(gan_finetune, "MIN_IMAGES", 20)
    monkeypatch.setattr(gan_loop, "RECALIBRATION_BATCHES", 5)
    shapes.main(["shapes", "--count", "16"])
    (tmp_path / "novel.txt").write_text(TEXT)
    (tmp_path / "sales.csv").write_text(SALES)
    torch.manual_seed(7)
    labels = {"labels": [str(i) for i in range(10)]}
    card = tiny_card("cifar10-whitened", "classify", "whitened-net", WHITENED, labels)
    Store(tmp_path / "models_store").publish(card, build("whitened-net", WHITENED).state_dict())
    card = tiny_card("series-lstm", "forecast", "forecaster", FORECASTER, {})
    Store(tmp_path / "models_store").publish(card, build("forecaster", FORECASTER).state_dict())
    return tmp_path


def train(stem: str, *options: str, name: str = "mine") -> None:
    SCRIPTS[stem].main([*OWN[stem], "--name", name, "--threads", "1", *options])


@pytest.mark.parametrize("stem", SCRIPTS)
def test_training_on_own_data_publishes_a_version_that_evaluation_confirms(
    stem: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with drawn_figures():
        train(stem, *(["--no-refit"] if stem in REFITTED else []))
    card = Store(workspace / "models_store").read("mine", 1).card
    (kind, digest), *_ = card.data.items()
    assert kind in ("images:shapes", "text:novel.txt", "csv:sales.csv")
    assert len(digest) == 64
    assert len(Path("runs/test-measurements.md").read_text().splitlines()) == 3  # two of them are the table's head
    assert card.labels == (None if stem in CHANGED_DATA else ["circle", "square", "triangle"])
    files = {path.name for path in (workspace / "models_store" / "mine" / "1").iterdir()}
    assert files >= {"curves.png", "samples.png"} | ({"confusion.png", "mistakes.png"} if stem == "cnn" else set())
    assert evaluate.main(["mine"]) == 0

    (workspace / SOURCES[stem]).write_bytes(CHANGED_DATA.get(stem) or image_bytes())
    capsys.readouterr()
    assert evaluate.main(["mine"]) == 1
    assert f"{kind:34} differs from the card ✗" in capsys.readouterr().out
    for source in ("novel.txt", "sales.csv"):
        (workspace / source).unlink()
    shutil.rmtree(workspace / "shapes")
    assert evaluate.main(["mine"]) == 0
    output = capsys.readouterr().out
    assert "not measured, because the data are missing" in output
    assert "1 not measured" in output


@pytest.mark.parametrize("stem", SCRIPTS)
def test_an_interrupted_run_publishes_nothing_and_ends_the_same_when_resumed(
    stem: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(stem, name="whole")
    log = running.Run.log

    def interrupt(self: running.Run, **metrics: float) -> None:
        log(self, **metrics)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(running.Run, "log", interrupt)
    with pytest.raises(SystemExit, match=r"saved .* resume with: \S+ -m training\.\w+ .*--name mine .*--resume"):
        train(stem)
    assert not (workspace / "models_store" / "mine").exists()
    monkeypatch.setattr(running.Run, "log", log)
    train(stem, "--resume")
    uninterrupted, resumed = (Store(workspace / "models_store").read(name, 1).tensors for name in ("whole", "mine"))
    assert all(torch.equal(uninterrupted[key], resumed[key]) for key in uninterrupted)


@pytest.mark.parametrize("stem", REFITTED)
def test_published_weights_are_trained_again_on_all_data(
    stem: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models, log = workspace / "models_store", running.Run.log
    train(stem, "--no-refit", name="first")
    train(stem, name="whole")

    def interrupt(self: running.Run, **metrics: float) -> None:
        log(self, **metrics)
        if self.refitting:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(running.Run, "log", interrupt)
    monkeypatch.setattr(language_model, "MIN_STEPS_PER_VALIDATION", 1)
    monkeypatch.setattr(finetune, "MAX_STEPS_PER_EPOCH", 8)
    with pytest.raises(SystemExit, match=r"at step [138] of \d+; resume with"):
        train(stem)
    assert not (models / "mine").exists()
    monkeypatch.setattr(running.Run, "log", log)
    train(stem, "--resume")

    first, whole, mine = (Store(models).read(name, 1) for name in ("first", "whole", "mine"))
    assert first.card.refit_steps is None
    assert mine.card.refit_steps == whole.card.refit_steps != 0
    assert f"on all data, for the {mine.card.refit_steps} steps " in mine.card.notes
    for key, metric in first.card.metrics.items():
        assert mine.card.metrics[key].value == metric.value
        before = mine.card.metrics[key].split.endswith("; measured before the refit")
        assert before == (not key.startswith(("untuned", "naive")))
    assert mine.tensors.keys() == first.tensors.keys()
    assert any(not torch.equal(mine.tensors[key], first.tensors[key]) for key in mine.tensors)
    assert all(torch.equal(mine.tensors[key], whole.tensors[key]) for key in mine.tensors)
    capsys.readouterr()
    assert evaluate.main(["mine"]) == 0
    assert "not measured: the metrics are those before the refit" in capsys.readouterr().out


def publish_refitted(stem: str, folder: Path, **data: str) -> None:
    """Publish a network ``seen`` whose card says that it was trained again on all of these data."""
    task, kind, sizes = {
        "cnn": ("classify", "whitened-net", WHITENED),
        "rnn": ("continue", "stacked-rnn", {"vocabulary": 3, "hidden": 8, "layers": 1}),
        "lstm": ("forecast", "forecaster", FORECASTER),
    }[stem]
    labels: dict[str, Any] = {
        "cnn": {"labels": [str(i) for i in range(10)]},
        "rnn": {"vocabulary": ["a", "b", "<unk>"]},
    }
    fields = {**labels.get(stem, {}), "data": data, "refit_steps": 3}
    Store(folder).publish(tiny_card("seen", task, kind, sizes, fields), build(kind, sizes).state_dict())


@pytest.mark.parametrize("stem", REFITTED)
def test_a_version_that_was_trained_on_all_of_the_data_is_no_start(stem: str, workspace: Path) -> None:
    key = {"cnn": "images:shapes", "rnn": "text:diary.txt novel.txt", "lstm": "csv:sales.csv"}[stem]
    name = {"cnn": "shapes", "rnn": r"novel\.txt", "lstm": r"sales\.csv"}[stem]
    publish_refitted(stem, workspace / "models_store", **{key: "digest of less data"})
    with pytest.raises(DataError, match=f"--from seen@1: this version of seen was trained on all of {name}, also on"):
        train(stem, "--from", "seen")
    if stem == "rnn":
        with pytest.raises(DataError, match="--teachers models_store/seen/1: this version of seen was trained on all"):
            Teachers([Path("models_store/seen/1")], ["a", "b", "<unk>"], "cpu", {"text:novel.txt": "other"})
    assert not (workspace / "runs").exists()


def test_a_version_for_another_size_of_the_same_images_is_no_start(workspace: Path) -> None:
    fields = {"labels": [str(i) for i in range(10)], "data": {"images:shapes": "digest"}}
    card = tiny_card("small", "classify", "whitened-net", WHITENED, fields)
    Store(Path("models_store")).publish(card, build("whitened-net", WHITENED).state_dict())
    message = (
        r"--from small@1: this version of small was trained on images of shapes with --size 32\. .* Use --size 32$"
    )
    with pytest.raises(DataError, match=message):
        train("cnn", "--from", "small", "--size", "64")
    assert not Path("runs").exists()


def test_data_are_the_same_if_their_name_or_their_digest_is_the_same() -> None:
    def seen(data: dict[str, str], refit_steps: int | None = 3, **own: str) -> list[str]:
        card = tiny_card("a", "forecast", "forecaster", FORECASTER, {"data": data, "refit_steps": refit_steps})
        return refit.seen_data(store.Card(version=1, weights_sha256="", **card), own)

    assert seen({"csv:a.csv": "1", "series-lstm@1": "5"}, **{"csv:b.csv": "1"}) == ["b.csv"]
    assert seen({"csv:a.csv": "1"}, **{"csv:a.csv": "2"}) == ["a.csv"]
    assert seen({"csv:a.csv": "1"}, None, **{"csv:a.csv": "1"}) == []
    assert seen({"csv:my a.csv": "1"}, **{"csv:a.csv": "2"}) == []
    assert seen({"text:my a.txt b.txt": "1"}, **{"text:my a.txt": "2", "text:c.txt": "2"}) == ["my a.txt"]
    assert seen({"text:a": "1"}, **{"images:a": "2", "tinyshakespeare": "3"}) == []
    assert seen({"text:tinyshakespeare.txt": "3"}, tinyshakespeare="3") == ["tinyshakespeare"]


def spoil_test_part(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the test part of the user's data, and nothing else."""
    if stem == "rnn":
        read_text = texts.read
        monkeypatch.setattr(texts, "read", lambda *_: spoiled(read_text(*_)))

        def spoiled(text: Any) -> Any:
            return replace(text, test="?" * len(text.test))
    elif stem == "lstm":
        lines = SALES.splitlines()
        Path("sales.csv").write_text("\n".join([*lines[:73], *("7" for _ in lines[73:])]) + "\n")
    else:
        module = cnn if stem == "cnn" else gan_finetune
        name = "read_dataset" if stem == "cnn" else "read"
        read_images = getattr(module, name)

        def read(*arguments: Any) -> Any:
            dataset = read_images(*arguments)
            dataset.images[dataset.split()[2]] = 0
            return dataset

        monkeypatch.setattr(module, name, read)


@pytest.mark.parametrize("stem", SCRIPTS)
def test_no_publish_reads_no_test_part(stem: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with drawn_figures():
        train(stem, "--no-publish")
        spoil_test_part(stem, monkeypatch)
        train(stem, "--no-publish")
    first, second = sorted((workspace / "runs" / "mine").iterdir())
    metrics = [json.loads((folder / "card.json").read_text())["metrics"] for folder in (first, second)]
    assert metrics[0] == metrics[1] != {}
    assert (first / "samples.png").read_bytes() == (second / "samples.png").read_bytes()
    assert not (workspace / "models_store" / "mine").exists()


def test_tensorboard_shows_the_logged_metrics(workspace: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("lstm", "--log-dir", "boards")
    (board,) = (workspace / "boards" / "mine").iterdir()
    events = EventAccumulator(str(board)).Reload()
    log = workspace / "runs" / "mine" / board.name / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    shown = [(event.step, event.value) for event in events.Scalars("validation_loss")]
    assert shown == [(record["step"], pytest.approx(record["validation_loss"])) for record in records]


def test_a_run_is_not_resumed_on_changed_data(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.Run, "log", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="resume with"):
        train("cnn")
    (workspace / "shapes" / "circle" / "0000.png").unlink()
    with pytest.raises(SystemExit, match="was started with data "):
        train("cnn", "--resume")


@pytest.mark.parametrize("stem", SCRIPTS)
def test_numbers_with_which_no_step_is_possible_are_rejected(stem: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"cnn": ["epochs", "finetune-batch"], "rnn": ["hidden", "bptt"], "gan": ["epochs", "r1-interval"]}
    for name in ("threads", "batch", *own.get(stem, ["epochs"])):
        with pytest.raises(SystemExit):
            train(stem, f"--{name}", "0")
        assert capsys.readouterr().err.endswith(f"error: --{name} is 0; it should be at least 1\n")
    for option, value, message in (
        ("--device", "foo", "--device is 'foo': Expected one of cpu, cuda"),
        ("--seed", str(2**63), f"--seed is {2**63}; it should be between 0 and 2^63 - 1"),
    ):
        with pytest.raises(SystemExit):
            train(stem, option, value)
        assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "option", "value", "message"),
    [
        ("own", "--shift", "32", "--shift must be from 0 to 31, not 32"),
        ("own", "--label-smoothing", "2", "--label-smoothing must be from 0 to 1, not 2.0"),
        ("own", "--head-only-share", "5", "--head-only-share must be from 0 to 1, not 5.0"),
        ("digits", "--shift", "28", "--shift must be from 0 to 27, not 28"),
    ],
)
def test_numbers_of_image_classifiers_outside_their_range_are_rejected(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, preset: str, option: str, value: str, message: str
) -> None:
    monkeypatch.setattr(cnn.data, "mnist", lambda: SimpleNamespace(train_images=torch.zeros(1, 1, 28, 28)))
    arguments = [*OWN["cnn"], "--name", "mine"] if preset == "own" else ["--preset", preset]
    with pytest.raises(SystemExit, match=f"^{message}$"):
        cnn.main([*arguments, option, value])
    assert not Path("runs").exists()


def test_a_run_is_not_resumed_with_other_options(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.Run, "log", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    for name, options, resumed, change in (
        ("first", ("--group", r"00\d\d"), (), r"group 00\\d\\d \(now None\)"),  # the parts of the split would differ
        ("second", (), ("--group", r"00\d\d"), r"group None \(now 00\\d\\d\)"),
    ):
        with pytest.raises(SystemExit, match="resume with"):
            train("cnn", *options, name=name)
        with pytest.raises(SystemExit, match=f"was started with {change}: resume it with the same options and data"):
            train("cnn", "--resume", *resumed, name=name)


def test_a_run_is_not_resumed_from_another_base_version(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.Run, "log", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="resume with"):
        train("cnn")  # without --from
    base = Store(workspace / "models_store").read("cifar10-whitened", 1)
    Store(workspace / "models_store").publish(base.card.model_dump(), base.tensors)
    with pytest.raises(SystemExit, match=r"was started with origin cifar10-whitened@1 \(now cifar10-whitened@2\)"):
        train("cnn", "--resume")
    with pytest.raises(SystemExit, match="resume with"):  # continues until the next line of the log
        train("cnn", "--resume", "--from", "cifar10-whitened@1")


@pytest.mark.parametrize("stem", SCRIPTS)
def test_two_processes_train_like_one(stem: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = ["--bfloat16", "0", *(["--dropout", "0.2"] if stem == "rnn" else [])]
    for name in ("conditional_trainer", "fit"):
        monkeypatch.setattr(gan_finetune, name, getattr(gan_finetune, name))  # restored after the test
    train_generators_in_float64()
    train(stem, *exact, name="one")
    arguments = [*OWN[stem], *exact, "--name", "two", "--threads", "1"]
    with (workspace / "output").open("w+") as output:
        pair_of_processes = start_pair(SCRIPTS[stem].__name__, arguments, workspace, output)
        for process in pair_of_processes:
            process.join(200)
        output.seek(0)
        content = output.read()
    assert [process.exitcode for process in pair_of_processes] == [0, 0], content
    assert content.count("published") == 1
    single, pair = (Store(workspace / "models_store").read(name, 1) for name in ("one", "two"))
    assert "torchrun --nproc-per-node 2" in pair.card.command
    initial = initial_weights(stem, single, workspace)
    update = sum((single.tensors[key] - initial[key]).abs().sum().item() for key in initial)
    difference = sum((single.tensors[key] - pair.tensors[key]).abs().sum().item() for key in single.tensors)
    assert difference < (1e-3 if stem == "cnn" else 1e-5) * update  # measured: 6e-5 for the CNN, others 2e-7


def initial_weights(stem: str, version: Version, workspace: Path) -> dict[str, torch.Tensor]:
    """Return the initial weights of a training with seed 0, except biases and the last layer."""
    torch.manual_seed(0)
    if stem in ("cnn", "lstm"):
        base = "cifar10-whitened" if stem == "cnn" else "series-lstm"
        weights = Store(workspace / "models_store").read(base, 1).tensors
    elif stem == "rnn":
        config = dataclasses.replace(RNN_OWN, hidden=8, layers=1)
        weights = language_model.new_network(config, version.card.sizes["vocabulary"]).state_dict()
    else:
        weights = in_float64(build)(version.card.kind, version.card.sizes).state_dict()
    return {key: tensor for key, tensor in weights.items() if tensor.ndim > 1 and key != "head.weight"}


def interrupted(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the checkpoint of an interrupted training on a text."""
    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "log", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(SystemExit, match="resume with"):
            train("rnn")
    (path,) = (workspace / "runs").rglob("state.pt")
    return path


def test_a_checkpoint_of_another_device_is_resumed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(workspace, monkeypatch)
    load, places = torch.load, []

    def record(*arguments: Any, **options: Any) -> Any:
        places.append(options["map_location"])
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", record)
    train("rnn", "--resume")
    assert places == ["cpu"]  # a tensor that is loaded to a GPU would need a GPU
    assert (workspace / "models_store" / "mine" / "1").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"code": "x", "commit": "0123"}, r"state.pt was written by other code \(commit 0123, now .*without --resume"),
        ({"tracked": {}}, "state.pt does not fit this network, for example .*; start a new run without --resume"),
        (None, "state.pt is damaged .*; start a new run without --resume"),
    ],
)
def test_an_unusable_checkpoint_is_rejected(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any] | None, sentence: str
) -> None:
    path = interrupted(workspace, monkeypatch)
    if change is None:
        path.write_bytes(path.read_bytes()[:1000])
    else:
        torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(SystemExit, match=sentence):
        train("rnn", "--resume")


@pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning")  # all forecasts are NaN
@pytest.mark.parametrize("stem", ["cnn", "rnn", "lstm"])
def test_a_training_that_diverges_publishes_nothing(workspace: Path, stem: str) -> None:
    with pytest.raises(SystemExit, match=r"^the training diverged: at step .* has [0-9,]+ weights that are NaN or inf"):
        train(stem, "--learning-rate", "1e30")
    assert not (workspace / "models_store" / "mine").exists()


def test_a_text_network_without_a_finite_validation_loss_is_not_published(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "window_loss", lambda *_, **__: math.inf)
    with pytest.raises(SystemExit, match=r"^the training diverged: no validation loss was finite; use a lower "):
        train("rnn")
    assert not (workspace / "models_store" / "mine").exists()


class Clock:
    """A clock that each training step and the evaluation advance."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("trainings", [1, 2])
@pytest.mark.parametrize("step_seconds", [0.05, 0.4])
def test_steps_fill_the_time_although_their_pace_changes(tmp_path: Path, step_seconds: float, trainings: int) -> None:
    clock = Clock()
    run: Any = SimpleNamespace(
        step=0, seconds=0.0, folder=tmp_path, options=SimpleNamespace(started=1000.0, minutes=1.0)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_budget.time, "monotonic", clock.monotonic)
        budget = time_budget.StepBudget(run, 500, 60.0, finish_seconds=6.0, trainings=trainings)
        clock.now += 4  # start
        totals = []
        while run.step < budget():
            run.step += 1
            clock.now += step_seconds * (1 + (run.step > 60))  # steps take twice as long after step 60
            totals.append(budget())
    clock.now += (trainings - 1) * (clock.now - 1004)  # the second training takes as long
    assert clock.now - 1000 == pytest.approx(54, abs=3)
    assert len(set(totals)) < 60
    assert json.loads((tmp_path / "budget.json").read_text()) == {"steps": run.step, "finish_seconds": 6.0}


def test_minutes_cover_start_training_and_evaluation(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--images", "shapes", "--batch", "16", "--name", "mine", "--threads", "1", "--minutes", "100"]
    monkeypatch.setattr(time_budget, "_seconds_per_step", lambda step: 1e-4)
    monkeypatch.setattr(time_budget, "FREEZE_SHARE", 0.0)  # the first plan is not changed
    monkeypatch.setattr(running.Run, "time_evaluation", lambda self, evaluate: 0.1)
    interrupt = cnn_finetune.FinetuneTrainer.update
    updates: list[int] = []

    def update(self: Any, *args: Any) -> torch.Tensor:
        updates.append(args[-1])
        if len(updates) == 4:
            signal.raise_signal(signal.SIGINT)
        return interrupt(self, *args)

    monkeypatch.setattr(cnn_finetune.FinetuneTrainer, "update", update)
    with pytest.raises(SystemExit, match="--minutes 100"):
        cnn.main(arguments)
    (budget_file,) = (workspace / "runs").rglob("budget.json")
    assert json.loads(budget_file.read_text())["finish_seconds"] == 0.1
    budget_file.write_text(json.dumps({"steps": 6, "finish_seconds": 0.1}))
    cnn.main([*arguments, "--resume"])
    assert json.loads((budget_file.parent / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert (workspace / "models_store" / "mine" / "1").exists()


def test_the_planned_time_of_a_step_includes_the_predictions_of_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(RNN_OWN, batch=4, bptt=8, hidden=8, layers=1)
    read: list[torch.Tensor] = []

    def predict(characters: torch.Tensor, states: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        read.append(characters)
        return torch.full((*characters.shape, 5), 0.2), states

    def plan(run: Any, default: int, start_dummy_run: Any, *_: Any) -> None:
        step = start_dummy_run()
        assert not read
        step(0)
        step(1)
        raise SystemExit

    monkeypatch.setattr(time_budget, "plan", plan)
    text = texts.FixedText(torch.arange(100) % 5)
    run: Any = SimpleNamespace(options=SimpleNamespace(device="cpu", seed=0, minutes=1.0))
    teachers: Any = SimpleNamespace(zero_states=lambda rows: [], predict=predict)
    with pytest.raises(SystemExit):
        language_model.fit(run, config, text, [], language_model.new_network(config, 5), teachers=teachers)
    assert [characters.shape for characters in read] == [(4, 8), (4, 8)]


def test_a_timed_evaluation_publishes_and_prints_nothing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--csv", "sales.csv", "--season", "7", "--batch", "16", "--force", "--name", "mine", "--threads", "1"]
    lstm.main([*arguments, "--minutes", "0.001"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("quantile_loss") for line in lines) == 1
    assert any("longer than --minutes 0.001, so training has only one step" in line for line in lines)
    assert ("mine", 1) in list(Store(workspace / "models_store").versions())
    assert not (workspace / "models_store" / "mine" / "2").exists()


def test_a_short_training_of_a_generator_spends_little_on_its_evaluation(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, trained = generation.label_classifier, []

    def label_classifier(*arguments: Any) -> Any:
        trained.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(gan_finetune, "label_classifier", label_classifier)
    arguments = ["--images", "shapes", "--batch", "16", "--size", "28", "--name", "mine", "--threads", "1"]
    gan.main([*arguments, "--minutes", "0.001"])
    assert len(trained) == 1  # no second classifier for the evaluation after the training
    metrics = Store(workspace / "models_store").read("mine", 1).card.metrics
    assert "the nearest of 14 training images: 50 samples" in metrics["nearest_neighbour_ratio"].split
    assert " trained for 1 steps on " in metrics["label_accuracy"].split
    assert evaluate.main(["mine"]) == 0


# --- folders


def save_noise(folder: Path, name: str, seed: int = 0, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8, generator=generator).numpy()
    Image.fromarray(pixels).save(folder / name, **options)
    return folder / name


def test_training_reads_images_of_any_size_and_mode_like_the_service(tmp_path: Path) -> None:
    for number, mode in enumerate(("1", "L", "P", "RGBA", "CMYK", "I;16")):
        folder = tmp_path / "all" / mode.replace(";", "")
        folder.mkdir(parents=True)
        shades = Image.linear_gradient("L").rotate(number * 40).resize((40 + number, 25))
        (shades.convert("I").convert("I;16") if mode == "I;16" else shades.convert("RGB").convert(mode)).save(
            folder / "a.tiff"
        )
    pictures = image_folders.read(tmp_path / "all", 32)
    assert pictures.classes == ["1", "CMYK", "I16", "L", "P", "RGBA"]
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


def test_names_of_files_need_not_be_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        save_noise(tmp_path / "pets" / "cat", os.fsdecode(b"K\xe4tz%d.png" % number), number)
    (tmp_path / "pets" / "cat" / os.fsdecode(b"gr\xfcn.jpg")).touch()
    dataset = image_folders.read(tmp_path / "pets", 32, group=r"K.tz1?")
    assert sum(map(len, dataset.split())) == 20
    image_dataset.print_summary(dataset)
    assert r"gr\udcfcn.jpg has 0 bytes" in capsys.readouterr().out
    running.Run.write_file(SimpleNamespace(folder=tmp_path), "skipped.txt", dataset.skipped[0])  # type: ignore[arg-type]
    assert r"gr\udcfcn.jpg" in (tmp_path / "skipped.txt").read_text()


@pytest.mark.parametrize("option", ["data", "name of the data", "--store"])
@pytest.mark.parametrize("stem", SCRIPTS)
def test_a_command_that_is_not_utf_8_is_rejected_before_the_data_are_read(
    stem: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / os.fsdecode(b"\xff")
    bad.mkdir()
    monkeypatch.chdir(bad)
    data = {"data": str(bad), "name of the data": "."}.get(option, "pets")
    with pytest.raises(SystemExit):
        SCRIPTS[stem].main([OWN[stem][0], data, "--name", "mine", "--store", str(bad) if option == "--store" else "x"])
    assert re.search(r"error: '.*\\udcff' is not UTF-8; rename the file or folder\n$", capsys.readouterr().err)
    assert not list(bad.iterdir())


def test_images_are_reordered_in_the_memory_that_they_already_use() -> None:
    for seed in range(20):
        indices = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[: 9 - seed % 3]
        images = torch.arange(9).view(9, 1, 1, 1).repeat(1, 3, 2, 2)
        expected = images[indices]
        reordered = image_folders._reordered(images, indices.tolist())
        assert torch.equal(reordered, expected)
        assert reordered.data_ptr() == images.data_ptr()


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
    assert any("row 51: expected a path and a label, not '10;;x.png'" in remark for remark in listed.skipped)


@pytest.mark.parametrize("head", ["filename,class", "image,label", "file,label", "Path,Category", "class,id,file"])
def test_a_table_of_images_may_have_other_column_names(tmp_path: Path, head: str) -> None:
    lines = [head]
    for number, label in enumerate(("cat", "dog", "cat")):
        save_noise(tmp_path / "all", f"{number}.png", number)
        file = f"all/{number}.png"
        lines.append(f"{label},{number},{file}" if head.startswith("class") else f"{file},{label}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    pictures = image_folders.read(tmp_path / "list.csv", 32)
    assert pictures.describe_classes() == "cat (2), dog (1)"
    assert pictures.skipped == []


def test_a_first_row_without_a_file_is_a_header_and_an_empty_class_is_dropped(tmp_path: Path) -> None:
    for number in range(2):
        save_noise(tmp_path, f"{number}.png", number)
    (tmp_path / "plain").write_bytes((tmp_path / "0.png").read_bytes())
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
    # These first rows are not headers.
    for first, remark in (("plain,cat", "plain: "), ("gone.png,cat", "gone.png: No such file")):
        path.write_text("\n".join([first, *rows[:2]]))
        pictures = image_folders.read(path, 32)
        assert pictures.describe_classes() == "cat (1), dog (1)"
        assert any(remark in skipped for skipped in pictures.skipped) == (first != "plain,cat")
        assert not any("a header" in skipped for skipped in pictures.skipped)


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
        ("shapes/circle", r"holds only one class, circle \(16\); at least two"),
        ("models_store", r"none of its \d+ files is an image"),
    ):
        with pytest.raises(DataError, match=sentence):
            cnn.main(["--images", images, "--name", "mine"])
    with pytest.raises(DataError, match="shapes: no images are left for validation; --group makes only 2 groups; use"):
        train("cnn", "--group", r"00\d")
    for number in range(10):
        for label in ("square", "triangle"):
            (workspace / "shapes" / label / f"{number:04}.png").unlink()
    few = r"too few images of square \(6\), triangle \(6\); each class needs 8 different images, and at least 2 classes"
    with pytest.raises(DataError, match=rf"circle \(16\), square \(6\), triangle \(6\): {few}"):
        train("cnn")
    Path("empty").mkdir()
    with pytest.raises(DataError, match="empty holds no files"):
        image_folders.read(Path("empty"), 32)
    with pytest.raises(DataError, match=r"at least 20 different images are needed"):
        gan.main(["--images", "shapes/circle", "--name", "mine"])
    Path("tags.csv").write_text("path,tags\nshapes/circle/0000.png,round;dark\nshapes/circle/0001.png,round\n")
    with pytest.raises(DataError, match=r"tags\.csv has several labels for an image, but image generators need one"):
        gan.main(["--images", "tags.csv", "--name", "mine"])
    with pytest.raises(DataError, match="--from efficientnet-lite0 needs --size 96 or more, not --size 64"):
        train("cnn", "--from", "efficientnet-lite0", "--size", "64")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("parts", "groups", "hint"),
    [
        (True, False, "move images of each class to train, or remove these classes"),
        (False, True, "use smaller groups in --group, or add images of each class, or remove these classes"),
    ],
)
@pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])
def test_a_class_without_images_for_training_is_rejected(several: bool, parts: bool, groups: bool, hint: str) -> None:
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
        tuple("test" if own else "train" for own in in_test.tolist()) if parts else (),
        tuple(test_group if own else f"film {number}" for number, own in enumerate(in_test.tolist())) if groups else (),
    )
    with pytest.raises(DataError, match=f"^pets: no images for training of cow, pig; {hint}$"):
        image_dataset.keep_trainable(dataset, Path("pets"))
    kept = dataset.select(~in_test)
    assert image_dataset.keep_trainable(kept, Path("pets")).classes == ["cat", "dog"]


# --- initial weights


@pytest.mark.parametrize("side", [32, 64])
def test_fine_tuning_starts_with_all_layers_but_the_last(workspace: Path, side: int) -> None:
    base = Store(workspace / "models_store").read("cifar10-whitened", 1)
    pictures = image_folders.read(workspace / "shapes", side)
    network = cnn_finetune.initial_network(CNN_OWN, pictures, pictures.split()[0], base)
    state = network.state_dict()
    assert state["head.weight"].shape == (3, 8)
    assert all(torch.equal(tensor, base.tensors[key]) for key, tensor in state.items() if key != "head.weight")
    assert network.sizes.label_smoothing == 0
    assert network.eval()(pictures.images[:2]).shape == (2, 3)


def test_the_last_layer_is_trained_alone_at_first(workspace: Path) -> None:
    base = Store(workspace / "models_store").read("cifar10-whitened", 1)
    pictures = image_folders.read(workspace / "shapes", 32)
    network = cnn_finetune.initial_network(CNN_OWN, pictures, pictures.split()[0], base)
    trainer = cnn_finetune.FinetuneTrainer(CNN_OWN, network, "cpu", pretrained=True)
    for step in range(4):
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        trainer.update(pictures.images, pictures.labels, torch.arange(16), step, 20)
        changed = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
        assert (changed == {"head.weight"}) == (step < 3)


def test_training_from_scratch_needs_no_published_network(workspace: Path) -> None:
    shutil.rmtree("models_store")
    with pytest.raises(SystemExit, match="--from other: not in models_store, which holds nothing; or use --from"):
        train("cnn", "--from", "other")
    train("cnn", "--from", "scratch", "--first-width", "8", "--later-width", "8", "--epochs", "1", "--size", "64")
    assert Store(Path("models_store")).card("mine", 1).sizes["image"] == 64


# --- texts


def test_an_unreadable_text_is_rejected_with_the_position(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_bytes(b"one\ntwo\ncaf\xe9\n" * 1000)
    with pytest.raises(
        DataError, match=r"novel.txt is not UTF-8: byte 0xe9 in line 3, byte offset 11; give .*--encoding cp1252"
    ):
        texts.read([path])
    path.write_text("short")
    with pytest.raises(DataError, match=r"novel.txt: 6 characters; at least 10,000 are needed"):
        texts.read([path])
    with pytest.raises(DataError, match=r"nothing\.txt: No such file"):
        texts.read([tmp_path / "nothing.txt"])


def test_a_vocabulary_without_characters_is_rejected(workspace: Path) -> None:
    with pytest.raises(DataError, match="--min-count is 99,999, but only 0 characters occur so often in the training"):
        train("rnn", "--min-count", "99999")
    assert not Path("runs").exists()


def test_files_with_any_line_breaks_are_joined_to_one_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\r" * 2000)
    (tmp_path / "b").write_text("grüße", "utf-8")
    text = texts.read([tmp_path / "a", tmp_path / "b"])
    assert text.train + text.test == "one\ntwo\n" * 2000 + "grüße\n"
    assert texts.vocabulary_of("aaabbc", 2) == ["a", "b", store.UNKNOWN_CHARACTER]


def test_folders_and_any_encoding_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "letters"
    (folder / "old").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, encoding in (("a.txt", "utf-8"), ("b.txt", "utf-16"), ("old/c.txt", "utf-8-sig"), (".git/x", "utf-8")):
        (folder / name).write_text(f"grüße {name[0]}\n" * 1000, encoding)
    (folder / "photo.png").write_bytes(b"\x89PNG\0\0\0\r")
    text = texts.read([folder])
    assert text.train + text.test == "".join(f"grüße {name}\n" * 1000 for name in "abo")
    assert "3 texts; 1 binary files are skipped" in capsys.readouterr().out
    russian = tmp_path / "russian.txt"
    russian.write_text("война и мир\n" * 1000, "koi8-r")
    with pytest.raises(DataError, match=r"is not UTF-8: byte .* give its encoding, for example --encoding cp1252"):
        texts.read([russian])
    text = texts.read([russian], "koi8-r")
    assert (text.train + text.test).startswith("война и мир\n")
    with pytest.raises(DataError, match="--encoding nonsense: Python knows no such encoding"):
        texts.read([russian], "nonsense")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_text_with_bytes_of_0_needs_its_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "russian.txt"
    path.write_text("война и мир\n" * 1000, encoding)
    with pytest.raises(
        DataError, match=r"has bytes of 0, so it is a binary file, or .* for example --encoding utf-16-le"
    ):
        texts.read([path])
    assert texts.read([path], encoding).train.startswith("война и мир\n")


def test_a_file_without_read_permission_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(TEXT)

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(DataError, match=r"a\.txt: Permission denied"):
        texts.read([tmp_path])


def test_the_working_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letters").mkdir()
    monkeypatch.chdir(tmp_path / "letters")
    assert [texts.name_of(Path(path)) for path in (".", "../letters", "a.txt")] == ["letters", "letters", "a.txt"]


def test_characters_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT + "äß😀\ud800" * 3
    for size in (7, texts.COUNTED):
        monkeypatch.setattr(texts, "COUNTED", size)
        assert texts.count_characters(text) == Counter(text)


def test_short_trainings_of_texts_are_tested_on_fewer_characters(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rnn, "TEST_CHARACTERS_PER_MINUTE", 1000)
    arguments = [option for option in OWN["rnn"] if option not in ("--epochs", "3")]
    rnn.main([*arguments, "--minutes", "0.001", "--no-refit", "--name", "mine", "--threads", "1"])
    metric = Store(workspace / "models_store").card("mine", 1).metrics["nats_per_character"]
    assert metric.split.startswith("the first characters of the last 10 % of the text, 1,000 characters")
    assert evaluate.main(["mine"]) == 0, capsys.readouterr().out


def test_loading_modules_is_not_counted_for_the_rest_of_a_test(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, measured = Clock(), rnn.measure

    def measure(generator: Any, text: Any, limit: int) -> Any:
        clock.now += len(text.test[:limit]) / 1000 + (30 if clock.now == 1000 else 0)  # the first call is slower
        return measured(generator, text, limit)

    monkeypatch.setattr(rnn, "measure", measure)
    monkeypatch.setattr(rnn, "TIMED_CHARACTERS", 400)
    monkeypatch.setattr(running.time, "monotonic", clock.monotonic)
    arguments = [option for option in OWN["rnn"] if option not in ("--epochs", "3")]
    rnn.main([*arguments, "--minutes", "0.5", "--no-refit", "--name", "mine", "--threads", "1"])
    (path,) = (workspace / "runs").rglob("budget.json")
    characters = len(TEXT) - int(len(TEXT) * 0.9)
    assert json.loads(path.read_text())["finish_seconds"] == pytest.approx(30 + characters / 1000, abs=0.5)


def test_the_validation_part_is_a_share() -> None:
    for share in (5, 1, -0.1, float("nan")):
        message = rf"--validation is {share:g}; it should be a share from 0 to below 1, such as 0\.05"
        for split in (texts.hold_out, texts.hold_out_windows):
            with pytest.raises(SystemExit, match=message):
                split(torch.arange(100_000), share, 10)
        with pytest.raises(SystemExit, match=message):
            rnn.arguments(["--validation", str(share)])


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        (0, "the training part has only 0 characters, which is too short for --batch 64"),
        (100, "the training part has only 100 characters, which is too short for --batch 64"),
        (640, "--bptt 64 is too large: with --batch 64 each stream has 10 characters, so at most 9 are possible"),
    ],
)
def test_a_training_part_that_is_too_short_is_rejected(characters: int, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        language_model.count_steps(RNN_OWN, characters)


@pytest.mark.parametrize("count", [9_000, 30_000, 200_000, 5_000_000])
def test_weights_for_own_texts_are_selected_on_at_least_20_windows(count: int) -> None:
    train, validation, window = texts.hold_out_windows(torch.arange(count), 0.05, parts=10)
    windows = sum((len(part) - 1) // window for part in validation)
    assert texts.MIN_WINDOWS <= windows <= texts.MAX_WINDOWS
    assert window == texts.WINDOW or count < 40_000
    assert len(train) >= 0.84 * count
    assert torch.equal(torch.cat([train, *validation]).sort().values, torch.arange(count))


def test_more_held_out_parts_than_a_short_text_has_are_rejected() -> None:
    with pytest.raises(
        SystemExit, match=r"--validation-parts is 2000; the text is too short for so many held-out parts"
    ):
        texts.hold_out_windows(torch.arange(9_000), 0.05, parts=2000)


def test_fine_tuning_a_text_network_keeps_the_weights_of_shared_characters(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = [*sorted(set(TEXT) - {"q"}), store.UNKNOWN_CHARACTER]
    sizes = {"vocabulary": len(vocabulary), "hidden": 8, "layers": 1}
    card = tiny_card("other", "continue", "character-rnn", sizes, {"vocabulary": vocabulary})
    base = Store(Path("models_store")).publish(card, build("character-rnn", sizes).state_dict())
    own = texts.vocabulary_of(TEXT, 1)
    network = language_model.transfer_weights(build("character-rnn", {**sizes, "vocabulary": len(own)}), own, base)
    for character, base_index in (("t", vocabulary.index("t")), ("q", len(vocabulary) - 1)):
        row = network.embedding.weight[own.index(character)]
        assert torch.equal(row, base.tensors["embedding.weight"][base_index])
    train("rnn", "--from", "other@1")
    card = Store(Path("models_store")).card("mine", 1)
    assert card.kind == "character-rnn"
    assert card.data["other@1"] == base.card.weights_sha256
    train("rnn", "--from", "other@1", "--epochs", "0")  # only calibrated
    card = Store(Path("models_store")).card("mine", 2)
    assert "All layers except the last are those of other@1. About 5% of the training part was held out" in card.notes
    assert "averaged" not in card.notes
    assert "The logits were divided by" in card.notes
    assert card.refit_steps is None
    for wrong in (["--epochs", "0"], ["--epochs", "-1", "--from", "other@1"]):
        with pytest.raises(SystemExit, match=r"--epochs is (0|-1); it should be at least 1, or 0 with --from"):
            train("rnn", *wrong)
    with pytest.raises(SystemExit, match="--hidden is 9, but the network in --from other@1 has 8; omit --hidden"):
        train("rnn", "--from", "other", "--hidden", "9")
    Path("novel.txt").write_text("ПРИВЕТ\n" * 3000)
    with pytest.raises(DataError, match="--from other: its vocabulary covers 14% of the text's characters"):
        train("rnn", "--from", "other")
    with pytest.raises(SystemExit, match="the network kind is character-rnn; this command can start from whitened-net"):
        train("cnn", "--from", "other", name="pets")


def test_the_weights_with_the_lowest_validation_loss_are_kept() -> None:
    network = torch.nn.Linear(1, 1)
    best = BestWeights(network)
    for weight, loss in ((1.0, 3.0), (2.0, 1.0), (3.0, 2.0)):
        torch.nn.init.constant_(network.weight, weight)
        best.update(network, loss)
    restored = BestWeights(network)
    restored.load_state_dict(best.state_dict())
    assert restored.weights["weight"].item() == 2
    assert restored.loss.item() == 1


# --- generated images


def test_the_channels_of_generated_images_follow_the_training_images(workspace: Path) -> None:
    for file in Path("shapes").rglob("*.png"):
        target = Path("grey") / file.relative_to("shapes")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).convert("L").save(target)
    assert gan_finetune.read(Path("grey"), 28, "auto", "mine").images.shape == (48, 1, 28, 28)
    assert gan_finetune.read(Path("grey"), 28, "rgb", "mine").images.shape == (48, 3, 28, 28)
    assert gan_finetune.read(Path("shapes"), 32, "auto", "mine").images.shape == (48, 3, 32, 32)
    assert gan_finetune.read(Path("shapes"), 32, "grey", "mine").images.shape == (48, 1, 32, 32)


def test_images_without_sub_folders_have_one_label(workspace: Path) -> None:
    Path("flat").mkdir()
    for number, file in enumerate(Path("shapes").rglob("*.png")):
        shutil.copy(file, Path("flat") / f"{number}.png")
    gan.main(["--images", "flat", "--epochs", "1", "--batch", "16", "--latent", "4", "--name", "mine"])
    card = Store(Path("models_store")).card("mine", 1)
    assert card.labels == ["mine"]
    assert set(card.metrics) == {"nearest_neighbour_ratio"}


# --- the command line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--images", "shapes"], "--images needs --name, the name of the new model"),
        (
            ["--images", "shapes", "--name", "My Pets"],
            "name 'My Pets' is not allowed; use at most 64 lower-case letters",
        ),
        (["--images", "shapes", "--name", "stats"], "name 'stats' is not allowed; "),
        (
            ["--images", "shapes", "--name", "a", "--preset", "strong"],
            "--images cannot be combined with --preset strong",
        ),
        (["--preset", "own"], "the preset own needs --images"),
        (["--minutes", "3"], "--minutes needs --images"),
        (["--from", "cifar10-accurate", "--name", "pets"], "--from needs --images"),
        (["--preset", "strong", "--size", "64"], "--size needs --images"),
        (["--images", "x", "--name", "a", "--minutes", "-1"], "minutes must be a number above 0, not '-1'"),
        (
            ["--images", "x", "--name", "a", "--minutes", "1", "--epochs", "2"],
            "--minutes and --epochs cannot be combined",
        ),
        (["--images", "x", "--name", "a", "--rotate", "2"], "the preset own has no --rotate"),
    ],
)
def test_contradictory_options_are_rejected(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cnn.main(options)
    assert sentence in capsys.readouterr().err


def test_a_name_of_a_model_for_another_task_is_rejected_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_tiny(tmp_path, "tiny-gan")
    options = ["--images", str(tmp_path / "missing"), "--name", "tiny-gan", "--store", str(tmp_path)]
    with pytest.raises(SystemExit):
        cnn.main(options)
    problem = "tiny-gan: task is 'classify', expected 'sample' as for tiny-gan@1; use another name"
    assert problem in capsys.readouterr().err
    for accepted in (["--no-publish"], ["--name", "other"]):  # these trainings begin, and find no images
        with pytest.raises(SystemExit, match="missing"):
            cnn.main([*options, *accepted])


def test_drawn_shapes_are_reproducible() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    for file in (first, second):
        shapes.draw_shape("square", np.random.default_rng(1)).save(file, "PNG")
    assert first.getvalue() == second.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("stem", OWN)
def test_own_data_are_trained_on_another_device(stem: str, workspace: Path) -> None:
    """The device stands in for a GPU. Operators fail if tensors are created on the wrong device."""
    with fake_device.enabled() as device:
        train(stem, "--epochs", "1", "--no-publish", "--device", str(device))
        assert fake_device.operators > 100
