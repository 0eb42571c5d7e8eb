"""Counts that all workers share, for limits: in memory that is there before they are forked."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from limits.aio.storage import Storage

SLOT = struct.Struct("=Qdq")  # hash of what is counted, when its window ends, count
SLOTS = 8192  # more than a file of keys can have lines with a few limits each


def _nameless() -> IO[bytes]:
    """A file whose lock is what it is for: in memory where that can be, since a container may have no other place."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("quartet-counts"), "wb")
    return tempfile.TemporaryFile()


class SharedCounters(Storage):
    """``limits``' own storage in memory counts for one process. This one counts for all that are forked after it was
    made: a table in shared memory, under a lock that the system takes back from a process that dies.

    Time is the machine's, in seconds since 1970, as ``limits`` has it.
    """

    STORAGE_SCHEME = None

    def __init__(self, slots: int = SLOTS) -> None:
        super().__init__()
        self._slots = slots
        self._table = mmap.mmap(-1, slots * SLOT.size)
        self._file = _nameless()
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
        """Offset, hash, end and count of what is counted under a key; count 0 and end 0 where nothing is."""
        named = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") or 1
        free = -1
        for i in range(self._slots):
            offset = (named + i) % self._slots * SLOT.size
            known, end, count = SLOT.unpack_from(self._table, offset)
            if known == named:
                return (offset, named, end, count) if end > now else (offset, named, 0.0, 0)
            if free < 0 and end <= now:
                free = offset
            if known == 0:
                break
        if free < 0:
            raise OSError("the table of counts is full")
        return free, named, 0.0, 0

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        now = time.time()
        with self._locked():
            offset, named, end, count = self._find(key, now)
            SLOT.pack_into(self._table, offset, named, end or now + expiry, count + amount)
        return count + amount

    async def get(self, key: str) -> int:
        with self._locked():
            return self._find(key, time.time())[3]

    async def get_expiry(self, key: str) -> float:
        now = time.time()
        with self._locked():
            return self._find(key, now)[2] or now

    async def check(self) -> bool:
        return True

    async def reset(self) -> int | None:
        with self._locked():
            self._table[:] = bytes(len(self._table))
        return None

    async def clear(self, key: str) -> None:
        with self._locked():
            offset, named, _, _ = self._find(key, time.time())
            SLOT.pack_into(self._table, offset, named, 0.0, 0)
