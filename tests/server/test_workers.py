"""Several workers behind one address: they share the connections, and dead and hung workers are replaced."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from support.processes import (
    GET_LIVE,
    HANG_ON_SEVEN,
    TIMEOUT_SECONDS,
    ServiceProcess,
    request_live,
    serving,
    start_process,
)
from support.responses import metric_samples
from support.service import ROOT
from support.waiting import wait_until

from app.server.http_server import bind
from app.server.worker_table import State, WorkerTable
from app.settings import SettingsError
from benchmarks.restarts import connections
from benchmarks.support.servers import free_port

LIVE = ("quartet_requests_total", ("method", "GET"), ("route", "/health/live"), ("status", "200"))


def connect_all(service: ServiceProcess, count: int) -> list[socket.socket]:
    """Let ``count`` callers connect and send a request at the same time."""
    callers: list[socket.socket] = []
    start = threading.Barrier(count)

    def call() -> None:
        start.wait()
        connection = service.connect()
        callers.append(connection)
        assert request_live(connection)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(callers) == count
    return callers


def counts(service: ServiceProcess) -> list[int]:
    """Return the number of connections of each worker, in ascending order."""
    port = httpx.URL(service.url).port or 0
    return sorted(connections(worker, port) for worker in service.workers)


@contextlib.contextmanager
def closing(callers: Sequence[socket.socket]) -> Iterator[None]:
    yield
    for caller in callers:
        caller.close()


@pytest.mark.parametrize(("starts", "even"), [(4, 1), pytest.param(50, 50, marks=pytest.mark.slow)])
def test_callers_are_distributed_evenly(tiny_store: Path, starts: int, even: int) -> None:
    """A worker that the machine does not run for half a second leaves the callers of this time to the other worker."""
    found: list[int] = []
    while sum(fewest >= 28 for fewest in found) < even:
        assert len(found) < starts, found
        with serving(tiny_store) as service, closing(connect_all(service, 64)):
            fewest, most = counts(service)
            assert fewest + most == 64
            found.append(fewest)


@pytest.mark.slow
def test_connections_are_distributed_one_by_one_and_metrics_are_added_up(tiny_store: Path) -> None:
    with serving(tiny_store) as service, httpx.Client(base_url=service.url, timeout=TIMEOUT_SECONDS) as client:
        callers = [connect_all(service, 1)[0] for _ in range(12)]
        with closing(callers):
            assert counts(service) == [6, 6]
            for caller in callers[::2]:
                caller.close()
            wait_until(lambda: sum(counts(service)) == 6)
            callers += [connect_all(service, 1)[0] for _ in range(6)]
            assert counts(service) == [6, 6]
        assert metric_samples(client)[LIVE] == 18


def test_a_slow_worker_does_not_block_the_others(tiny_store: Path) -> None:
    """The stopped worker has the fewest connections, so the next connections would be its own."""
    with serving(tiny_store) as service:
        slow = min(service.workers)
        os.kill(slow, signal.SIGSTOP)
        with closing(callers := connect_all(service, 8)):
            assert counts(service) == [0, 8]
            os.kill(slow, signal.SIGCONT)
            while not min(counts(service)):  # from its next heartbeat on, new connections are its own again
                callers += connect_all(service, 1)


@pytest.mark.slow
def test_connections_wait_while_all_workers_are_stopped(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        for worker in service.workers:
            os.kill(worker, signal.SIGSTOP)
        callers = [service.connect() for _ in range(700)]
        for worker in service.workers:
            os.kill(worker, signal.SIGCONT)
        with closing(callers):
            for caller in callers:
                request_live(caller)


def test_a_worker_accepts_no_more_connections_than_its_limit(tiny_store: Path) -> None:
    with serving(tiny_store, connections=3) as service, service.connect() as first:
        assert request_live(first)
        with closing(callers := connect_all(service, 5)), service.connect() as waiting:
            waiting.sendall(GET_LIVE)
            assert request_live(callers[0])
            assert counts(service) == [3, 3]
            first.close()
            assert waiting.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_a_killed_worker_loses_only_its_own_connections(tiny_store: Path) -> None:
    with serving(tiny_store, log_level="error") as service:
        before, port = service.workers, httpx.URL(service.url).port or 0
        victim = min(before)
        callers = connect_all(service, 8)
        losses = connections(victim, port)
        os.kill(victim, signal.SIGSTOP)
        waiting = [service.connect() for _ in range(8)]
        for connection in waiting:
            connection.sendall(GET_LIVE)
        os.kill(victim, signal.SIGKILL)
        with closing([*callers, *waiting]):
            for connection in waiting:
                assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
            lost = 0
            for caller in callers:
                try:
                    request_live(caller)
                except (AssertionError, OSError):
                    lost += 1
            assert lost == losses == 4
            wait_until(lambda: len(service.workers) == 2 and victim not in service.workers)
            with httpx.Client(base_url=service.url, timeout=TIMEOUT_SECONDS) as client:
                assert metric_samples(client)[LIVE] == 8 + 8 + 4  # including the requests of the dead worker


@pytest.mark.slow
def test_connections_are_rebalanced_after_a_replacement(tiny_store: Path) -> None:
    with serving(tiny_store, log_level="error") as service:
        callers = connect_all(service, 12)
        os.kill(min(service.workers), signal.SIGKILL)

        def are_balanced() -> bool:
            for i, caller in enumerate(callers):
                try:
                    is_open = request_live(caller)
                except (AssertionError, OSError):
                    is_open = False
                if not is_open:  # clients connect again
                    caller.close()
                    callers[i] = service.connect()
            return len(service.workers) == 2 and counts(service)[0] >= 4

        wait_until(are_balanced)
        with closing(callers):
            pass


@pytest.mark.slow
def test_a_hung_worker_is_replaced(tiny_store: Path) -> None:
    with serving(tiny_store, liveness_timeout_seconds=2, log_level="error") as service:
        before = service.workers
        os.kill(min(before), signal.SIGSTOP)
        wait_until(lambda: min(before) not in service.workers and len(service.workers) == 2)
        for _ in range(8):
            assert httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS).status_code == 200


def test_a_worker_with_a_hung_network_is_replaced(tiny_store: Path) -> None:
    """Its clients are disconnected then. Until then, the other worker accepts all connections."""
    with serving(
        tiny_store, before=HANG_ON_SEVEN, liveness_timeout_seconds=10, inline_seconds=0.05, log_level="error"
    ) as service:
        before = service.workers
        with service.connect() as hung:
            hung.sendall(b'POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{"count":7}')
            wait_until((tiny_store / ".hung").exists)
            with closing(connect_all(service, 6)):
                assert service.workers == before  # no connection had to wait for the replacement
            hung.settimeout(TIMEOUT_SECONDS)
            with contextlib.suppress(ConnectionError):
                assert hung.recv(1) == b""
        wait_until(lambda: len(service.workers) == 2 and len(service.workers & before) == 1)


FAIL_IN_ONE_WORKER = """
import os
from pathlib import Path
from app.tasks.image_generation import ImageSampler
original, file = ImageSampler.predict, Path(os.environ["QUARTET_STORE"], "fails")
def predict(self, items):
    if file.exists() and file.read_text() == str(os.getpid()):
        raise ValueError("the network fails")
    return original(self, items)
