"""Scan the model store at intervals and on demand."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping

from app.engine.observer import VersionKey
from app.serving.model import LoadFailure
from app.serving.store_snapshot import StoreSnapshot, is_unloaded
from app.store import Store
from app.store.disk_thread import DiskThread

log = logging.getLogger("quartet")

CHECK_SECONDS = 0.5  # time limit in seconds to read a rollout file, shorter than the timeout of a readiness probe


class StoreWatcher:
    """Keeps the latest ``snapshot`` of the store and calls ``on_scan`` after each refresh.

    ``poll_seconds`` is the interval between two scans in seconds. If it is 0, the store is scanned only once. The
    function ``failed`` returns the versions that could not be loaded, with their failures.
    """

    def __init__(
        self,
        store: Store,
        poll_seconds: float,
        failed: Callable[[], Mapping[VersionKey, LoadFailure]],
        on_scan: Callable[[], None],
    ) -> None:
        self.snapshot = StoreSnapshot()
        self._store = store
        self._poll_seconds = poll_seconds
        self._failed = failed
        self._on_scan = on_scan
        self._lock = asyncio.Lock()
        self._disk = DiskThread("store")
        self._check_disk = DiskThread("store-check")  # a separate thread, so that checks do not wait for a scan
        self._scan_started_at = -math.inf  # time.monotonic() at the start of the last successful scan

    async def scan(self) -> None:
        """Read the store into a new ``snapshot``, and log the failures that are new."""
        previous = self.snapshot
        self.snapshot = await self._disk.run(StoreSnapshot.scan, self._store, previous, self._failed())
        known = set(previous.failures)
        for failure in self.snapshot.failures:
            if failure not in known:
                failure.log()

    async def is_unloaded(self, name: str) -> bool | None:
        """Return whether a model is unloaded now, or None if its rollout cannot be read in ``CHECK_SECONDS``."""
        try:
            return await self._check_disk.run_within(CHECK_SECONDS, is_unloaded, self._store, name)
        except TimeoutError:
            return None

    async def refresh(self) -> None:
        """Scan the store now and call ``on_scan``, unless polling is off.

        Concurrent callers share one scan, if the scan starts after their calls and succeeds.
        """
        called_at = time.monotonic()
        async with self._lock:
            if self._scan_started_at > called_at or not self._poll_seconds:
                return
            started_at = time.monotonic()
            try:
                await self.scan()
                self._on_scan()
                self._scan_started_at = started_at
            except Exception:  # for example a network file system that is unavailable for a moment
                log.exception("the store cannot be scanned")

    async def watch(self) -> None:
        """Call ``refresh`` at intervals until this task is cancelled, unless polling is off."""
        while self._poll_seconds:
            await asyncio.sleep(self._poll_seconds)
            await self.refresh()
