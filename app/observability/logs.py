"""The format of log lines, and handlers that never let a blocked standard error block the service."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import threading
import time
from datetime import UTC, datetime
from logging.handlers import QueueHandler

log = logging.getLogger("quartet")

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
MAX_QUEUED_RECORDS = 2000  # records that wait for stderr; more are lost
FLUSH_SECONDS = 1.0  # longest time for which the exit of the process waits for stderr
STDERR = 2  # file descriptor


def configure_logging(level: str, log_format: str) -> None:
    """Write log records to stderr, as ``text`` or ``json`` lines. Call this again in a forked process."""
    handler = BackgroundHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


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
        self._thread: threading.Thread | None = None
        self._lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="log", daemon=True)
            self._thread.start()
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._lost += 1
            return
        if lost := self._lost:
            self._lost = 0
            log.error("about %d log records were lost: stderr was blocked", lost)

    def _write(self) -> None:
        """Write records, which ``prepare`` has formatted. Lines are lost if, for example, the disk is full."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the main thread waits for them
        while True:
            content = f"{self._records.get().getMessage()}\n".encode(errors="backslashreplace")
            with contextlib.suppress(OSError):
                while content:
                    content = content[os.write(STDERR, content) :]
            self._records.task_done()

    def flush(self) -> None:
        """Wait until all records are written, for at most ``FLUSH_SECONDS``. Python calls this at exit."""
        end = time.monotonic() + FLUSH_SECONDS
        while self._records.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.001)


def utc_time(seconds: float) -> str:
    """Return a time, in seconds since the epoch, as a text in UTC with milliseconds (RFC 3339)."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
