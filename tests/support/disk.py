"""Disks for the store whose calls fail, wait, or end with the death of the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from app.store.disk import Disk

Watch = Callable[[str, Path], object]
READS = ("list", "open")
CHANGES = ("write", "set_mode", "sync", "make_folder", "rename", "remove", "lock")


class WatchedDisk(Disk):
    """Calls ``before(call, path)`` before each call, and ``after(call, path)`` after each call that does not read."""

    def __init__(self, before: Watch = lambda call, path: None, after: Watch = lambda call, path: None) -> None:
        self.before, self.after = before, after

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return partial(self.watched, name, found) if name in (*READS, *CHANGES) else found

    def watched(self, name: str, call: Callable[..., Any], path: Path, *arguments: Any, **options: Any) -> Any:
        self.before(name, path)
        result = call(path, *arguments, **options)
        if name in CHANGES:
            self.after(name, path)
        return result


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
        self._remaining -= 1
        if self._remaining == -1:
            self.happened = True
            for each in self._unsynced:
                with suppress(FileNotFoundError):
                    each.chmod(0o600)
                    each.write_bytes(each.read_bytes()[: each.stat().st_size // 2])
            raise Killed

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        content = b"".join(chunks)
        super().write(path, [content[: len(content) // 2]])
        self._after("write", path)  # half of the content
        with path.open("ab") as file:
            file.write(content[len(content) // 2 :])
        self._unsynced.add(path)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._unsynced = {
            target / path.relative_to(source) if path.is_relative_to(source) else path for path in self._unsynced
        }