ImageSampler.predict = predict
"""


def test_a_failing_worker_gets_no_connections_while_another_works(tiny_store: Path) -> None:
    with serving(tiny_store, before=FAIL_IN_ONE_WORKER, log_level="error") as service:

        def statuses(count: int) -> list[int]:
            url = f"{service.url}/v1/images/sample"
            return [httpx.post(url, json={"count": 1}, timeout=TIMEOUT_SECONDS).status_code for _ in range(count)]

        assert set(statuses(4)) == {200}
        (tiny_store / "fails").write_text(str(min(service.workers)))
        wait_until(lambda: 500 in statuses(2))
        wait_until(lambda: statuses(8) == [200] * 8)


@pytest.mark.parametrize("inline_seconds", [pytest.param(0, marks=pytest.mark.slow), 0.05])
def test_a_single_process_with_a_hung_network_exits(tiny_store: Path, inline_seconds: float) -> None:
    """The network hangs on a thread or on the event loop."""
    with serving(
        tiny_store,
        before=HANG_ON_SEVEN,
        workers=1,
        liveness_timeout_seconds=0.5,
        inline_seconds=inline_seconds,
        log_level="error",
    ) as service:
        answer = httpx.post(f"{service.url}/v1/images/sample", json={"count": 2}, timeout=TIMEOUT_SECONDS)
        assert answer.status_code == 200
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{service.url}/v1/images/sample", json={"count": 7}, timeout=TIMEOUT_SECONDS)
        assert service.process.wait(TIMEOUT_SECONDS) == 1


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_pausing_all_processes_ends_no_worker(tiny_store: Path, workers: int) -> None:
    """All processes of a frozen container are paused. In this test, the pause is longer than the liveness timeout."""
    with serving(tiny_store, own_group=True, workers=workers, liveness_timeout_seconds=1, log_level="error") as service:
        before = service.workers
        os.killpg(service.process.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.killpg(service.process.pid, signal.SIGCONT)
        for _ in range(20):
            assert httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS).status_code == 200
            time.sleep(0.05)
        assert service.workers == before
        assert service.process.poll() is None


@pytest.mark.slow
def test_each_worker_has_room_for_the_largest_body(tiny_store: Path) -> None:
    """A worker accepts the largest body even if its share of max_buffered_bytes is smaller."""
    with serving(tiny_store, max_body_bytes=40_000, max_buffered_bytes=50_000) as service:
        answer = httpx.post(f"{service.url}/v1/images/classify", content=bytes(39_000), timeout=TIMEOUT_SECONDS)
        assert answer.json()["error"]["code"] == "not_an_image"


def test_an_invalid_host_name_gives_a_clear_error() -> None:
    with pytest.raises(SettingsError, match=r"QUARTET_HOST 'a\.\.b', QUARTET_PORT 0: cannot listen: "):
        bind("a..b", 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_used_address_gives_a_clear_error(tiny_store: Path, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with start_process(tiny_store, port=port, workers=workers) as process:
            assert process.wait(TIMEOUT_SECONDS) == 1
    message = f"QUARTET_HOST '127.0.0.1', QUARTET_PORT {port}: cannot listen: {os.strerror(98)}"
    assert capfd.readouterr().err.strip() == message


USED_AT_FORK = """
import os, socket
other = socket.socket()
other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
other.bind(("127.0.0.1", {port}))
os.register_at_fork(before=other.listen)
"""


@pytest.mark.slow
def test_an_address_that_another_process_uses_during_the_start_gives_a_clear_error(
    tiny_store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The service binds its socket before it loads the models, and listens afterwards."""
    port = free_port()
    with start_process(tiny_store, before=USED_AT_FORK.format(port=port), port=port) as process:
        assert process.wait(TIMEOUT_SECONDS) == 1
    assert f"cannot listen: {os.strerror(98)}" in capfd.readouterr().err


