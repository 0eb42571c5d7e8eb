"""Log lines are written on a thread: a blocked stderr stalls neither requests nor the exit."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import ROOT

from app.observability.access_log import AccessLog
from app.observability.logs import MAX_QUEUED_RECORDS, BackgroundHandler, StderrHandler

PIPE_BYTES = 65_536


@pytest.mark.parametrize(("workers", "log_format"), [(1, "json"), (2, "text")])
def test_requests_are_answered_while_stderr_is_blocked(tiny_store: Path, workers: int, log_format: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUARTET_")}
    settings = {"store": tiny_store, "port": 0, "workers": workers, "threads": 1, "log_format": log_format}
    environment |= {f"QUARTET_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "app.main"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            address = re.search(r"https?://[\d.:]+", process.stdout.readline())
            assert address
            with httpx.Client(base_url=address[0], timeout=20) as client:
                for _ in range(4 * PIPE_BYTES // 2000):
                    assert client.get(f"/{'x' * 2000}").status_code == 404
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, list[str]]]:
    """A stderr that blocks until the event is set, and the messages written to it."""
    release, messages = threading.Event(), list[str]()

    def emit(self: StderrHandler, record: logging.LogRecord) -> None:
        assert release.wait(30)
        messages.append(record.getMessage())

    monkeypatch.setattr(StderrHandler, "emit", emit)
    yield release, messages
    release.set()


def test_records_past_the_limit_are_dropped_and_counted(
    blocked: tuple[threading.Event, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    release, messages = blocked
    handler = BackgroundHandler()
    for i in range(MAX_QUEUED_RECORDS + 10):
        handler.handle(logging.makeLogRecord({"msg": f"record {i}"}))
    assert handler.dropped in (9, 10)  # the thread may hold one more record
    release.set()
    handler.flush()
    handler.handle(logging.makeLogRecord({"msg": "last"}))
    handler.close()
    assert messages[:2] == ["record 0", "record 1"]
    assert messages[-1] == "last"
    assert len(messages) in (MAX_QUEUED_RECORDS + 1, MAX_QUEUED_RECORDS + 2)
    assert re.search(r"(9|10) log records were dropped: stderr was blocked", caplog.text)


def test_the_exit_waits_at_most_a_second_for_a_blocked_stderr(blocked: tuple[threading.Event, list[str]]) -> None:
    release, messages = blocked
    handler = BackgroundHandler()
    handler.handle(logging.makeLogRecord({"msg": "one"}))
    handler.close()
    assert not messages
    release.set()
    handler.close()
    assert messages == ["one"]


def test_a_log_without_lines_starts_no_thread() -> None:
    before = threading.active_count()
    AccessLog("json").close()
    assert threading.active_count() == before
