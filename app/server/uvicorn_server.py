"""Two uvicorn servers. One has its own listening socket, and the other receives connections from the supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import ssl
import threading
import time
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI

from app.server.http_protocol import BoundedHttpProtocol
from app.server.supervisor import CONNECTION_MESSAGE, RELEASE_MESSAGE
from app.serving.models import Models
from app.settings import Settings, SettingsError

log = logging.getLogger("quartet")
TLS_HANDSHAKE_SECONDS = 10.0
STDOUT = 1  # file descriptor
CHANNEL_BYTES = 256  # number of bytes that a worker receives from the supervisor at a time


class Server(uvicorn.Server):
    """uvicorn's server. The first SIGTERM lets it finish running requests. A second SIGTERM lets it exit immediately.

    A SIGTERM during start-up also exits immediately.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_level="warning",
            access_log=False,
            log_config=None,  # uvicorn's records use the root logger
            ws="none",
            server_header=False,
            proxy_headers=False,  # client addresses are not used
            timeout_keep_alive=settings.keep_alive_seconds,
            timeout_graceful_shutdown=settings.shutdown_grace_seconds,  # type: ignore[arg-type]  # may be a fraction
            http=BoundedHttpProtocol,
            **tls_context(settings),
        )
        super().__init__(config)
        self.settings = settings
        self.models: Models = app.state.models
        self._signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:
            exit_on_signal()
        self.models.stopping = True
        self.force_exit = self._signalled  # not ``should_exit``, which ``drain`` also sets
        self._signalled = True
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self.models.recovery.failure and not self.should_exit:
            self.drain()
        return await super().on_tick(counter)

    def drain(self) -> None:
        """Report that this process is not ready, finish running requests, and then end the server."""
        self.models.stopping = self.should_exit = True


def exit_on_signal(*_: object) -> NoReturn:
    """Exit with status 0, without waiting for a thread that still reads weights."""
    logging.shutdown()
    os._exit(0)


def exit_if_orphaned(parent: int, seconds: float) -> None:
    """Start a thread that exits this worker ``seconds`` after its parent has ended. Normally a worker exits earlier."""

    def wait_for_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=wait_for_parent, name="orphan", daemon=True).start()


class Watchdog:
    """Ends the process with status 1 after ``seconds`` without a heartbeat.

    The whole process ends, because a single hung thread cannot be ended. A process manager should restart the process.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._last_heartbeat = 0.0

    def heartbeat(self) -> None:
        """Tell the watchdog that the process works. The first call starts the watchdog."""
        self._last_heartbeat = time.monotonic()
        if not self._thread.is_alive() and not self._stopped.is_set():
            self._thread.start()

    def stop(self) -> None:
        """End the watchdog."""
        self._stopped.set()

    def _watch(self) -> None:
        interval = min(1.0, self._seconds / 8)
        last_check = self._last_heartbeat = time.monotonic()  # the thread may start late
        while not self._stopped.wait(interval):
            now, previous_check = time.monotonic(), last_check
            last_check = now
            if now - previous_check > 2 * interval + 1:  # the whole process was stopped, for example by SIGSTOP
                self._last_heartbeat = now
            if (silence := now - self._last_heartbeat) > self._seconds:
                log.critical("no heartbeat for %.0f s: the service exits", silence)
                logging.shutdown()
                os._exit(1)


class ListeningServer(Server):
    """A server with its own socket. It prints its address after start-up, because the system may choose the port.

    ``watchdog`` ends the process if the compute thread hangs. Workers need no watchdog, because the supervisor watches
    them.
    """

    watchdog: Watchdog | None = None

    async def on_tick(self, counter: int) -> bool:
        if self.watchdog and self.models.executor.stalled_seconds() < self.settings.liveness_timeout_seconds:
            self.watchdog.heartbeat()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.watchdog:
            self.watchdog.stop()
        await super().shutdown(sockets)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped.

        Raises:
            SettingsError: the address cannot be used.
        """
        super().run(sockets or [listen_at(self.config.host, self.config.port)])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        with contextlib.suppress(OSError):  # uvloop raises no error; its server then has None as its socket
            await super().startup(sockets)
        listener = next((each for server in self.servers for each in server.sockets), None)
        if listener is None:  # since ``listen_at``, another process has begun to listen
            await self.lifespan.shutdown()
            raise _cannot_listen(self.config.host, self.config.port, os.strerror(errno.EADDRINUSE))
        announce(listener, self.settings)


