"""Several workers behind one address: connections are distributed, and dead and hung workers are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from support.processes import HANG_ON_SEVEN, TIMEOUT_SECONDS, request_live, serving
from support.responses import metric_samples
from support.service import ROOT
from support.waiting import wait_until

from app.main import create_app
from app.server.http_protocol import BoundedHttpProtocol
from app.server.supervisor import CONNECTION_MESSAGE, RELEASE_MESSAGE, RESTART_DELAYS, Supervisor, WorkerProcess
from app.server.system import can_fork
from app.server.uvicorn_server import CHANNEL_BYTES, ListeningServer, Server, WorkerServer, listen_at
from app.settings import Settings, SettingsError
from benchmarks.reliability.restarts import connections

pytestmark = pytest.mark.skipif(not can_fork(), reason="workers need fork")


class AbortingWorker(WorkerServer):
    """A worker that aborts each connection immediately."""

    def protocol(self) -> Any:
        class AbortingProtocol(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                transport.abort()

        return AbortingProtocol()


def supervisor_of(*workers: WorkerProcess, work: Callable[[socket.socket], None] = lambda channel: None) -> Supervisor:
    """Return a supervisor that serves with these workers. Its listener is a stub."""
    supervisor = Supervisor(Mock(), work, 1, 1.0, 20.0, 30.0, ready=lambda: None, died=lambda pid: None)
    supervisor._workers, supervisor._serving = [*workers], True
    return supervisor


def test_connections_are_distributed_and_metrics_are_added_up(tiny_store: Path) -> None:
    with serving(tiny_store) as service, httpx.Client(base_url=service.url, timeout=TIMEOUT_SECONDS) as client:
        assert len(service.workers) == 2
        open_connections = []
        for _ in range(12):  # one after the other, so that no worker reports its load much later than the other
            open_connections.append(service.connect())
            assert request_live(open_connections[-1])
        port = httpx.URL(service.url).port or 0
        counts = [connections(worker, port) for worker in service.workers]
        assert sum(counts) == 12
        assert min(counts) >= 4  # a worker may report the end of its last request late, so the counts may differ
        for connection in open_connections:
            request_live(connection)
            connection.close()
        live = ("quartet_requests_total", ("method", "GET"), ("route", "/health/live"), ("status", "200"))
        assert metric_samples(client)[live] == 24


def test_a_closed_connection_is_reported_without_waiting_for_the_next_tick(tiny_store: Path) -> None:
    settings = Settings(store=tiny_store, workers=1)

    async def reports() -> bytes:
        own_end, channel = socket.socketpair()
        with own_end, channel, socket.create_server(("127.0.0.1", 0)) as listener:
            own_end.setblocking(False)
            worker = WorkerServer(create_app(settings), settings, channel)
            worker.config.load()
            worker.lifespan = worker.config.lifespan_class(worker.config)
            worker.start_accepting()
            with socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
                socket.send_fds(own_end, [CONNECTION_MESSAGE], [connection.fileno()])
                content = await asyncio.get_running_loop().sock_recv(own_end, 4096)
                assert content == b"got 1\nleft 0\nbusy 1\n"
                await asyncio.gather(*worker.arriving)
            async with asyncio.timeout(TIMEOUT_SECONDS):
                content = await asyncio.get_running_loop().sock_recv(own_end, 4096)
            asyncio.get_running_loop().remove_reader(channel)
        return content

    assert asyncio.run(reports()) == b"got 0\nleft 1\nbusy 0\n"


def test_idle_connections_count_for_the_choice_of_a_worker() -> None:
    """Otherwise, one worker could get all connections of clients that send their requests later."""
    own_end, worker_end = socket.socketpair()
    with own_end, worker_end:
        process = multiprocessing.get_context("fork").Process()
        idle, computing, unhealthy = (WorkerProcess(process, own_end) for _ in range(3))
        idle.connections, computing.connections, computing.busy, unhealthy.unhealthy = 5, 2, 2, True
        assert sorted([unhealthy, idle, computing], key=WorkerProcess.load) == [computing, idle, unhealthy]


def test_a_signal_during_a_report_counts_no_connection_twice(tiny_store: Path) -> None:
    class InterruptedChannel(socket.socket):
        """A channel on which a signal arrives while the first report is sent."""

        def send(self, data: Any, flags: int = 0) -> int:
            if not worker.should_exit:
                worker.handle_exit(signal.SIGTERM, None)
            return super().send(data, flags)

    async def report() -> None:
        worker.start_accepting()
        worker._received = 2
        worker._send_status()
        await asyncio.sleep(0)
        asyncio.get_running_loop().remove_reader(channel)

    settings = Settings(store=tiny_store, workers=1)
    own_end, worker_end = socket.socketpair()
    with own_end, InterruptedChannel(fileno=worker_end.detach()) as channel:
        worker = WorkerServer(create_app(settings), settings, channel)
        worker.started = True
        asyncio.run(report())
        lines = own_end.recv(4096).split(b"\n")
    assert lines.count(b"stopping") == 1
    assert sum(int(line.removeprefix(b"got ")) for line in lines if line.startswith(b"got ")) == 2


def test_the_load_of_a_worker_includes_connections_on_their_way() -> None:
    """A worker whose engine hangs reports no running requests. This report does not count as a heartbeat."""
    own_end, worker_end = socket.socketpair()
    with own_end, worker_end, socket.socket() as received, socket.socket() as on_its_way:
        supervisor = Supervisor(
            received, lambda channel: None, 1, 1.0, 1.0, 1.0, ready=lambda: None, died=lambda pid: None
        )
        own_end.setblocking(False)
        worker = WorkerProcess(multiprocessing.get_context("fork").Process(), own_end)
        worker.sent.extend([received, on_its_way])
        worker_end.send(b"got 1\nleft 0\nbusy 3\n")
        worker.last_heartbeat = 0.0
        supervisor._receive(worker)
        assert (worker.busy, list(worker.sent), worker.last_heartbeat > 0) == (4, [on_its_way], True)
        worker_end.send(b"got 1\nleft 0\n")
        worker.last_heartbeat = 0.0
        supervisor._receive(worker)
        assert (worker.busy, list(worker.sent), worker.last_heartbeat) == (4, [], 0.0)


def test_connections_that_wait_when_the_service_stops_go_to_a_worker(caplog: pytest.LogCaptureFixture) -> None:
    own_end, worker_end = socket.socketpair()
    process = multiprocessing.get_context("fork").Process(target=signal.pause)
    process.start()
    with own_end, worker_end, contextlib.ExitStack() as clients, listen_at("127.0.0.1", 0) as listener:
        for end in (own_end, listener):
            end.setblocking(False)
        supervisor = Supervisor(
            listener, lambda channel: None, 1, 60.0, 60.0, 60.0, ready=lambda: None, died=lambda pid: None
        )
        worker = WorkerProcess(process, own_end, ready=True)
        supervisor._workers.append(worker)
        supervisor._accept_when_ready()
        for _ in range(100):
            clients.enter_context(socket.create_connection(listener.getsockname(), TIMEOUT_SECONDS))
        supervisor._stop()
        supervisor._accept()  # as if the selector had returned the listener together with the signal
        assert len(worker.sent) == 100
        assert not caplog.records
        for connection in worker.sent:
            connection.close()
    process.join(TIMEOUT_SECONDS)


def test_all_waiting_connections_are_accepted_in_one_event_loop_iteration(tiny_store: Path) -> None:
    """With one connection per iteration, the last connection would wait for the work of all earlier iterations."""

    async def count_iterations() -> int:
        settings = Settings(store=tiny_store, workers=1)
        own_end, channel = socket.socketpair()
        clients: list[socket.socket] = []
        with own_end, channel, socket.create_server(("127.0.0.1", 0)) as listener:
            worker = AbortingWorker(create_app(settings), settings, channel)
            worker.start_accepting()
            for _ in range(20):
                clients.append(socket.create_connection(listener.getsockname()))
                with listener.accept()[0] as connection:
                    socket.send_fds(own_end, [CONNECTION_MESSAGE], [connection.fileno()])
            iterations = 0
            while len(worker.arriving) < len(clients) and iterations < 100:
                await asyncio.sleep(0)
                iterations += 1
            await asyncio.gather(*worker.arriving)
            for _ in range(3):  # the worker reports the end of each connection
                await asyncio.sleep(0)
            asyncio.get_running_loop().remove_reader(channel)
        for client in clients:
            client.close()
        return iterations

    assert asyncio.run(count_iterations()) <= 3


def test_a_dead_worker_is_replaced_and_only_its_own_requests_fail(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        before = service.workers
        open_connections = [service.connect() for _ in range(4)]
        for connection in open_connections:
            request_live(connection)
        port = httpx.URL(service.url).port or 0
        expected_losses = connections(min(before), port)
        os.kill(min(before), signal.SIGKILL)
        lost = 0
        for connection in open_connections:
            try:
                request_live(connection)
            except (AssertionError, OSError):
                lost += 1
        assert lost == expected_losses > 0
        for _ in range(20):
            assert httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS).status_code == 200

        def replacement_serves() -> bool:
            with service.connect() as connection:
                request_live(connection)
                return any(connections(worker, port) for worker in service.workers - before)

        wait_until(replacement_serves)
        with httpx.Client(base_url=service.url, timeout=TIMEOUT_SECONDS) as client:
            live = ("quartet_requests_total", ("method", "GET"), ("route", "/health/live"), ("status", "200"))
            assert metric_samples(client)[live] >= 4 + 2 + 20  # including the requests of the dead worker
        for connection in open_connections:
            connection.close()


def test_connections_that_a_dying_worker_did_not_receive_go_to_another(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        victim = min(service.workers)
        os.kill(victim, signal.SIGSTOP)  # a stopped process receives nothing, like a process that is being killed
        open_connections = [service.connect() for _ in range(8)]  # more than one for each worker
        for connection in open_connections:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: connections(service.process.pid, httpx.URL(service.url).port or 0) > 0)
        os.kill(victim, signal.SIGKILL)
        for connection in open_connections:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            connection.close()


def test_a_connection_that_no_worker_accepts_in_time_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    own_end, client = socket.socketpair()
    with own_end, client:
        client.settimeout(TIMEOUT_SECONDS)
        supervisor = supervisor_of()
        supervisor._pending.append((own_end, time.monotonic() + 60))
        supervisor._offer_again()
        assert len(supervisor._pending) == 1
        supervisor._pending[0] = own_end, time.monotonic() - 1
        supervisor._offer_again()
        assert not supervisor._pending
        assert client.recv(1) == b""
    assert caplog.messages == ["closed a connection: no worker accepted it"]


def test_a_new_worker_closes_the_connections_that_wait_for_other_workers() -> None:
    """Otherwise, a client would not notice that another worker has closed its connection."""

    def wait(channel: socket.socket) -> None:
        channel.sendall(b"x")
        signal.pause()

    pairs = [socket.socketpair() for _ in range(3)]
    with contextlib.ExitStack() as opened:
        for end in (end for pair in pairs for end in pair):
            opened.enter_context(end)
            end.settimeout(TIMEOUT_SECONDS)
        (pending, first_client), (sent, second_client), (channel, _) = pairs
        supervisor = supervisor_of(WorkerProcess(Mock(), channel, sent=deque([sent])), work=wait)
        supervisor._pending.append((pending, math.inf))
        new = supervisor._spawn()
        opened.callback(new.process.join)
        opened.callback(new.process.kill)
        with new.channel:
            new.channel.settimeout(TIMEOUT_SECONDS)
            assert new.channel.recv(1) == b"x"
        for own_end, client in ((pending, first_client), (sent, second_client)):
            own_end.close()
            assert client.recv(1) == b""


def test_metrics_of_dead_workers_are_merged_into_one_file(tiny_store: Path) -> None:
    with serving(tiny_store, log_level="error") as service:
        folder = next(Path("/dev/shm").glob(f"quartet-{service.process.pid}-*"))
        live = ("quartet_requests_total", ("method", "GET"), ("route", "/health/live"), ("status", "200"))
        for round in range(1, 4):
            for _ in range(6):
                httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS)
            victim = min(service.workers)
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda victim=victim: victim not in service.workers and len(service.workers) == 2)
            with httpx.Client(base_url=service.url, timeout=TIMEOUT_SECONDS) as client:
                assert metric_samples(client)[live] == 6 * round
        process_ids = {file.name.removesuffix(".db").rpartition("_")[2] for file in folder.glob("*.db")}
        assert process_ids <= {"0", *map(str, service.workers)}


def test_a_worker_is_replaced_after_the_metrics_folder_was_removed(tiny_store: Path) -> None:
    """systemd removes the folder when the last session of a login user ends."""
    with serving(tiny_store, log_level="error") as service:
        shutil.rmtree(next(Path("/dev/shm").glob(f"quartet-{service.process.pid}-*")))
        os.kill(min(service.workers), signal.SIGKILL)

        def new_worker_counts() -> bool:
            try:
                answer = httpx.get(f"{service.url}/metrics", timeout=TIMEOUT_SECONDS)
            except httpx.HTTPError:  # the killed worker had the connection
                return False
            return answer.status_code == 200 and "quartet_workers 1.0" in answer.text

        wait_until(new_worker_counts)


def test_a_hung_worker_is_replaced(tiny_store: Path) -> None:
    with serving(tiny_store, liveness_timeout_seconds=2) as service:
        before = service.workers
        os.kill(min(before), signal.SIGSTOP)
        wait_until(lambda: min(before) not in service.workers and len(service.workers) == 2)
        for _ in range(8):
            assert httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS).status_code == 200


def test_a_new_worker_gets_more_time_if_the_last_one_started_slowly_or_was_killed() -> None:
    """Otherwise, a worker that needs more time to load the networks would be killed again and again."""

    def start(seconds_ago: float, is_ready: bool) -> float:
        """Let a worker have started some time ago, and return the time in seconds that a new worker gets."""
        worker = WorkerProcess(Mock(exitcode=None), own_end, started=time.monotonic() - seconds_ago)
        supervisor._workers = [worker]
        if is_ready:
            worker_end.send(b"ready\n")
            supervisor._receive(worker)
        supervisor._check_workers()
        assert worker.process.kill.called != is_ready
        lowest, highest = 0.0, 10_000.0
        while highest - lowest > 0.1:
            middle = (lowest + highest) / 2
            new = WorkerProcess(worker.process, own_end, started=time.monotonic() - middle)
            lowest, highest = (lowest, middle) if supervisor._hangs(new, time.monotonic()) else (middle, highest)
        return lowest

    own_end, worker_end = socket.socketpair()
    own_end.setblocking(False)
    with own_end, worker_end, listen_at("127.0.0.1", 0) as listener:
        supervisor = Supervisor(
            listener, lambda channel: None, 1, 5.0, 40.0, 20.0, ready=lambda: None, died=lambda pid: None
        )
        assert start(100, is_ready=True) == pytest.approx(300, abs=5)
        assert start(310, is_ready=False) == pytest.approx(620, abs=5)
        assert start(2, is_ready=True) == pytest.approx(80, abs=5)


def test_a_worker_that_hangs_while_it_stops_is_killed() -> None:
    """Otherwise, it would never be replaced. It has the grace period and the liveness timeout, together 50 s."""
    process = Mock(exitcode=None)
    worker = WorkerProcess(process, Mock(), stopping=time.monotonic() - 45, last_heartbeat=time.monotonic() - 1000)
    supervisor = supervisor_of(worker)
    supervisor._check_workers()
    assert not process.kill.called
    worker.stopping = time.monotonic() - 51
    supervisor._check_workers()
    assert process.kill.called


@pytest.mark.parametrize(("lifetime", "delay"), [(11.0, RESTART_DELAYS[0]), (1.0, RESTART_DELAYS[1])])
def test_the_delay_of_restarts_is_short_again_after_a_worker_that_lived_longer(lifetime: float, delay: float) -> None:
    own_end, worker_end = socket.socketpair()
    worker_end.close()
    with own_end:
        own_end.setblocking(False)
        supervisor = supervisor_of(WorkerProcess(Mock(exitcode=1), own_end, started=time.monotonic() - lifetime))
        supervisor._restart_delay = 6.4  # after several workers that died early
        supervisor._check_workers()
    assert (supervisor._restart_delay, supervisor._workers) == (delay, [])


@pytest.mark.parametrize("inline_seconds", [0, 0.05])
def test_a_single_process_with_a_hung_network_exits(tiny_store: Path, inline_seconds: float) -> None:
    """The network hangs on a thread or on the event loop."""
    with serving(
        tiny_store, before=HANG_ON_SEVEN, workers=1, liveness_timeout_seconds=0.5, inline_seconds=inline_seconds
    ) as service:
        answer = httpx.post(f"{service.url}/v1/images/sample", json={"count": 2}, timeout=TIMEOUT_SECONDS)
        assert answer.status_code == 200
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{service.url}/v1/images/sample", json={"count": 7}, timeout=TIMEOUT_SECONDS)
        assert service.process.wait(TIMEOUT_SECONDS) == 1


FAILS_FOR_GOOD = """
import os
from app.tasks.image_generation import ImageSampler
os.environ["QUARTET_LIMITS"] = '{"breaker_reset_seconds": 0, "recovery_check_seconds": 0.01}'
works, broken = ImageSampler.predict, []
def predict(self, items):
    if self.rows(items[0]) == 7:
        broken.append(7)
    if broken or self.rows(items[0]) == 6:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return works(self, items)
