"""The format of log lines, and a handler that writes them on a thread."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import queue
import select
import time
from collections.abc import Callable
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import ParamSpec

P = ParamSpec("P")
log = logging.getLogger("quartet")

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
MAX_QUEUED_RECORDS = 2000  # records that wait for stderr; more are dropped
FLUSH_SECONDS = 1.0  # longest time for which the exit of the process waits for stderr
STDERR = 2  # file descriptor


def configure_logging(level: str, log_format: str) -> None:
    """Write log records to stderr, as ``text`` or ``json`` lines."""
    logging.basicConfig(level=level.upper(), format=TEXT_FORMAT)
    if log_format == "json":
        logging.getLogger().handlers[0].setFormatter(JsonFormatter())


def log_in_background() -> None:
    """Write the records of the root logger on a thread from now on. Call this after forking."""
    _replace_handlers(BackgroundHandler)


def log_without_waiting() -> None:
    """From now on, drop records of the root logger that stderr does not accept immediately. Use this before forking."""
    _replace_handlers(lambda: StderrHandler(wait=False))


def _replace_handlers(create: Callable[[], logging.Handler]) -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        new = create()
        new.setFormatter(handler.formatter)
        root.removeHandler(handler)
        root.addHandler(new)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON. The keys of time, level and logger are the same as in the access log.

    The package python-json-logger is not used, because it would need overrides for the keys, the time and the
    traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": utc_time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class BackgroundHandler(QueueHandler):
    """Writes records to stderr on a thread, so that a blocked stderr, such as a full pipe, blocks no requests.

    The thread starts with the first record, because threads do not survive a fork. While ``MAX_QUEUED_RECORDS`` records
    wait, further records are lost. The number of lost lines is logged later.
    """

    def __init__(self) -> None:
        self._records: queue.Queue[logging.LogRecord] = queue.Queue(MAX_QUEUED_RECORDS)
        super().__init__(self._records)
        self._listener: QueueListener | None = None
        self._lost = LostLines()

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._listener is None:
                listener = QueueListener(self._records, StderrHandler())
                listener.start()
                self._listener = listener
            self._records.put_nowait(record)
        except queue.Full:
            self._lost.add(record, "stderr was blocked")
        except RuntimeError as error:  # no more threads are allowed; the next record tries again
            self._lost.add(record, str(error))
        else:
            self._lost.report()

    def flush(self) -> None:
        """Wait until all records are written, for at most ``FLUSH_SECONDS``. Python calls this at exit."""
        end = time.monotonic() + FLUSH_SECONDS
        while self._records.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.001)

    def close(self) -> None:
        """Write the remaining records and end the thread. A blocked thread ends with the process."""
        self.flush()
        if self._listener and not self._records.unfinished_tasks:
            self._listener.stop()
            self._listener = None
        super().close()


class StderrHandler(logging.Handler):
    """Writes records to file descriptor 2 without a lock, because a blocked thread with the lock would prevent an exit.

    Records that cannot be written, for example because the disk is full, are lost. The number of lost lines is logged
    when stderr works again. If ``wait`` is False, records are also lost while stderr is blocked.
    """

    def __init__(self, wait: bool = True) -> None:
        super().__init__()
        self._wait = wait
        self._lost = LostLines()
        self._line_is_open = False  # whether only a part of the last line was written

    def createLock(self) -> None:  # logging requires this name
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        content = f"{self.format(record)}\n".encode(errors="backslashreplace")
        if self._line_is_open:
            content = b"\n" + content
        try:
            if not (self._wait or select.select([], [STDERR], [], 0)[1]):
                raise BlockingIOError(errno.EAGAIN, "stderr was blocked")
            while content:
                written = os.write(STDERR, content)
                self._line_is_open = content[written - 1 : written] != b"\n"
                content = content[written:]
        except (OSError, ValueError) as error:  # ValueError: select for a closed descriptor
            self._lost.add(record, getattr(error, "strerror", None) or str(error))
        else:
            self._lost.report()


class LostLines:
    """Counts lines that could not be logged, until they can be reported."""

    def __init__(self) -> None:
        self.count = 0
        self._reason = ""

    def add(self, record: logging.LogRecord, reason: str) -> None:
        """Count the lines of a record."""
        self.count += record.getMessage().count("\n") + 1
        self._reason = reason

    def report(self) -> None:
        """Log the number of lost lines, if there are any. Call this after a record was logged."""
        if count := self.count:
            self.count = 0  # before logging, which may call this method again
            log.error("%d log lines were lost: %s", count, self._reason)


def utc_time(seconds: float) -> str:
    """Return a time, in seconds since the epoch, as a text in UTC with milliseconds (RFC 3339)."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def log_errors(report: Callable[P, None]) -> Callable[P, None]:
    """Wrap a function that records metrics or logs. Its errors, such as a full disk, are logged and not raised."""

    @functools.wraps(report)
    def reported(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            report(*args, **kwargs)
        except Exception:
            log.exception("%s failed", report.__qualname__)

    return reported
