"""Server processes: started, measured, paused while another one's turn is, and stopped with all their children."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.support.load import Request

ROOT = Path(__file__).resolve().parents[2]
TICKS = os.sysconf("SC_CLK_TCK")
BEGUN = 19  # where ``stats`` has the time a process was started: a number may be given again, that with it not
PORTS = count(20000 + os.getpid() % 1000 * 8, 8)
CALM_SECONDS = 1.0  # in which a server that is to have settled does nothing
STOP_SECONDS = 1.0


class StartFailed(Exception):
    """The server ended, or did not answer in time: the last lines of its log."""


def free_port() -> int:
    """A port that is free with the four after it, which some servers take too.

    Below those that the kernel gives to callers, and each time another one: a server may start much later.
    """
    for port in PORTS:
        with ExitStack() as stack:
            try:
                for number in range(port, port + 5):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
        return port
    raise AssertionError("the ports have no end")


@dataclass
class Server:
    """One command, in a session of its own so that all its processes can be found.

    ``ready``: the path to ask. ``adapt``: a request of ours as it wants it; ``said``: its answer in the shape of ours.
    ``peer``: it does only a part of the work.
    """

    name: str
    command: Sequence[str]
    port: int
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health/ready"
    adapt: Callable[[Request], Request] = lambda request: request
    said: Callable[[Any], Any] = lambda answer: answer
    peer: bool = False
    process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 120) -> float:
        """Start it and wait until it is ready. Gives the seconds that took. Raises StartFailed."""
        begun = time.perf_counter()
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
        while time.perf_counter() - begun < seconds:
            if self._answers():
                return time.perf_counter() - begun
            if self.process.poll() is not None:
                break
            time.sleep(0.005)
        self.stop()
        raise StartFailed(f"{self.name} did not start:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-2000:]

    def _answers(self) -> bool:
        """Whether it says 200."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(
                    f"GET {self.ready} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
                )
                return connection.recv(15).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def pids(self) -> list[int]:
        """All its processes: those of its session, and children that began one of their own."""
        if not self.process:
            return []
        known, found = {pid: (int(fields[1]), int(fields[3])) for pid, fields in stats()}, {self.process.pid}
        while more := {
            pid
            for pid, (parent, session) in known.items()
            if pid not in found and (parent in found or session == self.process.pid)
        }:
            found |= more
        return sorted(found)

    def cpu_seconds(self) -> float:
        """Of all its processes so far, in user and in system mode."""
        mine = set(self.pids())
        return sum((int(fields[11]) + int(fields[12])) / TICKS for pid, fields in stats() if pid in mine)

    def settle(self, seconds: float = 30) -> None:
        """Wait, no longer than so, until it does nothing: the first of its processes answers before the others do."""
        end, before = time.perf_counter() + seconds, self.cpu_seconds()
        while time.perf_counter() < end:
            time.sleep(CALM_SECONDS)
            before, busy = (now := self.cpu_seconds()), now - before
            if busy < 0.1 * CALM_SECONDS:
                return

    def memory(self) -> dict[str, float]:
        """Mebibytes of all its processes: ``pss`` counts a page that several share once, ``rss`` in each of them."""
        kilobytes = {"pss": 0, "rss": 0}
        for pid in self.pids():
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:  # it has ended
                continue
            for key, value in re.findall(r"^(Pss|Rss): +(\d+) kB", text, re.MULTILINE):
                kilobytes[key.lower()] += int(value)
        return {key: value / 1024 for key, value in kilobytes.items()}

    def pause(self) -> None:
        """So that not even its timers disturb the others."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self) -> None:
        """Ask it to end, then kill whatever of it is left."""
        if not self.process:
            return
        self.resume()
        mine = set(self.pids())
        known = {(pid, fields[BEGUN]) for pid, fields in stats() if pid in mine}  # before they lose their parent
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        for pid, fields in stats():
            if (pid, fields[BEGUN]) in known:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


def stats() -> list[tuple[int, list[str]]]:
    """Of every process its id and what follows its name in ``/proc/<pid>/stat`` (proc(5), from the state on)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except OSError:  # it has ended
                continue
            found.append((int(entry.name), text.rpartition(")")[2].split()))
    return found


def ours(folder: Path, store: Path, layout: str = "") -> Server:
    """As ``make serve`` starts it. ``layout``: workers x threads, such as 2x1; empty: as the settings choose."""
    port = free_port()
    environment = {"QUARTET_PORT": str(port), "QUARTET_STORE": str(store)}
    if layout:
        environment["QUARTET_WORKERS"], environment["QUARTET_THREADS"] = layout.split("x")
    name = f"ours {layout}".strip()
    return Server(name, [sys.executable, "-m", "app.main"], port, folder / f"{name}.log", environment)


def plain(folder: Path, store: Path, workers: int) -> Server:
    """``plain.py`` with torch's own number of threads, or as many as cores are left for each of several processes."""
    port = free_port()
    environment = {"QUARTET_STORE": str(store)}
    if workers > 1:
        environment["PLAIN_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // workers))
    options = ["--port", str(port), "--workers", str(workers), "--log-level", "warning"]
    command = [sys.executable, "-m", "uvicorn", "benchmarks.support.plain:app", *options]
    name = "plain" if workers == 1 else f"plain x{workers}"
    return Server(name, command, port, folder / f"{name}.log", environment, ready="/docs")