ImageSampler.predict = predict
"""


def test_a_process_whose_network_cannot_recover_exits(tiny_store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        serving(tiny_store, before=FAILS_FOR_GOOD, workers=1) as service,
        httpx.Client(base_url=service.url, timeout=TIMEOUT_SECONDS) as client,
    ):

        def generate(count: int) -> int:
            return client.post("/v1/images/sample", json={"count": count}).status_code

        assert {generate(6) for _ in range(9)} == {500}  # these inputs cause the errors, not the worker
        assert generate(2) == 200
        with contextlib.suppress(httpx.HTTPError):
            while generate(7) in (500, 503):
                pass
        assert service.process.wait(TIMEOUT_SECONDS) == 1
    assert "tiny-gan@1 fails on every input, failed" in capfd.readouterr().err


def test_a_hung_event_loop_gets_no_connections_until_the_worker_is_replaced(tiny_store: Path) -> None:
    """The event loop computes small batches inline. While it hangs, it reports nothing.

    The clients of the worker are disconnected when the worker is replaced.
    """
    with serving(
        tiny_store, before=HANG_ON_SEVEN, unready_after_seconds=1, liveness_timeout_seconds=6, inline_seconds=0.05
    ) as service:
        before = service.workers
        with service.connect() as hung_connection:
            hung_connection.sendall(
                b'POST /v1/images/sample HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\n\r\n{"count":7}'
            )
            wait_until((tiny_store / ".hung").exists)
            time.sleep(1.5)  # longer than unready_after_seconds
            open_connections = [service.connect() for _ in range(6)]
            for connection in open_connections:  # more than the other worker's connections
                assert request_live(connection)
            assert service.workers == before  # no connection had to wait for the replacement
            for connection in open_connections:
                connection.close()
            hung_connection.settimeout(TIMEOUT_SECONDS)
            with contextlib.suppress(ConnectionError):
                assert hung_connection.recv(1) == b""
        wait_until(lambda: len(service.workers) == 2 and len(service.workers & before) == 1)


NO_PROCESSES = """
import errno
from multiprocessing.context import ForkProcess
original, attempts = ForkProcess.start, []
def start(self):
    attempts.append(self)
    if len(attempts) in (2, 3):
        raise OSError(errno.EAGAIN, "no more processes")
    original(self)
