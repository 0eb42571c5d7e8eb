"""Rollouts: active version, canary, rollback and retirement, by functions and by the command line."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.networks import make_invalid, publish_tiny, rewrite_card
from support.service import run_models_command

from app import store
from app.serving.version_set import VersionSet
from app.store import StoreError, archive, rollout
from app.store.rollout import RolloutRefused, VersionNotFound, activate, active_or_none, retire, rollback
from app.tasks import check_loading

NAME = "tiny-gan"


def active_version(folder: Path) -> int | None:
    return active_or_none(folder, NAME, rollout.read(folder, NAME))


def test_the_newest_valid_version_is_active_by_default(three: Path) -> None:
    assert active_version(three) == 3
    publish_tiny(three, NAME)
    assert active_version(three) == 4
    make_invalid(three / NAME / "4")
    assert active_version(three) == 3
    assert not (three / NAME / rollout.FILE).exists()


def test_without_a_valid_version_none_is_active(three: Path) -> None:
    for number in (1, 2, 3):
        make_invalid(three / NAME / str(number))
    assert active_version(three) is None
    with pytest.raises(RolloutRefused, match=r"^tiny-gan has no previous version; activate one by its number$"):
        rollback(three, NAME)


def test_a_previous_version_is_preferred_only_to_those_that_were_not_chosen() -> None:
    assert rollout.Rollout(active=2, previous=1).preference([1, 2, 3]) == [2, 1, 3]
    assert rollout.Rollout(active=9, previous=1).preference([1, 2, 3]) == [1, 3, 2]
    assert rollout.Rollout(previous=1).preference([1, 2, 3]) == [3, 2, 1]


def test_the_first_chosen_version_has_no_previous_one(tmp_path: Path) -> None:
    publish_tiny(tmp_path, NAME)
    assert activate(tmp_path, NAME, 1).previous is None


def test_a_new_version_waits_while_a_chosen_version_is_active(three: Path) -> None:
    activate(three, NAME, 2)
    publish_tiny(three, NAME)
    assert active_version(three) == 2
    activate(three, NAME, "latest")
    assert active_version(three) == 4
    publish_tiny(three, NAME)
    assert active_version(three) == 5


def test_no_command_changes_a_published_version(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def contents() -> dict[str, bytes]:
        files = [path for number in "123" for path in (three / NAME / number).iterdir()]
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}

    before = contents()
    for command in (
        ("activate", NAME, "2"),
        ("activate", NAME, "3", "--share", "50"),
        ("rollback", NAME),
        ("retire", NAME, "3"),
        ("retire", NAME, "3", "--undo"),
        ("verify",),
    ):
        status, _, error = run_models_command(capsys, three, *command)
        assert status == 0, error
    publish_tiny(three, NAME)
    assert len(before) == 6
    assert contents() == before


def test_a_rollback_activates_the_previous_version_and_a_second_one_undoes_it(three: Path) -> None:
    rollback(three, NAME)  # no version was activated before, so the second newest becomes active
    assert active_version(three) == 2
    rollback(three, NAME)
    assert active_version(three) == 3
    activate(three, NAME, 1)
    assert rollback(three, NAME).active == 3
    assert rollback(three, NAME).active == 1


def test_a_rollback_after_activating_the_latest_version_activates_the_version_before(three: Path) -> None:
    activate(three, NAME, 1)
    for _ in range(2):  # the second time, the latest version is active already
        changed = activate(three, NAME, "latest")
        assert (changed.active, changed.previous, changed.latest) == (None, 1, 3)
    served = VersionSet.build(NAME, [1, 2, 3], changed, ())
    assert (served.previous, served.resident) == (1, [3, 1])
    assert rollback(three, NAME).active == 1
    assert rollback(three, NAME).active == 3
    assert activate(three, NAME, "latest").previous == 1  # the active version does not change
    publish_tiny(three, NAME)
    assert VersionSet.build(NAME, [1, 2, 3, 4], rollout.read(three, NAME), ()).resident == [4]
    assert rollback(three, NAME).active == 3


def test_a_rollback_after_activating_the_latest_version_may_find_versions_invalid_or_retired(three: Path) -> None:
    activate(three, NAME, 1)
    activate(three, NAME, "latest")
    make_invalid(three / NAME / "3")
    assert active_version(three) == 2
    assert rollback(three, NAME).active == 1
    activate(three, NAME, 2)
    activate(three, NAME, "latest")  # version 2 is the newest valid version
    make_invalid(three / NAME / "1")
    with pytest.raises(RolloutRefused, match=r"^tiny-gan has no previous version; tiny-gan@1 is invalid; activate one"):
        rollback(three, NAME)
    retire(three, NAME, 1)
    with pytest.raises(RolloutRefused, match=r"^tiny-gan has no previous version; activate one by its number$"):
        rollback(three, NAME)


def test_after_a_rollback_the_chosen_version_is_the_previous_one_even_if_it_is_invalid(three: Path) -> None:
    activate(three, NAME, 2)
    activate(three, NAME, 3)
    make_invalid(three / NAME / "3")
    changed = rollback(three, NAME)
    assert (changed.active, changed.previous) == (2, 3)


@pytest.mark.parametrize("share", [100, 10])
def test_a_version_is_never_its_own_previous_version(three: Path, share: float) -> None:
    activate(three, NAME, 2)
    activate(three, NAME, 3)
    make_invalid(three / NAME / "3")
    assert active_version(three) == 2
    changed = activate(three, NAME, 2 if share == 100 else 1, share)
    assert (changed.active, changed.previous) == (2, None)
    if share == 100:
        with pytest.raises(RolloutRefused, match=r"^tiny-gan has no previous version; activate one by its number$"):
            rollback(three, NAME)


@pytest.mark.parametrize(("version", "share"), [(3, 100), (1, 10)])
def test_an_invalid_version_does_not_become_the_previous_version(three: Path, version: int, share: float) -> None:
    publish_tiny(three, NAME)
    for number in (2, 4):
        make_invalid(three / NAME / str(number))
    changed = activate(three, NAME, version, share)
    assert (changed.active, changed.previous) == (3, 1)
    rollback(three, NAME)  # ends the canary if there is one
    assert active_version(three) == (1 if share == 100 else 3)


def test_an_invalid_previous_version_is_kept_because_it_may_be_repaired(three: Path) -> None:
    activate(three, NAME, 2)
    activate(three, NAME, 3)
    make_invalid(three / NAME / "2")
    assert activate(three, NAME, 3).previous == 2


def test_a_canary_ends_with_a_rollback_or_an_activation(three: Path) -> None:
    assert activate(three, NAME, 2, share=12.5).model_dump(include={"active", "canary"}) == {
        "active": 3,
        "canary": {"version": 2, "share": 12.5},
    }
    with pytest.raises(RolloutRefused, match=r"^tiny-gan@2 is the canary; `rollback` ends it$"):
        retire(three, NAME, 2)
    assert rollback(three, NAME).canary is None
    assert active_version(three) == 3
    assert activate(three, NAME, 2, share=0.5).canary == rollout.Canary(version=2, share=0.5)
    promoted = activate(three, NAME, 2)
    assert (promoted.active, promoted.canary, promoted.previous) == (2, None, 3)


def test_a_retired_version_is_not_served_and_keeps_its_files(three: Path) -> None:
    with pytest.raises(RolloutRefused, match=r"^tiny-gan@3 is the active version; activate another one first$"):
        retire(three, NAME, 3)
    retire(three, NAME, 2)
    assert store.read_version(three, NAME, 2).card.version == 2
    with pytest.raises(RolloutRefused, match=r"^tiny-gan@2 is retired; `retire` with `undo` restores it$"):
        activate(three, NAME, 2)
    assert rollback(three, NAME).active == 1  # version 2 is retired
    with pytest.raises(RolloutRefused, match=r"^tiny-gan@3 is not retired$"):
        retire(three, NAME, 3, undo=True)
    retire(three, NAME, 2, undo=True)
    assert activate(three, NAME, 2).active == 2


REJECTED: list[tuple[Callable[[Path], object], type[StoreError], str]] = [
    (lambda folder: activate(folder, NAME, 9), VersionNotFound, r"^there is no tiny-gan@9 in the store; versions in the store: 1, 2, 3$"),
    (lambda folder: activate(folder, "other", 1), VersionNotFound, "^there is no model 'other' in the store; models in the store: tiny-gan$"),
    (lambda folder: activate(folder, "../up", 1), VersionNotFound, r"^'\.\./up' is not a model name; a name has 1 to 64 lower-case letters, digits and hyphens"),
    (lambda folder: activate(folder, "x" * 90, 1), VersionNotFound, f"^'{'x' * 79}… is not a model name"),
    (lambda folder: activate(folder, NAME, 1, share=0), RolloutRefused, "^the share is 0; it should be more than 0 and at most 100 per cent$"),
    (lambda folder: activate(folder, NAME, 1, share=101), RolloutRefused, "^the share is 101; it should be"),
    (lambda folder: activate(folder, NAME, 1, share=float("nan")), RolloutRefused, "the share is nan"),
    (lambda folder: activate(folder, NAME, 3, share=5), RolloutRefused, "^tiny-gan@3 is already active; a canary must be another version$"),
    (lambda folder: activate(folder, NAME, "latest", share=5), RolloutRefused, "^the newest version cannot be a canary; use a version number$"),
    (lambda folder: retire(folder, NAME, 9), VersionNotFound, "^there is no tiny-gan@9 in the store; versions in the store: 1, 2, 3$"),
    (lambda folder: (make_invalid(folder / NAME / "1"), activate(folder, NAME, 1)), StoreError, "8 non-finite values"),
    (lambda folder: (make_invalid(folder / NAME / "1"), make_invalid(folder / NAME / "2"), rollback(folder, NAME)), RolloutRefused,
     "^tiny-gan has no previous version; tiny-gan@2 is invalid; activate one by its number$"),
    (lambda folder: rollout.unload(folder, NAME), RolloutRefused,
     "^tiny-gan is the default for the task 'sample'; make another model the default first$"),
]  # fmt: skip


def test_a_new_version_does_not_get_the_number_of_a_removed_version(three: Path) -> None:
    retire(three, NAME, 2)
    activate(three, NAME, 1)
    retire(three, NAME, 3)
    for number in (2, 3):
        shutil.rmtree(three / NAME / str(number))
    content = io.BytesIO(b"".join(archive.export_version(three, NAME, 1)))
    assert publish_tiny(three, NAME).card.version == 4
    assert archive.import_archive(three, content, 2**24, renumber=True).version == 5
    activate(three, NAME, 5, share=10)
    shutil.rmtree(three / NAME / "5")
    assert publish_tiny(three, NAME).card.version == 6
    activate(three, NAME, "latest")
    shutil.rmtree(three / NAME / "6")
    assert publish_tiny(three, NAME).card.version == 7
    (three / NAME / rollout.FILE).write_text("[]")
    assert publish_tiny(three, NAME).card.version == 8


@pytest.mark.parametrize(("change", "error_type", "sentence"), REJECTED, ids=range(len(REJECTED)))
def test_an_invalid_change_is_rejected_and_changes_nothing(
    three: Path, change: Callable[[Path], object], error_type: type[StoreError], sentence: str
) -> None:
    with pytest.raises(error_type, match=sentence):
        change(three)
    assert not (three / NAME / rollout.FILE).exists()


def test_an_unreadable_rollout_file_is_reported(three: Path) -> None:
    (three / NAME / rollout.FILE).write_text('{"active": "two"}')
    with pytest.raises(
        StoreError, match=r"^tiny-gan/active\.json: active: Input should be a valid integer, found 'two'$"
    ):
        rollout.read(three, NAME)


def test_the_message_of_an_unreadable_rollout_file_names_the_nested_key_and_a_short_value(three: Path) -> None:
    file = three / NAME / rollout.FILE
    file.write_text(json.dumps({"canary": {"version": 1, "share": "x" * 100}}))
    with pytest.raises(StoreError, match=rf"^tiny-gan/active\.json: canary\.share: .*, found '{'x' * 80}'$"):
        rollout.read(three, NAME)
    file.write_text("{")
    with pytest.raises(StoreError, match=r"^tiny-gan/active\.json: the file: Invalid JSON"):
        rollout.read(three, NAME)
    file.unlink()
    file.mkdir()
    with pytest.raises(StoreError, match=r"^tiny-gan/active\.json cannot be read: Is a directory$"):
        rollout.read(three, NAME)


def test_long_values_are_cut_in_messages() -> None:
    assert rollout.shorten("x" * 78) == f"'{'x' * 78}'"
    assert rollout.shorten("x" * 79) == f"'{'x' * 79}…"


def test_a_message_names_the_models_of_the_store_or_none(tmp_path: Path) -> None:
    with pytest.raises(VersionNotFound, match=r"^there is no model 'other' in the store; models in the store: none$"):
        rollout.numbers(tmp_path, "other")
    for name in ("tiny-cnn", NAME):
        publish_tiny(tmp_path, name)
    with pytest.raises(VersionNotFound, match=r"models in the store: tiny-cnn, tiny-gan$"):
        rollout.numbers(tmp_path, "other")


def test_the_file_has_the_command_and_the_time_of_the_last_change(three: Path) -> None:
    commands: list[tuple[Callable[[], rollout.Rollout], str]] = [
        (lambda: activate(three, NAME, 2, share=12.5), "activate 2 --share 12.5"),
        (lambda: rollback(three, NAME), "rollback"),
        (lambda: retire(three, NAME, 1), "retire 1"),
        (lambda: retire(three, NAME, 1, undo=True), "retire 1 --undo"),
        (lambda: activate(three, NAME, 2), "activate 2"),
        (lambda: activate(three, NAME, "latest"), "activate latest"),
    ]
    for change, command in commands:
        start = datetime.now(UTC).replace(microsecond=0)
        changed = change()
        assert changed.by == command
        assert start <= datetime.fromisoformat(changed.changed) <= datetime.now(UTC)
        assert rollout.read(three, NAME) == changed
        assert "." not in changed.changed  # whole seconds
    assert (three / NAME / rollout.FILE).read_text().startswith('{\n  "active": null,\n')


def test_activating_a_version_keeps_the_retired_ones_and_ends_a_canary(three: Path) -> None:
    publish_tiny(three, NAME)
    retire(three, NAME, 1)
    activate(three, NAME, 2, share=10)
    changed = activate(three, NAME, 4)  # version 4 is already active, so the previous version does not change
    assert (changed.active, changed.previous, changed.canary, changed.retired) == (4, 3, None, [1])
    assert rollback(three, NAME).retired == [1]
    assert activate(three, NAME, 2, share=10).retired == [1]
    changed = activate(three, NAME, "latest")
    assert (changed.active, changed.previous, changed.canary, changed.retired) == (None, 3, None, [1])


def test_retiring_the_previous_version_leaves_none(three: Path) -> None:
    activate(three, NAME, 1)
    assert retire(three, NAME, 2).model_dump(include={"previous", "retired"}) == {"previous": 3, "retired": [2]}
    assert retire(three, NAME, 3).model_dump(include={"previous", "retired"}) == {"previous": None, "retired": [2, 3]}
    assert retire(three, NAME, 2).retired == [2, 3]
    with pytest.raises(RolloutRefused, match=r"^tiny-gan has no previous version; activate one by its number$"):
        rollback(three, NAME)
    assert retire(three, NAME, 2, undo=True).retired == [3]
    (three / NAME / "1").rename(three / "removed")  # the chosen version is missing, but stays chosen
    with pytest.raises(RolloutRefused, match="tiny-gan@2 is the active version"):
        retire(three, NAME, 2)


def test_a_rollback_skips_invalid_versions_and_names_an_invalid_previous_one(three: Path) -> None:
    make_invalid(three / NAME / "2")
    assert rollback(three, NAME).active == 1
    activate(three, NAME, 3)
    make_invalid(three / NAME / "1")
    with pytest.raises(RolloutRefused, match=r"^tiny-gan has no previous version; tiny-gan@1 is invalid; activate one"):
        rollback(three, NAME)


def test_an_unloaded_model_is_loaded_again_by_load_and_activate_but_not_by_rollback(tmp_path: Path) -> None:
    for name in ("tiny-gan", "tiny-cgan", "tiny-cgan"):
        publish_tiny(tmp_path, name)
    name = "tiny-cgan"
    assert not rollout.load(tmp_path, name).unloaded
    assert not (tmp_path / name / rollout.FILE).exists()  # nothing has changed
    changed = rollout.unload(tmp_path, name)
    assert (changed.unloaded, changed.by) == (True, "unload")
    changed = rollback(tmp_path, name)
    assert (changed.active, changed.unloaded) == (1, True)
    changed = rollout.load(tmp_path, name)
    assert (changed.active, changed.unloaded, changed.by) == (1, False, "load")
    assert rollout.read(tmp_path, name) == changed
    rollout.unload(tmp_path, name)
    assert not activate(tmp_path, name, 2).unloaded
    for change in (rollout.load, rollout.unload, rollback):
        with pytest.raises(VersionNotFound, match=r"'\.\./up' is not a model name"):
            change(tmp_path, "../up")


def test_the_command_line_reports_each_change(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = [
        run_models_command(capsys, three, *arguments.split())[:2]
        for arguments in (
            "activate tiny-gan 2",
            "activate tiny-gan 3 --share 10",
            "rollback tiny-gan",
            "retire tiny-gan 3",
            "rollback tiny-gan",
        )
    ]
    assert outputs[:4] == [
        (0, "tiny-gan@2 is active\n"),
        (0, "tiny-gan@2 is active, tiny-gan@3 is the canary (10 %)\n"),
        (0, "tiny-gan@2 is active\n"),
        (0, "tiny-gan@2 is active; retired: 3\n"),
    ]
    assert outputs[4][0] == 1  # fails, because the previous version was retired
    status, table, _ = run_models_command(capsys, three, "list")
    assert status == 0
    assert [" ".join(line.split()) for line in table.splitlines()] == [
        "NAME TASK ACTIVE CANARY PREVIOUS VERSIONS RETIRED",
        "tiny-gan sample (default) 2 - - 1, 2, 3 3",
    ]
    _, details, _ = run_models_command(capsys, three, "show", "tiny-gan", "--json")
    assert [version["role"] for version in json.loads(details)["versions"]] == ["", "active", "retired"]


def test_all_served_versions_of_a_model_have_the_same_task(three: Path, tmp_path: Path) -> None:
    tiny_cnn = publish_tiny(tmp_path / "other", "tiny-cnn")
    shutil.copytree(tiny_cnn.folder, three / NAME / "4")  # no command publishes such a version
    rewrite_card(three / NAME / "4", name=NAME, version=4)
    for version, other, tasks in ((4, 1, ("classify", "sample")), (1, 4, ("sample", "classify"))):
        sentence = (
            f"^tiny-gan@{version}: task is '{tasks[0]}', expected '{tasks[1]}' as for tiny-gan@{other}; "
            f"use another name, or retire the versions for '{tasks[1]}'$"
        )
        for share in (100, 10):
            with pytest.raises(RolloutRefused, match=sentence):
                activate(three, NAME, version, share)
    with pytest.raises(RolloutRefused, match=r"^tiny-gan@4: task is 'classify'"):
        activate(three, NAME, "latest")
    assert not (three / NAME / rollout.FILE).exists()
    assert rollback(three, NAME).active == 3
    retire(three, NAME, 4)
    with pytest.raises(RolloutRefused, match=r"^tiny-gan@4: task is 'classify'"):
        retire(three, NAME, 4, undo=True)
    assert activate(three, NAME, 1).active == 1
    activate(three, NAME, "latest")
    assert publish_tiny(three, NAME).card.version == 5


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("tiny-cnn", {"labels": list("abcdefghi")}, "tiny-cnn@2: there are 9 labels, expected 10"),
        ("tiny-lstm", {"residuals": [0.1, -0.1]}, "tiny-lstm@2: residuals must be a list of standard deviations"),
        ("tiny-gan", {"labels": ["a"]}, "tiny-gan@2: there are 1 labels, expected 0"),
        ("tiny-rnn", {"vocabulary": ["a"]}, "tiny-rnn/2/card.json: vocabulary must be 13 distinct entries"),
    ],
)
def test_a_version_that_the_service_cannot_load_is_not_active(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, change: dict[str, object], reason: str
) -> None:
    folder, other = tmp_path / "store", tmp_path / "other"
    for each in (folder, folder, folder, other):
        publish_tiny(each, name)
    rewrite_card(folder / name / "2", **change)
    file = str(tmp_path / "version.zip")
    for store_folder, command, status in (
        (folder, f"activate {name} 2", 1),
        (folder, f"activate {name} 2 --share 10", 1),
        (folder, "verify", 1),
        (folder, f"export {name}@2 {file}", 0),
        (other, f"import {file}", 1),
    ):
        actual, out, error = run_models_command(capsys, store_folder, *command.split())
        assert actual == status, command
        assert (reason in out + error) == bool(status), command
    assert rollout.numbers(other, name) == [1]
    assert rollback(folder, name, check_loading).active == 1  # skips version 2
    activate(folder, name, "latest")
    (folder / name / "3").rename(tmp_path / "removed")
    row = json.loads(run_models_command(capsys, folder, "list", "--json")[1])[0]
    assert (row["active"], row["default"]) == (1, True)
    assert run_models_command(capsys, folder, "retire", name, "1")[0] == 1
    assert run_models_command(capsys, folder, "retire", name, "2")[0] == 0


@pytest.mark.parametrize("command", ["rollback tiny-gan", "import gan.zip --renumber"])
def test_a_change_with_unreadable_defaults_is_reported_as_done_or_not_made(
    three: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(three)
    Path("gan.zip").write_bytes(b"".join(archive.export_version(three, NAME, 1)))
    (three / "defaults.json").write_text("[]")
    status, out, error = run_models_command(capsys, three, *command.split())
    assert "defaults.json: expected an object from task" in error
    if command.startswith("import"):
        assert (status, out, rollout.numbers(three, NAME)) == (1, "", [1, 2, 3])
    else:
        assert (status, out, active_version(three)) == (0, "tiny-gan@2 is active\n", 2)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ("activate tiny-gan 9", 1, "error: there is no tiny-gan@9 in the store; versions in the store: 1, 2, 3\n"),
        ("activate tiny-gan two", 2, "'two' is not a version; it should be a number such as 3\n"),
        ("export tiny-gan@x x.zip", 1, "error: 'tiny-gan@x' should be a name and a version, such as sales@3\n"),
        ("list --store=", 2, "error: argument --store: the path should not be empty\n"),
        ("import nothing.zip", 1, "error: nothing.zip: No such file or directory\n"),
        ("retire tiny-gan 3", 1, "error: tiny-gan@3 is the active version; activate another one first\n"),
    ],
)
def test_the_command_line_rejects_with_one_message(
    three: Path, capsys: pytest.CaptureFixture[str], arguments: str, status: int, sentence: str
) -> None:
    exit_status, out, error = run_models_command(capsys, three, *arguments.split())
    assert (exit_status, out) == (status, "")
    assert error.endswith(sentence)


def test_the_default_model_of_a_task_can_be_changed(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish_tiny(three, "tiny-cgan")
    assert run_models_command(capsys, three, "default", "tiny-cgan")[:2] == (
        0,
        "tiny-cgan is the default for the task 'sample'\n",
    )
    assert store.read_defaults(three) == {"sample": "tiny-cgan"}
    assert rollout.unload(three, NAME).unloaded
    _, row, _ = run_models_command(capsys, three, "default", "tiny-cgan", "--json")
    assert json.loads(row)["default"] is True


def test_a_model_that_cannot_serve_does_not_become_the_default(three: Path) -> None:
    for name in ("tiny-cgan", "tiny-cnn"):
        publish_tiny(three, name)
    rollout.unload(three, "tiny-cgan")
    (three / "tiny-cnn" / "1" / store.WEIGHTS).unlink()
    for name, error, sentence in (
        ("tiny-cgan", RolloutRefused, "^tiny-cgan is unloaded; `load` serves it again$"),
        ("tiny-cnn", RolloutRefused, "^tiny-cnn has no valid version; `verify` prints the reasons$"),
        ("other", VersionNotFound, "^there is no model 'other' in the store"),
        ("../up", VersionNotFound, "is not a model name"),
    ):
        with pytest.raises(error, match=sentence):
            rollout.make_default(three, name)
    assert store.read_defaults(three) == {"sample": NAME, "classify": "tiny-cnn"}


def test_verify_names_invalid_versions_and_exits_with_1(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_models_command(capsys, three, "verify")[:2] == (0, "3 versions checked: all valid\n")
    make_invalid(three / NAME / "2")
    status, out, _ = run_models_command(capsys, three, "verify")
    assert status == 1
    assert out.startswith("tiny-gan@2: tiny-gan/2/model.safetensors: tensor 'layers.0.bias' has 8 non-finite values")
    assert out.endswith("\n3 versions checked: 1 problem found\n")


def test_diff_shows_differences(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_models_command(capsys, three, "diff", "tiny-gan", "1", "2")
    rows = [line.split() for line in out.splitlines()]
    assert status == 0
    assert rows[0] == ["tiny-gan@1", "tiny-gan@2"]
    assert ["sizes.latent", "4", "4"] in rows
    tensors = load_file(three / NAME / "2" / store.WEIGHTS)
    save_file({**tensors, "more": torch.ones(3)}, three / NAME / "2" / store.WEIGHTS)
    assert run_models_command(capsys, three, "diff", "tiny-gan", "1", "2")[0] == 1  # an invalid version is not compared
