"""Files are replaced atomically, only regular files are opened, and locks exclude other processes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from support.disk import WatchedDisk
from support.networks import publish_tiny, tiny_version

from app.store import Store, catalogue
from app.store.disk import LOCK, STALE_SCRATCH_SECONDS, Disk


def test_the_file_that_a_killed_process_left_is_removed_and_not_changed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("left")
    (tmp_path / ".file.json.new").symlink_to(other)  # root may change any file, so that file modes prove nothing
    Disk().replace(tmp_path / "file.json", b"new")
    assert (other.read_text(), (tmp_path / "file.json").read_text()) == ("left", "new")
    assert not (tmp_path / "file.json").is_symlink()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """Opening a pipe would block until another process writes to it."""
    publish_tiny(tmp_path, "tiny-gan")
    os.mkfifo(tmp_path / "tiny-gan" / "active.json")
    problem = "tiny-gan/active.json cannot be read: it is not a regular file"
    assert [row["problem"] for row in catalogue.verify(Store(tmp_path))] == ["", problem, ""]


def test_changes_are_made_under_the_lock_of_the_store(three: Path) -> None:
    def before(call: str, path: Path) -> None:
        if call == "rename":
            changed.append(path.name)
            with pytest.raises(BlockingIOError), Disk().lock(three, wait=False):
                pass

    changed: list[str] = []
    store = Store(three, disk=WatchedDisk(before))
    store.publish(*tiny_version("tiny-cgan"))
    store.activate("tiny-gan", 1)
    store.make_default("tiny-cgan")
    assert len(changed) == 3


def test_the_lock_file_belongs_to_the_owner_of_the_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    if os.geteuid() == 0:
        os.chown(tmp_path, 1234, 5678)
    with Disk().lock(tmp_path):
        status = (tmp_path / LOCK).stat()
    folder = tmp_path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (folder.st_uid, folder.st_gid, 0o660)


def test_a_link_is_not_followed_to_a_lock_file(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="Too many levels of symbolic links"), Disk().lock(tmp_path):
        pass
    assert not (tmp_path / "other").exists()


def test_a_publication_removes_its_scratch_folder_and_old_ones_of_killed_processes(tmp_path: Path) -> None:
    for name, age in ((".publish-dead", STALE_SCRATCH_SECONDS + 60), (".publish-running", STALE_SCRATCH_SECONDS - 60)):
        (tmp_path / name / "1").mkdir(parents=True)
        seconds = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (seconds, seconds))
    publish_tiny(tmp_path, "tiny-gan")
    assert {path.name for path in tmp_path.glob(".publish-*")} == {".publish-running"}
    assert list(Store(tmp_path).versions()) == [("tiny-gan", 1)]


def test_all_files_are_readable_by_other_users(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        for _ in range(2):
            folder = publish_tiny(tmp_path, "tiny-gan").folder
            Store(tmp_path).activate("tiny-gan", 1)
    finally:
        os.umask(before)
    for path in (tmp_path / "defaults.json", *folder.parent.iterdir(), *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444, path
        assert path.stat().st_mode & 0o111 == (0o111 if path.is_dir() else 0), path
