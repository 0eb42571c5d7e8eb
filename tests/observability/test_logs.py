"""Log lines are written on a thread: a blocked or full stderr stalls neither requests nor the exit."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.processes import children, start_process
from support.service import ROOT
from support.waiting import wait_until

from app.observability.access_log import AccessLog
from app.observability.logs import MAX_QUEUED_RECORDS, BackgroundHandler
from benchmarks.support.servers import free_port

LONG_PATH = f"/{'x' * 2000}"


@contextmanager
def service(store: Path, **streams: Any) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Start ``python -m app.main`` with these settings or streams, and stop it. It must end with status 0."""
    settings = {name: streams.pop(name) for name in ("workers", "log_format") if name in streams}
    settings |= {"store": store, "port": free_port(), "threads": 1, "shutdown_grace_seconds": 1}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUARTET_")}
    environment |= {f"QUARTET_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "app.main"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **streams) as process:
        try:
            transport = httpx.HTTPTransport(retries=8)  # waits up to two minutes for the start
            with httpx.Client(
                base_url=f"http://127.0.0.1:{settings['port']}", transport=transport, timeout=30
            ) as client:
                yield process, client
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "log_format"), [(1, "json"), (2, "text")])
def test_requests_are_answered_while_stderr_is_blocked(tiny_store: Path, workers: int, log_format: str) -> None:
    pipe = subprocess.PIPE
    with service(tiny_store, stderr=pipe, workers=workers, log_format=log_format) as (process, client):
        for _ in range(100):  # three times as many bytes as a pipe holds
            assert client.get(LONG_PATH).status_code == 404
        if workers > 1:  # the parent logs the death of a worker, and replaces the worker
            before = children(process.pid)
            os.kill(min(before), signal.SIGKILL)
            wait_until(lambda: len(children(process.pid) - before) == 1)


@pytest.mark.slow
def test_requests_are_answered_while_stdout_and_stderr_are_full(tiny_store: Path) -> None:
    with open("/dev/full", "w") as full, service(tiny_store, stdout=full, stderr=full, workers=1) as (_, client):
        for _ in range(3):
            with client.stream("GET", LONG_PATH) as response:
                assert response.status_code == 404
                assert "connection" not in response.headers


@contextmanager
def piped_stderr() -> Iterator[int]:
    """Replace stderr with a pipe, and yield the end from which its lines can be read."""
    saved, (read_end, write_end) = os.dup(2), os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)
    yield read_end
    os.dup2(saved, 2)
    os.close(saved)
    os.close(read_end)


def test_records_past_the_limit_are_lost_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    content = b""

    def read() -> None:
        nonlocal content
        while not content.endswith(b"last\n"):
            content += os.read(stderr, 65536)

    with piped_stderr() as stderr:
        handler = BackgroundHandler()
        for _ in range(MAX_QUEUED_RECORDS + 2000):  # a pipe holds about 600 of these lines
            handler.handle(logging.makeLogRecord({"msg": "x" * 100}))
        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: content.count(b"x\n") >= MAX_QUEUED_RECORDS)
        handler.handle(logging.makeLogRecord({"msg": "last"}))
        reader.join(30)
        assert not reader.is_alive()
    lost = map(int, re.findall(r"about (\d+) log records were lost: stderr was blocked", caplog.text))
    assert content.count(b"x\n") + sum(lost) == MAX_QUEUED_RECORDS + 2000


def test_a_log_without_lines_starts_no_thread() -> None:
    before = threading.active_count()
    AccessLog("json").close()
    assert threading.active_count() == before


@pytest.mark.slow
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
