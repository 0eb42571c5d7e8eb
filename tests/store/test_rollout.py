"""Rollouts: active version, canary, rollback, retirement, and the default model of a task."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.networks import make_invalid, publish_tiny, rewrite_card

from app.store import Canary, Roles, Rollout, RolloutRefused, Store, StoreError, VersionNotFound, archive, catalogue
from app.store.rollout import FILE
from app.tasks import check_loading

NAME = "tiny-gan"


def checked(folder: Path) -> Store:
    """Return a store that reads all files of a version before the version is active."""
    return Store(folder, check_loading)


def active(folder: Path) -> int | None:
    return checked(folder).roles(NAME).active


@pytest.mark.parametrize(
    ("rollout", "invalid", "roles"),
    [
        (Rollout(), set(), (4, None, 3)),
        (Rollout(), {4, 3}, (2, None, 1)),
        (Rollout(retired=[4, 2]), set(), (3, None, 1)),
        (Rollout(active=2, history=[4, 1]), {1}, (2, None, 4)),
        (Rollout(active=2, history=[4, 1], retired=[1]), set(), (2, None, 4)),
        (Rollout(active=2, history=[1]), {2}, (1, None, None)),  # a version of the history comes before a newer one
        (Rollout(active=9, history=[1]), set(), (1, None, None)),
        (Rollout(history=[1, 3]), set(), (4, None, 3)),  # version 4 was published later
        (Rollout(history=[1, 2]), set(), (4, None, 3)),
        (Rollout(canary=Canary(version=3, share=5)), set(), (4, 3, 3)),
        (Rollout(canary=Canary(version=3, share=5)), {4}, (3, None, 2)),  # the canary has become active
    ],
)
def test_one_function_decides_which_versions_are_active_canary_and_previous(
    rollout: Rollout, invalid: set[int], roles: tuple[int | None, int | None, int | None]
) -> None:
    found = rollout.roles([1, 2, 3, 4], lambda number: number not in invalid)
    assert (found.active, found.canary and found.canary.version, found.previous) == roles


def test_the_newest_valid_version_is_active_by_default(three: Path) -> None:
    assert active(three) == 3
    make_invalid(three / NAME / "3")
    assert active(three) == 2
    assert Store(three).roles(NAME).active == 3  # without a check, only cards are read
    (three / NAME / "3" / "card.json").write_text("{")
    assert Store(three).roles(NAME) == Roles(2, None, 1)
    assert not (three / NAME / FILE).exists()


def test_rollbacks_step_back_in_the_history(three: Path) -> None:
    for number in (1, 3, 2):
        Store(three).activate(NAME, number)
    assert [Store(three).rollback(NAME).active for _ in range(3)] == [3, 1, 3]
    with pytest.raises(RolloutRefused, match=r"^tiny-gan has no previous version; activate one by its number$"):
        Store(three).rollback(NAME)


def test_without_an_activation_rollbacks_activate_older_versions(three: Path) -> None:
    make_invalid(three / NAME / "2")
    assert checked(three).rollback(NAME).active == 1
    publish_tiny(three, NAME)
    assert active(three) == 1  # a publication does not undo the rollback
    with pytest.raises(RolloutRefused, match="has no previous version"):
        checked(three).rollback(NAME)


def test_after_activating_the_latest_version_newer_versions_become_active(three: Path) -> None:
    Store(three).activate(NAME, 1)
    publish_tiny(three, NAME)
    assert active(three) == 1
    for _ in range(2):  # the second time, the latest version is active already
        assert Store(three).activate(NAME, "latest").active is None
        assert Store(three).roles(NAME) == Roles(4, None, 1)
    for _ in range(2):
        publish_tiny(three, NAME)
    assert active(three) == 6
    assert [Store(three).rollback(NAME).active for _ in range(3)] == [5, 4, 1]


def test_activating_the_active_version_keeps_the_previous_one(three: Path) -> None:
    for _ in range(2):
        assert Store(three).activate(NAME, 3).history == [2]
    Store(three).activate(NAME, 1)
    assert Store(three).activate(NAME, 1).history == [2, 3]


@pytest.mark.parametrize("policy", ["latest", "number"])
def test_a_finished_canary_leaves_the_policy_as_it_was(three: Path, policy: str) -> None:
    Store(three).activate(NAME, "latest" if policy == "latest" else 3)
    before = Store(three).rollout(NAME)
    assert Store(three).activate(NAME, 1, share=12.5).canary == Canary(version=1, share=12.5)
    assert Store(three).roles(NAME).active == 3
    after = Store(three).rollback(NAME)
    assert (after.active, after.canary, after.history) == (before.active, None, before.history)
    publish_tiny(three, NAME)
    assert active(three) == (4 if policy == "latest" else 3)


def test_an_activated_canary_can_be_rolled_back(three: Path) -> None:
    start = datetime.now(UTC).replace(microsecond=0)
    canary = Store(three).activate(NAME, 2, share=12.5)
    assert canary.by == "activate 2 --share 12.5"
    assert start <= datetime.fromisoformat(canary.changed) <= datetime.now(UTC)
    promoted = Store(three).activate(NAME, 2)
    assert (promoted.active, promoted.canary, promoted.history) == (2, None, [3])
    assert Store(three).rollback(NAME).active == 3


def test_an_unloaded_model_is_loaded_by_load_and_activate_but_not_by_rollback(three: Path) -> None:
    publish_tiny(three, "tiny-cgan")
    Store(three).make_default("tiny-cgan")
    assert not Store(three).load(NAME).unloaded
    assert not (three / NAME / FILE).exists()  # nothing has changed
    assert Store(three).unload(NAME).unloaded
    assert Store(three).rollback(NAME).unloaded
    loaded = Store(three).load(NAME)
    assert (loaded.active, loaded.unloaded) == (2, False)
    Store(three).unload(NAME)
    assert not Store(three).activate(NAME, 1, share=10).unloaded


REJECTED: list[tuple[Callable[[Store], object], type[StoreError], str]] = [
    (lambda store: store.rollback("../up"), VersionNotFound, r"^'\.\./up' is not a model name; a name has 1 to 64 lower-case letters, digits and hyphens"),
    (lambda store: store.activate(NAME, 1, share=101), RolloutRefused, "^the share is 101; it should be"),
    (lambda store: store.activate(NAME, 3, share=5), RolloutRefused, "^tiny-gan@3 is already active; a canary must be another version$"),
    (lambda store: store.activate(NAME, "latest", share=5), RolloutRefused, "^the newest version cannot be a canary; use a version number$"),
    (lambda store: (make_invalid(store.path(NAME, 1)), store.activate(NAME, 1)), StoreError, "8 non-finite values"),
    (lambda store: (make_invalid(store.path(NAME, 1)), make_invalid(store.path(NAME, 2)), store.rollback(NAME)), RolloutRefused,
     "^tiny-gan has no previous version; tiny-gan@2 is invalid; activate one by its number$"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error_type", "sentence"), REJECTED, ids=range(len(REJECTED)))
def test_an_invalid_change_is_rejected_and_changes_nothing(
    three: Path, change: Callable[[Store], object], error_type: type[StoreError], sentence: str
) -> None:
    with pytest.raises(error_type, match=sentence):
        change(checked(three))
    assert not (three / NAME / FILE).exists()


def test_the_active_version_and_the_canary_cannot_be_retired(three: Path) -> None:
    Store(three).activate(NAME, 2, share=10)
    with pytest.raises(RolloutRefused, match=r"^tiny-gan@2 is the canary; `rollback` ends it$"):
        Store(three).retire(NAME, 2)
    Store(three).activate(NAME, 2)
    make_invalid(three / NAME / "2")  # so its fallback is active
    for number in (2, 3):
        with pytest.raises(RolloutRefused, match=f"tiny-gan@{number} is the active version"):
            checked(three).retire(NAME, number)


def test_a_new_version_does_not_get_the_number_of_a_removed_version(three: Path) -> None:
    content = io.BytesIO(b"".join(archive.export_version(Store(three), NAME, 1)))
    Store(three).retire(NAME, 2)
    Store(three).activate(NAME, 1)  # version 3 is in the history
    for number in (2, 3):
        shutil.rmtree(three / NAME / str(number))
    assert publish_tiny(three, NAME).card.version == 4
    assert archive.import_archive(Store(three), content, 2**24, renumber=True).version == 5
    Store(three).activate(NAME, 5, share=10)
    shutil.rmtree(three / NAME / "5")
    assert publish_tiny(three, NAME).card.version == 6


def test_an_invalid_rollout_file_is_reported_with_its_key(three: Path) -> None:
    (three / NAME / FILE).write_text('{"canary": {"version": 1, "share": "' + "x" * 100 + '"}}')
    changes: list[Callable[[str], object]] = [
        Store(three).rollout,
        Store(three).rollback,
        lambda name: publish_tiny(three, name),
    ]
    for change in changes:
        with pytest.raises(StoreError, match=rf"^tiny-gan/active\.json: canary\.share: .*, found '{'x' * 80}'$"):
            change(NAME)
    assert Store(three).numbers(NAME) == [1, 2, 3]


def test_all_served_versions_of_a_model_have_the_same_task(three: Path, tmp_path: Path) -> None:
    tiny_cnn = publish_tiny(tmp_path / "other", "tiny-cnn")
    shutil.copytree(tiny_cnn.folder, three / NAME / "4")  # no command publishes such a version
    rewrite_card(three / NAME / "4", name=NAME, version=4)
    sentence = (
        "^tiny-gan@4: task is 'classify', expected 'sample' as for tiny-gan@1; "
        "use another name, or retire the versions for 'sample'$"
    )
    with pytest.raises(StoreError, match=sentence):
        Store(three).activate(NAME, 4)
    with pytest.raises(StoreError, match=r"^tiny-gan@4: task is 'classify'"):
        Store(three).activate(NAME, "latest")
    with pytest.raises(StoreError, match=r"^tiny-gan@5: task is 'sample', expected 'classify' as for tiny-gan@4"):
        publish_tiny(three, NAME)
    Store(three).rollback(NAME)
    Store(three).retire(NAME, 4)
    with pytest.raises(StoreError, match=r"^tiny-gan@4: task is 'classify'"):
        Store(three).retire(NAME, 4, undo=True)
    assert Store(three).activate(NAME, 1).active == 1
    assert publish_tiny(three, NAME).card.version == 5


def test_a_missing_active_version_is_reported_and_replaced(three: Path) -> None:
    Store(three).activate(NAME, 2)
    Store(three).activate(NAME, 1, share=10)
    for number in (1, 2):
        shutil.rmtree(three / NAME / str(number))
    problem = (
        "tiny-gan/active.json names version 2, which is not in the store; "
        "tiny-gan/active.json names version 1, which is not in the store"
    )
    (row,) = catalogue.list_models(Store(three), [NAME])
    assert (row["active"], row["canary"], row["problem"]) == (3, None, problem)
    assert {"what": f"{NAME}/{FILE}", "problem": problem} in list(catalogue.verify(Store(three)))


def test_a_model_that_cannot_serve_does_not_become_the_default(three: Path) -> None:
    for name in ("tiny-cgan", "tiny-cnn"):
        publish_tiny(three, name)
    Store(three).unload("tiny-cgan")
    (three / "tiny-cnn" / "1" / "model.safetensors").unlink()
    for name, sentence in (
        ("tiny-cgan", "^tiny-cgan is unloaded; `load` serves it again$"),
        ("tiny-cnn", "^tiny-cnn has no valid version; `verify` prints the reasons$"),
    ):
        with pytest.raises(RolloutRefused, match=sentence):
            checked(three).make_default(name)
    Store(three).load("tiny-cgan")
    checked(three).make_default("tiny-cgan")
    defaults = {"sample": "tiny-cgan", "classify": "tiny-cnn"}
    assert (three / "defaults.json").read_text() == json.dumps(defaults, indent=2) + "\n"
