"""Plan the worker processes of the service, run one server or a supervisor, and handle signals."""

from __future__ import annotations

import logging
import os
import signal
import socket
from typing import Protocol

from fastapi import FastAPI
from limits.aio.storage import Storage

from app.api.middleware.api_keys import limit_storage
from app.observability.logs import log_in_background, log_without_waiting
from app.observability.multiprocess_metrics import restore_metrics_folder, shared_metrics, use_own_metrics
from app.server.supervisor import Supervisor
from app.server.system import available_memory, can_fork, cores, handles_sighup, raise_file_limit, single_arena
from app.server.uvicorn_server import (
    ListeningServer,
    Watchdog,
    WorkerServer,
    announce,
    exit_if_orphaned,
    exit_on_signal,
    listen_at,
    tls_context,
)
from app.serving.device import find_device
from app.serving.model import check_store
from app.serving.preload import Preloaded, worker_bytes
from app.settings import Settings, SettingsError

MAX_WORKERS = 16


class AppFactory(Protocol):
    """Builds the application. Workers share the rate-limit ``counters`` and the ``preloaded`` versions."""

    def __call__(
        self, settings: Settings, counters: Storage | None = None, preloaded: Preloaded | None = None
    ) -> FastAPI: ...


def run_service(settings: Settings, create_app: AppFactory) -> int:
    """Serve in this process or in several workers, until a signal stops the service. Returns the exit status.

    Raises:
        SettingsError: a setting, the device or the store cannot be used.
    """
    workers, threads = plan_workers(settings)
    raise_file_limit()
    single_arena()
    if workers > 1:
        return run_supervisor(settings, create_app, workers, threads)
    run_alone(settings.model_copy(update={"threads": threads}), create_app)
    return 0


def plan_workers(settings: Settings) -> tuple[int, int]:
    """Return two numbers: the number of workers, and the number of compute threads of each worker.

    By default there is one worker for each core, but at most ``MAX_WORKERS`` and only as many as memory allows. The
    workers divide the cores equally. The networks are small, so two threads for one matrix product are slower than two
    products in parallel (measured with ``make bench``). With a GPU, there is always one worker.

    Raises:
        SettingsError: the device or the store cannot be used, or several workers are set although only one is possible.
    """
    check_store(settings.store)
    device, memory = find_device(settings.device), available_memory()
    single = device.type == "cuda" or not can_fork()
    if single and settings.workers > 1:
        reason = "only one process can use a GPU" if can_fork() else "this system cannot fork processes"
        raise SettingsError(f"QUARTET_WORKERS is {settings.workers}: {reason}; allowed values: 0, 1")
    memory_per_worker = worker_bytes(settings.store)
    fitting = cores() if memory is None else int(memory / 2 // memory_per_worker)
    default = 1 if single else max(1, min(cores() // max(settings.threads, 1), fitting, MAX_WORKERS))
    workers = settings.workers or default
    return workers, settings.threads or max(1, cores() // workers)


def run_alone(settings: Settings, create_app: AppFactory) -> None:
    """Serve in this process until SIGTERM, SIGINT or SIGHUP stops it. A signal during start-up exits immediately."""
    use_own_metrics()
    log_in_background()
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal once more after draining
        signal.signal(number, exit_on_signal)
    if stop_on_hangup := handles_sighup():
        signal.signal(signal.SIGHUP, exit_on_signal)
    server = ListeningServer(create_app(settings), settings)

    def on_hangup(*_: object) -> None:
        if not server.should_exit:  # a closing terminal may send more than one SIGHUP
            signal.raise_signal(signal.SIGTERM)

    if stop_on_hangup:
        signal.signal(signal.SIGHUP, on_hangup)
    server.watchdog = Watchdog(settings.liveness_timeout_seconds)
    run_server(server)


def run_server(server: ListeningServer | WorkerServer) -> None:
    """Run a server until it is stopped. Exit with status 1 if a network cannot recover.

    If a thread is still busy at the end, exit immediately. Otherwise Python would wait for the thread.
    """
    server.run()
    logging.shutdown()  # called here, because a forked worker does not call it at exit
    models = server.models
    status = 1 if models.recovery.failure else 0
    if status or any(
        executor.busy
        for executor in (models.executor, models.parse_executor, models.large_image_executor, models.load_executor)
    ):
        os._exit(status)


def run_supervisor(settings: Settings, create_app: AppFactory, workers: int, threads: int) -> int:
    """Serve with several workers until a signal stops the service. Returns the exit status.

    Raises:
        SettingsError: the address, the certificate, the storage of rate limits or shared memory cannot be used.
    """
    worker_settings = settings.model_copy(
        update={
            "threads": threads,
            "workers": workers,  # for the metric quartet_planned_workers
            # Each worker must have room for one body of the allowed size.
            "max_buffered_bytes": max(settings.max_buffered_bytes // workers, settings.max_body_bytes),
            "queue_rows": max(1, settings.queue_rows // workers),
        }
    )
    tls_context(settings)
    for number in (signal.SIGTERM, signal.SIGINT):  # until the supervisor handles them
        signal.signal(number, exit_on_signal)
    log_without_waiting()
    listener, counters = listen_at(settings.host, settings.port), limit_storage(settings)
    try:
        metrics_folder = shared_metrics()
    except OSError as error:
        raise SettingsError(
            f"QUARTET_WORKERS is {workers}: workers need a folder for shared metrics: {error}"
        ) from None
    with metrics_folder as remove_process:
        # The requests may take the whole grace period, and the engines may take as long again. 5 s are a margin.
        parent, stop_seconds = os.getpid(), 2 * settings.shutdown_grace_seconds + 5

        preloaded = Preloaded()

        def work(channel: socket.socket) -> None:
            restore_metrics_folder()
            log_in_background()
            exit_if_orphaned(parent, stop_seconds)
            run_server(WorkerServer(create_app(worker_settings, counters, preloaded), worker_settings, channel))

        return Supervisor(
            listener,
            work=work,
            count=workers,
            unready_after_seconds=settings.unready_after_seconds,
            liveness_timeout_seconds=settings.liveness_timeout_seconds,
            kill_after_seconds=stop_seconds,
            ready=lambda: announce(listener, settings),
            died=remove_process,
            prepare=lambda: preloaded.load(worker_settings),
            tick=preloaded.release_evicted,
        ).run()
