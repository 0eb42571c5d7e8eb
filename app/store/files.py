"""Files and folders that appear whole or not at all, whichever process is killed at whatever moment."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SCRATCH = ".publish-"
LEFT_OVER = 60.0  # seconds; between making a scratch folder and locking it lies a moment


@contextlib.contextmanager
def file_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time for a folder; the system unlocks what a killed process has locked. Writes nothing.

    Raises BlockingIOError when another one has it and ``wait`` is false.
    """
    import fcntl  # not everywhere: what only serves does without

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def scratch_folder(store: Path) -> Iterator[Path]:
    """A folder in the store that no reader looks at, and that is gone afterwards.

    What killed processes have left of theirs goes too: nobody holds its lock any more.
    """
    for left in store.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_OVER:
                with file_lock(left, wait=False):
                    shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=store))
    try:
        with file_lock(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Give a file other content by one rename. Its folder is ``locked``, for what is renamed has always one name."""
    new = path.with_name(f".{path.name}.new")
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
    """Have the disk hold what was written: a rename must not outrun its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
