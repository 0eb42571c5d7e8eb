"""The access log: one line per request, as text or JSON."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import datetime
from typing import Any
from urllib.parse import quote

import orjson

from app.engine.observer import RequestTrace
from app.observability.logs import BackgroundHandler, utc_time

access = logging.getLogger("quartet.access")

FLUSH_SECONDS = 0.2  # longest time until a collected line is written
FLUSH_CHARACTERS = 3500  # less than a memory page, so that lines of several processes in one pipe do not mix


class AccessLog:
    """Collects one line per request, and writes the collected lines a few times a second.

    ``log_format`` is ``text`` or ``json``. A ``json`` line also has the model version and the engine times in seconds.
    The lines are not separate records of ``logging``, because that would take four to eight times as long.
    """

    def __init__(self, log_format: str = "text") -> None:
        self._is_json = log_format == "json"
        self._lines: list[str] = []
        self._size = 0
        self._output = BackgroundHandler()

    def __call__(self, method: str, path: str, route: str, status: int, seconds: float, trace: RequestTrace) -> None:
        """Add the line of a request. Call this on a thread with a running event loop."""
        if not access.isEnabledFor(logging.INFO):
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.write)
        line = self._line(method, path, route, status, seconds, trace)
        self._lines.append(line)
        self._size += len(line) + 1
        if self._size > FLUSH_CHARACTERS:
            self.write()

    def _line(self, method: str, path: str, route: str, status: int, seconds: float, trace: RequestTrace) -> str:
        if not self._is_json:
            stamp = datetime.now().isoformat(" ", "milliseconds").replace(".", ",")
            plain = path if path.isascii() and path.isprintable() and " " not in path else quote(path)
            return f"{stamp} INFO quartet.access {method} {plain} {status} {seconds * 1000:.1f} ms {trace.id}"
        line: dict[str, Any] = {
            "time": utc_time(time.time()),
            "level": "INFO",
            "logger": "quartet.access",
            "id": trace.id,
            "method": method,
            "path": path,
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
        }
        if trace.model:
            line |= {"model": trace.model, "version": trace.version}
        if trace.started_at:
            line["rows"] = trace.rows
            line["queue_seconds"] = round(trace.started_at - trace.queued_at, 6)
        if trace.ended_at:
            line["compute_seconds"] = round(trace.ended_at - trace.started_at, 6)
        if trace.time_to_first_token:
            line["time_to_first_token_seconds"] = round(trace.time_to_first_token, 6)
        if trace.error_code:
            line["reason"] = trace.error_code
        if trace.span:
            line["trace"] = f"{trace.span.get_span_context().trace_id:032x}"
        return orjson.dumps(line).decode()

    def write(self) -> None:
        """Hand the collected lines to the thread that writes them."""
        lines, self._lines, self._size = self._lines, [], 0
        if lines:
            self._output.handle(logging.makeLogRecord({"msg": "\n".join(lines)}))

    def close(self) -> None:
        """Write the collected lines."""
        self.write()
        self._output.flush()
