"""The service in processes of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from support.service import ROOT

TIMEOUT_SECONDS = 30  # more than anything here should take


class ServiceProcess:
    """The service in processes of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
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


def children(process: int) -> set[int]:
    return set(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def start_process(
    store: Path, own_group: bool = False, inside: Sequence[str] = (), before: str = "", **settings: object
) -> subprocess.Popen[str]:
    """Start the service, ``inside`` of another command, and do not wait until it serves; ``before``: what is done in
    the process first.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUARTET_")}
    chosen = {
        "store": store,
        "port": 0,
        "workers": 2,
        "threads": 1,
        "log_level": "warning",
        "shutdown_grace_seconds": 20,  # more than what runs takes, on a slow machine too
        **settings,
    }
    environment |= {f"QUARTET_{name.upper()}": str(value) for name, value in chosen.items()}
    return subprocess.Popen(
        [*inside, sys.executable, "-c", f"{before}\nfrom app.main import main\nmain()"],
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
        assert address, "it did not start"
        yield ServiceProcess(process, address[0])
    finally:
        with process:
            if process.poll() is None:
                process.terminate()
                process.wait(TIMEOUT_SECONDS)


def request_live(connection: socket.socket) -> bool:
    """A small request over a connection that is kept; gives whether it stays open."""
    connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        piece = connection.recv(4096)
        assert piece, answer
        answer += piece
    assert answer.startswith(b"HTTP/1.1 200")
    return b"connection: close" not in answer.lower()


HANG_ON_SEVEN = """
import time
from app.tasks.image_generation import ImageSampler
works = ImageSampler.predict
ImageSampler.predict = lambda self, items: time.sleep(3600) if self.rows(items[0]) == 7 else works(self, items)
"""
