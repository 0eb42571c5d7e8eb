"""The supervisor process, which accepts connections and distributes them among worker processes.

Each worker has its own event loop and its own engines. The supervisor passes each connection to the worker with the
least work. If the workers shared a listening socket instead, they would get connections at random, and would keep them
for a long time (keep-alive). The supervisor replaces workers that die or hang, and stops all workers when it is
stopped.

This module uses no threads, no event loop and no torch, because the supervisor forks the workers.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import multiprocessing
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess

from app.server.system import handles_sighup

log = logging.getLogger("quartet")

CONNECTION_MESSAGE = b"c"  # sent to a worker with a connection
RELEASE_MESSAGE = b"s"  # asks a worker to close one of its connections after the next response
BACKLOG = 2048
ACCEPTED_AT_ONCE = 64  # connections
TICK_SECONDS = 0.25
PAUSE_SECONDS = 2.0  # a longer time between two ticks means that the process was stopped, for example by SIGSTOP
START_SECONDS = 60.0  # shortest time that a new worker gets to become ready when it replaces another worker
START_FACTOR = 3  # a new worker gets this many times the last start of a worker, if that is longer
MAX_PENDING_SECONDS = 5.0  # a connection is closed if no worker accepts it for this long
REBALANCE_SECONDS = 1.0  # longest time for which a worker may have many more connections than another worker
BLOCKED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP)  # while a worker is forked
RESTART_DELAYS = (0.1, 10.0)  # first and longest delay, in seconds, before a worker that died early is replaced


@dataclass(eq=False)
class WorkerProcess:
    """A worker process, the socket to it, and its last reported status."""

    process: ForkProcess
    channel: socket.socket
    started: float = field(default_factory=time.monotonic)
    last_heartbeat: float = field(default_factory=time.monotonic)
    ready: bool = False
    was_ready: bool = False
    stopping: float | None = None  # time at which the worker began to stop
    unhealthy: bool = False  # whether the worker reports problems
    connections: int = 0
    busy: int = 0  # running requests at the last report, plus connections that the worker had not received by then
    buffer: bytes = b""  # an incomplete line
    sent: deque[socket.socket] = field(default_factory=deque)  # connections not yet reported as received

    def load(self) -> tuple[bool, int]:
        """Return a sort key. The worker with the lowest key gets the next connection. Unhealthy workers come last.

        A connection counts even if it is idle, because its client may send a request at any time.
        """
        return self.unhealthy, self.connections + self.busy


class Supervisor:
    """Starts ``count`` workers and distributes connections. ``work(channel)`` runs in each worker process.

    A worker without a heartbeat for ``unready_after_seconds`` gets connections only if no other worker accepts them.
    After ``liveness_timeout_seconds`` without a heartbeat, the worker is replaced. When the service is stopped, workers
    that still run after ``kill_after_seconds`` are killed. ``ready()`` is called when the service listens,
    ``died(pid)`` when a worker has ended, ``prepare()`` before a worker starts, and ``tick()`` at intervals.
    """

    def __init__(
        self,
        listener: socket.socket,
        work: Callable[[socket.socket], None],
        count: int,
        unready_after_seconds: float,
        liveness_timeout_seconds: float,
        kill_after_seconds: float,
        ready: Callable[[], None],
        died: Callable[[int], None],
        prepare: Callable[[], None] = lambda: None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._listener = listener
        self._work = work
        self._count = count
        self._unready_after_seconds = unready_after_seconds
        self._liveness_timeout_seconds = liveness_timeout_seconds
        self._kill_after_seconds = kill_after_seconds
        self._ready = ready
        self._died = died
        self._prepare, self._tick = prepare, tick
        self._workers: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()
        self._accepting = False
        self._accept_error_at = -math.inf  # time.monotonic() of the last log line about a failed accept
        self._serving = False
        self._stopping: float | None = None  # time of the stop
        self._restart_delay = RESTART_DELAYS[0]
        self._start_after = 0.0
        self._start_seconds = 0.0  # time that a new worker gets, according to the last start
        self._status = 0  # exit status of the service
        self._balanced_at = time.monotonic()
        self._checked_at = time.monotonic()
        self._pending: deque[tuple[socket.socket, float]] = deque()  # unaccepted connections and their deadlines

    def run(self) -> int:
        """Serve until SIGTERM, SIGINT or SIGHUP stops the service. A second SIGTERM or SIGINT exits immediately.

        Returns the exit status.
        """
        self._listener.setblocking(False)
        wakeup_read, wakeup_write = socket.socketpair()
        for end in (wakeup_read, wakeup_write):
            end.setblocking(False)
        self._selector.register(wakeup_read, selectors.EVENT_READ, lambda: self._on_signal(wakeup_read))
        signal.set_wakeup_fd(wakeup_write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, *([signal.SIGHUP] if handles_sighup() else [])):
            signal.signal(number, lambda *_: None)
        try:
            while self._stopping is None or self._workers:
                self._spawn_missing()
                for key, _ in self._selector.select(TICK_SECONDS):
                    key.data()
                self._offer_again()
                self._check_workers()
                self._tick()
        except BaseException:  # workers must not outlive the supervisor
            self._kill()
            raise
        return self._status

    def _spawn_missing(self) -> None:
        """Start missing workers."""
        while self._stopping is None and len(self._workers) < self._count and time.monotonic() >= self._start_after:
            self._prepare()
            try:
                worker = self._spawn()
            except OSError as error:  # out of memory, processes or files: try again later
                log.error("cannot start a worker: %s", error)
                self._delay_restart(time.monotonic())
                return
            self._workers.append(worker)
            self._selector.register(worker.channel, selectors.EVENT_READ, lambda worker=worker: self._receive(worker))

    def _spawn(self) -> WorkerProcess:
        """Fork a worker. Raises OSError."""
        own_end, worker_end = socket.socketpair()
        with worker_end:
            context = multiprocessing.get_context("fork")
            process = context.Process(
                target=self._run_worker, args=(worker_end, own_end), name="quartet-worker", daemon=False
            )
            # The child shares this process's wakeup socket until _run_worker resets it.
            previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
            try:
                process.start()
            except OSError:
                own_end.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        own_end.setblocking(False)
        return WorkerProcess(process, own_end)

    def _delay_restart(self, now: float) -> None:
        """Delay the next start of a worker. The delay doubles each time, up to a maximum."""
        self._start_after = now + self._restart_delay
        self._restart_delay = min(self._restart_delay * 2, RESTART_DELAYS[1])

    def _run_worker(self, channel: socket.socket, other_end: socket.socket) -> None:
        """Run in the new process: close all inherited sockets except ``channel``, and call ``work``."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGHUP):  # a terminal also sends these to the workers
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED_SIGNALS)
        self._selector.close()
        self._listener.close()
        sockets = [other_end, *(connection for connection, _ in self._pending)]
        for worker in self._workers:
            sockets += [worker.channel, *worker.sent]
        for inherited in sockets:
            inherited.close()
        self._work(channel)

    def _receive(self, worker: WorkerProcess) -> bool:
        """Read status lines of a worker. Returns whether there may be more lines.

        The lines are ``got N`` (N connections were received), ``left N`` (N connections have ended), ``ready``,
        ``stopping``, and ``busy N`` or ``unhealthy N`` (N running requests).
        """
        try:
            content = worker.channel.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            content = b""
        if not content:  # the worker has ended; _check_workers replaces it
            worker.ready = False
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.channel)
            self._take_back(worker)
            return False
        *lines, worker.buffer = (worker.buffer + content).split(b"\n")
        for line in lines:
            state, _, number = line.partition(b" ")
            if state in (b"ready", b"busy", b"unhealthy"):
                worker.last_heartbeat = time.monotonic()
            if state == b"ready":
                self._start_seconds = START_FACTOR * (time.monotonic() - worker.started)
                worker.ready, worker.was_ready = worker.stopping is None, True
                self._accept_when_ready()
            elif state == b"stopping":
                worker.ready, worker.stopping = False, time.monotonic()
            elif state in (b"busy", b"unhealthy"):
                worker.busy, worker.unhealthy = int(number) + len(worker.sent), state == b"unhealthy"
            elif state == b"got":
                for _ in range(int(number)):
                    worker.sent.popleft().close()
            elif state == b"left":
                worker.connections -= int(number)
        return True

    def _take_back(self, worker: WorkerProcess) -> None:
        """Keep the connections that a worker did not receive before it ended, to send them to other workers."""
        deadline = time.monotonic() + MAX_PENDING_SECONDS
        self._pending.extend((connection, deadline) for connection in worker.sent)
        worker.sent.clear()

    def _accept_when_ready(self) -> None:
        """Listen once all workers are ready, so that each worker gets some of the first connections."""
        ready = [worker for worker in self._workers if worker.ready]
        if not self._serving and len(ready) == self._count:
            try:
                self._listener.listen(BACKLOG)
            except OSError as error:  # since this socket was bound, another process has begun to listen
                log.error("cannot listen on %s, port %s: %s", *self._listener.getsockname()[:2], error.strerror)
                self._status = 1
                self._stop()
                return
            self._serving = True
            self._ready()
        if self._serving and ready and not (self._accepting or self._pending) and self._stopping is None:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._accepting = True

    def _stop_accepting(self) -> None:
        if self._accepting:
            self._selector.unregister(self._listener)
            self._accepting = False

    def _accept(self) -> bool:
        """Send waiting connections to workers. Returns whether more connections may wait."""
        for _ in range(ACCEPTED_AT_ONCE):
            ready = [worker for worker in self._workers if worker.ready]
            if not (ready and self._accepting):
                self._stop_accepting()
                return False
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    if (now := time.monotonic()) > self._accept_error_at + 1:
                        self._accept_error_at = now
                        log.error("cannot accept a connection: %s", error)
                    time.sleep(0.01)  # out of file descriptors: workers need a moment to close some
                return False
            if not self._hand_over(connection, ready):
                self._pending.append((connection, time.monotonic() + MAX_PENDING_SECONDS))
                self._stop_accepting()
        return True

    def _offer_again(self) -> None:
        """Try again to send pending connections to workers, because the queues of the workers may have room now."""
        while self._pending:
            connection, deadline = self._pending[0]
            if not self._hand_over(connection, [worker for worker in self._workers if worker.ready]):
                if time.monotonic() <= deadline and self._stopping is None:
                    return
                log.error("closed a connection: no worker accepted it")
                connection.close()
            self._pending.popleft()
            self._accept_when_ready()

    def _hand_over(self, connection: socket.socket, workers: list[WorkerProcess]) -> bool:
        """Send a connection to the worker with the least work. Returns False when no worker accepts it now.

        This process keeps the connection open until the worker has received it, because the worker may end earlier.
        """
        now = time.monotonic()

        def order(worker: WorkerProcess) -> tuple[bool, tuple[bool, int]]:
            return now - worker.last_heartbeat > self._unready_after_seconds, worker.load()

        for worker in sorted(workers, key=order):
            try:
                socket.send_fds(worker.channel, [CONNECTION_MESSAGE], [connection.fileno()])
            except OSError as error:  # the worker's queue is full; if the worker hangs, _check_workers replaces it
                if error.errno in (errno.EPIPE, errno.ECONNRESET):  # the worker has ended
                    worker.ready = False
                continue
            worker.sent.append(connection)
            worker.connections += 1
            worker.busy += 1
            return True
        return False

    def _check_workers(self) -> None:
        """Remove workers that have ended, kill workers that hang, and rebalance connections."""
        now = time.monotonic()
        if (paused := now - self._checked_at) > PAUSE_SECONDS:  # the whole service was paused, so no worker reported
            for worker in self._workers:
                worker.last_heartbeat += paused
        self._checked_at = now
        for worker in list(self._workers):
            if worker.process.exitcode is not None:
                self._reap(worker, now)
            elif self._stopping is None and self._hangs(worker, now):
                silence = now - (worker.stopping or worker.last_heartbeat)
                log.error("killed worker %s: no answer for %.0f s", worker.process.pid, silence)
                worker.process.kill()
                if not worker.was_ready and worker.stopping is None:
                    self._start_seconds = 2 * (now - worker.started)  # the store may have larger networks now
                worker.ready, worker.stopping = False, now
        if self._stopping is not None and now - self._stopping > self._kill_after_seconds:
            self._kill()
        self._rebalance(now)

    def _hangs(self, worker: WorkerProcess, now: float) -> bool:
        """Return whether a worker has been silent too long. The first workers may take any time to become ready."""
        if worker.stopping is not None:  # a worker that drains may be silent
            return now - worker.stopping > self._kill_after_seconds + self._liveness_timeout_seconds
        if worker.ready:
            return now - worker.last_heartbeat > self._liveness_timeout_seconds
        return self._serving and now - worker.started > max(
            START_SECONDS, 2 * self._liveness_timeout_seconds, self._start_seconds
        )

    def _reap(self, worker: WorkerProcess, now: float) -> None:
        while self._receive(worker):  # reads its last status lines
            pass
        self._workers.remove(worker)
        worker.channel.close()
        if worker.process.pid is not None:
            self._died(worker.process.pid)
        if self._stopping is not None:
            return
        log.error("worker %s exited with status %s", worker.process.pid, worker.process.exitcode)
        if not self._serving:  # the worker has logged the reason; other workers would fail too
            self._status = 1
            self._stop()
        elif now - worker.started < RESTART_DELAYS[1]:
            self._delay_restart(now)
        else:
            self._restart_delay = RESTART_DELAYS[0]

    def _rebalance(self, now: float) -> None:
        """Close some connections of a worker that has many more connections than another worker.

        The clients of these connections connect again, and get another worker. Imbalances shorter than
        ``REBALANCE_SECONDS`` are normal and ignored.
        """
        ready = [worker for worker in self._workers if worker.ready and not worker.unhealthy]
        counts = [worker.connections for worker in ready] or [0]
        surplus = (max(counts) - min(counts)) // 2
        if surplus < 2 or max(counts) <= 1.5 * min(counts):
            self._balanced_at = now
        elif now - self._balanced_at > REBALANCE_SECONDS:
            self._balanced_at = now
            with contextlib.suppress(OSError):
                max(ready, key=lambda worker: worker.connections).channel.send(RELEASE_MESSAGE * surplus)

    def _on_signal(self, wakeup: socket.socket) -> None:
        """Handle the signals that have arrived."""
        for number in wakeup.recv(64):
            if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if self._stopping is None:
                    self._stop()
                elif number != signal.SIGHUP:  # a closing terminal may send more than one SIGHUP
                    self._kill()

    def _stop(self) -> None:
        """Accept only the connections that wait already, and let the workers finish their requests."""
        for _ in range(BACKLOG // ACCEPTED_AT_ONCE):
            if not self._accept():
                break
        self._stop_accepting()
        self._stopping = time.monotonic()
        self._listener.close()
        for worker in self._workers:
            worker.process.terminate()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
