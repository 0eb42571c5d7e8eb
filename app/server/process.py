"""Plan the worker processes of the service, run one server or a supervisor, and handle signals."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from fastapi import FastAPI

from app.server.http_server import Server, bind, exit_on_signal, listen, run_server
from app.server.supervisor import Supervisor
from app.server.system import available_memory, cores, handles_sighup, raise_file_limit, single_arena
from app.server.worker_table import State, WorkerTable
from app.serving.device import find_device
from app.serving.model import check_store
from app.serving.preload import worker_bytes
from app.settings import Settings, SettingsError

log = logging.getLogger("quartet")
MAX_WORKERS = 16


def run_service(settings: Settings, create_app: Callable[..., FastAPI]) -> int:
    """Serve in this process or in several workers, until a signal stops the service. Returns the exit status.

    Raises:
        SettingsError: a setting, the device, the store, the address, the certificate or the storage of rate limits
            cannot be used.
    """
    workers, threads = plan_workers(settings, Machine.find(settings))
    raise_file_limit()
    single_arena()
    if workers == 1:
        run_alone(settings.model_copy(update={"threads": threads}), create_app)
    changes = {
        "threads": threads,
        "workers": workers,
        # Each worker must have room for one body of the allowed size.
        "max_buffered_bytes": max(settings.max_buffered_bytes // workers, settings.max_body_bytes),
        "queue_rows": max(1, settings.queue_rows // workers),
    }
    return Supervisor(settings.model_copy(update=changes), create_app).run()


@dataclass(frozen=True)
class Machine:
    """What the service may use. ``worker_bytes`` is the memory of one worker."""

    cores: int
    memory_bytes: int
    worker_bytes: int
    has_gpu: bool = False

    @classmethod
    def find(cls, settings: Settings) -> Machine:
        """Raises SettingsError: the device or the store cannot be used."""
        check_store(settings.store)
        has_gpu = find_device(settings.device).type == "cuda"
        return cls(cores(), available_memory(), worker_bytes(settings.store), has_gpu)


def plan_workers(settings: Settings, machine: Machine) -> tuple[int, int]:
    """Return two numbers: the number of workers, and the number of compute threads of each worker.

    By default there is one worker for each core, but at most ``MAX_WORKERS`` and only as many as memory allows. The
    workers divide the cores equally. The networks are small, so two threads for one matrix product are slower than two
    products in parallel (measured with ``make bench``). With a GPU, there is always one worker.

    Raises:
        SettingsError: several workers are set, and there is a GPU.
    """
    if machine.has_gpu and settings.workers > 1:
        raise SettingsError(
            f"QUARTET_WORKERS is {settings.workers}: only one process can use a GPU; allowed values: 0, 1"
        )
    fitting = machine.memory_bytes // 2 // machine.worker_bytes
    default = max(1, min(machine.cores // max(settings.threads, 1), fitting, MAX_WORKERS))
    workers = settings.workers or (1 if machine.has_gpu else default)
    return workers, settings.threads or max(1, machine.cores // workers)


def run_alone(settings: Settings, create_app: Callable[..., FastAPI]) -> NoReturn:
    """Serve in this process until SIGTERM, SIGINT or SIGHUP stops it. A signal during start-up exits immediately."""
    for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if handles_sighup() else [])):
        signal.signal(number, exit_on_signal)
    listener, table = bind(settings.host, settings.port), WorkerTable(1, settings.limits.fresh_heartbeat_seconds)
    server = Server(create_app(settings), settings, listener, table, on_ready=lambda: listen(listener, settings))

    def on_hangup(*_: object) -> None:
        if not server.should_exit:  # a closing terminal may send more than one SIGHUP
            signal.raise_signal(signal.SIGTERM)

    if handles_sighup():
        signal.signal(signal.SIGHUP, on_hangup)
    exit_if_hung(table, settings.limits.liveness_timeout_seconds)
    run_server(server)


def exit_if_hung(table: WorkerTable, seconds: float) -> None:
    """Start a thread that ends this process with status 1 after ``seconds`` without a heartbeat, until it drains.

    The whole process ends, because a single hung thread cannot be ended. A service manager should start it again.
    """

    def watch() -> None:
        heartbeat, silent_seconds, interval = 0.0, 0.0, min(1.0, seconds / 8)
        while table.states[0] != State.DRAINING:
            time.sleep(interval)  # does not count the time while the process is paused (SIGSTOP)
            silent_seconds = silent_seconds + interval if table.heartbeats[0] == heartbeat else 0.0
            heartbeat = table.heartbeats[0]
            if silent_seconds > seconds and table.states[0] != State.STARTING:
                log.critical("no heartbeat for %.0f s: the service exits", silent_seconds)
                logging.shutdown()
                os._exit(1)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
