"""The command ``python -m app.models``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from support.networks import make_invalid, publish_tiny, rewrite_card
from support.service import ROOT, run_models_command

from app.store import Store, archive, rollout

NAME = "tiny-gan"


def test_the_command_line_reports_each_change(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_tiny(three, "tiny-cgan")
    for arguments, expected in (
        ("activate tiny-gan 2", "tiny-gan@2 is active\n"),
        ("activate tiny-gan 3 --share 10%", "tiny-gan@2 is active, tiny-gan@3 is the canary (10 %)\n"),
        ("rollback tiny-gan", "tiny-gan@2 is active\n"),
        ("retire tiny-gan 1", "tiny-gan@2 is active; retired: 1\n"),
        ("retire tiny-gan 1 --undo", "tiny-gan@2 is active\n"),
        ("rollback tiny-gan", "tiny-gan@3 is active\n"),
        ("default tiny-cgan", "tiny-cgan is the default for the task 'sample'\n"),
        ("unload tiny-gan", "tiny-gan is unloaded\n"),
        ("load tiny-gan", "tiny-gan@3 is active\n"),
        ("activate tiny-gan latest", "tiny-gan@3 is active (latest)\n"),
    ):
        assert run_models_command(capsys, three, *arguments.split()) == (0, expected, "")
    Store(three).retire(NAME, 1)
    Store(three).activate(NAME, 2)
    status, table, _ = run_models_command(capsys, three, "list")
    assert status == 0
    assert [" ".join(line.split()) for line in table.splitlines()] == [
        "NAME TASK ACTIVE CANARY PREVIOUS VERSIONS RETIRED",
        "tiny-cgan sample (default) 1 (latest) - - 1",
        "tiny-gan sample 2 - 3 1, 2, 3 1",
    ]
    _, details, _ = run_models_command(capsys, three, "show", "tiny-gan", "--json")
    assert [version["role"] for version in json.loads(details)["versions"]] == ["retired", "active", "previous"]
    _, details, _ = run_models_command(capsys, three, "show", "tiny-gan")
    first = details.splitlines()[0]
    assert first.startswith("tiny-gan: sample, tiny-gan@2 is active; retired: 1; last change: activate 2, ")


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ("list gone", 1, "error: there is no model 'gone' in the store; models in the store: tiny-gan\n"),
        ("activate tiny-gan two", 2, "'two' is not a version; it should be a number such as 3\n"),
        ("activate tiny-gan 2 --share x%", 2, "'x%' is not a share; it should be like 20 or 20%\n"),
        ("export tiny-gan@x x.zip", 1, "error: 'tiny-gan@x' should be a name and a version, such as sales@3\n"),
        ("export tiny-gan@1 nothing/x.zip", 1, "error: nothing/x.zip: No such file or directory\n"),
        ("list --store=", 2, "error: argument --store: the path should not be empty\n"),
        ("list --store=missing", 1, "error: --store is 'missing', which is not a folder\n"),
        ("import nothing.zip", 1, "error: nothing.zip: No such file or directory\n"),
        (
            "import bad.onnx",
            1,
            "error: bad.onnx: the file is not a ZIP archive: File is not a zip file; this is not an archive of "
            "`export`; for .pt2 and ONNX files, use `add`\n",
        ),
    ],
)
def test_the_command_line_rejects_with_one_message(
    three: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    status: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    Path("bad.onnx").write_bytes(b"x")
    exit_status, out, error = run_models_command(capsys, three, *arguments.split())
    assert (exit_status, out) == (status, "")
    assert error.endswith(sentence)


def test_verify_names_invalid_versions_and_exits_with_1(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_models_command(capsys, three, "verify")[:2] == (0, "3 versions checked: all valid\n")
    make_invalid(three / NAME / "2")
    rewrite_card(three / NAME / "1", labels=["a"])
    status, out, _ = run_models_command(capsys, three, "verify")
    assert status == 1
    assert out.splitlines() == [
        "tiny-gan@1: tiny-gan@1: there are 1 labels, expected 0",
        "tiny-gan@2: tiny-gan/2/model.safetensors: tensor 'layers.0.bias' has 8 non-finite values, expected none",
        "3 versions checked: 2 problems found",
    ]


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("tiny-cnn", {"labels": list("abcdefghi")}, "tiny-cnn@2: there are 9 labels, expected 10"),
        ("tiny-lstm", {"residuals": [0.1, -0.1]}, "tiny-lstm@2: residuals must be a list of standard deviations"),
        ("tiny-gan", {"labels": ["a"]}, "tiny-gan@2: there are 1 labels, expected 0"),
        ("tiny-rnn", {"vocabulary": ["a"]}, "tiny-rnn/2/card.json: vocabulary must be 13 distinct entries"),
    ],
)
def test_a_version_that_the_service_cannot_load_is_neither_activated_nor_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: dict[str, object], reason: str
) -> None:
    folder, other = tmp_path / "store", tmp_path / "other"
    for each in (folder, folder, other):
        publish_tiny(each, name)
    rewrite_card(folder / name / "2", **change)
    file = str(tmp_path / "version.zip")
    for store_folder, command, status in (
        (folder, f"activate {name} 2", 1),
        (folder, f"export {name}@2 {file}", 0),
        (other, f"import {file}", 1),
    ):
        actual, out, error = run_models_command(capsys, store_folder, *command.split())
        assert actual == status, command
        assert (reason in out + error) == bool(status), command
    assert Store(other).numbers(name) == [1]


def test_a_version_is_exported_and_imported(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert run_models_command(capsys, three, "export", NAME)[0] == 0
    assert Path("tiny-gan-3.zip").read_bytes() == b"".join(archive.export_version(Store(three), NAME, 3))
    assert run_models_command(capsys, three, "export", NAME)[2] == "error: tiny-gan-3.zip already exists\n"
    other = tmp_path / "other"
    for arguments, expected in (
        ("import tiny-gan-3.zip", "imported tiny-gan@3, which is active\n"),
        (
            "import tiny-gan-3.zip --renumber",
            "imported tiny-gan@4, which is active and replaces tiny-gan@3\n"
            f"to undo it: quartet models rollback tiny-gan --store {other}\n",
        ),
        (
            "import tiny-gan-3.zip --renumber --no-activate",
            "imported tiny-gan@5, which is not active; tiny-gan@4 is\n"
            f"to activate it: quartet models activate tiny-gan 5 --store {other}\n",
        ),
        (
            "import tiny-gan-3.zip --renumber --activate",
            "imported tiny-gan@6, which is active and replaces tiny-gan@4\n"
            f"to undo it: quartet models rollback tiny-gan --store {other}\n",
        ),
    ):
        assert run_models_command(capsys, other, *arguments.split()) == (0, expected, "")
    assert Store(other).roles(NAME).active == 6
    error = run_models_command(capsys, other, "import", "tiny-gan-3.zip")[2]
    assert error.startswith("error: tiny-gan@3 is already in the store; with `renumber`, ")


def test_a_change_with_unreadable_defaults_is_reported_as_done(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (three / "defaults.json").write_text("[]")
    status, out, error = run_models_command(capsys, three, "rollback", NAME)
    assert (status, out, Store(three).active(NAME)) == (0, "tiny-gan@2 is active\n", 2)
    assert "defaults.json: the file: Input should be an object" in error


def test_problems_are_printed_beside_the_rows(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (three / NAME / rollout.FILE).write_text('{"active": 9}')
    problem = "tiny-gan: tiny-gan/active.json names version 9, which is not in the store\n"
    for command in ("list", "show"):
        assert run_models_command(capsys, three, command, NAME)[::2] == (0, problem)


def test_a_full_disk_and_an_exited_reader_are_noticed_before_the_exit(
    three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output is shorter than the buffer of standard output, which Python would otherwise write only at exit."""
    reader, writer = os.pipe()
    os.close(reader)
    for handle, status, message in (
        (writer, 0, ""),
        (os.open("/dev/full", os.O_WRONLY), 1, "error: /dev/stdout: No space left on device\n"),
    ):
        for command in (["list"], ["show", NAME, "--json"], ["activate", NAME, "2"], ["verify"]):
            with os.fdopen(os.dup(handle), "w") as output, redirect_stdout(output):
                assert run_models_command(capsys, three, *command) == (status, "", message)
        os.close(handle)


def test_characters_outside_the_encoding_of_the_output_are_escaped(
    three: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_card(three / NAME / "3", metrics={"Güte": {"value": 1, "split": "test"}})
    with (tmp_path / "output").open("w", encoding="ascii") as file, redirect_stdout(file):
        assert run_models_command(capsys, three, "show", NAME)[0] == 0
    assert "G\\xfcte 1" in (tmp_path / "output").read_text("ascii")


@pytest.mark.parametrize("command", ["app.models list", "app.keys --help"])
def test_commands_that_read_only_cards_do_not_import_torch(three: Path, command: str) -> None:
    module, *arguments = command.split()
    script = (
        "import runpy, sys\n"
        f"sys.argv[1:] = {arguments}\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "print([name for name in ('torch', 'numpy', 'pydantic_settings', 'fastapi') if name in sys.modules])\n"
    )
    environment = os.environ | {"QUARTET_STORE": str(three)}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.endswith("\n[]\n"), result.stderr
