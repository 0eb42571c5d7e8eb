"""The catalogue shows the content of the store as rows: models, versions, checks and comparisons."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.networks import make_invalid, publish_tiny, rewrite_card
from support.service import run_models_command

from app import store
from app.store import catalogue, rollout
from app.store.rollout import VersionNotFound

NAME = "tiny-gan"
BAD_WEIGHTS = "tiny-gan/2/model.safetensors: tensor 'layers.0.bias' has 8 non-finite values, expected none"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a store with four versions of the default model tiny-gan."""
    for _ in range(4):
        publish_tiny(tmp_path, NAME)
    return tmp_path


def model_row(folder: Path) -> dict[str, Any]:
    (row,) = (row for row in catalogue.list_models(folder) if row["name"] == NAME)
    assert catalogue.model_row(folder, NAME) == row
    return row


def test_a_row_describes_the_rollout_of_a_model(folder: Path) -> None:
    row = {
        "name": NAME, "task": "sample", "default": True, "active": 4, "update_policy": "latest", "canary": None,
        "previous": 3, "retired": [], "unloaded": False, "versions": [1, 2, 3, 4], "changed": "", "by": "",
        "problem": "",
    }  # fmt: skip
    assert catalogue.list_models(folder) == [row]
    rollout.retire(folder, NAME, 1)
    changed = rollout.activate(folder, NAME, 2, share=10).changed
    assert catalogue.list_models(folder) == [
        {**row, "update_policy": "pinned", "canary": {"version": 2, "share": 10.0}, "previous": 3, "retired": [1],
         "changed": changed, "by": "activate 2 --share 10"}
    ]  # fmt: skip


def test_only_the_default_model_of_a_task_is_marked(folder: Path) -> None:
    publish_tiny(folder, "tiny-cgan")
    publish_tiny(folder, "tiny-cnn")
    assert {row["name"]: row["default"] for row in catalogue.list_models(folder)} == {
        "tiny-cgan": False,
        "tiny-cnn": True,
        NAME: True,
    }


def test_a_model_without_a_valid_version_has_no_task_and_is_no_default(folder: Path) -> None:
    for number in (1, 2, 3, 4):
        make_invalid(folder / NAME / str(number))
    row = model_row(folder)
    assert (row["task"], row["default"], row["active"], row["previous"]) == (None, False, None, None)


def test_a_removed_previous_version_is_not_listed(folder: Path) -> None:
    rollout.activate(folder, NAME, 1)
    assert model_row(folder)["previous"] == 4
    (folder / NAME / "4").rename(folder / "elsewhere")
    assert model_row(folder)["previous"] is None


def test_a_model_that_is_removed_while_it_is_listed_has_no_active_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_tiny(folder, "tiny-cnn")
    version_numbers = store.version_numbers

    def numbers_before_the_removal(models: Path, name: str) -> list[int]:
        numbers = version_numbers(models, name)
        if name == NAME:
            shutil.rmtree(folder / NAME, ignore_errors=True)
        return numbers

    with monkeypatch.context() as patch:
        patch.setattr(store, "version_numbers", numbers_before_the_removal)
        rows = catalogue.list_models(folder)
    assert [(row["name"], row["active"], row["versions"]) for row in rows] == [
        ("tiny-cnn", 1, [1]),
        (NAME, None, [1, 2, 3, 4]),
    ]
    with pytest.raises(VersionNotFound, match="there is no model 'tiny-gan' in the store"):
        catalogue.model_row(folder, NAME)


def test_the_folders_of_all_models_are_listed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny-cgan", "tiny-cnn", "tiny-rnn"):
        publish_tiny(folder, name)
    iterdir, listed = Path.iterdir, list[Path]()

    def recorded(path: Path) -> Any:
        listed.append(path)
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", recorded)
    assert len(catalogue.list_models(folder)) == 4
    assert listed.count(folder) == 1
    listed.clear()
    catalogue.model_row(folder, NAME)
    assert set(listed) == {folder / NAME}


def test_an_unreadable_rollout_is_a_problem_of_its_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / NAME / rollout.FILE).write_text('{"active": "two"}')
    row = model_row(folder)
    assert row["problem"] == "tiny-gan/active.json: active: Input should be a valid integer, found 'two'"
    assert row["active"] == 4
    for command in ("list", "show"):
        assert run_models_command(capsys, folder, command, NAME)[::2] == (0, f"tiny-gan: {row['problem']}\n")


def test_unreadable_defaults_are_a_problem_of_each_row(folder: Path) -> None:
    (folder / "defaults.json").write_text("[]")
    row = model_row(folder)
    assert row["problem"].startswith("defaults.json: expected an object from task")
    assert (row["default"], row["active"]) == (False, 4)
    (folder / NAME / rollout.FILE).write_text("[]")
    assert model_row(folder)["problem"].startswith("tiny-gan/active.json: the file: ")
    assert "; defaults.json: expected" in model_row(folder)["problem"]