@pytest.mark.slow
def test_process_1_reports_a_stopped_command_as_failed() -> None:
    """Only the service handles SIGTERM in process 1; a training or an import does not end with status 0."""
    code = "import os, signal; os.getpid = lambda: 1; import app, app.networks; print(signal.getsignal(signal.SIGTERM))"
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    code += "; print(os.environ.get('OPENBLAS_NUM_THREADS'))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert re.search(r"SIG_DFL|^0$", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-1] == "None"


# The shared table


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def table() -> WorkerTable:
    """Return a table of three ready workers with 2, 3 and 5 connections."""
    table = WorkerTable(3, fresh_seconds=1.0, clock=Clock())
    for place, connected in enumerate((2, 3, 5)):
        table.states[place], table.connections[place] = State.READY, connected
        table.beat(place)
    return table


def accepting(table: WorkerTable) -> list[int]:
    return [place for place in range(3) if table.may_accept(place)]


def test_only_the_least_loaded_workers_accept(table: WorkerTable) -> None:
    assert accepting(table) == [0]
    table.connections[0] = 3
    assert accepting(table) == [0, 1]


@pytest.mark.parametrize("state", [State.STARTING, State.UNHEALTHY, State.DRAINING])
def test_a_worker_that_is_not_ready_accepts_nothing_while_another_is_ready(table: WorkerTable, state: State) -> None:
    table.states[0] = state
    assert accepting(table) == [1]


def test_unhealthy_workers_accept_if_no_worker_is_ready(table: WorkerTable) -> None:
    for place in range(3):
        table.states[place] = State.UNHEALTHY
    table.states[2] = State.DRAINING
    assert accepting(table) == [0, 1]


def test_a_worker_with_an_old_heartbeat_does_not_count(table: WorkerTable) -> None:
    clock = Clock()
    clock.now = 101.5
    stale = WorkerTable(2, fresh_seconds=1.0, clock=clock)
    for place, (connected, heartbeat) in enumerate(((0, 100.0), (4, 101.0))):
        stale.states[place], stale.connections[place], stale.heartbeats[place] = State.READY, connected, heartbeat
    assert stale.may_accept(1)
    table.clear(0)
    assert accepting(table) == [1]
