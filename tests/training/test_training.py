"""Training runs: resuming, published cards, schedules, metrics and downloads."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fake_device import fake_device
from support.images import drawn_figures
from support.networks import tiny_card
from support.processes import FORK_SERVER, train_and_wait
from support.service import ROOT
from support.waiting import locked

from app import store
from app.networks import KINDS, build
from app.store import Store
from training import cnn, evaluation_log, gan, lstm, publishing, recalibrate, rnn
from training import run as running
from training.checkpoints import checkpoint
from training.configs import CnnConfig
from training.data import datasets, texts
from training.evaluation import evaluate, generation, language_model, speed
from training.evaluation.calibration import fit_temperature
from training.loops.airbench import Lookahead, triangular_schedule
from training.loops.classifier import augment
from training.loops.gan import recalibrate_batchnorm
from training.loops.text import elman_recurrence
from training.loops.text.distillation import Teachers

IMAGES = ["--epochs", "3", "--batch", "16", "--validation", "60"]
WIDTHS = ["--first-width", "24", "--second-width", "26", "--third-width", "26"]
TINY = {
    "cnn": IMAGES,
    "strong": ["--preset", "strong", *WIDTHS, *IMAGES],
    "accurate": ["--preset", "accurate", *WIDTHS, *IMAGES, "--selected", "8", "--corrupted", "0.5"],
    "rnn": ["--hidden", "8", "--epochs", "2", "--batch", "4", "--bptt", "40", "--validation", "0.4"],
    "gated": [
        *("--preset", "gated", "--hidden", "16", "--layers", "2", "--epochs", "2", "--batch", "4", "--bptt", "40"),
        *("--validation", "0.4"),
    ],
    "lstm": ["--hidden", "4", "--window", "10", "--horizon", "5", "--steps", "60", "--batch", "4"],
    "forecaster": [
        *("--preset", "strong", "--hidden", "8", "--members", "2", "--steps", "20", "--batch", "8"),
        *("--synthetic-series", "6", "--structural-series", "6"),
    ],
    "gan": ["--epochs", "3", "--batch", "16", "--latent", "4", "--r1-penalty", "1"],
    "conditional": ["--preset", "conditional", "--epochs", "3", "--batch", "16", "--latent", "4"],
}
SCRIPTS: dict[str, Any] = {
    **{"cnn": cnn, "strong": cnn, "accurate": cnn, "rnn": rnn, "gated": rnn, "lstm": lstm, "forecaster": lstm},
    **{"gan": gan, "conditional": gan},
}
LONG_TESTS = [stem for stem in SCRIPTS if stem != "strong"]  # "accurate" runs the same code, and more


@pytest.fixture
def tiny_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create data sets of noise with the files and shapes of the real ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, channels, side in (("cifar10", 3, 32), ("mnist", 1, 28)):
        tensors = {}
        for part, count in (("train", 200), ("test", 60)):
            tensors[f"{part}_images"] = torch.randint(
                0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator
            )
            tensors[f"{part}_labels"] = torch.arange(count) % 10
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "m4").mkdir()
    for kind, horizon in (("Hourly", 48), ("Weekly", 13)):
        for part, length in (("train", 200), ("test", horizon)):
            rows = 10 + torch.randn(4, length, generator=generator).cumsum(1)
            lines = [
                ",".join(["V1", *map(str, range(length))]),
                *(f"W,{','.join(map(str, row.tolist()))}" for row in rows),
            ]
            (folder / "m4" / f"{kind}-{part}.csv").write_text("\n".join(lines))
    (folder / "tinyshakespeare.txt").write_text("HAMLET:\nto be, or not to be: that is the question\n\n" * 200)
    monkeypatch.setenv("QUARTET_DATA_DIR", str(folder))
    monkeypatch.setattr(datasets, "SHA256", {})
    monkeypatch.setattr(generation, "SAMPLES", 200)
    monkeypatch.setattr(generation, "CLASSIFIER_SAMPLES", 200)
    monkeypatch.setattr(generation, "UNSEEN", 60)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Return a store that has only mnist-judge."""
    shutil.copytree(ROOT / "models_store" / "mnist-judge", tmp_path / "models" / "mnist-judge")
    return tmp_path / "models"


def arguments(stem: str, runs: Path, models: Path) -> list[str]:
    return [*TINY[stem], "--seed", "3", "--threads", "1", "--runs", str(runs), "--store", str(models)]


def model_name(stem: str) -> str:
    """Return the model name under which a script publishes."""
    options = TINY[stem]
    name: str = SCRIPTS[stem].NAMES[options[options.index("--preset") + 1] if "--preset" in options else "workshop"]
    return name


def only_entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def finished(tiny_data: Path, models: Path, shared_folder: Path) -> Callable[[str], Path]:
    """Return a function that trains a tiny network, and returns a folder with ``runs``, ``models`` and ``output``.

    Each network is trained only once for all tests, so tests must not change the folder.
    """

    def train(stem: str) -> Path:
        folder = shared_folder / f"trained-{stem}"
        with locked(folder.with_suffix(".lock")):
            if not (folder / "output").exists():
                shutil.copytree(models, folder / "models")
                with contextlib.redirect_stdout(io.StringIO()) as output, drawn_figures():
                    SCRIPTS[stem].main(arguments(stem, folder / "runs", folder / "models"))
                (folder / "output").write_text(output.getvalue())
        return folder

    return train


