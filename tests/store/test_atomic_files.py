"""Atomic changes of files and folders, and locks."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from support.networks import publish_tiny

from app import store
from app.store import rollout
from app.store.atomic_files import LOCK, STALE_AFTER_SECONDS, file_lock, folder_lock, replace_file, scratch_folder


def test_a_replaced_file_has_the_new_content_and_all_may_read_it(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    for content in ("old", "new: é"):
        before = os.umask(0o077)
        try:
            replace_file(file, content)
        finally:
            os.umask(before)
        assert file.read_bytes().decode() == content
        assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_replacement_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_fsync(handle: int) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "file.json"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", failing_fsync)
    with pytest.raises(OSError, match="No space left"):
        replace_file(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_file_that_a_killed_process_left_is_removed_and_not_changed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("left")
    (tmp_path / ".file.json.new").symlink_to(other)  # root may change any file, so that file modes prove nothing
    replace_file(tmp_path / "file.json", "new")
    assert (other.read_text(), (tmp_path / "file.json").read_text()) == ("left", "new")
    assert not (tmp_path / "file.json").is_symlink()


def test_the_first_error_is_raised_if_the_temporary_file_cannot_be_removed_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_fsync(handle: int) -> None:
        raise OSError(28, "No space left on device")

    def failing_unlink(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", failing_fsync)
    monkeypatch.setattr(Path, "unlink", failing_unlink)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "file.json", "new")


def test_content_is_flushed_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, str]] = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: flushed.append((Path(f"/proc/self/fd/{handle}").resolve().name, file.read_text()))
    )
    file = tmp_path / "file.json"
    file.write_text("old")
    replace_file(file, "new")
    assert flushed == [(".file.json.new", "old"), (tmp_path.name, "new")]


@pytest.mark.parametrize("lock", [file_lock, folder_lock])
def test_a_lock_excludes_others_until_it_is_released(tmp_path: Path, lock: Any) -> None:
    with lock(tmp_path), pytest.raises(BlockingIOError), lock(tmp_path, wait=False):
        pass
    with lock(tmp_path, wait=False):
        pass


def test_the_locks_of_the_store_hold_on_all_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux passes the lock of a file on NFS to the server if the file is open for writing, and never of a folder."""
    flock, locked = fcntl.flock, list[str]()

    def shared_flock(handle: int, operation: int) -> None:
        assert stat.S_ISREG(os.fstat(handle).st_mode)
        assert fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        flock(handle, operation)
        folder = Path(f"/proc/self/fd/{handle}").resolve().parent
        locked.append("scratch" if folder.name.startswith(".publish-") else folder.name)

    monkeypatch.setattr(fcntl, "flock", shared_flock)
    publish_tiny(tmp_path, "tiny-gan")
    rollout.activate(tmp_path, "tiny-gan", 1)
    store.set_default(tmp_path, "sample", "tiny-gan")
    assert locked == ["scratch", tmp_path.name, "tiny-gan", tmp_path.name]


def test_those_who_may_write_to_a_folder_may_lock_it(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        for mode, expected in ((0o755, 0o644), (0o2775, 0o664), (0o700, 0o600)):
            tmp_path.chmod(mode)
            with folder_lock(tmp_path):
                assert stat.S_IMODE((tmp_path / LOCK).stat().st_mode) == expected
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change the owner of a file")
def test_the_owner_of_a_folder_may_lock_it_after_root(tmp_path: Path) -> None:
    os.chown(tmp_path, 10_001, 10_002)
    with folder_lock(tmp_path):
        status = (tmp_path / LOCK).stat()
    assert (status.st_uid, status.st_gid) == (10_001, 10_002)


def test_a_link_is_not_followed_to_a_lock_file(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), folder_lock(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_scratch_folder_is_locked_hidden_and_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with scratch_folder(tmp_path) as folder:
            (folder / "file").write_text("x")
            assert folder.parent == tmp_path
            assert folder.name.startswith(".publish-")
            with pytest.raises(BlockingIOError), folder_lock(folder, wait=False):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_only_old_unlocked_scratch_folders_are_removed(tmp_path: Path) -> None:
    for name in (".publish-old", ".publish-busy", ".publish-young", "other"):
        (tmp_path / name / "tiny-gan" / "1").mkdir(parents=True)
        age = STALE_AFTER_SECONDS + (-30 if name == ".publish-young" else 30)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with folder_lock(tmp_path / ".publish-busy"):
        os.utime(tmp_path / ".publish-busy", (0, 0))  # its lock file is new
        with scratch_folder(tmp_path):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".publish-busy", ".publish-young", "other"]
