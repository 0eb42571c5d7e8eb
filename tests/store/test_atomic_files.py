"""Atomic changes of files and folders, and locks."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from app.store.atomic_files import LEFT_OVER, file_lock, replace_file, scratch_folder


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


def test_a_lock_excludes_others_until_it_is_released(tmp_path: Path) -> None:
    with file_lock(tmp_path), pytest.raises(BlockingIOError), file_lock(tmp_path, wait=False):
        pass
    with file_lock(tmp_path, wait=False):
        pass


def test_a_scratch_folder_is_locked_hidden_and_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with scratch_folder(tmp_path) as folder:
            (folder / "file").write_text("x")
            assert folder.parent == tmp_path
            assert folder.name.startswith(".publish-")
            with pytest.raises(BlockingIOError), file_lock(folder, wait=False):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_only_old_unlocked_scratch_folders_are_removed(tmp_path: Path) -> None:
    for name in (".publish-old", ".publish-busy", ".publish-young", "other"):
        (tmp_path / name / "tiny-gan" / "1").mkdir(parents=True)
        age = LEFT_OVER + (-30 if name == ".publish-young" else 30)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with file_lock(tmp_path / ".publish-busy"), scratch_folder(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".publish-busy", ".publish-young", "other"]
