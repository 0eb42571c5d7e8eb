"""uvicorn as this service runs it: alone, or as a worker that is handed its connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
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
from app.server.supervisor import CONNECTION_MESSAGE, RELEASE_MESSAGE, listen
from app.serving.registry import Registry
from app.settings import Settings, SettingsError

log = logging.getLogger("quartet")
HANDSHAKE = 10.0  # seconds that the beginning of TLS may take


class Server(uvicorn.Server):
    """Turns readiness off as soon as it is told to stop; told again, or before it serves, it stops at once."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_level="warning",
            access_log=False,
            log_config=None,  # its lines are written as all others
            ws="none",
            server_header=False,
            proxy_headers=False,  # nothing looks at the caller's address
            timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_seconds),
            http=BoundedHttpProtocol,
            **tls_context(settings),
        )
        super().__init__(config)
        self.settings = settings
        self.registry: Registry = app.state.registry

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.started:
            exit_on_signal()
        self.registry.stopping = True
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)


def exit_on_signal(*_: object) -> NoReturn:
    """Exit with status 0, without waiting for a thread that still reads weights."""
    logging.shutdown()
    os._exit(0)


def exit_if_orphaned(parent: int, seconds: float) -> None:
    """End this process when the one that started it has been gone for so many seconds. It finishes what it has before
    that, by itself; but one that hangs would stay for ever.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, name="orphan", daemon=True).start()


class Watchdog:
    """Ends the process, with status 1, when it has not been told for so many ``seconds`` that all is well.

    A thread that hangs cannot be ended alone; whoever started the process starts it again.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._heard = 0.0

    def heartbeat(self) -> None:
        """All is well; with the first time it begins to watch."""
        self._heard = time.monotonic()
        if not self._thread.is_alive() and not self._over.is_set():
            self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()

    def _watch(self) -> None:
        often = min(1.0, self._seconds / 8)
        looked = self._heard = time.monotonic()  # a pause may lie between the first word and here
        while not self._over.wait(often):
            now, before = time.monotonic(), looked
            looked = now
            if now - before > 2 * often + 1:  # the whole process was stopped: it could tell nothing
                self._heard = now
            if (silent := now - self._heard) > self._seconds:
                log.critical("nothing has been computed for %.0f s: the service ends", silent)
                logging.shutdown()
                os._exit(1)