def listen_at(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to ``host`` and ``port``, but does not listen yet.

    Raises:
        SettingsError: the address cannot be used.
    """
    try:
        return _bound_socket(host, port)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, getattr(error, "strerror", None) or error) from None


def _bound_socket(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet, so that no client connects too early.

    Raises OSError, or UnicodeError for an invalid host name.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ((family, kind, protocol, _, address), *_) = socket.getaddrinfo(
        host, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    return listener


def _cannot_listen(host: str, port: int, reason: object) -> SettingsError:
    return SettingsError(f"QUARTET_HOST {host!r}, QUARTET_PORT {port}: cannot listen: {reason}")


def tls_context(settings: Settings) -> dict[str, Any]:
    """Return uvicorn's options for HTTPS, or no options for HTTP.

    Raises:
        SettingsError: the certificate or its key cannot be used.
    """
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None:
        if key is not None:
            raise SettingsError(f"QUARTET_TLS_KEY is {str(key)!r}: QUARTET_TLS_CERT must be set too")
        return {}
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError; its text quotes no file contents
        files = f"QUARTET_TLS_CERT is {str(cert)!r}, QUARTET_TLS_KEY {str(key or cert)!r}"
        raise SettingsError(f"{files}: not a certificate and its key: {error}") from None
    return {"ssl_certfile": cert, "ssl_keyfile": key}


def announce(listener: socket.socket, settings: Settings) -> None:
    """Print the address of the service."""
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    address = f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"
    line = f"Quartet serves on {address} - open it in a browser, or see {address}/docs\n"
    try:
        os.write(STDOUT, line.encode())  # print would try again at exit and change the exit status
    except OSError as error:
        log.warning("the address cannot be printed: %s", error.strerror)


class WorkerServer(Server):
    """A server that receives connections over ``channel`` and reports its status there to the ``Supervisor``."""

    def __init__(self, app: FastAPI, settings: Settings, channel: socket.socket) -> None:
        super().__init__(app, settings)
        channel.setblocking(False)
        self._channel = channel
        self._liveness_timeout_seconds = settings.liveness_timeout_seconds
        self._received = 0  # connections received since the last report
        self._closed = 0  # connections that have ended since the last report
        self._health = "busy"  # "unhealthy" if there are problems
        self.arriving: set[asyncio.Task[None]] = set()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run([])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.start_accepting()
        self._send_status("ready")

    def start_accepting(self) -> None:
        """Accept connections from now on."""
        asyncio.get_running_loop().add_reader(self._channel, self._accept_all)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish running requests on SIGTERM. Later signals change nothing, because only the supervisor kills workers.

        SIGINT is ignored, because a terminal sends it to all processes, and the supervisor handles it.
        """
        if sig == signal.SIGTERM:
            if not self.started:
                exit_on_signal()
            self.drain()

    def drain(self) -> None:
        super().drain()
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            # A signal can interrupt _send_status, which would then count connections twice.
            asyncio.get_running_loop().call_soon_threadsafe(self._send_status, "stopping")

    async def on_tick(self, counter: int) -> bool:
        self._health = "unhealthy" if self.models.problems() else "busy"
        self._report_load()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._accept_all()  # connections that the supervisor sent before it noticed the stop
        asyncio.get_running_loop().remove_reader(self._channel)
        if self.arriving:
            await asyncio.wait(self.arriving, timeout=1)  # a TLS handshake may wait for a silent client
        await super().shutdown(sockets)

    def _report_load(self) -> None:
        """Report the number of running requests, unless the compute thread hangs.

        A new connection counts as a running request, because its request begins soon.
        """
        if self.models.executor.stalled_seconds() < self._liveness_timeout_seconds:
            self._send_status(f"{self._health} {len(self.server_state.tasks) + self._received}")
        else:
            self._send_status()

    def _send_status(self, *lines: str) -> None:
        """Send two numbers and the status lines ``lines`` to the supervisor.

        The numbers are the connections received and the connections ended since the last report.
        """
        received, closed = self._received, self._closed
        with contextlib.suppress(OSError):
            self._channel.send("".join(f"{line}\n" for line in (f"got {received}", f"left {closed}", *lines)).encode())
            self._received -= received
            self._closed -= closed

    def _accept_all(self) -> None:
        """Accept all waiting connections at once, because iterations of a busy event loop are milliseconds apart.

        Report the connections to the supervisor before reading from them. If this worker died, the supervisor would
        give unreported connections to another worker.
        """
        surplus = 0
        while content := self._accept():
            surplus += content.count(RELEASE_MESSAGE)
        if surplus:  # only now, because a request to close more than ``CHANNEL_BYTES`` connections comes in parts
            open_connections = [each for each in self.server_state.connections if isinstance(each, BoundedHttpProtocol)]
            for connection in open_connections[:surplus]:
                connection.close_after_response = True
        if self._received:
            self._report_load()

    def _accept(self) -> bytes:
        """Receive messages with new connections or requests to close connections. Returns empty bytes if none came."""
        loop = asyncio.get_running_loop()
        try:
            content, descriptors, _, _ = socket.recv_fds(self._channel, CHANNEL_BYTES, 16)
        except BlockingIOError:
            return b""
        except OSError:
            content, descriptors = b"", []
        if not content:  # the supervisor has ended: drain and exit
            loop.remove_reader(self._channel)
            self.handle_exit(signal.SIGTERM, None)
            return b""
        self._received += content.count(CONNECTION_MESSAGE)
        if lost := content.count(CONNECTION_MESSAGE) - len(descriptors):
            log.error("%s connections were lost: too many open files (see ulimit -n)", lost)
            self._closed += lost
        for descriptor in descriptors:
            task = loop.create_task(self._connect(socket.socket(fileno=descriptor)))
            self.arriving.add(task)
            task.add_done_callback(self.arriving.discard)
        return content

    async def _connect(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tls: dict[str, Any] = {}
            if self.config.is_ssl:
                tls = {"ssl": self.config.ssl, "ssl_handshake_timeout": TLS_HANDSHAKE_SECONDS}
            await asyncio.get_running_loop().connect_accepted_socket(self.protocol, connection, **tls)
            return
        connection.close()
        self._count_closed()

    def protocol(self) -> BoundedHttpProtocol:
        protocol = BoundedHttpProtocol(self.config, self.server_state, self.lifespan.state, asyncio.get_running_loop())
        protocol.on_connection_lost = self._count_closed
        return protocol

    def _count_closed(self) -> None:
        """Count a closed connection, and report it soon. Otherwise the supervisor would prefer other workers."""
        if not self._closed:
            asyncio.get_running_loop().call_soon(self._report_load)
        self._closed += 1
