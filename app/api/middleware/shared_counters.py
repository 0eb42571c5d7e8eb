"""Rate-limit counters in memory that all forked workers share."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from limits.aio.storage import Storage

SLOT = struct.Struct("=Qdq")  # hash of the counter's key, end of its window, count


def _lock_file() -> IO[bytes]:
    """Open a file that is only used as a lock. The file is in memory if possible, as the disk may be read-only."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("quartet-counts"), "wb")
    return tempfile.TemporaryFile()


class SharedCounters(Storage):
    """Storage for the package ``limits``, shared by all processes that are forked later.

    The package's own memory storage is separate in each process. This storage is a hash table in shared memory. A file
    lock protects the table. The operating system releases the lock if the process that holds it dies. Times are on
    ``time.monotonic``'s clock, which all processes share. If the system clock is set back, no window lasts longer.
    """

    STORAGE_SCHEME = None

    def __init__(self, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._slots, self._clock = slots, clock
        self._table = mmap.mmap(-1, slots * SLOT.size)
        self._file = _lock_file()
        weakref.finalize(self, self._file.close)

    @property
    def base_exceptions(self) -> type[Exception] | tuple[type[Exception], ...]:
        return OSError

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _find(self, key: str, now: float) -> tuple[int, int, float, int]:
        """Return the offset, hash, window end and count of a key. End and count are 0 for a new or expired counter."""
        digest = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") or 1
        free = -1
        for i in range(self._slots):
            offset = (digest + i) % self._slots * SLOT.size
            known, end, count = SLOT.unpack_from(self._table, offset)
            if known == digest:
                return (offset, digest, end, count) if end > now else (offset, digest, 0.0, 0)
            if free < 0 and end <= now:
                free = offset
            if known == 0:
                break
        if free < 0:
            raise OSError("the table of rate-limit counters is full")
        return free, digest, 0.0, 0

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        now = self._clock()
        with self._locked():
            offset, digest, end, count = self._find(key, now)
            SLOT.pack_into(self._table, offset, digest, end or now + expiry, count + amount)
        return count + amount

    async def get(self, key: str) -> int:
        with self._locked():
            return self._find(key, self._clock())[3]

    async def get_expiry(self, key: str) -> float:
        """Return the end of the window in seconds since the epoch, as the package ``limits`` expects."""
        now = self._clock()
        with self._locked():
            return time.time() + max(0.0, self._find(key, now)[2] - now)

    async def check(self) -> bool:
        return True

    async def reset(self) -> int | None:
        with self._locked():
            self._table[:] = bytes(len(self._table))
        return None

    async def clear(self, key: str) -> None:
        with self._locked():
            offset, digest, _, _ = self._find(key, self._clock())
            SLOT.pack_into(self._table, offset, digest, 0.0, 0)
