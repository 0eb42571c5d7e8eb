"""The parent process: it starts, watches, drains and replaces the workers. It handles no connections.

The parent runs no event loop and computes nothing, because it forks the workers. Its only thread writes log records.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess

from fastapi import FastAPI

from app.api.middleware.api_keys import limit_storage
from app.observability.logs import configure_logging
from app.observability.shared_metrics import SharedMetrics
from app.server.http_server import Server, bind, exit_on_signal, listen, run_server, tls_context
from app.server.system import handles_sighup
from app.server.worker_table import State, WorkerTable
from app.serving.preload import Preloaded
from app.settings import Settings, SettingsError

log = logging.getLogger("quartet")

TICK_SECONDS = 0.25
START_TICK_SECONDS = 0.01  # until all workers are ready


@dataclass(eq=False)
class Worker:
    """A worker process, and its place in the table."""

    process: ForkProcess
    place: int
    started: float = field(default_factory=time.monotonic)
    heartbeat: float = 0.0  # the last one that the parent has seen
    silent_seconds: float = 0.0  # the time since then; it does not pass while the whole service is paused (SIGSTOP)


class Supervisor:
    """Keeps ``settings.workers`` workers running. ``settings`` are the settings of a worker.

    ``create_app`` builds the application in a worker, with all arguments of ``app.main.create_app`` except ``disk``.

    Raises:
        SettingsError: the address, the certificate or the storage of rate limits cannot be used.
    """

    def __init__(self, settings: Settings, create_app: Callable[..., FastAPI]) -> None:
        tls_context(settings)
        self._settings, self._create_app, self._limits = settings, create_app, settings.limits
        self._listener, self._counters = bind(settings.host, settings.port), limit_storage(settings)
        self._table = WorkerTable(settings.workers, settings.limits.fresh_heartbeat_seconds)
        self._shared, self._preloaded = SharedMetrics(settings.workers), Preloaded()
        # The requests may take the whole grace period, and the engines may take as long again. 5 s are a margin.
        self._kill_after_seconds = 2 * settings.shutdown_grace_seconds + 5
        self._pid = os.getpid()
        self._workers: list[Worker] = []
        self._start_after = 0.0  # time of the next start of a worker
        self._serving = False
        self._stopping: float | None = None  # time of the stop
        self._status = 0  # exit status of the service

    def run(self) -> int:
        """Serve until SIGTERM, SIGINT or SIGHUP stops the service. A second SIGTERM or SIGINT exits immediately.

        Returns the exit status.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, exit_on_signal)
        self._preloaded.load(self._settings)
        signals = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, *([signal.SIGHUP] if handles_sighup() else [])}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            while self._stopping is None or self._workers:
                self._start_missing()
                seconds = TICK_SECONDS if self._serving else START_TICK_SECONDS
                received = signal.sigtimedwait(signals, seconds)
                # After SIGCONT, Python may return a result without a signal.
                if received and received.si_signo in signals - {signal.SIGCHLD}:
                    self._on_signal(received.si_signo)
                self._check_workers(0.0 if received else seconds)
                self._preloaded.release_evicted(self._settings.store)
        except BaseException:  # workers must not outlive their parent
            self._kill()
            raise
        finally:
            self._shared.close()
        return self._status

    def _start_missing(self) -> None:
        """Start a worker at each free place."""
        for place in set(range(len(self._table.states))) - {worker.place for worker in self._workers}:
            if self._stopping is not None or time.monotonic() < self._start_after:
                return
            self._preloaded.load(self._settings)
            process = multiprocessing.get_context("fork").Process(
                target=self._run_worker, args=(place,), name="quartet-worker", daemon=False
            )
            try:
                process.start()
            except OSError as error:  # out of memory or processes
                log.error("cannot start a worker: %s", error)
                self._start_after = time.monotonic() + self._limits.restart_seconds
                return
            self._workers.append(Worker(process, place))

    def _run_worker(self, place: int) -> None:
        for number in (signal.SIGINT, signal.SIGHUP):  # a terminal also sends these to the workers
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._shared.use(place)
        configure_logging(self._settings.log_level, self._settings.log_format)
        threading.Thread(target=self._stop_if_orphaned, name="orphan", daemon=True).start()
        app = self._create_app(self._settings, self._counters, self._preloaded, self._shared)
        run_server(Server(app, self._settings, self._listener, self._table, place, has_parent=True))

    def _stop_if_orphaned(self) -> None:
        """Stop this worker after its parent has ended, and end it later if it still runs. Called on a thread."""
        while os.getppid() == self._pid:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self._kill_after_seconds)
        os._exit(1)

    def _check_workers(self, passed_seconds: float) -> None:
        """Remove workers that have ended, kill workers that hang, and listen once all workers are ready."""
        for worker in list(self._workers):
            if worker.process.exitcode is not None:
                self._remove(worker)
                continue
            heartbeat = self._table.heartbeats[worker.place]
            worker.silent_seconds = worker.silent_seconds + passed_seconds if heartbeat == worker.heartbeat else 0.0
            worker.heartbeat = heartbeat
            if worker.silent_seconds > self._longest_silence(worker):
                log.error("killed worker %s: no answer for %.0f s", worker.process.pid, worker.silent_seconds)
                worker.process.kill()
                worker.silent_seconds = 0.0
        if self._stopping is not None:
            if time.monotonic() - self._stopping > self._kill_after_seconds:
                self._kill()
        elif not self._serving and State.STARTING not in self._table.states:
            try:
                listen(self._listener, self._settings)
                self._serving = True
            except SettingsError as error:
                log.error("%s", error)
                self._stop(status=1)

    def _longest_silence(self, worker: Worker) -> float:
        state = self._table.states[worker.place]
        if state == State.STARTING:  # the first workers may take any time
            return self._limits.worker_start_seconds if self._serving else float("inf")
        if state == State.DRAINING:  # a worker that drains may be silent
            return self._kill_after_seconds + self._limits.liveness_timeout_seconds
        return self._limits.liveness_timeout_seconds

    def _remove(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self._table.clear(worker.place)
        self._shared.remove(worker.place)
        if self._stopping is not None:
            return
        log.error("worker %s exited with status %s", worker.process.pid, worker.process.exitcode)
        if not self._serving:  # the worker has logged the reason; other workers would fail too
            self._stop(status=1)
        self._start_after = worker.started + self._limits.restart_seconds

    def _on_signal(self, number: int) -> None:
        if self._stopping is None:
            self._stop()
        elif number != signal.SIGHUP:  # a closing terminal may send more than one SIGHUP
            self._kill()

    def _stop(self, status: int = 0) -> None:
        """Let the workers accept the connections that wait already, and finish their requests."""
        self._status, self._stopping = status, time.monotonic()
        for worker in self._workers:
            self._table.states[worker.place] = State.DRAINING
        for worker in self._workers:
            worker.process.terminate()
        self._listener.close()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