def test_the_versions_of_a_model_have_roles_and_figures(folder: Path) -> None:
    rewrite_card(folder / NAME / "4", metrics={"fid": {"value": 1.5, "split": "test"}}, notes="a note")
    rollout.retire(folder, NAME, 1)
    rollout.activate(folder, NAME, 2, share=10)
    described = catalogue.describe_model(folder, NAME)
    assert {**described, "versions": [1, 2, 3, 4]} == model_row(folder)
    assert [(row["version"], row["role"]) for row in described["versions"]] == [
        (1, "retired"),
        (2, "canary"),
        (3, "previous"),
        (4, "active"),
    ]
    files = (folder / NAME / "4").iterdir()
    assert described["versions"][3] == {
        "version": 4, "role": "active", "problem": "", "bytes": sum(path.stat().st_size for path in files),
        "title": "untrained, for tests", "created": "2026-01-01T00:00:00+00:00", "metrics": {"fid": 1.5},
        "notes": "a note",
    }  # fmt: skip


def test_an_invalid_version_is_described_with_its_problem(folder: Path) -> None:
    make_invalid(folder / NAME / "2")
    versions = catalogue.describe_model(folder, NAME)["versions"]
    assert versions[1] == {"version": 2, "role": "", "problem": BAD_WEIGHTS}
    with pytest.raises(
        VersionNotFound, match=r"^there is no model 'other' in the store; models in the store: tiny-gan$"
    ):
        catalogue.describe_model(folder, "other")


def test_a_version_with_an_unreadable_file_is_described_with_its_problem(folder: Path) -> None:
    (folder / NAME / "2" / "curves.png").symlink_to(folder / "missing")
    versions = catalogue.describe_model(folder, NAME)["versions"]
    assert versions[1] == {
        "version": 2, "role": "", "problem": "tiny-gan/2 cannot be read: No such file or directory"
    }  # fmt: skip
    assert [row["problem"] for row in versions if row["version"] != 2] == ["", "", ""]


def test_every_file_and_version_is_verified(folder: Path) -> None:
    make_invalid(folder / NAME / "2")
    names = ["defaults.json", "tiny-gan/active.json", *(f"tiny-gan@{number}" for number in (1, 2, 3, 4))]
    problems = dict.fromkeys(names, "") | {"tiny-gan@2": BAD_WEIGHTS}
    assert list(catalogue.verify(folder)) == [{"what": what, "problem": text} for what, text in problems.items()]


def test_unreadable_defaults_and_rollouts_are_found(folder: Path) -> None:
    for file in ("defaults.json", f"{NAME}/{rollout.FILE}"):
        (folder / file).write_text("{")
    defaults, active, *versions = catalogue.verify(folder)
    assert defaults["problem"].startswith("defaults.json")
    assert active["problem"].startswith("tiny-gan/active.json: the file: Invalid JSON")
    assert {row["problem"] for row in versions} == {""}


def test_default_models_that_are_not_in_the_store_are_found(folder: Path) -> None:
    (folder / "defaults.json").write_text('{"sample": "tiny-gan", "classify": "gone", "forecast": "lost"}')
    assert next(iter(catalogue.verify(folder))) == {
        "what": "defaults.json",
        "problem": "defaults.json names 'gone', which is not in the store; "
        "defaults.json names 'lost', which is not in the store",
    }


def test_a_default_model_for_another_task_is_found(folder: Path) -> None:
    (folder / "defaults.json").write_text('{"classify": "tiny-gan"}')
    assert next(iter(catalogue.verify(folder)))["problem"] == (
        "defaults.json: 'tiny-gan' is for 'sample', expected one for 'classify'; "
        "defaults.json names no model for the task 'sample'; `default` chooses one of: tiny-gan"
    )


def test_a_task_with_models_but_without_a_default_model_is_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tiny-cgan", "tiny-cnn", "tiny-lstm"):
        publish_tiny(folder, name)
    (folder / "tiny-lstm" / "1" / store.WEIGHTS).unlink()
    (folder / "defaults.json").write_text('{"classify": "tiny-cnn"}')
    problem = "defaults.json names no model for the task 'sample'; `default` chooses one of: tiny-cgan, tiny-gan"
    assert next(iter(catalogue.verify(folder)))["problem"] == problem
    rollout.unload(folder, NAME)
    status, out, _ = run_models_command(capsys, folder, "verify")
    assert (status, out.splitlines()[0]) == (1, f"defaults.json: {problem.removesuffix(', tiny-gan')}")
    rollout.unload(folder, "tiny-cgan")
    assert next(iter(catalogue.verify(folder)))["problem"] == ""


