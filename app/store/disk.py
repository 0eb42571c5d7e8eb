"""All calls of the store to the file system, in one object that tests can replace by one that fails."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

LOCK = ".lock"  # lock file in a folder; readers skip names that begin with a dot
SCRATCH = ".publish-"  # prefix of scratch folders
STALE_SCRATCH_SECONDS = 3600.0  # a scratch folder of this age was left by a killed process; imports take minutes


class Disk:
    """The file system. ``replace`` and ``scratch`` consist of the other calls. All calls raise OSError."""

    def list(self, folder: Path) -> list[str]:
        """Return the names of the entries of a folder."""
        return os.listdir(folder)

    def open(self, path: Path) -> IO[bytes]:
        """Open a regular file for reading. Opening a pipe would block until another process writes to it."""
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return path.open("rb")

    def read(self, path: Path) -> bytes:
        """Return the content of a file."""
        with self.open(path) as file:
            return file.read()

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Write a new file. The content may be lost at a power failure until ``sync`` has returned."""
        with path.open("xb") as file:
            file.writelines(chunks)

    def set_mode(self, path: Path, bits: int) -> None:
        """Add permission bits to a file or folder."""
        path.chmod(path.stat().st_mode | bits)

    def sync(self, path: Path) -> None:
        """Flush a file or folder to the disk. Otherwise a later rename might reach the disk before the content does."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents, unless it exists."""
        path.mkdir(parents=True, exist_ok=True)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file, which replaces an existing file, or a folder, which must not exist with any content."""
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with its content."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, folder: Path, wait: bool = True) -> Iterator[None]:
        """Lock a folder, so that only one process at a time can hold the lock, also if machines share the folder.

        The lock is on the file ``.lock`` in the folder, which stays. NFS passes locks to the server only for files that
        are open for writing. Users who may write to the folder may also lock it. The operating system releases the lock
        of a killed process. Raises BlockingIOError if ``wait`` is false and another process holds the lock.
        """
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            status = folder.stat()
            with contextlib.suppress(PermissionError):  # another user has made the file
                os.fchmod(handle, status.st_mode & 0o666)
                os.fchown(handle, status.st_uid if os.geteuid() == 0 else -1, status.st_gid)
            yield
        finally:
            os.close(handle)

    def replace(self, path: Path, content: bytes) -> None:
        """Replace the content of a file by one rename. If the process is killed, the old or the new content remains.

        The caller must hold the ``lock`` of the folder, because the temporary file always has the same name.
        """
        new = path.with_name(f".{path.name}.new")
        self.remove(new)  # left by a killed process, perhaps of another user
        self.write(new, [content])
        self.set_mode(new, 0o444)
        self.sync(new)
        self.rename(new, path)
        self.sync(path.parent)

    @contextlib.contextmanager
    def scratch(self, folder: Path) -> Iterator[Path]:
        """Make a folder that readers of the store ignore, and remove it and those of killed processes afterwards."""
        path = folder / f"{SCRATCH}{os.urandom(8).hex()}"
        self.make_folder(path)
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):
                self.remove(path)
                for stale in (folder / name for name in self.list(folder) if name.startswith(SCRATCH)):
                    if time.time() - stale.stat().st_mtime > STALE_SCRATCH_SECONDS:
                        self.remove(stale)
