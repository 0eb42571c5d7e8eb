"""The format of log lines, and a handler that writes them on a thread."""

from __future__ import annotations

import functools
import json
import logging
import os
import queue
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import ParamSpec

P = ParamSpec("P")
log = logging.getLogger("quartet")

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
MAX_QUEUED_RECORDS = 2000  # records that wait for stderr; more are dropped
FLUSH_SECONDS = 1.0  # how long an exit waits for stderr
STDERR = 2  # file descriptor


def configure_logging(level: str, log_format: str) -> None:
    """Write log records to stderr, as ``text`` or ``json`` lines."""
    logging.basicConfig(level=level.upper(), format=TEXT_FORMAT)
    if log_format == "json":
        logging.getLogger().handlers[0].setFormatter(JsonFormatter())


def log_in_background() -> None:
    """Write the records of the root logger on a thread from now on. Call this after forking."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        background = BackgroundHandler()
        background.setFormatter(handler.formatter)
        root.removeHandler(handler)
        root.addHandler(background)


class JsonFormatter(logging.Formatter):
    """Format a record as one line of JSON with the keys of the access log.

    python-json-logger would need overrides for these keys, the time and the traceback.
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
    """Write records to stderr on a thread: a stalled stderr (a paused terminal, a full pipe) must not stall requests.

    The thread starts with the first record, because threads do not survive a fork. While ``MAX_QUEUED_RECORDS`` wait,
    further records are dropped; their number is logged later.
    """

    def __init__(self) -> None:
        self._records: queue.Queue[logging.LogRecord] = queue.Queue(MAX_QUEUED_RECORDS)
        super().__init__(self._records)
        self._thread = QueueListener(self._records, StderrHandler())
        self._started = False
        self.dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        if not self._started:
            self._started = True
            self._thread.start()
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            return
        if dropped := self.dropped:
            self.dropped = 0
            log.error("%d log records were dropped: stderr was blocked", dropped)

    def flush(self) -> None:
        """Wait until all records are written, for at most ``FLUSH_SECONDS``. Python calls this at exit."""
        end = time.monotonic() + FLUSH_SECONDS
        while self._records.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.001)

    def close(self) -> None:
        """Write the remaining records and end the thread. A blocked thread ends with the process."""
        self.flush()
        if self._started and not self._records.unfinished_tasks:
            self._started = False
            self._thread.stop()
        super().close()


class StderrHandler(logging.Handler):
    """Write messages to file descriptor 2, without locks: one held by a blocked thread would prevent Python's exit."""

    def createLock(self) -> None:  # the name of logging
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        content = f"{record.getMessage()}\n".encode(errors="backslashreplace")
        with suppress(OSError):  # nobody can read it: a closed terminal or pipe
            while content:
                content = content[os.write(STDERR, content) :]


def utc_time(seconds: float) -> str:
    """A time since the epoch as RFC 3339, in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def log_errors(report: Callable[P, None]) -> Callable[P, None]:
    """Log the errors of a function that records metrics, such as a missing file descriptor, and do not raise them."""

    @functools.wraps(report)
    def reported(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            report(*args, **kwargs)
        except Exception:
            log.exception("a metric was not recorded")

    return reported
