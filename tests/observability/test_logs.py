"""Log lines are written on a thread: a blocked stderr stalls neither requests nor the exit."""

from __future__ import annotations

import errno
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
from support.processes import start_process
from support.service import Serve

from app.observability import logs
from app.observability.access_log import AccessLog
from app.observability.logs import MAX_QUEUED_RECORDS, BackgroundHandler, StderrHandler
from app.server import uvicorn_server

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
    """Yield an event and a list: stderr blocks until the event is set, and the list receives the written messages."""
    release, messages = threading.Event(), list[str]()

    def emit(self: StderrHandler, record: logging.LogRecord) -> None:
        assert release.wait(30)
        messages.append(record.getMessage())

    monkeypatch.setattr(StderrHandler, "emit", emit)
    yield release, messages
    release.set()


def test_records_past_the_limit_are_lost_and_counted(
    blocked: tuple[threading.Event, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    release, messages = blocked
    handler = BackgroundHandler()
    for i in range(MAX_QUEUED_RECORDS + 10):
        handler.handle(logging.makeLogRecord({"msg": f"record {i}"}))
    release.set()
    handler.flush()
    handler.handle(logging.makeLogRecord({"msg": "last"}))
    handler.close()
    assert messages[:2] == ["record 0", "record 1"]
    assert messages[-1] == "last"
    assert len(messages) in (MAX_QUEUED_RECORDS + 1, MAX_QUEUED_RECORDS + 2)
    assert re.search(r"(9|10) log lines were lost: stderr was blocked", caplog.text)


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


def write_lines(handler: logging.Handler, *lines: str) -> None:
    for line in lines:
        handler.handle(logging.makeLogRecord({"msg": line}))


def test_lines_that_stderr_does_not_accept_are_counted_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read_end, closed_pipe = os.pipe()
    os.close(read_end)
    full_disk = os.open("/dev/full", os.O_WRONLY)
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    handler = StderrHandler()
    for broken, reason in ((closed_pipe, "Broken pipe"), (full_disk, "No space left on device")):
        monkeypatch.setattr(logs, "STDERR", broken)
        write_lines(handler, "one", "two\nthree")
        monkeypatch.setattr(logs, "STDERR", file)
        write_lines(handler, "four")
        assert f"3 log lines were lost: {reason}" in caplog.text
    assert (tmp_path / "log").read_text() == "four\nfour\n"
    for descriptor in (closed_pipe, full_disk, file):
        os.close(descriptor)


def test_a_line_after_a_part_of_a_line_starts_on_a_new_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, handler, write = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), StderrHandler(), os.write
    monkeypatch.setattr(logs, "STDERR", file)

    def write_part(descriptor: int, content: bytes) -> int:
        if not content.startswith(b"part"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:4])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_part)
        write_lines(handler, "part of a line")
    write_lines(handler, "next")
    assert (tmp_path / "log").read_text() == "part\nnext\n"
    os.close(file)


def test_the_supervisor_does_not_wait_for_a_blocked_stderr(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read_end, write_end = os.pipe()
    monkeypatch.setattr(logs, "STDERR", write_end)
    handler = StderrHandler(wait=False)
    write_lines(handler, *["x" * 1000] * (2 * PIPE_BYTES // 1000))
    os.read(read_end, PIPE_BYTES)
    write_lines(handler, "last")
    assert re.search(r"\d+ log lines were lost: stderr was blocked", caplog.text)
    assert os.read(read_end, PIPE_BYTES).endswith(b"last\n")
    os.close(read_end)
    os.close(write_end)


def test_a_failing_access_log_does_not_close_the_connection(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    caplog.set_level("INFO", "quartet.access")
    monkeypatch.setattr(AccessLog, "_text", fail)
    with serve() as client:
        assert len({local_address(client) for _ in range(3)}) == 1
    assert "AccessLog.__call__ failed" in caplog.text


def local_address(client: httpx.Client) -> str:
    """Send a request, and return the address of the client's end of the connection."""
    with client.stream("GET", "/health/live") as response:
        assert response.read()
        return str(response.extensions["network_stream"].get_extra_info("client_addr"))


def test_log_lines_are_not_written_to_a_connection_if_stderr_is_closed(tiny_store: Path) -> None:
    """Without stderr, the next file or connection that the process opens could become its stderr."""
    closed = ("bash", "-c", 'exec "$@" 0<&- 2>&-', "bash")
    with start_process(tiny_store, wrapper=closed, workers=1, log_level="info") as process:
        try:
            assert process.stdout
            address = re.search(r"https?://[\d.:]+", process.stdout.readline())
            assert address
            assert [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in (0, 2)] == [Path(os.devnull)] * 2
            with httpx.Client(base_url=address[0], timeout=20) as client:
                assert client.get("/nothing").status_code == 404
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_a_full_stdout_does_not_prevent_the_start(
    monkeypatch: pytest.MonkeyPatch, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(uvicorn_server, "STDOUT", full)
    with serve() as client:
        assert client.get("/health/live").status_code == 200
    os.close(full)
    assert "the address cannot be printed: No space left on device" in caplog.text
