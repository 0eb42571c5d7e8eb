"""Start, measure, pause and stop servers, with all their child processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Self

import psutil

from benchmarks.support.load import Request

ROOT = Path(__file__).resolve().parents[2]
PORTS = count(20000 + os.getpid() % 200 * 56, 8)  # seven calls in each process; then the next process has the ports
IDLE_SECONDS = 1.0  # a server without CPU use for this time is idle
STOP_SECONDS = 1.0


class StartFailed(Exception):
    """Raised if a server exits or does not answer in time. The message contains the last lines of its log."""


def free_port() -> int:
    """Return a free port. The next four ports are also free, because some servers need several ports.

    The ports are below the kernel's range of ephemeral ports. Each call returns a different port, because the server
    that uses a returned port may not have started yet.
    """
    for port in PORTS:
        with ExitStack() as stack:
            try:
                for number in range(port, port + 5):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
        return port
    raise AssertionError("unreachable: the counter of ports does not end")


@dataclass
class Server:
    """A server. It runs in a separate session of the operating system, so that all its processes can be found.

    ``ready`` is the path of its readiness check. ``adapt`` converts a request from Quartet's format to the server's
    format. ``workloads`` are the names of the supported workloads. If ``workloads`` is None, the server supports all.
    """

    name: str
    command: Sequence[str]
    port: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health/ready"
    adapt: Callable[[Request], Request] = lambda request: request
    workloads: Sequence[str] | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 120) -> float:
        """Start the server, wait until it is ready, and return the seconds that this took. Raises StartFailed."""
        started = time.perf_counter()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while time.perf_counter() - started < seconds:
            if self._answers():
                return time.perf_counter() - started
            if self.process.poll() is not None:
                break
            time.sleep(0.005)
        self.stop()
        raise StartFailed(f"{self.name} did not start:\n{self.tail()}")

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Run the server during a ``with`` block. Raises StartFailed."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def tail(self) -> str:
        """Return the last 2,000 characters of the log."""
        return self.log.read_text(errors="replace")[-2000:]

    def _answers(self) -> bool:
        """Return whether the readiness check returns status 200."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(
                    f"GET {self.ready} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
                )
                return connection.recv(15).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def processes(self) -> list[psutil.Process]:
        """Return all processes in the server's session, and their descendants in other sessions."""
        if not self.process:
            return []
        found: dict[int, psutil.Process] = {}
        for pid in psutil.pids():  # ``process_iter`` may return an earlier process with the same id
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(pid) == self.process.pid:
                    process = psutil.Process(pid)
                    found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        return [found[pid] for pid in sorted(found)]

    def measured(self, read: Callable[[psutil.Process], float | None]) -> float:
        """Call ``read`` with each process, and return the sum."""
        total = 0.0
        for process in self.processes():
            with suppress(psutil.Error):  # the process has ended
                total += read(process) or 0
        return total

    def cpu_seconds(self) -> float:
        """Return the CPU seconds (user and system) that all processes of the server have used so far."""
        return self.measured(lambda process: sum(process.cpu_times()[:2]))

    def memory(self) -> float:
        """Return the PSS of all processes in MiB. The PSS divides a shared page between all processes that use it."""
        return self.measured(lambda process: process.memory_full_info().pss) / 2**20

    def wait_until_idle(self) -> None:
        """Wait up to 30 seconds until the server uses no CPU time.

        The first process of a server may answer before the other processes of this server are ready.
        """
        deadline, before = time.perf_counter() + 30, self.cpu_seconds()
        while time.perf_counter() < deadline:
            time.sleep(IDLE_SECONDS)
            before, used = (now := self.cpu_seconds()), now - before
            if used < 0.1 * IDLE_SECONDS:
                return

    def pause(self) -> None:
        """Suspend all processes of the server, so that they do not disturb another measurement."""
        self.measured(psutil.Process.suspend)

    def resume(self) -> None:
        self.measured(psutil.Process.resume)

    def stop(self) -> None:
        """Terminate the server. Then kill those of its processes that still run."""
        if not self.process:
            return
        self.resume()
        processes = self.processes()
        self.process.terminate()
        psutil.wait_procs(processes, STOP_SECONDS)
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()
        self.process = None


def ours(folder: Path, store: Path = ROOT / "models_store", layout: str = "", **settings: object) -> Server:
    """Return a server that runs Quartet as ``make serve`` does.

    ``layout`` is the number of workers x the number of threads of each worker, such as 2x1. If ``layout`` is empty, the
    service chooses both numbers. ``settings`` are further settings, such as ``queue_rows``.
    """
    port = free_port()
    if layout:
        settings |= dict(zip(("workers", "threads"), layout.split("x"), strict=True))
    settings |= {"port": port, "store": store}
    environment = {f"QUARTET_{name.upper()}": str(value) for name, value in settings.items()}
    return Server("ours", [sys.executable, "-m", "app.main"], port, folder / f"ours-{port}.log", environment)


def plain(folder: Path, store: Path, workers: int) -> Server:
    """Return a server that runs ``plain.py``. Several workers divide the cores between them."""
    port = free_port()
    environment = {"QUARTET_STORE": str(store)}
    if workers > 1:
        environment["PLAIN_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    options = ["--port", str(port), "--workers", str(workers), "--log-level", "warning"]
    command = [sys.executable, "-m", "uvicorn", "benchmarks.support.plain:app", *options]
    name = "plain" if workers == 1 else f"plain x{workers}"
    return Server(name, command, port, folder / f"{name}.log", environment, ready="/docs")
