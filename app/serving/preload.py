"""Load versions in the supervisor before it forks a worker, so that all workers share the memory of the networks."""

from __future__ import annotations

import gc
import mmap
from contextlib import suppress
from pathlib import Path

import torch

from app.engine.observer import VersionKey
from app.networks import is_imported
from app.serving.device import find_device, trim_heap
from app.serving.model import Prepared, prepare
from app.serving.plan import Entry, plan
from app.settings import Settings
from app.store import WEIGHTS, Store
from app.store.snapshot import Snapshot, Stamp, read_stamp


class Preloaded:
    """The versions that the supervisor has loaded, for the workers that it forks later.

    A worker that evicts a version sets a flag in memory that all processes share. The supervisor then releases the
    versions that are not resident any more.
    """

    def __init__(self) -> None:
        self._versions: dict[VersionKey, tuple[Stamp, Prepared]] = {}
        self._evicted = mmap.mmap(-1, 1)

    def keys(self) -> set[VersionKey]:
        """Return name and number of each version."""
        return set(self._versions)

    def load(self, settings: Settings) -> None:
        """Load the resident versions that are missing, and release the others. Called before a worker is forked.

        ``settings`` are the settings of a worker. Nothing is loaded if ``settings.threads`` is not 1, because a forked
        process cannot use the compute threads of its parent. Imported networks are left out, because their runtimes may
        start threads. Versions that cannot be loaded are left out, too: each worker tries to load them again, and
        reports the reason.
        """
        if settings.threads != 1:
            return
        torch.set_num_threads(1)
        device, store = find_device(settings.device), Store(settings.store)
        try:
            due = resident_versions(settings.store)
        except OSError:  # each worker reports the reason
            return
        resident: dict[VersionKey, tuple[Stamp, Prepared]] = {}
        for key in due:
            stamp, known = read_stamp(store.path(*key)), self._versions.get(key)
            with suppress(Exception):
                if known and known[0] == stamp:
                    resident[key] = known
                elif not is_imported(store.card(*key).kind):
                    resident[key] = stamp, prepare(settings, device, *key)
        if self._versions == resident:
            return
        self._versions = resident
        gc.collect()
        trim_heap()
        gc.freeze()  # otherwise garbage collection in a worker would write to each object, and copy the shared memory

    def release_evicted(self, folder: Path) -> None:
        """Release versions after a worker has evicted some. Called in the supervisor, at intervals."""
        if self._evicted[0]:
            self._evicted[0] = 0
            with suppress(OSError):
                for key in self.keys().difference(resident_versions(folder)):
                    del self._versions[key]

    def take(self, name: str, number: int, stamp: Stamp) -> Prepared | None:
        """Return a version for use in this process, or None if its files have changed. It is taken only once."""
        known = self._versions.pop((name, number), None)
        return known[1] if known and known[0] == stamp else None

    def on_evicted(self) -> None:
        """Tell the supervisor that this process has evicted a version."""
        self._evicted[0] = 1


def resident_versions(folder: Path) -> list[VersionKey]:
    """Return the versions in a store that a new worker loads if none is damaged, most important first."""
    snapshot = Snapshot.read(Store(folder))
    table = {
        (name, number): Entry(name, number, version)
        for name, numbers in snapshot.versions.items()
        for number, version in numbers.items()
        if version.card
    }
    return plan(snapshot, table, {}, 0.0, 0.0).load


def worker_bytes(folder: Path) -> int:
    """Estimate the memory of a worker in bytes, without the memory that workers share.

    The estimate is 100 MiB for torch (measured), plus three times the weights of the resident versions. Some
    weights are stored in half precision, and some are copied when they are prepared for computing.
    """
    weights = 0
    for name, number in resident_versions(folder):
        with suppress(OSError):  # a version without weights is not loaded
            weights += (folder / name / str(number) / WEIGHTS).stat().st_size
    return 100 * 2**20 + 3 * weights
