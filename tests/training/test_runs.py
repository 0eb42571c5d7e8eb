"""Run folders and checkpoints: which run is resumed, and which checkpoint is rejected."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.trainings import interrupted, train_own

from app import store
from training import lstm, publishing
from training import run as running


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


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path, new = tmp_path / "state.pt", tmp_path / "state.tmp"
    for kept in ("", "; the previous checkpoint is kept, so --resume continues the run"):
        new.symlink_to("/dev/full")
        sentence = f"the checkpoint {new} could not be written (No space left on device){kept}"
        with pytest.raises(SystemExit, match=f"^{re.escape(sentence)}$"):
            running.save_checkpoint(path, {"weights": torch.zeros(1000)})
        assert not new.is_symlink()
        running.save_checkpoint(path, {"step": 3})
        assert torch.load(path, weights_only=True) == {"step": 3}


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


def test_the_commit_is_unknown_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert publishing.commit() == "unknown"


def test_a_run_is_not_resumed_on_changed_data(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted(monkeypatch):
        train_own("cnn")
    Path("shapes/circle/0000.png").unlink()
    with pytest.raises(SystemExit, match="was started with data "):
        train_own("cnn", "--resume")


def test_a_run_is_not_resumed_with_other_options(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options, resumed, change in (
        ("first", ("--group", r"00\d\d"), (), r"group 00\\d\\d \(now None\)"),  # the parts of the split would differ
        ("second", (), ("--group", r"00\d\d"), r"group None \(now 00\\d\\d\)"),
    ):
        with interrupted(monkeypatch):
            train_own("cnn", *options, name=name)
        with pytest.raises(SystemExit, match=f"was started with {change}: resume it with the same options and data"):
            train_own("cnn", "--resume", *resumed, name=name)


def test_a_run_is_not_resumed_from_another_base_version(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted(monkeypatch):
        train_own("cnn")  # without --from
    base = store.Store(Path("models_store")).read("cifar10-whitened", 1)
    store.Store(Path("models_store")).publish(base.card.model_dump(), base.tensors)
    with pytest.raises(SystemExit, match=r"was started with origin cifar10-whitened@1 \(now cifar10-whitened@2\)"):
        train_own("cnn", "--resume")
    with interrupted(monkeypatch):  # continues until the next line of the log
        train_own("cnn", "--resume", "--from", "cifar10-whitened@1")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tracked": {}}, "state.pt does not fit this network, for example .*; start a new run without --resume"),
        (None, "state.pt is damaged .*; start a new run without --resume"),
    ],
)
def test_an_unusable_checkpoint_is_rejected(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any] | None, sentence: str
) -> None:
    with interrupted(monkeypatch):
        train_own("rnn")
    (path,) = Path("runs").rglob("state.pt")
    if change is None:
        path.write_bytes(path.read_bytes()[:1000])
    else:
        torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(SystemExit, match=sentence):
        train_own("rnn", "--resume")


def test_a_run_is_resumed_with_changed_code(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with interrupted(monkeypatch):
        train_own("rnn")
    (path,) = Path("runs").rglob("state.pt")
    torch.save({**torch.load(path, weights_only=True), "code": "commit 0123, torch 2"}, path)
    train_own("rnn", "--resume")
    assert "state.pt was written with commit 0123, torch 2; now commit " in capsys.readouterr().out
    (resumed,) = store.Store(Path("models_store")).card("mine", 1).resumed or []
    assert re.match(r"step \d; before: commit 0123, torch 2; after: commit ", resumed)