def test_an_unloaded_model_does_not_become_the_default_by_publication(folder: Path) -> None:
    publish_tiny(folder, "tiny-cgan")
    rollout.unload(folder, "tiny-cgan")
    (folder / NAME).rename(folder / ".removed")
    publish_tiny(folder, "tiny-cgan")
    assert store.read_defaults(folder) == {"sample": NAME}
    store.set_default(folder, "sample", "tiny-cgan")
    assert next(iter(catalogue.verify(folder)))["problem"] == "defaults.json names 'tiny-cgan', which is unloaded"
    rollout.load(folder, "tiny-cgan")
    assert not any(row["problem"] for row in catalogue.verify(folder))
    store.set_default(folder, "sample", NAME)
    publish_tiny(folder, "tiny-cgan")
    assert store.read_defaults(folder) == {"sample": "tiny-cgan"}


def test_an_unreadable_folder_of_a_model_is_a_problem(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    iterdir = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path == folder / NAME:
            raise PermissionError(errno.EACCES, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    problem = "tiny-gan cannot be read: Permission denied"
    assert [row for row in catalogue.verify(folder) if row["problem"]] == [{"what": NAME, "problem": problem}]
    assert run_models_command(capsys, folder, "show", NAME) == (1, "", f"error: {problem}\n")
    publish_tiny(folder, "tiny-cnn")
    rows = catalogue.list_models(folder)
    assert [(row["name"], row["versions"], row["problem"]) for row in rows] == [
        ("tiny-cnn", [1], ""),
        (NAME, [], problem),
    ]


def test_two_versions_are_compared_by_all_facts_of_their_cards(folder: Path) -> None:
    version = folder / NAME / "2"
    rewrite_card(
        version, metrics={"fid": {"value": 2, "split": "test"}}, data={"rows": "9"}, labels=["a", "b"],
        vocabulary=["a", "b", "c"], seed=7,
    )  # fmt: skip
    rows = {row["what"]: (row["first"], row["second"]) for row in catalogue.diff(folder, NAME, 1, 2)}
    parameters = sum(tensor.numel() for tensor in store.read_version(folder, NAME, 1).tensors.values())
    assert rows == {
        "metrics.fid": (None, 2.0),
        "sizes.latent": (4, 4),
        "sizes.hidden": ([8], [8]),
        "sizes.channels": (1, 1),
        "sizes.image": (28, 28),
        "parameters": (parameters, parameters),
        "data.rows": (None, "9"),
        "task": ("sample", "sample"),
        "kind": ("gan-generator", "gan-generator"),
        "title": ("untrained, for tests", "untrained, for tests"),
        "created": ("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00"),
        "seed": (0, 7),
        "command": ("none", "none"),
        "commit": ("none", "none"),
        "hardware": ("none", "none"),
        "minutes": (0.0, 0.0),
        "notes": ("", ""),
        "labels": (None, 2),
        "vocabulary": (None, 3),
        "bytes": (catalogue.size(folder, NAME, 1), catalogue.size(folder, NAME, 2)),
    }
    reversed_rows = {row["what"]: (row["second"], row["first"]) for row in catalogue.diff(folder, NAME, 2, 1)}
    assert reversed_rows == rows
    with pytest.raises(
        VersionNotFound, match=r"^there is no tiny-gan@9 in the store; versions in the store: 1, 2, 3, 4$"
    ):
        catalogue.diff(folder, NAME, 1, 9)


def test_a_full_disk_and_an_exited_reader_are_noticed_before_the_exit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output is shorter than the buffer of standard output, which Python would otherwise write only at exit."""
    reader, writer = os.pipe()
    os.close(reader)
    for handle, status, message in (
        (writer, 0, ""),
        (os.open("/dev/full", os.O_WRONLY), 1, "error: /dev/stdout: No space left on device\n"),
    ):
        for command in (["list"], ["list", "--json"], ["show", NAME], ["activate", NAME, "2"], ["verify"]):
            with os.fdopen(os.dup(handle), "w") as output:
                monkeypatch.setattr(sys, "stdout", output)
                assert run_models_command(capsys, folder, *command) == (status, "", message)
        os.close(handle)


def test_characters_outside_the_encoding_of_the_output_are_escaped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    title, path = "Zahlen für Gemälde", tmp_path / "\udcff.zip"  # a file name that is not UTF-8
    rewrite_card(folder / NAME / "4", title=title)
    monkeypatch.setattr(sys, "stdout", (tmp_path / "output").open("w", encoding="ascii"))
    for command in (["diff", NAME, "3", "4"], ["show", NAME, "--json"], ["export", NAME, str(path)]):
        assert run_models_command(capsys, folder, *command)[0] == 0
    sys.stdout.close()
    output = (tmp_path / "output").read_text("ascii")
    assert "Zahlen f\\xfcr" in output
    assert json.loads(output[output.index("{") : output.rindex("}") + 1])["versions"][3]["title"] == title
    assert "\\udcff.zip: " in output
    assert path.exists()
