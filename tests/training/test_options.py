"""Options of the training commands that are rejected."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from support.networks import publish_tiny
from support.trainings import KINDS

from training import cnn, gan, lstm, prediction, rnn


def test_options_that_would_train_nothing_are_rejected(workspace: Path) -> None:
    for kind, changed, message in (
        ("cnn", "batch=5000", "batch is 5,000, but there are only"),
        ("gan", "batch=5000", "batch is 5,000, but there are only"),
        ("rnn", "layers=2", "layers is 2; the preset workshop has one layer"),
    ):
        with pytest.raises(SystemExit, match=message):
            KINDS[kind].train(workspace, "--set", changed)
    with pytest.raises(SystemExit, match="--calibration cannot be combined with --preset workshop; use strong or"):
        KINDS["cnn"].train(workspace, "--calibration", "runs")
    assert not (workspace / "runs").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cnn --set first_width=8", "first_width=8: the preset workshop has the numbers epochs, batch, learning_rate,"),
        ("cnn --set batch", "batch is ; it should be a valid integer"),
        ("cnn --set batch=0", "batch is 0; it should be greater than or equal to 1"),
        ("cnn --set validation=0", "validation is 0; it should be greater than or equal to 1"),
        ("cnn --set flip=maybe", "flip is maybe; it should be a valid boolean"),
        ("cnn --size 100", "argument --size: 100; it should be a multiple of 32"),
        ("cnn --epochs 0", "epochs is 0; it should be greater than or equal to 1"),
        ("cnn --threads 0", "argument --threads: 0; it should be greater than or equal to 1"),
        ("cnn --minutes -1", "argument --minutes: -1; it should be greater than 0"),
        ("cnn --minutes 1 --epochs 2", "--minutes and --epochs cannot be combined"),
        (f"cnn --seed {2**63}", f"argument --seed: {2**63}; it should be less than {2**63}"),
        ("cnn --device foo", "--device is 'foo': Expected one of cpu, cuda"),
        ("accurate --set depth=4", "depth is 4; it should be less than or equal to 3"),
        ("accurate --set corrupted=1.5", "corrupted is 1.5; it should be less than or equal to 1"),
        ("rnn --set dropout=1", "dropout is 1; it should be less than 1"),
        ("rnn --set validation=nan", "validation is nan; it should be less than 1"),
        ("rnn --set clip=inf", "clip is inf; it should be a finite number"),
        ("lstm --horizon 1", "horizon is 1; it should be greater than or equal to 2"),
        ("lstm --season 365", "argument --season: 365; it should be less than or equal to 168"),
        ("lstm --season 0", "argument --season: 0; it should be greater than or equal to 1"),
        ("lstm --set learning_rate=-0.5", "learning_rate is -0.5; it should be greater than or equal to 0"),
        ("gan --set latent=1.5", "latent is 1.5; it should be a valid integer"),
    ],
)
def test_numbers_out_of_range_are_rejected(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    stem, *words = command.split()
    with pytest.raises(SystemExit):
        KINDS[stem].script.main([*KINDS[stem].options[:2], *words] if stem == "accurate" else words)
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("script", [cnn, rnn, lstm, gan, prediction])
def test_help_shows_ten_options_and_help_all_shows_the_others(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            script.main([word])
        shown[word] = set(re.findall(r"^  (--[a-z-]+)", text := capsys.readouterr().out, re.MULTILINE))
    assert len(shown["--help"]) <= 10
    assert shown["--help"] < shown["--help-all"]
    assert {"--store", "--seed"} <= shown["--help-all"] - shown["--help"]
    assert script is prediction or "\n  batch: " in text


@pytest.mark.parametrize("stem", ["cnn", "rnn", "gan", "lstm"])
def test_a_preview_describes_the_data_and_trains_nothing(
    stem: str, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    KINDS[f"own-{stem}"].script.main([*KINDS[f"own-{stem}"].options[:2], "--preview"])
    described = {"rnn": "17,144 characters", "lstm": "1 series (sold) of 90 values"}.get(
        stem, "72 different images of 3 classes"
    )
    assert described in capsys.readouterr().out
    assert not (workspace / "runs").exists()


@pytest.mark.parametrize("option", ["data", "name of the data", "--store"])
@pytest.mark.parametrize("stem", ["cnn", "rnn", "gan", "lstm"])
def test_a_command_that_is_not_utf_8_is_rejected_before_the_data_are_read(
    stem: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / os.fsdecode(b"\xff")
    bad.mkdir()
    monkeypatch.chdir(bad)
    data = {"data": str(bad), "name of the data": "."}.get(option, "pets")
    with pytest.raises(SystemExit):
        KINDS[f"own-{stem}"].script.main(
            [
                KINDS[f"own-{stem}"].options[0],
                data,
                "--name",
                "mine",
                "--store",
                str(bad) if option == "--store" else "x",
            ]
        )
    assert re.search(r"error: '.*\\udcff' is not UTF-8; rename the file or folder\n$", capsys.readouterr().err)
    assert not list(bad.iterdir())


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
        (["--from", "cifar10-accurate", "--name", "pets"], "--from needs --images"),
        (["--preset", "strong", "--size", "64"], "--size needs --images"),
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
