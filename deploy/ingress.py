"""Check the key of a request and find its task, before an ingress forwards it. This module does not import Ray."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.admin_key import admin_key, check_admin_key
from app.api.errors import error_response
from app.api.middleware.api_keys import is_public, key_of, load_keyring, sent_key
from app.api.middleware.body_memory import BodyMemoryLimit
from app.api.middleware.cors import cors
from app.api.middleware.trusted_host import host_check
from app.api.routes.admin import PREFIX as ADMIN
from app.engine.executor import Executor
from app.errors import QuartetError
from app.settings import Settings
from app.store import Store, StoreError, TaskName
from app.tasks import TASKS

REPOSITORY = "/v2/repository/models/"
MODEL_PREFIXES = ("/v2/models/", REPOSITORY)
PUBLIC_BODY_BYTES = 64 * 1024  # limit for bodies of requests that need no key

ForwardTo = Callable[[TaskName | None, int], ASGIApp]


class IngressApp:
    """An ASGI application that checks the key, finds the task, and runs the app ``forward_to(task, max_body_bytes)``.

    The key is checked before the body is read. The replicas check the key again and apply the rate limits. ``own`` maps
    paths to applications that run in this process. Requests for these paths are not forwarded.

    Raises:
        SettingsError: a key file, the admin key or a trusted host cannot be used.
    """

    def __init__(self, settings: Settings, forward_to: ForwardTo, own: Mapping[str, ASGIApp]) -> None:
        self._ring = load_keyring(settings)
        self._check_seconds = settings.limits.key_check_seconds
        self._watch: asyncio.Task[None] | None = None  # reads the key file again; started by the first request
        self._admin_key = admin_key(settings)
        self._models = ModelTasks(Store(settings.store), settings.store_poll_seconds)
        self._forward_to = forward_to
        self._own = own
        self._max_body_bytes = settings.max_body_bytes
        self._check_host = host_check(settings)
        self._app = cors(BodyMemoryLimit(self._forward, settings.max_buffered_bytes), settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_host(scope)
            known = await self._authenticate(scope)
        except QuartetError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        app = self._own.get(scope["path"])
        if app is None:
            limit = self._max_body_bytes if known else min(PUBLIC_BODY_BYTES, self._max_body_bytes)
            app = self._forward_to(await task_of_path(scope["path"], self._models.find), limit)
        await app(scope, receive, send)

    async def _authenticate(self, scope: Scope) -> bool:
        """Return whether the request may have a large body. Raises Unauthorized for a missing or wrong key."""
        path = scope["path"]
        if self._admin_key and path.startswith((f"{ADMIN}/", REPOSITORY)):
            check_admin_key(sent_key(scope) or "", self._admin_key)
            return True
        if is_public(path):
            return False
        if self._ring:
            if self._watch is None:
                self._watch = asyncio.create_task(self._ring.watch(Executor("keys"), self._check_seconds))
            key_of(self._ring, scope)
        return True


class ModelTasks:
    """Finds the task of each model in the store.

    Each model card is read once. If a request is for an unknown model, a thread scans the store for new models. It
    does this at most once in ``poll_seconds``. If ``poll_seconds`` is 0, it scans the store only once. A request waits
    at most ``scan_wait_seconds`` for a scan, because the file system of the store may hang.
    """

    def __init__(
        self,
        store: Store,
        poll_seconds: float,
        scan_wait_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._scan_wait_seconds, self._clock = store, scan_wait_seconds, clock
        self._interval = poll_seconds or math.inf
        self._tasks: dict[str, TaskName] = {}
        self._read: set[tuple[str, int]] = set()  # versions whose card has been read
        self._disk = Executor("cards")
        self._scan: asyncio.Task[None] | None = None  # the scan that is in progress
        self._scanned_at = -math.inf  # start of the last scan

    async def find(self, name: str) -> TaskName | None:
        """Return the task of a model, or None for an unknown model."""
        if name not in self._tasks:
            if self._scan is None and self._clock() - self._scanned_at >= self._interval:
                self._scanned_at = self._clock()
                self._scan = asyncio.create_task(self._disk.run(self._read_cards))
                self._scan.add_done_callback(self._end_scan)
            if self._scan:
                await asyncio.wait([self._scan], timeout=self._scan_wait_seconds)
        return self._tasks.get(name)

    def _end_scan(self, scan: asyncio.Task[None]) -> None:
        self._scan = None
        if not scan.cancelled():
            scan.exception()  # ignore errors, because the replicas report a store that cannot be read

    def _read_cards(self) -> None:
        for name, number in self._store.versions():
            if (name, number) not in self._read:
                with suppress(StoreError):  # the next scan reads the card again; the replicas report the error
                    self._tasks[name] = self._store.card(name, number).task
                    self._read.add((name, number))


async def task_of_path(path: str, find: Callable[[str], Awaitable[TaskName | None]]) -> TaskName | None:
    """Return the task of a request by its path, or None if any replica can answer it. ``find`` maps models to tasks."""
    for prefix in MODEL_PREFIXES:
        if path.startswith(prefix):
            return await find(path.removeprefix(prefix).split("/")[0].split("@")[0])
    return next((task.name for task in TASKS.values() if path in task.paths), None)