def test_a_classifier_gets_the_calibration_of_another_training(
    finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, runs = tmp_path / "store", tmp_path / "runs"
    shutil.copytree(finished("accurate") / "models", models)
    options = [*TINY["accurate"], "--threads", "1", "--store", str(models), "--no-publish"]
    cnn.main([*options, "--seed", "4", "--validation", "80", "--runs", str(runs)])
    folder = only_entry(runs / "cifar10-accurate")
    recalibrate.main(["cifar10-accurate@1", "--run", str(folder), "--store", str(models)])
    before, after = (Store(models).read("cifar10-accurate", number) for number in (1, 2))
    changed = {key for key in before.tensors if not torch.equal(before.tensors[key], after.tensors[key])}
    assert changed == {"temperature", "views_temperature"}
    own = json.loads((folder / "card.json").read_text())  # the training fits its calibration to the same 80 images
    assert after.card.sizes == own["sizes"]
    assert after.tensors["temperature"].item() == pytest.approx(
        load_file(folder / "model.safetensors")["temperature"].item(), rel=1e-3
    )
    assert after.card.metrics["accuracy"] == before.card.metrics["accuracy"]
    assert "were fitted to 80 images that a training with seed 4 held out" in after.card.notes
    assert after.card.command
    assert after.card.command.startswith("python -m training.recalibrate cifar10-accurate@1")
    assert evaluate.main(["cifar10-accurate@2", "--store", str(models)]) == 0
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / store.CARD).write_text("null")
    for arguments, message in (
        (["cifar10-accurate", "--run", str(folder)], "is not NAME@VERSION"),
        (["cifar10-accurate@9", "--run", str(folder)], "9"),
        (["cifar10-accurate@1", "--run", str(tmp_path)], "not the folder of a finished run"),
        (["cifar10-accurate@1", "--run", str(damaged)], "not the folder of a finished run"),
        (["mnist-judge@1", "--run", str(folder)], "its network has another"),
    ):
        with pytest.raises(SystemExit):
            recalibrate.main([*arguments, "--store", str(models)])
        assert message in capsys.readouterr().err


SHORT = {
    **{stem: ["--epochs", "1"] for stem in ("cnn", "accurate", "gan", "conditional")},
    **{stem: ["--epochs", "1", "--batch", "16"] for stem in ("rnn", "gated")},
    **{stem: ["--steps", "3"] for stem in ("lstm", "forecaster")},
}


@pytest.mark.slow
@pytest.mark.parametrize("stem", LONG_TESTS)
def test_a_network_is_trained_on_another_device(stem: str, tiny_data: Path, models: Path, tmp_path: Path) -> None:
    """The device stands in for a GPU. Operators fail if tensors are created on the wrong device."""
    with fake_device.enabled() as device:
        options = [*SHORT[stem], "--device", str(device), "--no-publish"]
        SCRIPTS[stem].main([*arguments(stem, tmp_path / "runs", models), *options])
        assert fake_device.operators > 100


@pytest.mark.parametrize("stem", ["cnn", "gated", "forecaster", "conditional"])
def test_a_version_is_evaluated_on_another_device(stem: str, finished: Callable[[str], Path]) -> None:
    """All figures are those on the card, which were measured on the CPU."""
    models = finished(stem) / "models"
    version = Store(models).read(model_name(stem), 1)
    with fake_device.enabled() as device:
        lines = evaluate.check(version, models, str(device))
        assert fake_device.operators > 20
    assert lines
    assert all(line.endswith("✓") for line in lines), lines


