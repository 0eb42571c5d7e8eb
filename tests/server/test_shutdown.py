"""Shutdown: during loading, idle, computing or streaming; by one or two signals. No accepted request is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from support.processes import HANG_ON_SEVEN, TIMEOUT_SECONDS, ServiceProcess, children, serving, start_process
from support.waiting import wait_until

from app.server.supervisor import can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="workers need fork")


def stream(service: ServiceProcess, characters: int) -> socket.socket:
    """A running text stream."""
    caller = service.connect()
    body = json.dumps({"prompt": "a", "max_characters": characters, "n": 16, "stream": True}).encode()
    caller.sendall(b"POST /v1/text/continue HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert caller.recv(10)
    return caller


def test_a_stop_drains_and_leaves_no_process(tiny_store: Path) -> None:
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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_processes_drains_too(tiny_store: Path, number: int, workers: int) -> None:
    """Like Ctrl-C in a terminal, a closed terminal, and systemd."""
    heard = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)"  # also where these tests run under nohup
    with serving(tiny_store, own_group=True, before=heard, workers=workers) as service:
        caller = stream(service, 3000)
        os.killpg(service.process.pid, number)
        with caller, caller.makefile("rb") as answer:
            content = answer.read()
        assert content.count(b'"finish_reason":"length"') == 16
        assert service.process.wait(TIMEOUT_SECONDS) == 0


def test_a_single_stopped_worker_loses_no_request(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        before, caller = service.workers, stream(service, 3000)
        for worker in before:
            os.kill(worker, signal.SIGTERM)
        answers = [httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS).status_code for _ in range(20)]
        assert set(answers) == {200}
        with caller, caller.makefile("rb") as answer:
            assert answer.read().count(b'"finish_reason":"length"') == 16
        wait_until(lambda: len(service.workers) == 2 and not service.workers & before)


def test_draining_may_take_longer_than_the_liveness_timeout(tiny_store: Path) -> None:
    with serving(tiny_store, liveness_timeout_seconds=0.3, shutdown_grace_seconds=10) as service:
        caller = stream(service, 4000)
        service.process.send_signal(signal.SIGTERM)
        with caller, caller.makefile("rb") as answer:
            assert answer.read().count(b'"finish_reason":"length"') == 16
        assert service.process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_sighup_does_not_interrupt_draining(tiny_store: Path, workers: int) -> None:
    heard = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)"
    with serving(tiny_store, own_group=True, before=heard, workers=workers) as service:
        caller = stream(service, 3000)
        for _ in range(3):
            os.killpg(service.process.pid, signal.SIGHUP)
            time.sleep(0.1)  # they come as they come
        with caller, caller.makefile("rb") as answer:
            assert answer.read().count(b'"finish_reason":"length"') == 16
        assert service.process.wait(TIMEOUT_SECONDS) == 0


def test_sighup_is_ignored_under_nohup(tiny_store: Path) -> None:
    ignored = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with serving(tiny_store, own_group=True, before=ignored) as service:
        before = service.workers
        os.killpg(service.process.pid, signal.SIGHUP)
        assert httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS).status_code == 200
        assert service.workers == before


def test_a_hung_worker_does_not_outlive_the_supervisor(tiny_store: Path) -> None:
    with serving(
        tiny_store, before=HANG_ON_SEVEN, own_group=True, shutdown_grace_seconds=0.1, inline_seconds=0.05
    ) as service:
        workers, caller = service.workers, service.connect()
        caller.sendall(b'POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{"count":7}')
        service.process.kill()
        service.process.wait(TIMEOUT_SECONDS)
        wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
        caller.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_exits_immediately(tiny_store: Path, workers: int) -> None:
    with serving(tiny_store, workers=workers, shutdown_grace_seconds=60) as service:
        processes, caller = service.workers, service.connect()
        caller.sendall(b"POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")  # and no more
        service.process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            try:
                service.connect().close()
            except OSError:
                return True
            return False

        wait_until(refused)
        begun = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - begun < 10
        assert not [one for one in processes if Path(f"/proc/{one}").exists()]
        caller.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_during_loading_exits_immediately(tiny_store: Path, workers: int) -> None:
    weights = tiny_store / "tiny-gan" / "1" / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)  # whoever reads it waits for what never comes
    held: list[int] = []

    def loads() -> bool:
        try:
            held.append(os.open(weights, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads yet
            return False
        return True

    with start_process(tiny_store, workers=workers, shutdown_grace_seconds=60) as process:
        try:
            wait_until(loads)
            wait_until(lambda: len(children(process.pid)) == (workers if workers > 1 else 0))
            processes, begun = children(process.pid), time.monotonic()
            process.terminate()
            assert process.wait(TIMEOUT_SECONDS) == 0
            assert time.monotonic() - begun < 5
            assert not [one for one in processes if Path(f"/proc/{one}").exists()]
            assert process.stdout
            assert process.stdout.read() == ""  # it never said that it serves
        finally:
            process.kill()
    os.close(held[0])


CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def test_process_1_can_be_stopped_while_torch_is_imported(tiny_store: Path, tmp_path: Path) -> None:
    if not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("nobody may make a container here")
    begun = "import pathlib, time; pathlib.Path(__file__).with_name('begun').touch(); time.sleep(60)"
    (tmp_path / "torch.py").write_text(begun)  # one that takes its time
    wrapper = (*CONTAINER, "env", f"PYTHONPATH={tmp_path}")
    with start_process(tiny_store, workers=1, wrapper=wrapper) as process:
        try:
            wait_until((tmp_path / "begun").exists)
            (first,) = children(process.pid)
            os.kill(first, signal.SIGTERM)
            assert process.wait(TIMEOUT_SECONDS) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("workers", [1, 2])
def test_readiness_turns_off_at_the_signal(tiny_store: Path, workers: int) -> None:
    """Within 0.1 s in one of three tries, because the machine may be busy."""
    took = [_until_unready(tiny_store, workers)]
    while took[-1] > 0.1 and len(took) < 3:
        took.append(_until_unready(tiny_store, workers))
    assert min(took) < 0.1


def _until_unready(store: Path, workers: int) -> float:
    """Seconds from the signal to 503, while a stream keeps the service running."""

    def ready(connection: socket.socket) -> bool:
        try:
            connection.sendall(b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n")
            return connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        except OSError:
            return False

    with serving(store, workers=workers, shutdown_grace_seconds=20) as service:
        kept = [service.connect() for _ in range(4)]
        assert all(map(ready, kept))
        caller = stream(service, 4000)  # so that it does not just end
        service.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        wait_until(lambda: not any(map(ready, kept)))
        took = time.monotonic() - begun
        with caller, caller.makefile("rb") as answer:
            assert answer.read().count(b'"finish_reason":"length"') == 16
        assert service.process.wait(TIMEOUT_SECONDS) == 0
        for connection in kept:
            connection.close()
    return took


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_that_cannot_finish_before_the_stop_get_an_error(tiny_store: Path, workers: int) -> None:
    with serving(
        tiny_store, before=HANG_ON_SEVEN, workers=workers, shutdown_grace_seconds=1, inline_seconds=0
    ) as service:
        processes = service.workers
        with service.connect() as caller:
            caller.sendall(b'POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{"count":7}')
            time.sleep(0.3)  # it is computed
            begun = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            assert caller.recv(65536).startswith(b"HTTP/1.1 503 ")
        assert service.process.wait(TIMEOUT_SECONDS) == 0
        assert time.monotonic() - begun < 2 * 1 + 5 + 1
        assert not [one for one in processes if Path(f"/proc/{one}").exists()]


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
        assert not [one for one in processes if Path(f"/proc/{one}").exists()]


def test_workers_end_with_the_supervisor(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        workers = service.workers
        service.stop(signal.SIGKILL)

        def gone() -> bool:
            return not [one for one in workers if Path(f"/proc/{one}").exists() and " Z " not in status(one)]

        wait_until(gone)


def status(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return " Z "
