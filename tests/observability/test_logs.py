"""Log lines are written on a thread: a blocked or full stderr stalls neither requests nor the exit."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.processes import children, start_process
from support.waiting import wait_until

from app.observability.logs import MAX_QUEUED_RECORDS, BackgroundHandler
from benchmarks.support.servers import free_port


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams", ["2>{pipe}", ">/dev/full 2>/dev/full", "0<&- 2>&-"], ids=["blocked", "full", "closed"]
)
def test_requests_are_answered_while_stderr_is_blocked_full_or_closed(
    tiny_store: Path, tmp_path: Path, streams: str
) -> None:
    pipe, port = tmp_path / "pipe", free_port()
    os.mkfifo(pipe)
    unread = os.open(pipe, os.O_RDWR)
    wrapper = ("bash", "-c", f'exec "$@" {streams.format(pipe=pipe)}', "bash")
    settings = {"port": port, "log_level": "info", "shutdown_grace_seconds": 1}
    with start_process(tiny_store, wrapper=wrapper, **settings) as process:
        try:
            transport = httpx.HTTPTransport(retries=8)  # waits up to two minutes for the start
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=30) as client:
                for _ in range(100):  # three times as many bytes as a pipe holds
                    answer = client.get(f"/{'x' * 2000}")
                    assert (answer.status_code, "connection" in answer.headers) == (404, False)
                before = children(process.pid)
                os.kill(min(before), signal.SIGKILL)  # the parent logs this, and replaces the worker
                wait_until(lambda: len(children(process.pid) - before) == 1)
            if "&-" in streams:  # otherwise the next file or connection that the process opens could become its stderr
                for number in (0, 2):
                    assert Path(f"/proc/{process.pid}/fd/{number}").readlink() == Path(os.devnull)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(unread)


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
