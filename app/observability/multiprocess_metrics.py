"""Metrics of several worker processes.

Each process counts in its own files in a shared folder. To read the metrics, a process sums the counts of all files.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from prometheus_client import Metric, multiprocess, values
from prometheus_client.mmap_dict import MmapedDict

from app.observability.logs import log_errors
from app.store.disk import file_lock

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # the environment variable that prometheus_client reads
ALIVE = "alive"  # a file in the folder that is locked as long as a process of the service lives
LOCK_SECONDS = 1.0  # longest time for which the supervisor waits for the lock of the folder
DEAD = 0  # in file names, the process id that stands for all processes that have ended


def shared_metrics() -> AbstractContextManager[Callable[[int], None]]:
    """Make a shared folder for the metrics of all processes that are forked from now on.

    The context manager yields a function to call with the process id of a worker that has ended. The function merges
    the files of this worker with the files of workers that ended earlier. The folder is in memory (/dev/shm) if
    possible, because a container's disk may be read-only.

    Raises:
        OSError: no folder can be created.
    """
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else gettempdir()
    for abandoned in Path(parent).glob(f"quartet-*/{ALIVE}"):  # left by a service that was killed with all its workers
        with suppress(OSError), file_lock(abandoned, wait=False):
            shutil.rmtree(abandoned.parent, ignore_errors=True)
    folder = TemporaryDirectory(prefix=f"quartet-{os.getpid()}-", dir=parent)
    lock = ExitStack()
    alive = Path(folder.name, f"{ALIVE}.new")
    alive.touch()
    lock.enter_context(file_lock(alive))  # forked processes inherit the lock
    alive.rename(alive.with_name(ALIVE))
    os.environ[FOLDER_VARIABLE] = folder.name
    values.ValueClass = values.get_value_class()  # at its import, prometheus_client did not find the variable

    @contextmanager
    def context() -> Iterator[Callable[[int], None]]:
        with lock, folder:
            yield merge_ended

    return context()


def use_own_metrics() -> None:
    """Keep the metrics of this process in memory, even if the environment names a folder of another service."""
    for variable in (FOLDER_VARIABLE, FOLDER_VARIABLE.lower()):  # prometheus_client still reads the old name
        os.environ.pop(variable, None)
    values.ValueClass = values.get_value_class()  # chosen when prometheus_client was imported


def restore_metrics_folder() -> None:
    """Make the shared folder again if it was removed. Each worker calls this when it starts.

    systemd removes the files that a login user has in /dev/shm when the last session of this user ends (``RemoveIPC``
    of logind). The counts in these files are lost, but without the folder no new worker could start.
    """
    os.makedirs(os.environ[FOLDER_VARIABLE], mode=0o700, exist_ok=True)


def is_shared() -> bool:
    """Return whether this process has a shared folder for metrics."""
    return FOLDER_VARIABLE in os.environ


def collect_shared() -> list[Metric]:
    """Return the metrics of all workers. Waits while files are being merged."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    with file_lock(folder):
        files = [file for file in folder.glob("*.db") if _has_content(file)]
        return list(multiprocess.MultiProcessCollector.merge(files))


def _has_content(file: Path) -> bool:
    """Return whether a file of counts exists and is not empty. prometheus_client cannot read an empty file.

    A file is empty for a moment when a starting worker creates it, and stays empty if the worker is killed then.
    """
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:  # a gauge of a worker that has just ended
        return False


@log_errors
def merge_ended(process: int) -> None:
    """Add the counts of an ended process to the sums of all ended processes, in one file for each kind of metric.

    Of the gauges, only those with the mode ``max`` are kept. Their file has the largest values instead of sums.

    Otherwise each ended process would leave files that every later reader has to read. If another process has the lock
    for longer than LOCK_SECONDS, because it hangs, the files stay. The sums of the readers are then still correct.
    """
    multiprocess.mark_process_dead(process)
    folder = Path(os.environ[FOLDER_VARIABLE])
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            with file_lock(folder, wait=False):
                _merge(folder, process)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)


def _merge(folder: Path, process: int) -> None:
    for own in folder.glob(f"*_{process}.db"):
        if not _has_content(own):
            own.unlink()
            continue
        kind = own.name.rpartition("_")[0]  # such as counter or gauge_max
        total = folder / f"{kind}_{DEAD}.db"
        merged = total.with_suffix(".fresh")
        if total.exists():
            shutil.copyfile(total, merged)
        else:
            merged.unlink(missing_ok=True)  # left by an earlier merge that failed
        sums = MmapedDict(str(merged))
        for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(own):
            before = sums.read_value(key)[0]
            sums.write_value(key, max(before, value) if kind == "gauge_max" else before + value, timestamp)
        sums.close()
        merged.replace(total)
        own.unlink()


def rewrite_own_files(is_current: Callable[[Mapping[str, str]], bool]) -> None:
    """Remove the metrics with outdated labels from the files of this process.

    The caller must create all metrics again afterwards, so that they read their counts from the new files.
    """
    files = list(Path(os.environ[FOLDER_VARIABLE]).glob(f"*_{os.getpid()}.db"))
    rewritten = [(_current_copy(file, is_current), file) for file in files]
    values.close_all_multiprocess_files()
    for copy, file in rewritten:
        copy.replace(file)  # in one step, because other processes read the file
    values.ValueClass = values.get_value_class()


def _current_copy(file: Path, is_current: Callable[[Mapping[str, str]], bool]) -> Path:
    copy = file.with_suffix(".fresh")
    copy.unlink(missing_ok=True)  # left by an earlier attempt that failed
    content = MmapedDict(str(copy))
    for key, value, timestamp, _ in MmapedDict.read_all_values_from_file(file):
        if is_current(json.loads(key)[2]):
            content.write_value(key, value, timestamp)
    content.close()
    return copy
