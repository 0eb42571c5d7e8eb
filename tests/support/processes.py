"""Start the service and trainings in separate processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Self

import httpx

from app.limits import Limits
from app.main import main
from support.service import ROOT

TIMEOUT_SECONDS = 30  # longest time that a test waits for one event


# The fork server imports these modules once, for all processes. Otherwise each process would take 2 s to import them.
# Optimizers import torch._dynamo.
os.environ["PYTHONPATH"] = str(ROOT)  # processes import the code of this checkout, in any working folder
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["app.main", "training.run", "torch._dynamo", "matplotlib.pyplot"])


class ForkedProcess:
    """A process of the fork server, with the attributes of ``subprocess.Popen`` that the tests use."""

    def __init__(self, environment: dict[str, str], own_group: bool, before: str) -> None:
        self.stdout, output = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
        with output:
            streams = [DupFd(output.fileno()), DupFd(2)]
            self._process = FORK_SERVER.Process(target=_serve, args=(environment, own_group, before, *streams))
            self._process.start()
        assert self._process.pid
        self.pid = self._process.pid
        self.terminate, self.kill = self._process.terminate, self._process.kill

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self._process.join()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the service", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)


def _serve(environment: dict[str, str], own_group: bool, before: str, stdout: DupFd, stderr: DupFd) -> None:
    """Run the service in a new process. The process ends with the exit status of the service."""
    for number, stream in ((1, stdout), (2, stderr)):
        os.dup2(stream.detach(), number)
    if own_group:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    exec(before, {})
    main()


class ServiceProcess:
    """The service in separate processes."""

    def __init__(self, process: subprocess.Popen[str] | ForkedProcess, url: str) -> None:
        self.process = process
        self.url = url

    @property
    def workers(self) -> set[int]:
        return children(self.process.pid)

    def connect(self) -> socket.socket:
        url = httpx.URL(self.url)
        return socket.create_connection((url.host, url.port or 0), TIMEOUT_SECONDS)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_SECONDS)


def memory_mib(process: int, name: str) -> float:
    """Return a size from ``/proc/PID/status``, such as ``VmRSS`` or ``VmHWM``, its largest value so far."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024


def reset_memory_peak(process: int) -> float:
    """Set ``VmHWM`` to the current memory of a process, and return this memory in MiB."""
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return memory_mib(process, "VmRSS")


def children(process: int) -> set[int]:
    return set(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def start_process(
    store: Path, own_group: bool = False, wrapper: Sequence[str] = (), before: str = "", **settings: object
) -> subprocess.Popen[str] | ForkedProcess:
    """Start the service, and return without waiting for it. ``settings`` may also have constants in ``Limits``.

    ``wrapper`` is a command that runs the service, such as ``nohup``. Without one, ``before`` is Python code that the
    process executes before it starts the service.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUARTET_")}
    values = {
        "store": store,
        "port": 0,
        "workers": 2,
        "threads": 1,
        "log_level": "warning",
        "shutdown_grace_seconds": 60,  # longer than any request here, also on a slow machine
        **settings,
    }
    limits = {name: values.pop(name) for name in vars(Limits()) if name in values}
    environment |= {f"QUARTET_{name.upper()}": str(value) for name, value in values.items()}
    environment["QUARTET_LIMITS"] = json.dumps(limits)
    if not wrapper:
        return ForkedProcess(environment, own_group, before)
    assert not before
    return subprocess.Popen(
        [*wrapper, sys.executable, "-m", "app.main"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=own_group,
    )


@contextmanager
def serving(
    store: Path, own_group: bool = False, wrapper: Sequence[str] = (), before: str = "", **settings: object
) -> Iterator[ServiceProcess]:
    process = start_process(store, own_group, wrapper, before, **settings)
    try:
        assert process.stdout
        address = re.search(r"https?://[\d.:]+", process.stdout.readline())
        assert address, "the service did not print its address"
        yield ServiceProcess(process, address[0])
    finally:
        with process:
            if process.poll() is None:
                process.terminate()
                process.wait(TIMEOUT_SECONDS)


GET_LIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def request_live(connection: socket.socket, request: bytes = GET_LIVE) -> bool:
    """Send GET /health/live over an open connection; return whether the service keeps the connection open."""
    connection.sendall(request)
    answer = b""
    while not answer.endswith(b"}"):
        chunk = connection.recv(4096)
        assert chunk, answer
        answer += chunk
    assert answer.startswith(b"HTTP/1.1 200")
    return b"connection: close" not in answer.lower()


def start_python(
    arguments: Sequence[str], folder: Path = ROOT, output: IO[str] | None = None
) -> multiprocessing.Process:
    """Start ``python -m MODULE ...`` or ``python -c CODE ...`` in a folder, as a process of the fork server."""
    streams = DupFd(output.fileno()) if output else None
    process = FORK_SERVER.Process(target=_run_python, args=([*arguments], {**os.environ}, str(folder), streams))
    process.start()
    return process


def _run_python(arguments: list[str], environment: dict[str, str], folder: str, output: DupFd | None) -> None:
    """Run code or a module in this process, as ``python`` would. Write stdout and stderr to ``output``."""
    if output:
        descriptor = output.detach()
        for number in (1, 2):
            os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)
    option, source, *rest = arguments
    sys.argv = [option, *rest]
    if option == "-c":
        exec(source, {"__name__": "__main__"})
    else:
        runpy.run_module(source, run_name="__main__", alter_sys=True)


# Requests for seven images hang. The file ``.hung`` in the store shows that one does.
HANG_ON_SEVEN = """
import os
import time
from pathlib import Path
from app.tasks.image_generation import ImageSampler
original, file = ImageSampler.predict, Path(os.environ["QUARTET_STORE"], ".hung")
def predict(self, items):
    if self.rows(items[0]) == 7:
        file.touch()
        time.sleep(3600)
    return original(self, items)
ImageSampler.predict = predict
"""


SLOW_STEPS = """
import time
from app.tasks.text_generation import TextGenerator
step = TextGenerator.step
TextGenerator.step = lambda self, texts: (time.sleep(0.005), step(self, texts))
"""
