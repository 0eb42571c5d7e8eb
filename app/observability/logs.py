"""The format of log lines, and handlers that never let a blocked standard error block the service."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import queue
import time
from collections.abc import Callable
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import ParamSpec

P = ParamSpec("P")
log = logging.getLogger("quartet")

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
MAX_QUEUED_RECORDS = 2000  # records that wait for stderr; more are lost
FLUSH_SECONDS = 1.0  # longest time for which the exit of the process waits for stderr
STDERR = 2  # file descriptor


def configure_logging(level: str, log_format: str) -> None:
    """Write log records to stderr, as ``text`` or ``json`` lines."""
    logging.basicConfig(level=level.upper(), format=TEXT_FORMAT)
    if log_format == "json":
        logging.getLogger().handlers[0].setFormatter(JsonFormatter())


def log_in_background() -> None:
    """Write the records of the root logger on a thread from now on. Call this again in a forked process."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        new = BackgroundHandler()
        new.setFormatter(handler.formatter)
        root.removeHandler(handler)
        root.addHandler(new)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON. The keys of time, level and logger are the same as in the access log."""

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
    wait, further records are lost. Their approximate number is logged later.
    """

    def __init__(self) -> None:
        self._records: queue.Queue[logging.LogRecord] = queue.Queue(MAX_QUEUED_RECORDS)
        super().__init__(self._records)
        self._listener: StderrListener | None = None
        self._lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._listener is None:
            self._listener = StderrListener(self._records)
            self._listener.start()
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._lost += 1
            return
        if lost := self._lost:
            self._lost = 0
            log.error("about %d log records were lost: stderr was blocked", lost)

    def flush(self) -> None:
        """Wait until all records are written, for at most ``FLUSH_SECONDS``. Python calls this at exit."""
        end = time.monotonic() + FLUSH_SECONDS
        while self._records.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.001)


class StderrListener(QueueListener):
    """Writes records to stderr. It has no handlers: the lock of a blocked handler would prevent the exit.

    Lines that cannot be written, for example because the disk is full, are lost.
    """

    def handle(self, record: logging.LogRecord) -> None:
        content = f"{record.getMessage()}\n".encode(errors="backslashreplace")  # formatted by ``QueueHandler.prepare``
        with contextlib.suppress(OSError):
            while content:
                content = content[os.write(STDERR, content) :]


def utc_time(seconds: float) -> str:
    """Return a time, in seconds since the epoch, as a text in UTC with milliseconds (RFC 3339)."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def log_errors(report: Callable[P, None]) -> Callable[P, None]:
    """Wrap a function that records metrics or logs. Its errors are logged and not raised."""

    @functools.wraps(report)
    def reported(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            report(*args, **kwargs)
        except Exception:
            log.exception("%s failed", report.__qualname__)

    return reported
