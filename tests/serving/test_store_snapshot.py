"""The snapshot: the content of the store at one time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.disk import WatchedDisk, failing
from support.networks import publish_tiny
from support.waiting import wait_until

from app import store
from app.serving.model import LoadFailure, file_stamps
from app.serving.store_snapshot import StoreSnapshot, VersionFiles, is_unloaded, worker_bytes
from app.store import Store, rollout
from app.store.disk import Disk
from app.store.rollout import Rollout
from app.store.weights_size import weights_size

NAME = "tiny-gan"
MIB = 2**20


def scan(
    folder: Path, previous: StoreSnapshot | None = None, *failed: LoadFailure, disk: Disk | None = None
) -> StoreSnapshot:
    failures = {(failure.name, failure.version): failure for failure in failed}
    return StoreSnapshot.scan(Store(folder, disk=disk), previous or StoreSnapshot(), failures)


def test_a_snapshot_has_the_cards_files_rollouts_and_defaults(three: Path) -> None:
    (three / NAME / "2" / "curves.png").write_bytes(b"x")
    Store(three).activate(NAME, 2)
    snapshot = scan(three)
    size = weights_size(three, Store(three).card(NAME, 2))
    assert snapshot.numbers == {NAME: [1, 2, 3]}
    assert snapshot.rollouts == {NAME: Store(three).rollout(NAME)}
    assert snapshot.cards[NAME, 2] == Store(three).card(NAME, 2)
    assert snapshot.files[NAME, 2] == VersionFiles((three / NAME / "2").stat().st_mtime_ns, size, ("curves.png",))
    assert list(snapshot.files) == list(snapshot.cards) == [(NAME, 1), (NAME, 2), (NAME, 3)]
    assert (snapshot.failures, snapshot.retry) == ([], frozenset())
    assert (snapshot.defaults, snapshot.defaults_error) == ({"sample": NAME}, "")


def test_a_readable_card_is_read_once_and_pictures_when_the_folder_has_changed(three: Path) -> None:
    before = scan(three)
    calls: list[tuple[str, Path]] = []
    (three / NAME / "1" / store.CARD).write_text("{")  # a rewritten file does not change the folder
    (three / NAME / "2" / "curves.png").write_bytes(b"x")
    after = scan(three, before, disk=WatchedDisk(lambda call, path: calls.append((call, path))))
    assert after.cards == before.cards
    assert [path for _, path in calls if path.parent == three / NAME] == [
        three / NAME / rollout.FILE,
        three / NAME / "2",
    ]
    assert [after.files[NAME, number].pictures for number in (1, 2, 3)] == [(), ("curves.png",), ()]


def test_an_unreadable_card_is_a_failure_unless_its_version_is_retired(three: Path) -> None:
    for number in (1, 2):
        (three / NAME / str(number) / store.CARD).write_text("{")
    Store(three).retire(NAME, 1)
    snapshot = scan(three)
    assert [(failure.label, failure.reason[:39]) for failure in snapshot.failures] == [
        ("tiny-gan@2", "tiny-gan/2/card.json: the file: Invalid")
    ]
    assert list(snapshot.cards) == list(snapshot.files) == [(NAME, 3)]


def test_versions_that_are_published_during_a_scan_are_not_missing(three: Path) -> None:
    def publish_and_retire(call: str, path: Path) -> None:
        if path.name == rollout.FILE and Store(three).numbers(NAME) == [1, 2, 3]:
            publish_tiny(three, NAME)  # the scan has read the numbers, but not the rollout
            for number in (1, 2, 3):
                Store(three).retire(NAME, number)

    before = scan(three)
    after = scan(three, before, disk=WatchedDisk(publish_and_retire))
    assert (after.numbers[NAME], after.rollouts[NAME].retired) == ([1, 2, 3, 4], [1, 2, 3])
    assert (NAME, 4) in after.cards


def test_a_missing_active_version_is_a_failure(three: Path) -> None:
    Store(three).activate(NAME, 2)
    shutil.rmtree(three / NAME / "2")
    assert [failure.reason for failure in scan(three).failures] == [
        "tiny-gan/active.json names version 2, which is not in the store"
    ]


def test_unreadable_rollouts_and_defaults_are_reported(three: Path) -> None:
    Store(three).activate(NAME, 2)
    before = scan(three)
    (three / NAME / rollout.FILE).write_text("{")
    (three / "defaults.json").write_text("[]")
    after = scan(three, before)
    assert after.rollouts == before.rollouts
    assert scan(three).rollouts == {NAME: Rollout()}
    ((name, version, reason),) = ((failure.name, failure.version, failure.reason) for failure in after.failures)
    assert (name, version) == ("tiny-gan/active.json", 0)
    assert reason.startswith("tiny-gan/active.json: the file: Invalid JSON")
    assert after.defaults is None
    assert after.defaults_error.startswith("defaults.json: expected an object")
    assert is_unloaded(Store(three), NAME) is None


def test_a_version_that_failed_is_tried_again_when_its_files_changed_its_time_came_or_it_is_gone(three: Path) -> None:
    files = file_stamps(three, NAME, 1)
    unchanged = LoadFailure(NAME, 1, "damaged", files)
    due = LoadFailure(NAME, 2, "out of memory", file_stamps(three, NAME, 2), retry_at=0.0)
    changed = LoadFailure(NAME, 3, "damaged", files=())
    gone = LoadFailure("gone", 1, "damaged", files=())
    assert scan(three, None, unchanged, due, changed, gone).retry == {(NAME, 2), (NAME, 3), ("gone", 1)}


def test_the_card_of_a_failed_version_is_read_again_when_its_files_have_changed(three: Path) -> None:
    failures = [LoadFailure(NAME, number, "damaged", file_stamps(three, NAME, number)) for number in (1, 2)]
    before = scan(three)
    path = three / NAME / "1" / store.CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | {"title": "The repaired version"}))
    (three / NAME / "1" / "curves.png").write_bytes(b"x")
    after = scan(three, before, *failures)
    assert after.cards[NAME, 1].title == "The repaired version"
    assert after.cards[NAME, 2] is before.cards[NAME, 2]
    assert after.retry == {(NAME, 1)}
    assert after.files[NAME, 1].pictures == ("curves.png",)
    path.write_text("{")
    damaged = scan(three, after, failures[0])
    assert [failure.label for failure in damaged.failures] == ["tiny-gan@1"]
    assert damaged.retry == {(NAME, 1)}


def test_a_version_that_could_not_be_read_is_tried_again_when_its_permissions_change(three: Path) -> None:
    weights = three / NAME / "1" / store.WEIGHTS
    weights.chmod(0o200)
    failure = LoadFailure(NAME, 1, "Permission denied", file_stamps(three, NAME, 1))
    assert scan(three, None, failure).retry == frozenset()

    def is_retried() -> bool:
        weights.chmod(0o644)
        return scan(three, None, failure).retry == {(NAME, 1)}

    wait_until(is_retried)  # the file system may note times of 4 ms


def test_a_version_is_tried_again_at_the_stated_time(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.serving.store_snapshot.time", SimpleNamespace(monotonic=lambda: 5.0))
    now, later = (
        LoadFailure(NAME, number, "out of memory", file_stamps(three, NAME, number), retry_at=retry_at)
        for number, retry_at in ((1, 5.0), (2, 5.5))
    )
    assert scan(three, None, now, later).retry == {(NAME, 1)}


def test_a_missing_folder_has_no_files(tmp_path: Path) -> None:
    card = publish_tiny(tmp_path / "store", NAME).card
    assert VersionFiles.read(Store(tmp_path), card, None) == VersionFiles(0, 0, ())


def test_the_memory_of_a_worker_depends_on_the_resident_versions(three: Path) -> None:
    size = weights_size(three, Store(three).card(NAME, 1))
    assert worker_bytes(three) == 100 * MIB + 2 * size  # the newest version
    Store(three).activate(NAME, 2)
    assert worker_bytes(three) == 100 * MIB + 2 * 2 * size  # and the previous version
    Store(three).activate(NAME, 1, share=10)
    assert worker_bytes(three) == 100 * MIB + 2 * 3 * size
    assert worker_bytes(three, max_bytes=size) == 100 * MIB + 2 * size
    (three / NAME / rollout.FILE).write_text("{")  # gives the same result as without a rollout file
    assert worker_bytes(three) == 100 * MIB + 2 * size
    other = publish_tiny(three, "tiny-cnn")
    assert worker_bytes(three) == 100 * MIB + 2 * (size + weights_size(three, other.card))
    (other.folder / store.CARD).write_text("{")
    assert worker_bytes(three) == 100 * MIB + 2 * size


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
@pytest.mark.parametrize(
    ("failure", "numbers", "label", "path"),
    [
        ("list tiny-cnn", {"tiny-gan": [1]}, "tiny-cnn", "tiny-cnn"),
        ("open tiny-cnn/1", {"tiny-cnn": [1], "tiny-gan": [1]}, "tiny-cnn@1", "tiny-cnn/1/card.json"),
    ],
)
def test_an_unreadable_model_does_not_affect_other_models(
    tmp_path: Path, error: OSError, failure: str, numbers: dict[str, list[int]], label: str, path: str
) -> None:
    for name in ("tiny-cnn", "tiny-gan"):
        publish_tiny(tmp_path, name)
    call, folder = failure.split()
    disk = failing((call, tmp_path / folder), error=error)
    before = scan(tmp_path)
    assert scan(tmp_path, before, disk=disk).numbers == {"tiny-cnn": [1], "tiny-gan": [1]}  # as before
    snapshot = scan(tmp_path, disk=disk)
    assert snapshot.numbers == numbers
    assert [(failure.label, failure.reason) for failure in snapshot.failures] == [
        (label, f"{path} cannot be read: {error.strerror}")
    ]
    assert list(snapshot.cards) == [("tiny-gan", 1)]