class ListeningServer(Server):
    """Prints its address once it answers there: with port 0 nobody could know it before.

    Alone in its process, it may have a ``watchdog``; a worker is watched by the process that listens.
    """

    watchdog: Watchdog | None = None

    async def on_tick(self, counter: int) -> bool:
        if self.watchdog and self.registry.executor.oldest_job_seconds() < self.settings.liveness_timeout_seconds:
            self.watchdog.heartbeat()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.watchdog:
            self.watchdog.stop()
        await super().shutdown(sockets)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Raises SettingsError for an address where it cannot listen."""
        super().run(sockets or [listen_at(self.config.host, self.config.port)])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers[:1]:
            announce(server.sockets[0], self.settings)


def listen_at(host: str, port: int) -> socket.socket:
    """A socket for an address of the settings. Raises SettingsError where that cannot be."""
    try:
        return listen(host, port)
    except (OSError, UnicodeError) as error:  # the latter of a name that can be none
        address = f"QUARTET_HOST {host!r}, QUARTET_PORT {port}"
        raise SettingsError(f"{address}: cannot listen there: {getattr(error, 'strerror', None) or error}") from None


def tls_context(settings: Settings) -> dict[str, Any]:
    """What uvicorn is told to serve HTTPS; nothing for HTTP. Raises SettingsError for files that cannot be used."""
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None:
        if key is not None:
            raise SettingsError(f"QUARTET_TLS_KEY is {str(key)!r}: QUARTET_TLS_CERT has to be set too")
        return {}
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:  # also ssl.SSLError; never with a word of what is in them
        told = f"QUARTET_TLS_CERT is {str(cert)!r}, QUARTET_TLS_KEY {str(key or cert)!r}"
        raise SettingsError(f"{told}: they are no certificate and its key: {error}") from None
    return {"ssl_certfile": cert, "ssl_keyfile": key}


def announce(listener: socket.socket, settings: Settings) -> None:
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    address = f"{'https' if settings.tls_cert else 'http'}://{host}:{port}"
    print(f"Quartet serves on {address} - open it in a browser, or see {address}/docs", flush=True)


class WorkerServer(Server):
    """Takes connections from a ``channel`` and tells over it how it is; see ``app.server.supervisor``."""

    def __init__(self, app: FastAPI, settings: Settings, channel: socket.socket) -> None:
        super().__init__(app, settings)
        channel.setblocking(False)
        self._channel = channel
        self._hang_seconds = settings.liveness_timeout_seconds
        self._left = 0  # connections that have ended since it was told
        self.arriving: set[asyncio.Task[None]] = set()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run([])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting()
        self._send_status("ready")

    def accepting(self) -> None:
        """From now on connections are taken."""
        asyncio.get_running_loop().add_reader(self._channel, self._accept_all)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """However often it is told: what runs is finished. To end a worker at once is for the process that listens,
        and Ctrl-C, which a terminal sends to all, for that one alone.
        """
        if sig == signal.SIGTERM:
            if not self.started:
                exit_on_signal()
            self.registry.stopping = self.should_exit = True
            self._send_status("stopping")

    async def on_tick(self, counter: int) -> bool:
        if self.registry.executor.oldest_job_seconds() < self._hang_seconds:
            word = "unwell" if self.registry.problems() else "busy"
            self._send_status(f"{word} {len(self.server_state.tasks)}")
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._accept_all()  # what was handed over before the other side knew
        asyncio.get_running_loop().remove_reader(self._channel)
        if self.arriving:
            await asyncio.wait(self.arriving, timeout=1)  # TLS may wait for a caller who says nothing
        await super().shutdown(sockets)

    def _send_status(self, line: str) -> None:
        """A line about this worker, and how many connections have ended."""
        with contextlib.suppress(OSError):
            gone = self._left
            self._channel.send(f"{line}\nleft {gone}\n".encode())
            self._left -= gone

    def _accept_all(self) -> None:
        """All that has come: a reading brings one connection, and between two turns of a busy loop lie milliseconds."""
        while self._accept():
            pass

    def _accept(self) -> bool:
        """Connections that were handed over, and requests to part with some. Gives whether there were any."""
        loop = asyncio.get_running_loop()
        try:
            content, descriptors, _, _ = socket.recv_fds(self._channel, 256, 16)
        except BlockingIOError:
            return False
        except OSError:
            content, descriptors = b"", []
        if not content:  # the process that listens is gone: finish and go too
            loop.remove_reader(self._channel)
            self.handle_exit(signal.SIGTERM, None)
            return False
        if lost := content.count(CONNECTION_MESSAGE) - len(descriptors):
            log.error("%s connections are lost: too many files are open (see ulimit -n)", lost)
            self._left += lost
        for descriptor in descriptors:
            task = loop.create_task(self._connect(socket.socket(fileno=descriptor)))
            self.arriving.add(task)
            task.add_done_callback(self.arriving.discard)
        surplus = content.count(RELEASE_MESSAGE)
        for connection in [one for one in self.server_state.connections if isinstance(one, BoundedHttpProtocol)][
            :surplus
        ]:
            connection.last = True
        return True

    async def _connect(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            secured: dict[str, Any] = {}
            if self.config.is_ssl:
                secured = {"ssl": self.config.ssl, "ssl_handshake_timeout": HANDSHAKE}
            await asyncio.get_running_loop().connect_accepted_socket(self.protocol, connection, **secured)
            return
        connection.close()
        self._exit()

    def protocol(self) -> BoundedHttpProtocol:
        protocol = BoundedHttpProtocol(self.config, self.server_state, self.lifespan.state, asyncio.get_running_loop())
        protocol.left = self._exit
        return protocol

    def _exit(self) -> None:
        self._left += 1
