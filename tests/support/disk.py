"""Disks for the store whose calls fail, wait, or end with the death of the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from app.store.disk import Disk

Watch = Callable[[str, Path], object]


def _nothing(call: str, path: Path) -> None:
    pass


class WatchedDisk(Disk):
    """Calls ``before(call, path)`` before each call, and ``after(call, path)`` after each call that does not read."""

    def __init__(self, before: Watch = _nothing, after: Watch = _nothing) -> None:
        self.before = before
        self.after = after

    @contextmanager
    def _watched(self, call: str, path: Path) -> Iterator[None]:
        self.before(call, path)
        yield
        self.after(call, path)

    def list(self, folder: Path) -> list[str]:
        self.before("list", folder)
        return super().list(folder)

    def open(self, path: Path) -> IO[bytes]:
        self.before("open", path)
        return super().open(path)

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        with self._watched("write", path):
            super().write(path, chunks)

    def set_mode(self, path: Path, bits: int) -> None:
        with self._watched("set_mode", path):
            super().set_mode(path, bits)

    def sync(self, path: Path) -> None:
        with self._watched("sync", path):
            super().sync(path)

    def make_folder(self, path: Path) -> None:
        with self._watched("make_folder", path):
            super().make_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        with self._watched("rename", source):
            super().rename(source, target)

    def remove(self, path: Path) -> None:
        with self._watched("remove", path):
            super().remove(path)

    @contextmanager
    def lock(self, folder: Path, wait: bool = True) -> Iterator[None]:
        with self._watched("lock", folder):
            pass
        with super().lock(folder, wait):
            yield


def failing(*failures: tuple[str, Path], error: OSError | None = None) -> WatchedDisk:
    """Return a disk on which these calls fail: pairs of a call and a path, or a folder of the path."""

    def before(call: str, path: Path) -> None:
        if any(call == wanted and (path == where or where in path.parents) for wanted, where in failures):
            raise error or OSError(5, "Input/output error", str(path))

    return WatchedDisk(before)


class FullDisk(WatchedDisk):
    """One call fails, after ``calls`` others. ``happened`` says whether it has failed."""

    def __init__(self, calls: int) -> None:
        super().__init__(self._before)
        self._remaining = calls
        self.happened = False

    def _before(self, call: str, path: Path) -> None:
        self._remaining -= 1
        if self._remaining == -1:
            self.happened = True
            raise OSError(28, "No space left on device")


class Killed(BaseException):
    """The process was killed."""


class CrashDisk(WatchedDisk):
    """The computer crashes after ``calls`` other calls. Then no call has an effect any more.

    A file that is being written at that time has only the first half of its content. The content of files that were
    written but not flushed by ``sync`` is lost.
    """

    def __init__(self, calls: int) -> None:
        super().__init__(self._before, self._after)
        self._remaining = calls
        self.happened = False
        self._unsynced: set[Path] = set()

    def _before(self, call: str, path: Path) -> None:
        if self.happened:
            raise Killed

    def _after(self, call: str, path: Path) -> None:
        if call == "sync":
            self._unsynced.discard(path)
        if self._remaining == 0:
            self.crash()
        self._remaining -= 1

    def crash(self) -> None:
        self.happened = True
        for path in self._unsynced:
            with suppress(FileNotFoundError):
                path.chmod(0o600)
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        raise Killed

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        self._before("write", path)
        content = b"".join(chunks)
        Disk.write(self, path, [content[: len(content) // 2]])
        self._after("write", path)  # half of the content
        with path.open("ab") as file:
            file.write(content[len(content) // 2 :])
        self._unsynced.add(path)
        self._after("write", path)

    def rename(self, source: Path, target: Path) -> None:
        self._before("rename", source)
        Disk.rename(self, source, target)
        self._unsynced = {
            target / path.relative_to(source) if path.is_relative_to(source) else path for path in self._unsynced
        }
        self._after("rename", source)
