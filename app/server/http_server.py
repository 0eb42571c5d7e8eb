"""The HTTP server of one process. Several processes share its listening socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable
from functools import partial
from itertools import islice
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI

from app.server.http_protocol import HttpProtocol
from app.server.worker_table import State, WorkerTable
from app.serving.models import Models
from app.settings import Settings, SettingsError

log = logging.getLogger("quartet")
BACKLOG = 2048
STDOUT = 1  # file descriptor
TICKS_PER_SECOND = 10  # of uvicorn's main loop


class Server(uvicorn.Server):
    """uvicorn's server, which shares ``listener`` with other workers: it accepts a connection if no other has fewer.

    ``place`` is the place of this worker in ``table``. ``on_ready`` is called when the models are loaded. The server
    accepts connections as soon as ``listener`` listens. With a parent, only SIGTERM stops the server. Without one,
    SIGINT does too, and the second signal exits at once.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        listener: socket.socket,
        table: WorkerTable,
        place: int = 0,
        has_parent: bool = False,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            log_config=None,  # uvicorn's records use the root logger
            ws="none",
            server_header=False,
            proxy_headers=False,  # client addresses are not used
            timeout_keep_alive=settings.keep_alive_seconds,
            timeout_graceful_shutdown=settings.shutdown_grace_seconds,  # type: ignore[arg-type]  # may be a fraction
            **tls_context(settings),
        )
        super().__init__(config)
        self.limits = settings.limits
        self.models: Models = app.state.models
        self.listener, self.table, self.place = listener, table, place
        self.has_parent, self.on_ready = has_parent, on_ready
        self._signalled = False
        self._handshakes: set[asyncio.Task[None]] = set()
        listener.setblocking(False)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped."""
        super().run([])  # uvicorn itself listens nowhere

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.table.beat(self.place)
        self.table.states[self.place] = State.READY
        try:
            self.on_ready()
        except SettingsError:
            await self.lifespan.shutdown()
            raise
        while not (self.listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or self.should_exit):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # until all workers are ready
        self._accept_again()

    async def on_tick(self, counter: int) -> bool:
        if self.models.recovery.failure and not self.should_exit:
            self.drain()
        if self.models.executor.stalled_seconds() < self.limits.liveness_timeout_seconds:
            self.table.beat(self.place)
        if self.table.states[self.place] != State.DRAINING:  # the parent may have set it
            self.table.states[self.place] = State.UNHEALTHY if self.models.problems() else State.READY
        if counter % TICKS_PER_SECOND == 0:
            self._release_connections()
        return await super().on_tick(counter)

    def _release_connections(self) -> None:
        """Close some connections after their next response if another worker has far fewer, such as a new worker."""
        own, fewest = self.table.connections[self.place], self.table.fewest_connections(self.place)
        if own > 1.5 * fewest + 2:
            for connection in islice(self.server_state.connections, int(own - fewest) // 2):
                connection.last_request = True  # type: ignore[union-attr]

    def _accept_again(self) -> None:
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(self.listener, self._on_waiting_connection)

    def _pause_accepting(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.listener)
        loop.call_later(seconds, self._accept_again)

    def _on_waiting_connection(self) -> None:
        """Accept a connection, or leave it to the other workers for a moment."""
        is_full = self.table.connections[self.place] >= self.limits.connections
        if is_full or not self.table.may_accept(self.place):
            self._pause_accepting(self.limits.accept_pause_seconds)
            return
        try:
            self._accept()
        except BlockingIOError:  # another worker was faster
            pass
        except OSError as error:  # such as too many open files
            log.error("cannot accept a connection: %s", error.strerror)
            self._pause_accepting(self.limits.accept_error_seconds)

    def _accept(self) -> None:
        """Accept a connection. Raises OSError."""
        connection, _ = self.listener.accept()
        self.table.connections[self.place] += 1
        task = asyncio.get_running_loop().create_task(self._connect(connection))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _connect(self, connection: socket.socket) -> None:
        loop, state = asyncio.get_running_loop(), self.lifespan.state
        protocol = partial(HttpProtocol, self.config, self.server_state, state, loop, self.limits, self._on_lost)
        tls: dict[str, Any] = {}
        if self.config.is_ssl:
            tls = {"ssl": self.config.ssl, "ssl_handshake_timeout": self.limits.tls_handshake_seconds}
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.connect_accepted_socket(protocol, connection, **tls)
        except OSError:
            connection.close()
            self._on_lost()

    def _on_lost(self) -> None:
        self.table.connections[self.place] -= 1

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.has_parent and sig != signal.SIGTERM:  # a terminal sends SIGINT to all processes
            return
        if not self.started:
            exit_on_signal()
        self.force_exit = self._signalled and not self.has_parent  # only the parent kills workers
        self._signalled = True
        self.drain()

    def drain(self) -> None:
        """Report that this process is not ready, finish running requests, and then end the server."""
        self.models.stopping = self.should_exit = True
        self.table.states[self.place] = State.DRAINING

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.table.states[self.place] = State.DRAINING
        asyncio.get_running_loop().remove_reader(self.listener)
        if self.table.fewest_connections(self.place) == float("inf"):  # no other worker accepts the rest
            with contextlib.suppress(OSError):
                while True:
                    self._accept()
        for connection in self.server_state.connections:
            connection.last_request = True  # type: ignore[union-attr]  # also while the handshakes below end
        self.listener.close()
        if self._handshakes:
            await asyncio.wait(self._handshakes, timeout=1)  # a TLS handshake may wait for a silent client
        await super().shutdown(sockets)


def exit_on_signal(*_: object) -> NoReturn:
    """Exit with status 0, without waiting for a thread that still reads weights."""
    logging.shutdown()
    os._exit(0)


def run_server(server: Server) -> NoReturn:
    """Run a server until it is stopped, and exit. The status is 1 if a network cannot recover."""
    server.run()
    logging.shutdown()
    os._exit(1 if server.models.recovery.failure else 0)  # does not wait for busy threads


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that does not listen yet, so that no client connects too early.

    Raises:
        SettingsError: the address cannot be used.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        listener.close()
        raise _cannot_listen(host, port, error) from None
    return listener


def listen(listener: socket.socket, settings: Settings) -> None:
    """Listen, and print the address of the service.

    Raises:
        SettingsError: another process has begun to listen at the address.
    """
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    host = f"[{host}]" if ":" in host else host
    address = f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"
    line = f"Quartet serves on {address} - open it in a browser, or see {address}/docs\n"
    try:
        os.write(STDOUT, line.encode())  # print would try again at exit and change the exit status
    except OSError as error:
        log.warning("the address cannot be printed: %s", error.strerror)


def _cannot_listen(host: str, port: int, error: Exception) -> SettingsError:
    reason = getattr(error, "strerror", None) or error
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
