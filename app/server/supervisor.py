"""Several processes behind one address, each with an event loop, the networks, and a core of its own.

One process listens and hands each connection to the worker that has least to do: workers that share a socket are
given connections by chance, and keep-alive keeps them where they are. It starts another worker for one that dies, or
no longer tells that it is alive, and stops them all when it is told to stop.

It imports neither torch nor an event loop of its own, and has no threads: it forks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess

log = logging.getLogger("quartet")

CONNECTION_MESSAGE = b"c"  # goes with the connection that a worker is given
RELEASE_MESSAGE = b"s"  # asks a worker to close a connection after its next answer
BACKLOG = 2048
TICK = 0.25  # seconds
PAUSED = 2.0  # seconds between two ticks, from which on the process was stopped meanwhile
LOADING = 60.0  # seconds that a new worker may take until it is ready
MAX_PENDING = 5.0  # seconds that a connection may wait until one of them has read those that were handed over before
UNEVEN = 5.0  # seconds for which one worker may have many more connections than another
HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP)  # while a worker is forked
AGAIN = (0.1, 10.0)  # seconds before a worker that dies at once is replaced: at first, and at most


@dataclass(eq=False)
class WorkerProcess:
    """A process, the socket to it, and what it has told of itself."""

    process: ForkProcess
    channel: socket.socket
    started: float = field(default_factory=time.monotonic)
    last_heartbeat: float = field(default_factory=time.monotonic)
    ready: bool = False
    leaving: bool = False  # it was told to stop, by whom ever
    unwell: bool = False  # it cannot answer as it should, and says so
    connections: int = 0
    busy: int = 0  # requests under way when it last told, and connections handed to it since
    words: bytes = b""

    def load(self) -> tuple[bool, int, int]:
        """The least is given the next connection: one that fails at once would else always have the least to do."""
        return self.unwell, self.busy, self.connections


class Supervisor:
    """``work`` runs a worker: it is given its end of a socket, over which connections come, and tells its state.

    A worker without a heartbeat for ``unready_after_seconds`` gets connections only when no other worker is better.
    After ``liveness_timeout_seconds`` it is replaced. At a stop, workers have ``shutdown_grace_seconds``.
    """

    def __init__(
        self,
        listener: socket.socket,
        work: Callable[[socket.socket], None],
        count: int,
        unready_after_seconds: float,
        liveness_timeout_seconds: float,
        shutdown_grace_seconds: float,
        ready: Callable[[], None],
        died: Callable[[int], None],
    ) -> None:
        self._listener = listener
        self._work = work
        self._count = count
        self._silent_seconds = unready_after_seconds
        self._hang_seconds = liveness_timeout_seconds
        self._stop_seconds = shutdown_grace_seconds
        self._ready = ready
        self._died = died
        self._workers: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()
        self._accepting = False
        self._serving = False
        self._stopping: float | None = None  # when it was told
        self._pause = AGAIN[0]
        self._start_after = 0.0
        self._status = 0  # of the whole service, for whoever started it
        self._even = time.monotonic()  # when it last was
        self._looked = time.monotonic()
        self._pending: tuple[socket.socket, float] | None = None  # a connection that all are too busy for, until when

    def run(self) -> int:
        """Serve until told to stop by SIGTERM or SIGINT, or left by the terminal; the second of them stops at once.
        Gives the exit status.
        """
        self._listener.setblocking(False)
        waking, told = socket.socketpair()
        for end in (waking, told):
            end.setblocking(False)
        self._selector.register(waking, selectors.EVENT_READ, lambda: self._on_signal(waking))
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, *([signal.SIGHUP] if handles_sighup() else [])):
            signal.signal(number, lambda *_: None)
        try:
            while self._stopping is None or self._workers:
                self._spawn_missing()
                for key, _ in self._selector.select(TICK):
                    key.data()
                self._offer_again()
                self._check_workers()
        except BaseException:  # else the others would go on listening for nobody
            self._kill()
            raise
        return self._status

    def _spawn_missing(self) -> None:
        """Start the workers that are missing."""
        while self._stopping is None and len(self._workers) < self._count and time.monotonic() >= self._start_after:
            try:
                worker = self._spawn()
            except OSError as error:  # no memory, processes or files are left: there may be later
                log.error("a worker cannot be started: %s", error)
                self._wait(time.monotonic())
                return
            ours = worker.channel
            self._workers.append(worker)
            self._selector.register(ours, selectors.EVENT_READ, lambda worker=worker: self._receive(worker))

    def _spawn(self) -> WorkerProcess:
        """A new process. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            context = multiprocessing.get_context("fork")
            process = context.Process(target=self._run_worker, args=(theirs, ours), name="quartet-worker", daemon=False)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # a signal to the new one would be told to this one
            try:
                process.start()
            except OSError:
                ours.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.setblocking(False)
        return WorkerProcess(process, ours)

    def _wait(self, now: float) -> None:
        """Start none for a while, and the next time for longer."""
        self._start_after, self._pause = now + self._pause, min(self._pause * 2, AGAIN[1])

    def _run_worker(self, channel: socket.socket, other_end: socket.socket) -> None:
        """In the new process: keep nothing of this one's but the socket, which ends when this one does."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGINT, signal.SIGHUP):  # of a terminal they go to all: the one that listens tells others
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        self._selector.close()
        self._listener.close()
        pending = [self._pending[0]] if self._pending else []
        for held in (other_end, *pending, *(worker.channel for worker in self._workers)):
            held.close()
        self._work(channel)

    def _receive(self, worker: WorkerProcess) -> None:
        """What a worker tells: ``ready``, ``busy N`` or ``unwell N`` requests, ``left N`` connections; a line each."""
        try:
            content = worker.channel.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            content = b""
        if not content:
            worker.ready = False  # it is gone, and will be looked after
            with contextlib.suppress(KeyError):
                self._selector.unregister(worker.channel)
            return
        *lines, worker.words = (worker.words + content).split(b"\n")
        worker.last_heartbeat = time.monotonic()
        for line in lines:
            word, _, number = line.partition(b" ")
            if word == b"ready":
                worker.ready = not worker.leaving
                self._accept_when_ready()
            elif word == b"stopping":
                worker.ready, worker.leaving = False, True
            elif word in (b"busy", b"unwell"):
                worker.busy, worker.unwell = int(number), word == b"unwell"
            elif word == b"left":
                worker.connections -= int(number)

    def _accept_when_ready(self) -> None:
        """Begin to listen when all workers are ready, so that the first connections are shared among them."""
        ready = [worker for worker in self._workers if worker.ready]
        if not self._serving and len(ready) == self._count:
            self._listener.listen(BACKLOG)
            self._serving = True
            self._ready()
        if self._serving and ready and not (self._accepting or self._pending) and self._stopping is None:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
            self._accepting = True

    def _stop_accepting(self) -> None:
        if self._accepting:
            self._selector.unregister(self._listener)
            self._accepting = False

    def _accept(self) -> None:
        """Hand over the connections that have come."""
        for _ in range(64):
            ready = [worker for worker in self._workers if worker.ready]
            if not ready:
                self._stop_accepting()
                return
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    log.error("a connection cannot be taken: %s", error)
                    time.sleep(0.01)  # out of file descriptors: the others need a moment to close theirs
                return
            if self._hand_over(connection, ready):
                connection.close()
            else:
                self._pending = connection, time.monotonic() + MAX_PENDING
                self._stop_accepting()
                return

    def _offer_again(self) -> None:
        """The connection that no worker could take, before any other: soon they will have read those before it."""
        if self._pending is None:
            return
        connection, end = self._pending
        handed = self._hand_over(connection, [worker for worker in self._workers if worker.ready])
        if handed or time.monotonic() > end or self._stopping is not None:
            if not handed:
                log.error("a connection is closed: no worker takes it")
            connection.close()
            self._pending = None
            self._accept_when_ready()

    def _hand_over(self, connection: socket.socket, workers: list[WorkerProcess]) -> bool:
        """Give a connection to the one with least to do; False when none can take more now."""
        now = time.monotonic()
        for worker in sorted(workers, key=lambda one: (now - one.last_heartbeat > self._silent_seconds, one.load())):
            try:
                socket.send_fds(worker.channel, [CONNECTION_MESSAGE], [connection.fileno()])
            except OSError as error:  # one that takes no more will be found hung
                if error.errno in (errno.EPIPE, errno.ECONNRESET):  # it is gone, and will be buried
                    worker.ready = False
                continue
            worker.connections += 1
            worker.busy += 1
            return True
        return False

    def _check_workers(self) -> None:
        """Bury the dead, end the hung, and even out what the workers have."""
        now = time.monotonic()
        if (paused := now - self._looked) > PAUSED:  # the whole service was: nobody could tell anything
            for worker in self._workers:
                worker.last_heartbeat += paused
        self._looked = now
        for worker in list(self._workers):
            if worker.process.exitcode is not None:
                self._reap(worker, now)
            elif self._stopping is None and not worker.leaving and self._hangs(worker, now):
                log.error(
                    "worker %s has not answered for %.0f s: ended", worker.process.pid, now - worker.last_heartbeat
                )
                worker.process.kill()
                worker.ready, worker.leaving = False, True
        if self._stopping is not None and now - self._stopping > self._stop_seconds:
            self._kill()
        self._rebalance(now)

    def _hangs(self, worker: WorkerProcess, now: float) -> bool:
        """Whether it is silent for too long; before it is ready it tells nothing, and the first may take their time."""
        if worker.ready:
            return now - worker.last_heartbeat > self._hang_seconds
        return self._serving and now - worker.started > max(LOADING, 2 * self._hang_seconds)

    def _reap(self, worker: WorkerProcess, now: float) -> None:
        self._workers.remove(worker)
        with contextlib.suppress(KeyError):
            self._selector.unregister(worker.channel)
        worker.channel.close()
        if worker.process.pid is not None:
            self._died(worker.process.pid)
        if self._stopping is not None:
            return
        log.error("worker %s ended with %s", worker.process.pid, worker.process.exitcode)
        if not self._serving:  # it said why; the others would say the same
            self._status = 1
            self._stop()
        elif now - worker.started < AGAIN[1]:
            self._wait(now)
        else:
            self._pause = AGAIN[0]

    def _rebalance(self, now: float) -> None:
        """When a worker has long had many more connections than another, as after a replacement, let some come again.

        For a moment that is nothing: callers come and go.
        """
        ready = [worker for worker in self._workers if worker.ready and not worker.unwell]
        counts = [worker.connections for worker in ready] or [0]
        surplus = (max(counts) - min(counts)) // 2
        if surplus < 2 or max(counts) <= 1.5 * min(counts):
            self._even = now
        elif now - self._even > UNEVEN:
            self._even = now
            with contextlib.suppress(OSError):
                max(ready, key=lambda worker: worker.connections).channel.send(RELEASE_MESSAGE * surplus)

    def _on_signal(self, waking: socket.socket) -> None:
        """A signal came."""
        for number in waking.recv(64):
            if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if self._stopping is None:
                    self._stop()
                elif number != signal.SIGHUP:  # of a terminal that is closed, more than one may come
                    self._kill()

    def _stop(self) -> None:
        """Take no more connections, and have the workers finish what they have."""
        self._stopping = time.monotonic()
        self._stop_accepting()
        self._listener.close()
        for worker in self._workers:
            worker.process.terminate()

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet, so that nobody connects before there is somebody to answer.

    Raises OSError.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ((family, kind, protocol, _, address), *_) = socket.getaddrinfo(
        host, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    return listener


def handles_sighup() -> bool:
    """Whether the end of a terminal is to stop the service: not under ``nohup``, nor where there is no such signal."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def can_fork() -> bool:
    """Whether this system can share a process's memory with workers."""
    return sys.platform == "linux" and hasattr(os, "fork")