def test_a_network_learns_from_the_mean_predictions_of_teachers(
    tiny_data: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teachers are two finished runs. A network that learns only from their predictions becomes similar to them."""
    command = [*arguments("gated", tmp_path / "runs", models), "--no-publish"]
    folders = []
    for seed in ("1", "2"):
        rnn.main([*command, "--seed", seed, "--name", f"teacher-{seed}"])
        folders.append(str(only_entry(tmp_path / "runs" / f"teacher-{seed}")))
    vocabulary = texts.vocabulary_of(datasets.tinyshakespeare().train)
    teachers = Teachers([Path(folder) for folder in folders], vocabulary, "cpu", {})
    characters = torch.randint(0, len(vocabulary) - 1, (3, 7))
    probabilities, _ = teachers.predict(characters, teachers.zero_states(3))
    assert probabilities.sum(dim=-1).numpy() == pytest.approx(1)
    whole = teachers.predict(characters, teachers.zero_states(3))[0][:, 4:]
    _, first = teachers.predict(characters[:, :4], teachers.zero_states(3))
    assert torch.allclose(teachers.predict(characters[:, 4:], first)[0], whole, atol=0.01)  # bfloat16
    published = [option for option in command if option != "--no-publish"]
    rnn.main([*published, "--name", "student", "--teachers", *folders, "--distillation-weight", "1"])
    card = json.loads((only_entry(tmp_path / "runs" / "student") / "card.json").read_text())
    assert list(card["data"])[1:] == ["teacher 1: teacher-1, seed 1", "teacher 2: teacher-2, seed 2"]
    assert "Distilled: the mean predictions of 2 networks have the weight 1." in card["notes"]
    capsys.readouterr()
    assert evaluate.main(["student", "--store", str(models)]) == 0
    assert "teacher 1: teacher-1, seed 1       not compared: teachers are not published" in capsys.readouterr().out
    Teachers([only_entry(tmp_path / "runs" / "student")], vocabulary, "cpu", {})
    with pytest.raises(datasets.DataError, match="teacher-1 has another vocabulary"):
        Teachers([Path(folders[0])], vocabulary[1:], "cpu", {})
    shutil.copytree(folders[0], tmp_path / "damaged")
    (tmp_path / "damaged" / store.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(datasets.DataError, match="not the folder of a finished run"):
        Teachers([tmp_path / "damaged"], vocabulary, "cpu", {})
    with pytest.raises(datasets.DataError, match="not the folder of a finished run"):
        rnn.main([*command, "--name", "other", "--teachers", str(tmp_path)])


def test_the_workshop_rnn_can_train_on_all_characters(tiny_data: Path, models: Path, tmp_path: Path) -> None:
    """The preset has no validation part, so the logits are not calibrated."""
    rnn.main([*arguments("rnn", tmp_path / "runs", models), "--validation", "0"])
    assert "then all of it was trained on" in Store(models).read("shakespeare-rnn", 1).card.notes


def test_options_that_would_train_nothing_are_rejected(tiny_data: Path, models: Path, tmp_path: Path) -> None:
    for script, stem, changed, message in (
        (cnn, "cnn", ["--batch", "5000"], "--batch is 5,000, but there are only"),
        (gan, "gan", ["--batch", "5000"], "--batch is 5,000, but there are only"),
        (rnn, "rnn", ["--layers", "2"], "--layers is 2; the preset workshop has one layer"),
        (rnn, "rnn", ["--validation", "5"], "--validation is 5; it should be a share from 0 to below 1"),
        (lstm, "lstm", ["--horizon", "1"], "--horizon is 1; it should be at least 2"),
        (lstm, "lstm", ["--validation", "49"], "--validation is 49; it should be from 50 to 785"),
        (lstm, "lstm", ["--validation", "786"], "--validation is 786; it should be from 50 to 785"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main([*arguments(stem, tmp_path / "runs", models), *changed])
    assert not (tmp_path / "runs").exists()


def test_a_published_network_is_calibrated_without_training(tiny_data: Path, models: Path, tmp_path: Path) -> None:
    command = arguments("gated", tmp_path / "runs", models)
    rnn.main(command)
    first = Store(models).read("shakespeare-rnn", 1)
    rnn.main([*command, "--from", "shakespeare-rnn@1", "--epochs", "0", "--validation", "0.3"])
    second = Store(models).read("shakespeare-rnn", 2)
    changed = {key for key, tensor in first.tensors.items() if not torch.equal(tensor, second.tensors[key])}
    assert changed == {"head.bias", "head.weight"}
    temperature = (first.tensors["head.weight"] / second.tensors["head.weight"]).mean().item()
    assert list(second.card.data) == ["tinyshakespeare", "shakespeare-rnn@1"]
    assert second.card.notes == (
        "All layers except the last are those of shakespeare-rnn@1. "
        "30% of the training part, in 10 parts, were held out. "
        f"The logits were divided by {temperature:.3g}, which gives the lowest loss on the held-out characters."
    )


@pytest.mark.parametrize("stem", LONG_TESTS)
def test_a_killed_and_resumed_run_ends_like_an_uninterrupted_one(
    stem: str, finished: Callable[[str], Path], tiny_data: Path, models: Path, tmp_path: Path
) -> None:
    script = SCRIPTS[stem]
    name = model_name(stem)
    whole = finished(stem)
    steps, sender = FORK_SERVER.Pipe(duplex=False)
    options = arguments(stem, tmp_path / "killed", models)
    process = FORK_SERVER.Process(target=train_and_wait, args=(script.__name__, 13, options, dict(os.environ), sender))
    process.start()
    sender.close()
    while steps.recv() != 13:
        pass
    process.kill()
    process.join()
    steps.close()
    killed = only_entry(tmp_path / "killed" / name)
    (killed / "state.tmp").write_bytes(b"a state half written")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10000, "loss": 1}\n{"step": 1')
    assert not (models / name).exists()
    script.main([*arguments(stem, tmp_path / "killed", models), "--resume"])

    uninterrupted, resumed = (Store(folder).read(name, 1) for folder in (whole / "models", models))
    assert uninterrupted.tensors.keys() == resumed.tensors.keys()
    for key, tensor in uninterrupted.tensors.items():
        assert torch.equal(tensor, resumed.tensors[key]), key
    runs = (whole / "runs", tmp_path / "killed")
    lines = [(only_entry(folder / name) / "metrics.jsonl").read_text() for folder in runs]
    assert lines[0] == lines[1]
    assert uninterrupted.card.metrics == resumed.card.metrics
    assert uninterrupted.card.resumed is None
    assert resumed.card.resumed is not None
    (place,) = resumed.card.resumed
    code = f"commit {re.escape(resumed.card.commit)}, torch {re.escape(torch.__version__)}"
    assert re.fullmatch(rf"step \d+; before: {code}; after: {code}", place)

    (killed / "finished").unlink()  # simulates a kill right after publishing
    script.main([*arguments(stem, tmp_path / "killed", models), "--resume"])
    assert [number for other, number in Store(models).versions() if other == name] == [1]


@pytest.mark.parametrize("stem", SCRIPTS)
def test_a_run_writes_plots_and_a_card_that_evaluation_confirms(
    stem: str, finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, whole = model_name(stem), finished(stem)
    folder = only_entry(whole / "runs" / name)
    models = shutil.copytree(whole / "models", tmp_path / "copy")
    for file in ("config.json", "metrics.jsonl", "curves.png", "samples.png", "card.json"):
        assert (folder / file).stat().st_size > 50, file
    card = Store(models).read(name, 1).card
    assert card.command.startswith(f"python -m {SCRIPTS[stem].__name__} ")
    assert card.seed == 3
    assert "--seed 3" in card.command
    assert card.metrics
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in card.data.values())
    assert (models / name / "1" / "samples.png").exists()
    assert card.speed is not None
    assert card.speed.milliseconds > 0
    assert speed.describe(card.speed.model_dump(), card.task) in (whole / "output").read_text()
    path = models / name / "1" / "card.json"
    published = path.read_bytes()
    assert speed.main([name, "--store", str(models)]) == 0
    assert f"{name}@1: on one thread " in capsys.readouterr().out
    assert evaluate.main([f"{name}@1", "--store", str(models)]) == 0
    for command in (speed, evaluate):
        with pytest.raises(SystemExit):
            command.main([name, f"{name}@7", "--store", str(models)])
        assert f"error: {models} has no {name}@7; it has " in capsys.readouterr().err
    assert path.read_bytes() == published
    changed = json.loads(path.read_text())
    metric = next(iter(changed["metrics"].values()))
    metric["value"] += evaluate.MAX_BFLOAT16_DIFFERENCE + 3 * 10 ** -metric["decimals"]
    path.write_text(json.dumps(changed))
    capsys.readouterr()
    assert evaluate.main([name, "--store", str(models)]) == 1
    assert "✗" in capsys.readouterr().out


def test_the_preset_accurate_stores_the_weights_of_convolutions_in_float16(finished: Callable[[str], Path]) -> None:
    tensors = Store(finished("accurate") / "models").read("cifar10-accurate", 1).tensors
    half = {key for key, tensor in tensors.items() if tensor.dtype == torch.float16}
    assert half == {key for key in tensors if re.search(r"conv[123]\.weight", key)}
    assert len(half) == 9


@pytest.mark.parametrize(
    ("kind", "name", "hardware", "difference", "line"),
    [
        ("lenet", "accuracy", "Xeon", 0.0001, "0.5000  measured 0.5001 ✓"),
        ("lenet", "accuracy", "Xeon", 0.0002, "0.5000  measured 0.5002 ✗"),
        (
            *("whitened-net", "accuracy", "Xeon", -0.0019),
            "0.5000  measured 0.4981 ≈ differs by -0.0019 (some processors use bfloat16; card: Xeon, now: EPYC)",
        ),
        ("whitened-net", "accuracy", "Xeon", 0.0021, "0.5000  measured 0.5021 ✗"),
        ("conditional-generator", "samples_only_accuracy", "EPYC", 0.0030, "0.5000  measured 0.5030 ✗"),
        (
            *("conditional-generator", "samples_only_accuracy", "Xeon", 0.0030),
            "0.5000  measured 0.5030 ≈ differs by +0.0030 (card: Xeon, now: EPYC)",
        ),
    ],
)
def test_evaluation_tolerates_rounding_and_states_differences_of_processors(
    kind: str, name: str, hardware: str, difference: float, line: str
) -> None:
    fields = {"version": 1, "weights_sha256": "", "hardware": f"{hardware}, threads: 2"}
    fields |= {"metrics": {name: {"value": 0.5, "split": "", "decimals": 4}}}
    sizes = {"classes": 10} if kind == "conditional-generator" else {}
    card = store.Card.model_validate(tiny_card("a", KINDS[kind].task, kind, sizes, fields))
    now = {name: running.metric(0.5 + difference, ""), "new": running.metric(0.25, "", 2)}
    new, compared = sorted(evaluate.compare(card, now, "EPYC"), key=lambda text: "new" not in text)
    assert compared == f"  {name:34} {line}"
    assert new == f"  {'new':34} not on the card, measured 0.25"
    (missing,) = evaluate.compare(card, {}, "EPYC")
    assert missing == f"  {name:34} on the card only ✗"


@pytest.mark.parametrize("command", ["strong --first-width", "lstm --steps", "lstm --window", "gan --latent"])
def test_sizes_and_numbers_of_steps_are_positive(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    stem, option = command.split()
    with pytest.raises(SystemExit):
        SCRIPTS[stem].main([*TINY[stem], option, "0", "--no-publish"])
    assert capsys.readouterr().err.endswith(f"error: {option} is 0; it should be at least 1\n")


@pytest.mark.parametrize(
    ("command", "limit"),
    [("rnn --dropout 1", "below 1"), ("lstm --ema-decay 1", "below 1"), ("rnn --unknown-share 2", "at most 1")],
)
def test_shares_and_decays_have_an_upper_limit(command: str, limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    stem, option, value = command.split()
    with pytest.raises(SystemExit):
        SCRIPTS[stem].main([option, value])
    assert capsys.readouterr().err.endswith(f"error: {option} is {float(value)}; it should be {limit}\n")


@pytest.mark.parametrize("value", ["-0.5", "nan", "inf"])
def test_hyperparameters_are_finite_and_not_negative(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lstm.main(["--learning-rate", value])
    message = f"error: --learning-rate is {float(value)}; it should be finite and not negative\n"
    assert capsys.readouterr().err.endswith(message)


def test_a_store_that_is_no_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (speed, evaluate):
        with pytest.raises(SystemExit):
            command.main(["--store", str(tmp_path / "nothing")])
        assert f"--store is '{tmp_path}/nothing', which is not a folder" in capsys.readouterr().err


def test_the_speed_of_other_versions_is_measured_beside_a_damaged_version(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (models / "broken" / "1").mkdir(parents=True)
    (models / "broken" / "1" / "card.json").write_text("{")
    monkeypatch.setattr(speed, "measure", lambda *_: {"milliseconds": 1.0, "per_second": 1.0, "rows": 1})
    assert speed.main(["--store", str(models)]) == 1
    output = capsys.readouterr().out
    assert "broken@1: not measured: " in output
    assert "mnist-judge@1: on one thread" in output


def test_a_command_on_a_card_may_name_a_device_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("to be, or not to be\n" * 1000)
    command = f"python -m training.rnn --text {path} --name a --device cuda:99"
    card: Any = SimpleNamespace(data={"text:novel.txt": ""}, command=command)
    assert evaluate.own_data(card, tmp_path).train.startswith("to be")
    card.command += " --epoch 3 --nonsense"
    with pytest.raises(evaluate.EvaluationError, match=r"command 'python .* is rejected: .*--nonsense"):
        evaluate.own_data(card, tmp_path)
    card.command = command + " --validation 5"
    with pytest.raises(evaluate.EvaluationError, match="is rejected: --validation is 5; it should be"):
        evaluate.own_data(card, tmp_path)


def test_the_commit_is_unknown_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert publishing.commit() == "unknown"


def test_the_commit_is_that_of_the_code_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def record(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(stdout="")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(publishing.subprocess, "run", record)
    publishing.commit()
    assert [command[:3] for command in commands] == [["git", "-C", str(ROOT)]] * 2


class Unreadable:
    """A test part that must not be read."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"{name} of a test part was read")


@pytest.mark.parametrize("stem", LONG_TESTS)
def test_no_publish_reads_no_test_part(
    stem: str, tiny_data: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cifar10", "mnist"):
        images = dataclasses.replace(getattr(datasets, name)(), test_images=Unreadable(), test_labels=Unreadable())
        monkeypatch.setattr(datasets, name, lambda images=images: images)
    text = dataclasses.replace(datasets.tinyshakespeare(), test=Unreadable())
    monkeypatch.setattr(datasets, "tinyshakespeare", lambda: text)
    for collection in (datasets.m4_hourly(), datasets.m4_weekly()):
        hidden = dataclasses.replace(collection, future=torch.full_like(collection.future, torch.nan))
        monkeypatch.setattr(datasets, collection.name, lambda hidden=hidden: hidden)
    sine = datasets.sine

    def hidden_sine(seed: int = 0) -> datasets.Sine:
        series = sine(seed)
        series.values[series.split :] = torch.nan
        return series

    monkeypatch.setattr(datasets, "sine", hidden_sine)
    SCRIPTS[stem].main([*arguments(stem, tmp_path / "runs", models), "--no-publish"])
    folder = only_entry(tmp_path / "runs" / model_name(stem))
    metrics = json.loads((folder / "card.json").read_text())["metrics"]
    assert metrics
    for metric in metrics.values():
        assert math.isfinite(metric["value"])
        assert "test" not in metric["split"]
    assert (folder / "samples.png").exists()
    assert not (models / model_name(stem)).exists()


def test_generators_train_on_no_images_that_validate_them(
    tiny_data: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def fit(
        run: running.Run, trainer: Any, images: torch.Tensor, labels: torch.Tensor, total: Callable[[], int]
    ) -> None:
        seen.append(images)
        assert len(images) == len(labels)
        assert total() == 3 * (len(images) // 16)
        raise KeyboardInterrupt

    monkeypatch.setattr(gan, "fit", fit)
    command = arguments("conditional", tmp_path / "runs", models)
    for options in ([], ["--no-publish"]):
        with pytest.raises(KeyboardInterrupt):
            gan.main([*command, *options])
    images = datasets.mnist()
    assert torch.equal(seen[0], images.train_images)
    assert torch.equal(seen[1], images.train_images[images.split_validation(60)[0]])
    shutil.rmtree(min((tmp_path / "runs" / "mnist-cgan").iterdir()))  # the run that would read the test part
    with pytest.raises(SystemExit, match=r"was started with part validation \(now test\)"):
        gan.main([*command, "--resume"])


def test_each_measurement_on_a_test_part_is_logged(
    tiny_data: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, own_log = tmp_path / "training" / "LOG.md", tmp_path / "runs" / evaluation_log.OWN_LOG
    log.parent.mkdir()
    log.write_text("| time |\n|---|\n")
    monkeypatch.setattr(evaluation_log, "LOG", log)

    def train(*options: str) -> None:
        lstm.main([*arguments("lstm", tmp_path / "runs", models), *options])

    train("--no-publish")
    assert len(log.read_text().splitlines()) == 2
    assert not own_log.exists()
    train()  # the log is not in a git checkout
    assert len(log.read_text().splitlines()) == 2
    (line,) = own_log.read_text().removeprefix(evaluation_log.HEAD).splitlines()
    card = Store(models).card("sine-lstm", 1)
    mse = card.metrics["one_step_mse"].value
    assert re.fullmatch(
        rf"\| \S+ \| sine-lstm \| sine \| one_step_mse {mse:.4f} \| .* \| `{re.escape(card.command)}` \|", line
    )
    (tmp_path / ".git").mkdir()
    train("--seed", "4")
    assert "--seed 4" in log.read_text().splitlines()[2]
    assert len(own_log.read_text().splitlines()) == 3
    own_log.unlink()
    own_log.mkdir()
    shutil.rmtree(tmp_path / ".git")
    train("--seed", "5")  # the log cannot be written
    assert "this measurement on the test part could not be logged in" in capsys.readouterr().out
    assert Store(models).numbers("sine-lstm") == [1, 2, 3]


def test_ctrl_c_saves_a_checkpoint_and_prints_the_resume_command(
    tiny_data: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = running.Run.log

    def interrupt(self: running.Run, **metrics: float) -> None:
        log(self, **metrics)
        if self.step + 1 >= 8:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(running.Run, "log", interrupt)
    with pytest.raises(SystemExit, match=r"saved .* at step 8 of 24; resume with: \S+ -m training.* --resume$"):
        cnn.main(arguments("cnn", tmp_path / "runs", models))
    with pytest.raises(SystemExit, match=r"at step 16 of 24; resume with: .* --resume$") as second:
        cnn.main([*arguments("cnn", tmp_path / "runs", models), "--resume"])
    assert str(second.value).count("--resume") == 1
    assert not (models / "cifar10-lenet").exists()
    monkeypatch.setattr(running.Run, "log", log)
    with pytest.raises(SystemExit, match="was started with batch 16"):
        cnn.main([*arguments("cnn", tmp_path / "runs", models), "--resume", "--batch", "8"])
    cnn.main([*arguments("cnn", tmp_path / "runs", models), "--resume"])
    assert (models / "cifar10-lenet" / "1").exists()


def test_the_newest_unfinished_run_with_the_same_options_is_resumed(tmp_path: Path) -> None:
    def start(*arguments: str) -> running.Run:
        options, config = lstm.arguments(["--runs", str(tmp_path), "--threads", "1", *arguments])
        return running.Run(options, config, arguments)

    runs = [start("--seed", seed) for seed in ("1", "1", "2")]
    newest = re.escape(str(runs[2].folder))
    with pytest.raises(SystemExit, match=rf"^{newest} is still running in another process: wait until it ends, or "):
        start("--seed", "2", "--resume")
    for run in runs:
        run.lock.close()
    resumed = [start("--seed", "1", "--resume") for _ in range(2)]
    assert [run.folder for run in resumed] == [runs[1].folder, runs[0].folder]  # the newest one runs already
    assert start("--seed", "2", "--resume").folder == runs[2].folder
    with pytest.raises(SystemExit, match=rf"^{newest} was started with seed 2 \(now 3\): "):
        start("--seed", "3", "--resume")


def test_a_card_states_the_code_before_and_after_each_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(commit: str, version: str, *, last: int) -> list[str]:
        """Train until the step ``last``, and return the card's entries about resumes."""
        monkeypatch.setattr(running, "commit", lambda: commit)
        monkeypatch.setattr(torch, "__version__", version)
        arguments = ["--runs", str(tmp_path), "--threads", "1", "--resume"]
        options, config = lstm.arguments(arguments)
        run = running.Run(options, config, arguments)
        run.track()
        for _ in run.steps(lambda: 9):
            if run.step + 1 == last:
                signal.raise_signal(signal.SIGINT)
        run.lock.close()
        return run.provenance()["resumed"] or []

    with pytest.raises(SystemExit, match="at step 3 of 9"):
        train("a", "1.0", last=3)
    first = "step 3; before: commit a, torch 1.0; after: commit b, torch 2.0"
    with pytest.raises(SystemExit, match="at step 9 of 9"):
        train("b", "2.0", last=9)
    assert train("b", "2.0", last=0) == [first]
    last = "after the last step, 9; before: commit b, torch 2.0; after: commit {}, torch {}"
    assert train("c", "2.0", last=0) == [first, last.format("c", "2.0")]
    assert train("b", "2.1", last=0) == [first, last.format("b", "2.1")]
    (path,) = tmp_path.rglob("state.pt")
    state = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "torch"}, path)  # of an older version of the code
    old = "after the last step, 9; before: commit b, torch unknown; after: commit b, torch 2.0"
    assert train("b", "2.0", last=0) == [first, old]


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path, new = tmp_path / "state.pt", tmp_path / "state.tmp"
    for kept in ("", "; the previous checkpoint is kept, so --resume continues the run"):
        new.symlink_to("/dev/full")
        sentence = f"the checkpoint {new} could not be written (No space left on device){kept}"
        with pytest.raises(SystemExit, match=f"^{re.escape(sentence)}$"):
            checkpoint.save(path, {"weights": torch.zeros(1000)})
        assert not new.is_symlink()
        checkpoint.save(path, {"step": 3})
        assert torch.load(path, weights_only=True) == {"step": 3}


@pytest.mark.parametrize("stem", ["cnn", "lstm", "forecaster"])
def test_a_training_that_diverges_publishes_nothing(stem: str, tiny_data: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^the training diverged: at step .* has [0-9,]+ weights that are NaN or inf"):
        SCRIPTS[stem].main([*arguments(stem, tmp_path / "runs", models), "--learning-rate", "1e30"])
    assert not (models / model_name(stem)).exists()


@pytest.mark.parametrize("refit", [False, True])
def test_a_run_killed_before_its_first_checkpoint_leaves_no_lines_in_the_log(tmp_path: Path, refit: bool) -> None:
    command = ["--runs", str(tmp_path), "--threads", "1"]
    for arguments in (command, [*command, "--resume"]):
        options, config = lstm.arguments(arguments)
        run = running.Run(options, config, arguments)
        if refit:
            run.begin_refit()
        run.track()
        run.log(loss=1.0)  # the first run ends here, without a checkpoint
        run.lock.close()
    log = run.folder / ("refit.jsonl" if refit else "metrics.jsonl")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1]
    assert len(list(run.folder.parent.iterdir())) == 1


def test_printed_commands_run_with_the_python_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for python, word in (
        (tmp_path / ".venv" / "bin" / "python", ".venv/bin/python"),
        (tmp_path / "python3.12", str(tmp_path / "python3.12")),  # the shell would search the name in PATH
        (tmp_path.parent / "my tools" / "python", f"'{tmp_path.parent}/my tools/python'"),
    ):
        monkeypatch.setattr(sys, "executable", str(python))
        assert publishing.runnable("python -m training.cnn --seed 1") == f"{word} -m training.cnn --seed 1"
    command = publishing.runnable("torchrun --nproc-per-node 2 -m training.rnn")
    assert command.endswith("python' -m torch.distributed.run --nproc-per-node 2 -m training.rnn")


@pytest.mark.parametrize(("kind", "layers"), [("character-rnn", 1), ("stacked-rnn", 3)])
def test_the_fast_recurrence_equals_the_network(kind: str, layers: int) -> None:
    torch.manual_seed(0)
    network: Any = build(kind, {"vocabulary": 11, "hidden": 16, "layers": layers}).double()
    characters = torch.randint(11, (3, 7))
    state = torch.randn(3, layers, 16, dtype=torch.float64, requires_grad=True)

    def outputs_and_gradients(forward: Any) -> list[torch.Tensor]:
        logits, last = forward(characters, state)
        loss = logits.square().sum() + last.sin().sum()
        return [logits, last, *torch.autograd.grad(loss, [*network.parameters(), state])]

    fast = outputs_and_gradients(lambda *inputs: elman_recurrence.forward(network, *inputs))
    for expected, actual in zip(outputs_and_gradients(network), fast, strict=True):
        assert torch.allclose(expected, actual, atol=1e-12)


def test_gradients_in_bfloat16_are_close_to_those_in_float32() -> None:
    torch.manual_seed(0)
    network: Any = build("stacked-rnn", {"vocabulary": 11, "hidden": 32, "layers": 3})
    characters, state = torch.randint(11, (4, 20)), torch.randn(4, 3, 32)

    def gradients(low: bool) -> torch.Tensor:
        logits, last = elman_recurrence.forward(network, characters, state, bfloat16=low)
        assert logits.dtype == last.dtype == torch.float32
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), characters[:, 1:].flatten())
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(network.parameters()))])

    exact, low = gradients(False), gradients(True)
    assert 0 < (exact - low).norm() / exact.norm() < 0.02


