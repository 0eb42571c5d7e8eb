"""Shutdown by one or two signals while the service loads, is idle, computes or streams. No request is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest
from support.processes import (
    HANG_ON_SEVEN,
    SLOW_STEPS,
    TIMEOUT_SECONDS,
    ServiceProcess,
    children,
    serving,
    start_process,
)
from support.waiting import wait_until


def stream(service: ServiceProcess, characters: int) -> socket.socket:
    """Start a text stream; return its connection after the first bytes."""
    caller = service.connect()
    body = json.dumps({"prompt": "a", "max_characters": characters, "n": 16, "stream": True}).encode()
    caller.sendall(b"POST /v1/text/continue HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert caller.recv(10)
    return caller


def is_accepting(service: ServiceProcess) -> bool:
    try:
        service.connect().close()
    except OSError:
        return False
    return True


def test_sigterm_drains_and_leaves_no_process(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        workers, caller = service.workers, stream(service, 3000)
        service.process.send_signal(signal.SIGTERM)
        with caller, caller.makefile("rb") as answer:
            content = answer.read()
        assert content.count(b'"finish_reason":"length"') == 16
        assert content.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert service.process.wait(TIMEOUT_SECONDS) == 0
        assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
        with pytest.raises(ConnectionError):
            service.connect()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP))],
)
def test_a_signal_to_the_process_group_drains(tiny_store: Path, number: int, workers: int) -> None:
    """Ctrl-C, a closed terminal and systemd send the signal to the whole process group."""
    default_handler = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)"  # the tests may run under nohup
    with serving(tiny_store, own_group=True, before=default_handler, workers=workers) as service:
        caller = stream(service, 3000)
        os.killpg(service.process.pid, number)
        with caller, caller.makefile("rb") as answer:
            content = answer.read()
        assert content.count(b'"finish_reason":"length"') == 16
        assert service.process.wait(TIMEOUT_SECONDS) == 0


def test_workers_stopped_by_sigterm_lose_no_request(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        before = service.workers
        with stream(service, 3000) as caller, caller.makefile("rb") as answer:
            for worker in before:
                os.kill(worker, signal.SIGTERM)
            url = f"{service.url}/health/live"
            assert {httpx.get(url, timeout=TIMEOUT_SECONDS).status_code for _ in range(20)} == {200}
            assert answer.read().count(b'"finish_reason":"length"') == 16
        wait_until(lambda: len(service.workers) == 2 and not service.workers & before)


@pytest.mark.slow
def test_draining_may_take_longer_than_the_liveness_timeout(tiny_store: Path) -> None:
    with serving(tiny_store, before=SLOW_STEPS, liveness_timeout_seconds=1) as service:
        caller = stream(service, 300)  # takes at least 1.5 s
        service.process.send_signal(signal.SIGTERM)
        with caller, caller.makefile("rb") as answer:
            assert answer.read().count(b'"finish_reason":"length"') == 16
        assert service.process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.slow
def test_sighup_is_ignored_under_nohup(tiny_store: Path) -> None:
    ignoring_handler = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with serving(tiny_store, own_group=True, before=ignoring_handler) as service:
        before = service.workers
        os.killpg(service.process.pid, signal.SIGHUP)
        assert httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS).status_code == 200
        assert service.workers == before


@pytest.mark.slow
def test_a_hung_worker_does_not_outlive_the_supervisor(tiny_store: Path) -> None:
    with serving(
        tiny_store, before=HANG_ON_SEVEN, own_group=True, shutdown_grace_seconds=0.1, inline_seconds=0.05
    ) as service:
        workers, caller = service.workers, service.connect()
        caller.sendall(b'POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{"count":7}')
        wait_until((tiny_store / ".hung").exists)
        service.process.kill()
        service.process.wait(TIMEOUT_SECONDS)
        wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
        caller.close()


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_second_signal_exits_immediately(tiny_store: Path, workers: int) -> None:
    with serving(tiny_store, workers=workers, shutdown_grace_seconds=60) as service:
        processes, caller = service.workers, service.connect()
        caller.sendall(b"POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")  # incomplete
        service.process.send_signal(signal.SIGTERM)

        wait_until(lambda: not is_accepting(service))
        assert service.stop() == 0  # stop() waits for TIMEOUT_SECONDS, less than the grace period
        assert not [process for process in processes if Path(f"/proc/{process}").exists()]
        caller.close()


@pytest.mark.parametrize(
    ("workers", "threads"), [(1, 1), *(pytest.param(2, threads, marks=pytest.mark.slow) for threads in (1, 2))]
)
def test_a_signal_during_the_start_exits_immediately(tiny_store: Path, workers: int, threads: int) -> None:
    def handles_sigterm() -> bool:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
        return bool(caught & 1 << (signal.SIGTERM - 1))

    with start_process(tiny_store, workers=workers, threads=threads, shutdown_grace_seconds=60) as process:
        try:
            wait_until(handles_sigterm)
            processes = children(process.pid)
            process.terminate()
            assert process.wait(TIMEOUT_SECONDS) == 0  # less than the grace period
            assert not [child for child in processes if Path(f"/proc/{child}").exists()]
        finally:
            process.kill()


CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.mark.slow
def test_process_1_can_be_stopped_while_torch_is_imported(tiny_store: Path, tmp_path: Path) -> None:
    if not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare is missing or not permitted")
    slow_module = "import pathlib, time; pathlib.Path(__file__).with_name('started').touch(); time.sleep(60)"
    (tmp_path / "torch.py").write_text(slow_module)
    wrapper = (*CONTAINER, "env", f"PYTHONPATH={tmp_path}")
    with start_process(tiny_store, workers=1, wrapper=wrapper) as process:
        try:
            wait_until((tmp_path / "started").exists)
            (first,) = children(process.pid)
            os.kill(first, signal.SIGTERM)
            assert process.wait(TIMEOUT_SECONDS) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_readiness_turns_off_at_the_signal_and_requests_are_still_answered(tiny_store: Path, workers: int) -> None:
    """Connections without a request stay open after the signal. Only the readiness check then gets 503."""

    def status(connection: socket.socket, head: bytes = b"GET /health/ready HTTP/1.1", body: bytes = b"") -> bytes:
        try:
            connection.sendall(head + b"\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return connection.recv(65536)[9:12]
        except OSError:
            return b""

    with serving(tiny_store, last_request_seconds=60, workers=workers) as service, contextlib.ExitStack() as opened:
        new, late = ([opened.enter_context(service.connect()) for _ in range(4)] for _ in range(2))
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_accepting(service))
        statuses = list(map(status, new))
        assert b"503" in statuses, statuses
        statuses = [status(connection, b"POST /v1/images/sample HTTP/1.1", b"{}") for connection in late]
        assert b"200" in statuses, statuses
        assert b"503" not in statuses, statuses
        assert service.process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_request_that_cannot_finish_before_the_stop_gets_503(tiny_store: Path, workers: int) -> None:
    with serving(
        tiny_store, before=HANG_ON_SEVEN, workers=workers, shutdown_grace_seconds=1, inline_seconds=0
    ) as service:
        processes = service.workers
        with service.connect() as caller:
            caller.sendall(b'POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{"count":7}')
            wait_until((tiny_store / ".hung").exists)
            service.process.send_signal(signal.SIGTERM)
            assert caller.recv(65536).startswith(b"HTTP/1.1 503 ")
        assert service.process.wait(TIMEOUT_SECONDS) == 0  # less than two default grace periods
        assert not [process for process in processes if Path(f"/proc/{process}").exists()]


@pytest.mark.slow
def test_a_client_that_stops_reading_does_not_delay_the_stop(tiny_store: Path) -> None:
    with serving(tiny_store, shutdown_grace_seconds=1) as service, socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url, body = httpx.URL(service.url), b'{"prompt": "a", "max_characters": 4000, "n": 16, "stream": true}'
        caller.connect((url.host, url.port or 0))
        caller.sendall(
            b"POST /v1/text/continue HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert caller.recv(10)
        processes = service.workers
        assert service.stop() == 0
        assert not [process for process in processes if Path(f"/proc/{process}").exists()]


def test_workers_end_when_the_supervisor_is_killed(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        workers = service.workers
        service.stop(signal.SIGKILL)

        def have_ended() -> bool:
            return not [
                worker for worker in workers if Path(f"/proc/{worker}").exists() and " Z " not in status(worker)
            ]

        wait_until(have_ended)


def status(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return " Z "
