"""Start, measure, pause and stop servers, with all their child processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.support.load import Request

ROOT = Path(__file__).resolve().parents[2]
TICKS = os.sysconf("SC_CLK_TCK")
STARTED = 19  # index of the start time in ``stats``; process ids may be reused, but not with the same start time
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
    format, and ``convert`` converts its answer to Quartet's format. ``workloads`` are the names of the supported
    workloads. If ``workloads`` is None, the server supports all workloads.
    """

    name: str
    command: Sequence[str]
    port: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health/ready"
    adapt: Callable[[Request], Request] = lambda request: request
    convert: Callable[[Any], Any] = lambda answer: answer
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
    def running(self) -> Iterator[None]:
        """Run the server during a ``with`` block. Raises StartFailed."""
        self.start()
        try:
            yield
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

    def pids(self) -> list[int]:
        """Return the ids of all processes in the server's session, and of their children in other sessions."""
        if not self.process:
            return []
        processes, result = {pid: (int(fields[1]), int(fields[3])) for pid, fields in stats()}, {self.process.pid}
        while children := {
            pid
            for pid, (parent, session) in processes.items()
            if pid not in result and (parent in result or session == self.process.pid)
        }:
            result |= children
        return sorted(result)

    def cpu_seconds(self) -> float:
        """Return the CPU seconds (user and system) that all processes of the server have used so far."""
        own = set(self.pids())
        return sum((int(fields[11]) + int(fields[12])) / TICKS for pid, fields in stats() if pid in own)

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

    def memory(self) -> dict[str, float]:
        """Return the memory of all processes in MiB.

        ``rss`` counts a shared page once for each process. ``pss`` divides a shared page between all processes that use
        it, including processes that do not belong to the server.
        """
        kilobytes = {"pss": 0, "rss": 0}
        for pid in self.pids():
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:  # the process has ended
                continue
            for key, value in re.findall(r"^(Pss|Rss): +(\d+) kB", text, re.MULTILINE):
                kilobytes[key.lower()] += int(value)
        return {key: value / 1024 for key, value in kilobytes.items()}

    def pause(self) -> None:
        """Suspend all processes of the server with SIGSTOP, so that they do not disturb another measurement."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """Terminate the server. Then kill those of its processes that still run."""
        if not self.process:
            return
        self.resume()
        own = set(self.pids())
        # List the processes now, because they lose their parent when the server ends.
        processes = {(pid, fields[STARTED]) for pid, fields in stats() if pid in own}
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        for pid, fields in stats():
            if (pid, fields[STARTED]) in processes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


def stats() -> list[tuple[int, list[str]]]:
    """Return the id of each process, and the fields after its name in ``/proc/<pid>/stat`` (see proc(5))."""
    result = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:  # the process has ended
                continue
            result.append((int(entry.name), text.rpartition(")")[2].split()))
    return result


def ours(folder: Path, store: Path, layout: str = "") -> Server:
    """Return a server that runs Quartet as ``make serve`` does.

    ``layout`` is the number of workers x the number of threads of each worker, such as 2x1. If ``layout`` is empty, the
    service chooses both numbers.
    """
    port = free_port()
    environment = {"QUARTET_PORT": str(port), "QUARTET_STORE": str(store)}
    if layout:
        environment["QUARTET_WORKERS"], environment["QUARTET_THREADS"] = layout.split("x")
    name = f"ours {layout}".strip()
    return Server(name, [sys.executable, "-m", "app.main"], port, folder / f"{name}.log", environment)


def plain(folder: Path, store: Path, workers: int) -> Server:
    """Return a server that runs ``plain.py``.

    A single worker uses torch's default number of threads. Several workers divide the cores between them.
    """
    port = free_port()
    environment = {"QUARTET_STORE": str(store)}
    if workers > 1:
        environment["PLAIN_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    options = ["--port", str(port), "--workers", str(workers), "--log-level", "warning"]
    command = [sys.executable, "-m", "uvicorn", "benchmarks.support.plain:app", *options]
    name = "plain" if workers == 1 else f"plain x{workers}"
    return Server(name, command, port, folder / f"{name}.log", environment, ready="/docs")