def test_dropout_zeroes_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = elman_recurrence.dropout(torch.ones(999, 1001), 0.25, 0)
    assert dropped.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.002)
    assert elman_recurrence.dropout(dropped, 0.0, 0) is dropped


def test_validation_parts_are_spread_over_the_text_and_not_trained_on() -> None:
    characters = torch.arange(100_003)
    training, validation = texts.hold_out(characters, 0.05, parts=10)
    assert [len(part) for part in validation] == [500] * 10
    assert torch.equal(torch.cat([training, *validation]).sort().values, characters)
    assert [round(part[250].item() / 10_000, 1) for part in validation] == [i + 0.5 for i in range(10)]
    everything, nothing = texts.hold_out(characters, 0.0, parts=10)
    assert torch.equal(everything, characters)
    assert nothing == []
    (middle,) = texts.hold_out(characters, 0.1, parts=1)[1]
    assert (len(middle), middle[0]) == (10_000, 45_001)
    with pytest.raises(SystemExit, match="--validation-parts is 0; it should be at least 1"):
        texts.hold_out(characters, 0.1, parts=0)
    with pytest.raises(SystemExit, match="holds out 50 characters in each of 10 parts; at least 257"):
        texts.hold_out(characters, 0.005, parts=10)


def test_augmented_images_are_shifted_and_mirrored_images() -> None:
    config = CnnConfig("cifar10", "lenet", 1, 1, 1.0, 0.0, 0.0, 0.9, shift=2, flip=1, rotate=0.0, validation=1)
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    padded = torch.nn.functional.pad(image.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    cuts = [padded[0, :, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
    candidates = [*cuts, *(cut.flip(2) for cut in cuts)]
    torch.manual_seed(0)
    indices = set()
    for augmented in augment(image.expand(400, -1, -1, -1), config):
        indices.add(next(i for i, candidate in enumerate(candidates) if torch.equal(candidate, augmented)))
    assert len(indices) == 50


def test_rotation_by_zero_degrees_changes_nothing() -> None:
    config = CnnConfig("mnist", "digit-net", 1, 1, 1.0, 0.0, 0.0, 0.9, shift=0, flip=0, rotate=1e-9, validation=1)
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    assert torch.allclose(augment(images, config), images.float(), atol=1e-3)


def test_the_frechet_distance_equals_that_of_two_gaussians() -> None:
    torch.manual_seed(0)
    first = torch.randn(200_000, 3, dtype=torch.float64)
    second = torch.randn(200_000, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0, 0])
    assert generation.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    expected = 1 + 0 + 1 + 4  # |m|^2 + sum of (s1 - s2)^2
    assert generation.frechet_distance(first, second) == pytest.approx(expected, rel=0.02)


def test_the_spread_of_the_frechet_floor_is_that_of_repeated_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    second = torch.randn(2000, 3, generator=generator)
    draws = [generation.frechet_floor(torch.randn(1000, 3, generator=generator), second) for _ in range(40)]
    floors, spreads = (torch.tensor(values) for values in zip(*draws, strict=True))
    assert spreads.mean() == pytest.approx(floors.std().item(), rel=0.35)


def test_density_and_coverage_are_one_for_equal_features_and_zero_for_distant_ones() -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(2, 1500, 4)
    density, coverage = generation.density_and_coverage(real, fake)
    assert density == pytest.approx(1, abs=0.1)
    assert coverage > 0.9
    assert generation.density_and_coverage(real, fake + 100) == (0, 0)


@pytest.mark.parametrize("labels", [None, torch.tensor([0] * 80 + [3] * 20)])
def test_recalibrated_batch_norms_have_the_statistics_of_their_inputs(labels: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    network: Any = build("conditional-generator", {"latent": 4})
    with torch.no_grad():
        network.linear.weight.mul_(10)
    recalibrate_batchnorm(network, 50, labels)
    classes = torch.arange(500) % 10 if labels is None else labels.repeat(5)
    inputs = network.linear(torch.cat([torch.randn(500, 4), torch.eye(10)[classes]], dim=1)).unflatten(1, (49, -1))
    norm = network.norms[0].norm
    assert torch.allclose(norm.running_mean, inputs.mean(dim=(0, 1)), atol=0.2)
    assert torch.allclose(norm.running_var, inputs.var(dim=(0, 1)), rtol=0.1)


def test_the_cosine_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [running.cosine_schedule(step, 100) for step in range(100)]
    assert max(factors) == 1
    assert factors[0] < 0.3
    assert factors[-1] < 1e-3
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert running.cosine_schedule(0, 1) == 1  # the only step trains the network


def test_lookahead_returns_to_the_slow_weights_and_ends_with_them() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    slow = Lookahead(network)
    weights = []
    with torch.no_grad():
        for step in range(13):
            network.weight.add_(1)
            slow.update(network, step, 13)
            weights.append(network.weight.item())
    first, second = (1 - 0.95**5 * (step_count / 13) ** 3 for step_count in (5, 10))
    assert weights[:4] == [1, 2, 3, 4]
    assert weights[4] == pytest.approx(5 * first)
    assert weights[9] == pytest.approx(weights[4] + 5 * second)
    assert weights[10:] == pytest.approx([weights[9] + 1, weights[9] + 2, weights[9]])


def test_the_triangular_schedule_is_linear_up_and_down() -> None:
    factors = [triangular_schedule(step, 1000, warm_up=0.23, final=0.07) for step in range(1000)]
    assert (factors[0], factors[115], factors[230]) == pytest.approx((0.2, 0.6, 1.0))
    assert factors[-1] == pytest.approx(0.07, abs=0.002)
    assert max(factors) == 1


def test_the_fitted_temperature_equals_that_of_the_labels() -> None:
    torch.manual_seed(0)
    logits = torch.randn(10_000, 5) * 2
    labels = torch.multinomial(logits.softmax(dim=1), 1).squeeze(1)
    for temperature in (0.4, 1.0, 3.0):
        assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_an_option_of_another_preset_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cnn.main(["--preset", "strong", "--weight-decay", "0.1", "--rotate", "3"])
    assert "the preset strong has no --rotate" in capsys.readouterr().err


def test_an_incomplete_download_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARTET_DATA_DIR", str(tmp_path))
    monkeypatch.setitem(datasets.URLS, "tinyshakespeare.txt", "http://127.0.0.1:9/nothing-listens-here")
    (tmp_path / "tinyshakespeare.txt.part").write_text("half")
    with pytest.raises(
        datasets.DataError, match=r"could not be downloaded .*; set QUARTET_DATA_DIR to the folder that contains it"
    ):
        datasets.tinyshakespeare()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "tinyshakespeare.txt").write_text("half")
    with pytest.raises(datasets.DataError, match=r"sha256 is .*, expected 86c4e6aa.*: delete the file and run"):
        datasets.tinyshakespeare()
    (tmp_path / "mnist.safetensors").write_bytes(b"half")
    with pytest.raises(datasets.DataError, match="is damaged"):
        datasets.mnist()


def test_a_download_is_verified_and_then_moved_to_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import functools
    import hashlib
    import http.server
    import threading

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "text").write_text("to be or not")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "site")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("QUARTET_DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setitem(datasets.URLS, "tinyshakespeare.txt", f"http://127.0.0.1:{server.server_port}/text")
        with pytest.raises(datasets.DataError, match="expected 86c4e6aa"):
            datasets.tinyshakespeare()
        assert list((tmp_path / "data").iterdir()) == []
        digest = hashlib.sha256(b"to be or not").hexdigest()
        monkeypatch.setitem(datasets.SHA256, "tinyshakespeare.txt", digest)
        text = datasets.tinyshakespeare()
        server.shutdown()
        thread.join()
    assert (text.train, text.test, text.sha256) == ("to be or n", "ot", digest)


def test_the_vocabulary_ends_with_the_unknown_character() -> None:
    vocabulary = texts.vocabulary_of("banana")
    assert vocabulary == ["a", "b", "n", store.UNKNOWN_CHARACTER]
    assert texts.encode("bax", vocabulary).tolist() == [1, 0, 3]


def test_the_loss_of_a_network_with_equal_logits_is_the_log_of_the_vocabulary_size() -> None:
    network: Any = build("character-rnn", {"vocabulary": 10, "hidden": 4})
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    characters = torch.randint(10, (2000,))
    assert language_model.window_loss(network, characters) == pytest.approx(2.302585, abs=1e-5)
    assert language_model.stream_loss(network, characters) == pytest.approx(2.302585, abs=1e-5)


PAGE_FAULTS = """
import resource, torch
from training.run import configure_cpu
configure_cpu(1)
ones = torch.ones(2**24)  # 64 MiB

def add():
    return ones + 1

add()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    add()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_training_reuses_the_memory_of_large_tensors() -> None:
    output = subprocess.check_output([sys.executable, "-c", PAGE_FAULTS], text=True, cwd=ROOT)
    assert int(output) < 1000  # with the default settings: 4 x 64 MiB in pages of 4 KiB, or 65,536
