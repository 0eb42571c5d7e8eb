"""Start the service and trainings in separate processes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, Self

import httpx
import torch

from app.main import main
from app.tasks import speed
from benchmarks.support.servers import free_port
from support.service import ROOT
from training import run
from training.data import datasets
from training.evaluation import generation
from training.loops import gan, gan_finetune

TIMEOUT_SECONDS = 30  # longest time that a test waits for one event


# The fork server imports these modules once, for all processes. Otherwise each process would take 2 s to import them.
# Optimizers import torch._dynamo.
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
    """Start the service, and return without waiting for it.

    ``wrapper`` is a command that runs the service, such as ``nohup``. ``before`` is Python code that the process
    executes before it starts the service.
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
    environment |= {f"QUARTET_{name.upper()}": str(value) for name, value in values.items()}
    if not wrapper:
        return ForkedProcess(environment, own_group, before)
    return subprocess.Popen(
        [*wrapper, sys.executable, "-c", f"{before}\nfrom app.main import main\nmain()"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=own_group,
    )


@contextmanager
def serving(store: Path, own_group: bool = False, before: str = "", **settings: object) -> Iterator[ServiceProcess]:
    process = start_process(store, own_group, before=before, **settings)
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
    speed.SECONDS = 0.0  # trainings measure the speed of their network with few calls
    option, source, *rest = arguments
    sys.argv = [option, *rest]
    if option == "-c":
        exec(source, {"__name__": "__main__"})
    else:
        runpy.run_module(source, run_name="__main__", alter_sys=True)


def train_and_wait(
    script: str, last: int, arguments: Sequence[str], environment: dict[str, str], steps: Connection
) -> None:
    """Train in this process, and send the step of each checkpoint. At step ``last``, wait to be killed."""
    os.environ.update(environment)
    gan.RECALIBRATION_BATCHES = gan.PREVIEW_BATCHES = 2
    datasets.SHA256.clear()
    run.SAVE_EVERY = 0
    save = run.Run.save

    def save_and_send(self: run.Run) -> None:
        save(self)
        steps.send(self.step)
        if self.step == last:
            threading.Event().wait()

    run.Run.save = save_and_send  # type: ignore[method-assign]
    importlib.import_module(script).main(arguments)


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``function`` with float64 as the default type of tensors."""

    def call(*arguments: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            return function(*arguments)
        finally:
            torch.set_default_dtype(torch.float32)

    return call


def train_generators_in_float64() -> None:
    """Make this process train generators for users' images in float64.

    In float32, training would amplify rounding errors to visible differences.
    """
    start, fit = gan_finetune.conditional_trainer, gan_finetune.fit

    def fit_in_float64(own_run: run.Run, trainer: gan.GanTrainer, *arguments: Any) -> None:
        in_float64(fit)(own_run, trainer, *arguments)
        trainer.average.module.float()  # published weights are float32

    gan_finetune.conditional_trainer, gan_finetune.fit = in_float64(start), fit_in_float64


def train_own_data(
    script: str, arguments: Sequence[str], environment: dict[str, str], folder: str, stdout: DupFd
) -> None:
    """Train on a small data set of a user, in one of the processes that torchrun would start."""
    os.dup2(stdout.detach(), 1)
    os.chdir(folder)
    os.environ.update(environment)
    gan_finetune.MIN_IMAGES, gan_finetune.SAMPLES = 20, 50
    generation.LABEL_CLASSIFIER_STEPS, gan.RECALIBRATION_BATCHES = 10, 5
    train_generators_in_float64()
    importlib.import_module(script).main(arguments)


def start_pair(script: str, arguments: Sequence[str], folder: Path, output: IO[str]) -> list[multiprocessing.Process]:
    """Start two processes that train one network together; see ``train_own_data``."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        stdout = DupFd(output.fileno())
        processes.append(
            FORK_SERVER.Process(target=train_own_data, args=(script, arguments, environment, str(folder), stdout))
        )
        processes[-1].start()
    return processes


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
