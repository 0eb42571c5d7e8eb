"""Options of the training commands that are rejected."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support.networks import publish_tiny
from support.trainings import KINDS, train_own

from training import cnn, lstm


def test_options_that_would_train_nothing_are_rejected(workspace: Path) -> None:
    for kind, changed, message in (
        ("cnn", ["--batch", "5000"], "--batch is 5,000, but there are only"),
        ("gan", ["--batch", "5000"], "--batch is 5,000, but there are only"),
        ("rnn", ["--layers", "2"], "--layers is 2; the preset workshop has one layer"),
        ("rnn", ["--validation", "5"], "--validation is 5; it should be a share from 0 to below 1"),
        ("lstm", ["--horizon", "1"], "--horizon is 1; it should be at least 2"),
        ("lstm", ["--validation", "49"], "--validation is 49; it should be from 50 to 785"),
        ("lstm", ["--validation", "786"], "--validation is 786; it should be from 50 to 785"),
    ):
        with pytest.raises(SystemExit, match=message):
            KINDS[kind].train(workspace, *changed)
    assert not (workspace / "runs").exists()


@pytest.mark.parametrize("command", ["accurate --first-width", "lstm --steps", "lstm --window", "gan --latent"])
def test_sizes_and_numbers_of_steps_are_positive(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    stem, option = command.split()
    with pytest.raises(SystemExit):
        KINDS[stem].script.main([*KINDS[stem].options, option, "0", "--no-publish"])
    assert capsys.readouterr().err.endswith(f"error: {option} is 0; it should be at least 1\n")


@pytest.mark.parametrize(
    ("command", "limit"),
    [("rnn --dropout 1", "below 1"), ("lstm --ema-decay 1", "below 1"), ("rnn --unknown-share 2", "at most 1")],
)
def test_shares_and_decays_have_an_upper_limit(command: str, limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    stem, option, value = command.split()
    with pytest.raises(SystemExit):
        KINDS[stem].script.main([option, value])
    assert capsys.readouterr().err.endswith(f"error: {option} is {float(value)}; it should be {limit}\n")


@pytest.mark.parametrize("value", ["-0.5", "nan", "inf"])
def test_hyperparameters_are_finite_and_not_negative(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lstm.main(["--learning-rate", value])
    message = f"error: --learning-rate is {float(value)}; it should be finite and not negative\n"
    assert capsys.readouterr().err.endswith(message)


def test_an_option_of_another_preset_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cnn.main(["--preset", "strong", "--weight-decay", "0.1", "--rotate", "3"])
    assert "the preset strong has no --rotate" in capsys.readouterr().err


@pytest.mark.parametrize("stem", ["cnn", "rnn", "gan", "lstm"])
def test_numbers_with_which_no_step_is_possible_are_rejected(stem: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"cnn": ["epochs", "finetune-batch"], "rnn": ["hidden", "bptt"], "gan": ["epochs", "r1-interval"]}
    for name in ("threads", "batch", *own.get(stem, ["epochs"])):
        with pytest.raises(SystemExit):
            train_own(stem, f"--{name}", "0")
        assert capsys.readouterr().err.endswith(f"error: --{name} is 0; it should be at least 1\n")
    for option, value, message in (
        ("--device", "foo", "--device is 'foo': Expected one of cpu, cuda"),
        ("--seed", str(2**63), f"--seed is {2**63}; it should be between 0 and 2^63 - 1"),
    ):
        with pytest.raises(SystemExit):
            train_own(stem, option, value)
        assert f"error: {message}" in capsys.readouterr().err


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
