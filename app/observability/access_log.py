"""The log: a line for each request, and all lines as JSON where that is wanted."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import orjson

from app.engine.observer import RequestTrace

access = logging.getLogger("quartet.access")

FLUSH_SECONDS = 0.2  # seconds ...
FLUSH_CHARACTERS = (
    3500  # ... or characters of log lines: what is shorter than a page is not torn by another process's lines
)


class JsonFormatter(logging.Formatter):
    """Each record as one line of JSON with the keys of the access log, a traceback inside it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class AccessLog:
    """One line a request, written a few times a second: a write for each would cost more than most answers.

    ``kind`` is ``text`` or ``json``; the latter tells also what the request had from the engines, in seconds.
    """

    def __init__(self, kind: str = "text") -> None:
        self._line = self._json if kind == "json" else self._text
        self._lines: list[str] = []
        self._size = 0
        self._second, self._stamp = 0, ""

    def __call__(self, method: str, path: str, route: str, status: int, seconds: float, account: RequestTrace) -> None:
        if not access.isEnabledFor(logging.INFO):
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.write)
        line = self._line(method, path, route, status, seconds, account)
        self._lines.append(line)
        self._size += len(line)
        if self._size > FLUSH_CHARACTERS:
            self.write()

    def _text(self, method: str, path: str, route: str, status: int, seconds: float, account: RequestTrace) -> str:
        now = time.time()
        if int(now) != self._second:
            self._second, self._stamp = int(now), time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        plain = path if path.isascii() and path.isprintable() and " " not in path else quote(path)
        return (
            f"{self._stamp},{int(now % 1 * 1000):03d} INFO quartet.access "
            f"{method} {plain} {status} {seconds * 1000:.1f} ms {account.id}\n"
        )

    def _json(self, method: str, path: str, route: str, status: int, seconds: float, account: RequestTrace) -> str:
        line: dict[str, Any] = {
            "time": _time(time.time()),
            "level": "INFO",
            "logger": "quartet.access",
            "id": account.id,
            "method": method,
            "path": path,
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
        }
        if account.started_at:
            line |= {"model": account.model, "version": account.version, "rows": account.rows}
            line["queue_seconds"] = round(account.started_at - account.queued_at, 6)
        if account.ended_at:
            line["compute_seconds"] = round(account.ended_at - account.started_at, 6)
        if account.time_to_first_token:
            line["first_seconds"] = round(account.time_to_first_token, 6)
        if account.error_code:
            line["reason"] = account.error_code
        if account.span:
            line["trace"] = f"{account.span.get_span_context().trace_id:032x}"
        return orjson.dumps(line).decode() + "\n"

    def write(self) -> None:
        """Write what was gathered."""
        lines, self._lines, self._size = self._lines, [], 0
        sys.stderr.write("".join(lines))
        sys.stderr.flush()


def _time(seconds: float) -> str:
    """In UTC, to the millisecond (RFC 3339)."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
