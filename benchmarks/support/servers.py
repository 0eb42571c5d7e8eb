"""Server processes: start, measure, pause and stop them with all their children."""

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
STARTED = 19  # index of the start time in ``stats``: a process id may be reused, but not with the same start time
PORTS = count(20000 + os.getpid() % 1000 * 8, 8)
IDLE_SECONDS = 1.0  # a server without CPU use for this time is idle
STOP_SECONDS = 1.0


class StartFailed(Exception):
    """The server exited or did not answer in time. The message holds the last lines of its log."""


def free_port() -> int:
    """Return a free port whose four successors are free too: some servers use them.

    The ports are below the kernel's ephemeral range. Each call returns another one, because a server may start later.
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
    """A server command in its own session, so that all its processes can be found.

    ``ready`` is the path of its readiness check. ``adapt`` converts one of our requests to the server's format,
    ``convert`` its answer to ours. A competitor supports only ``works``; None: all workloads.
    """

    name: str
    command: Sequence[str]
    port: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health/ready"
    adapt: Callable[[Request], Request] = lambda request: request
    convert: Callable[[Any], Any] = lambda answer: answer
    works: Sequence[str] | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 120) -> float:
        """Start the server and wait until it is ready. Return the seconds needed. Raises StartFailed."""
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
        """Return whether the readiness check answers 200."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(
                    f"GET {self.ready} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
                )
                return connection.recv(15).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def pids(self) -> list[int]:
        """Return all processes of its session, and children that started a session of their own."""
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
        """Return the CPU seconds (user and system) of all its processes so far."""
        own = set(self.pids())
        return sum((int(fields[11]) + int(fields[12])) / TICKS for pid, fields in stats() if pid in own)

    def wait_until_idle(self, seconds: float = 30) -> None:
        """Wait up to ``seconds`` until the server is idle. Its first process may answer before the others are ready."""
        deadline, before = time.perf_counter() + seconds, self.cpu_seconds()
        while time.perf_counter() < deadline:
            time.sleep(IDLE_SECONDS)
            before, used = (now := self.cpu_seconds()), now - before
            if used < 0.1 * IDLE_SECONDS:
                return

    def memory(self) -> dict[str, float]:
        """Return the MiB of all its processes. ``pss`` counts shared pages once, ``rss`` once per process."""
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
        """Stop all its processes with SIGSTOP, so that they do not disturb another measurement."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """Terminate the server, then kill its remaining processes."""
        if not self.process:
            return
        self.resume()
        own = set(self.pids())
        # Listed before the processes lose their parent.
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
    """Return each process's id and the fields after its name in ``/proc/<pid>/stat`` (proc(5))."""
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
    """Quartet as ``make serve`` starts it.

    ``layout`` is workers x threads, such as 2x1; empty: chosen by the settings.
    """
    port = free_port()
    environment = {"QUARTET_PORT": str(port), "QUARTET_STORE": str(store)}
    if layout:
        environment["QUARTET_WORKERS"], environment["QUARTET_THREADS"] = layout.split("x")
    name = f"ours {layout}".strip()
    return Server(name, [sys.executable, "-m", "app.main"], port, folder / f"{name}.log", environment)


def plain(folder: Path, store: Path, workers: int) -> Server:
    """The server of ``plain.py``: torch's default threads for one worker, otherwise cores divided by workers."""
    port = free_port()
    environment = {"QUARTET_STORE": str(store)}
    if workers > 1:
        environment["PLAIN_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    options = ["--port", str(port), "--workers", str(workers), "--log-level", "warning"]
    command = [sys.executable, "-m", "uvicorn", "benchmarks.support.plain:app", *options]
    name = "plain" if workers == 1 else f"plain x{workers}"
    return Server(name, command, port, folder / f"{name}.log", environment, ready="/docs")