ForkProcess.start = start
"""


def test_a_failed_worker_start_is_retried(tiny_store: Path) -> None:
    with serving(tiny_store, before=NO_PROCESSES, log_level="error") as service:
        assert len(service.workers) == 2
        assert httpx.get(f"{service.url}/health/ready", timeout=TIMEOUT_SECONDS).status_code == 200
        assert service.stop() == 0


FAIL_IN_ONE_WORKER = """
import multiprocessing
import os
from pathlib import Path
from app.tasks.image_generation import ImageSampler
original, file = ImageSampler.predict, Path(os.environ["QUARTET_STORE"], "fails")
def predict(self, items):
    if file.exists() and file.read_text() == str(os.getpid()):
        raise MemoryError
    return original(self, items)
ImageSampler.predict = predict
"""


def test_a_failing_worker_gets_no_connections_while_another_works(tiny_store: Path) -> None:
    with serving(tiny_store, before=FAIL_IN_ONE_WORKER, log_level="error") as service:

        def statuses(count: int) -> list[int]:
            return [
                httpx.post(f"{service.url}/v1/images/sample", json={"count": 1}, timeout=TIMEOUT_SECONDS).status_code
                for _ in range(count)
            ]

        assert set(statuses(4)) == {200}
        (tiny_store / "fails").write_text(str(min(service.workers)))
        wait_until(lambda: statuses(1) == [503])
        wait_until(lambda: statuses(8) == [200] * 8)
        assert set(statuses(8)) == {200}


def test_connections_wait_while_all_workers_are_busy(tiny_store: Path) -> None:
    """More connections wait than the channels to the workers can hold, and none of them is closed."""
    long_wait = "from app.server import supervisor\nsupervisor.MAX_PENDING_SECONDS = 60"
    with serving(tiny_store, before=long_wait) as service:
        for worker in service.workers:
            os.kill(worker, signal.SIGSTOP)
        open_connections = [service.connect() for _ in range(700)]
        for worker in service.workers:
            os.kill(worker, signal.SIGCONT)
        for connection in open_connections:
            request_live(connection)
            connection.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_pausing_all_processes_ends_no_worker(tiny_store: Path, workers: int) -> None:
    """All processes of a frozen container are paused. In this test, the pause is longer than the liveness timeout."""
    with serving(tiny_store, own_group=True, workers=workers, liveness_timeout_seconds=2, log_level="error") as service:
        before = service.workers
        os.killpg(service.process.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.killpg(service.process.pid, signal.SIGCONT)
        for _ in range(20):
            assert httpx.get(f"{service.url}/health/live", timeout=TIMEOUT_SECONDS).status_code == 200
            time.sleep(0.05)
        assert service.workers == before
        assert service.process.poll() is None


def test_connections_are_rebalanced_after_a_replacement(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        open_connections = [service.connect() for _ in range(12)]
        port = httpx.URL(service.url).port or 0
        for connection in open_connections:
            request_live(connection)
        os.kill(min(service.workers), signal.SIGKILL)

        def are_balanced() -> bool:
            for i, connection in enumerate(open_connections):
                try:
                    is_open = request_live(connection)
                except (AssertionError, OSError):
                    is_open = False
                if not is_open:  # clients reconnect
                    connection.close()
                    open_connections[i] = service.connect()
            counts = [connections(worker, port) for worker in service.workers]
            return len(counts) == 2 and min(counts) >= 4

        wait_until(are_balanced)
        for connection in open_connections:
            connection.close()


def test_no_connections_are_moved_to_an_unhealthy_worker() -> None:
    channel, now = Mock(), time.monotonic()
    other = WorkerProcess(Mock(), Mock(), ready=True, unhealthy=True)
    supervisor = supervisor_of(WorkerProcess(Mock(), channel, ready=True, connections=20), other)
    supervisor._balanced_at = now - 2
    supervisor._rebalance(now)
    assert not channel.send.called
    other.unhealthy, supervisor._balanced_at = False, now - 2
    supervisor._rebalance(now)
    channel.send.assert_called_once_with(RELEASE_MESSAGE * 10)


def test_a_repeated_error_of_accept_is_logged_once_per_second(caplog: pytest.LogCaptureFixture) -> None:
    listener = Mock(accept=Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
    supervisor = Supervisor(
        listener, lambda channel: None, 1, 60.0, 60.0, 60.0, ready=lambda: None, died=lambda pid: None
    )
    supervisor._workers.append(WorkerProcess(Mock(), Mock(), ready=True))
    supervisor._accepting = True
    for _ in range(3):
        supervisor._accept()
    supervisor._accept_error_at -= 1.0  # as if a second had passed
    supervisor._accept()
    assert caplog.messages == ["cannot accept a connection: [Errno 24] Too many open files"] * 2


def test_the_first_sigterm_lets_requests_finish_even_if_the_server_already_drains() -> None:
    """The server drains when a network is broken."""
    server = Server(Mock(), Settings())
    server.started = True
    server.drain()
    server.handle_exit(signal.SIGTERM, None)
    assert (server.should_exit, server.force_exit) == (True, False)
    server.handle_exit(signal.SIGTERM, None)
    assert server.force_exit


def test_a_request_to_close_many_connections_closes_as_many() -> None:
    """The worker receives the request in parts."""

    async def accept_all() -> None:
        worker._accept_all()

    own_end, channel = socket.socketpair()
    with own_end, channel:
        worker = WorkerServer(Mock(), Settings(), channel)
        open_connections = [BoundedHttpProtocol.__new__(BoundedHttpProtocol) for _ in range(3 * CHANNEL_BYTES)]
        for connection in open_connections:
            connection.close_after_response = False
            worker.server_state.connections.add(connection)
        own_end.send(RELEASE_MESSAGE * (2 * CHANNEL_BYTES + 1))
        asyncio.run(accept_all())
    assert sum(connection.close_after_response for connection in open_connections) == 2 * CHANNEL_BYTES + 1


def test_connections_that_a_worker_cannot_open_are_reported_as_closed(caplog: pytest.LogCaptureFixture) -> None:
    """The kernel delivers messages without connections to a process with too many open files."""

    async def accept_all() -> None:
        worker._accept_all()

    own_end, channel = socket.socketpair()
    with own_end, channel:
        own_end.settimeout(TIMEOUT_SECONDS)
        app = Mock()
        app.state.models.executor.stalled_seconds.return_value = 0.0
        worker = WorkerServer(app, Settings(), channel)
        own_end.send(CONNECTION_MESSAGE * 2)
        asyncio.run(accept_all())
        assert own_end.recv(1000).startswith(b"got 2\nleft 2\n")
    assert caplog.messages == ["2 connections were lost: too many open files (see ulimit -n)"]


def test_upgrade_requests_do_not_change_the_connection_counts(tiny_store: Path) -> None:
    with serving(tiny_store) as service:
        upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\n"
        for _ in range(10):
            with service.connect() as connection:
                connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 ")
        open_connections = []
        for _ in range(12):
            open_connections.append(service.connect())
            request_live(open_connections[-1])
        port = httpx.URL(service.url).port or 0
        counts = [connections(worker, port) for worker in service.workers]
        assert sum(counts) == 12
        assert min(counts) >= 4
        for connection in open_connections:
            connection.close()


def test_each_worker_has_room_for_the_largest_body(tiny_store: Path) -> None:
    """A worker accepts the largest body even if its share of max_buffered_bytes is smaller."""
    with serving(tiny_store, max_body_bytes=40_000, max_buffered_bytes=50_000) as service:
        answer = httpx.post(f"{service.url}/v1/images/classify", content=bytes(39_000), timeout=TIMEOUT_SECONDS)
        assert answer.json()["error"]["code"] == "not_an_image"


def test_an_invalid_host_name_gives_a_clear_error() -> None:
    with pytest.raises(SettingsError, match=r"QUARTET_HOST 'a\.\.b', QUARTET_PORT 0: cannot listen: "):
        listen_at("a..b", 0)


def test_a_used_address_gives_a_clear_error(tiny_store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "app.main"],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "QUARTET_PORT": str(port), "QUARTET_STORE": str(tiny_store), "QUARTET_WORKERS": "2"},
        )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.strip() == f"QUARTET_HOST '127.0.0.1', QUARTET_PORT {port}: cannot listen: " + os.strerror(98)


def test_an_address_that_another_process_uses_during_the_start_gives_a_clear_error(
    tiny_store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with listen_at("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        alone, shared = listen_at("127.0.0.1", port), listen_at("127.0.0.1", port)
        first.listen()
        settings = Settings(store=tiny_store, workers=1, port=port)
        with pytest.raises(SettingsError) as rejection:
            ListeningServer(create_app(settings), settings).run([alone])
        assert (
            str(rejection.value)
            == f"QUARTET_HOST '127.0.0.1', QUARTET_PORT {port}: cannot listen: Address already in use"
        )
        alone.close()
        supervisor = Supervisor(
            shared, lambda channel: None, 0, 1.0, 1.0, 1.0, ready=lambda: None, died=lambda pid: None
        )
        supervisor._accept_when_ready()
        assert supervisor._status == 1
        assert caplog.messages == [f"cannot listen on 127.0.0.1, port {port}: Address already in use"]
