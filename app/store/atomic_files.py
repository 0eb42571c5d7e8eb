"""Change files and folders atomically. If the process is killed, the old or the new content remains, never a mix."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"  # lock file in a folder; readers skip names that begin with a dot
SCRATCH = ".publish-"  # prefix of scratch folders
# An unlocked scratch folder older than this many seconds is stale. A new scratch folder is unlocked for a moment.
STALE_AFTER_SECONDS = 60.0


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Lock a file or a folder, so that only one process at a time can hold the lock. ``path`` is opened with ``flags``.

    The operating system releases the lock of a killed process. On a network file system, the lock of a folder holds
    only on this machine; use ``folder_lock`` there. Raises BlockingIOError if ``wait`` is false and another process
    holds the lock.
    """
    import fcntl  # does not exist on Windows, where the service can run but not publish

    handle = os.open(path, flags, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def folder_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Lock a folder of the store, as ``file_lock`` does, for the processes of all machines that share the store.

    The lock is on the file ``.lock`` in the folder, which stays. NFS passes locks to the server only for files that are
    open for writing. Users who may write to the folder may also lock it.
    """
    with file_lock(folder / LOCK, wait, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW) as handle:
        status = folder.stat()
        for owner in (status.st_uid, -1):  # only root may change the owner; a member of the group may set the group
            with contextlib.suppress(PermissionError):
                os.fchown(handle, owner, status.st_gid)
        with contextlib.suppress(PermissionError):  # another user has made the file
            os.fchmod(handle, status.st_mode & 0o666)
        yield


@contextlib.contextmanager
def scratch_folder(store: Path) -> Iterator[Path]:
    """Make a folder in the store that readers ignore, and remove it afterwards.

    Also remove the scratch folders that killed processes have left. The folders of killed processes are not locked any
    more.
    """
    for stale in store.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > STALE_AFTER_SECONDS:
                with folder_lock(stale, wait=False):
                    pass  # its process has ended
                shutil.rmtree(stale, ignore_errors=True)  # after the lock, because NFS keeps open files
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=store))
    try:
        with folder_lock(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Replace the content of a file by one rename.

    The caller must hold the ``folder_lock`` of the folder, because the temporary file always has the same name.
    """
    new = path.with_name(f".{path.name}.new")
    with contextlib.suppress(OSError):
        new.unlink()  # left by a killed process of another user, whose files this process may not change
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(0o644)
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk. Otherwise a later rename might reach the disk before the content does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
