"""Metrics of several workers, with the multiprocess mode of prometheus_client.

Each worker counts in its own files, and the reader adds them up. The files are in memory, and are not limited by the
size of a disk or of /dev/shm: writing to a mapped file on a full one would end the process (SIGBUS).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from tempfile import gettempdir, mkdtemp

from prometheus_client import CollectorRegistry, Metric, multiprocess, values

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # the environment variable that prometheus_client reads
LIVE = ("gauge_livemax", "gauge_livesum")  # kinds of metrics that show only running workers
KINDS = ("counter", "histogram", "summary", "gauge_max", *LIVE)
EMPTY = bytes(8)  # the start of a file without metrics
FILE_BYTES = 64 * 1024  # prometheus_client cannot read an empty file


class SharedMetrics:
    """A folder with a file for each kind of metric and each worker.

    Create the object before the workers are forked. A worker that replaces another one continues its counts.
    """

    def __init__(self, workers: int) -> None:
        self._files = {f"{kind}_{place}.db": self._new_file() for kind in KINDS for place in range(workers)}
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else gettempdir()
        self._folder = mkdtemp(prefix=f"quartet-{os.getpid()}-", dir=folder)
        self._link()

    def _new_file(self) -> int:
        descriptor = os.memfd_create("quartet-metrics")
        os.ftruncate(descriptor, FILE_BYTES)
        return descriptor

    def _link(self) -> None:
        """Make the files visible in the folder. All workers have inherited their descriptors."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        for name, descriptor in self._files.items():
            with suppress(FileExistsError):
                os.symlink(f"/proc/self/fd/{descriptor}", os.path.join(self._folder, name))

    def use(self, place: int) -> None:
        """Let this process count as the worker at ``place``. Call this before its metrics are created."""
        os.environ[FOLDER_VARIABLE] = self._folder
        values.ValueClass = values.MultiProcessValue(lambda: place)

    def remove(self, place: int) -> None:
        """Remove the live gauges of a worker that has ended."""
        for kind in LIVE:
            os.pwrite(self._files[f"{kind}_{place}.db"], EMPTY, 0)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of all workers."""
        if not os.path.isdir(self._folder):  # systemd removes it when the last session of a login user ends
            self._link()
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, self._folder)
        return registry.collect()

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
