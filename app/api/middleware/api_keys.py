"""Who calls, and how often: nobody without a key gets further, where there is a file of keys."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from fastapi import FastAPI
from limits import RateLimitItem
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.middleware.shared_counters import SharedCounters
from app.api.openapi import RETRY_AFTER, error_document
from app.engine.admission import current_caller
from app.errors import LimitReached, MissingKey, QuartetError, Unauthorized
from app.key_file import ApiKey, Keyring, KeysError, parse_limits
from app.settings import Settings, SettingsError, hide_password

log = logging.getLogger("quartet")

# What a browser or a load balancer asks for before it could know a key, and what has a key of its own.
PUBLIC_PATHS = {"/", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"}
PUBLIC_PREFIXES = ("/health/", "/v2/health/", "/static-offline-docs/", "/web/", "/v1/admin/", "/v2/repository/models/")
REDIS: dict[str, Any] = {"implementation": "redispy", "socket_timeout": 1.0, "socket_connect_timeout": 1.0}
STORAGE_RETRY_SECONDS = (
    5.0  # seconds without a count once it could not be had: to wait for each would cost every caller a second
)


class ApiKeys:
    """Lets requests with a key of the ring through, as many as it may send, and says to the engines whose they are.

    ``limits`` are for keys that have none of their own; ``limited`` is told of each that was over its limit.
    """

    def __init__(
        self,
        app: ASGIApp,
        ring: Keyring,
        limits: Sequence[RateLimitItem],
        counts: Storage,
        failure: Callable[[QuartetError], ASGIApp],
        limited: Callable[[str], None],
    ) -> None:
        self.app = app
        self.ring = ring
        self.limits = limits
        self.limiter = FixedWindowRateLimiter(counts)
        self.failure = failure
        self.limited = limited
        self.away = 0.0  # until when counts are not asked for

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_public(scope["path"]):
            await self.app(scope, receive, send)
            return
        try:
            key = key_of(self.ring, scope)
            await self._count(key)
        except QuartetError as error:
            await self.failure(error)(scope, receive, send)
            return
        current_caller.set(key.name)  # for this request's task alone
        await self.app(scope, receive, send)

    async def _count(self, key: ApiKey) -> None:
        """Raises LimitReached. Where the counts cannot be had (Redis is away) nobody is held up for long: it is logged,
        and for a while they are not asked for.
        """
        if time.monotonic() < self.away:
            return
        for limit in key.limits or self.limits:
            try:
                if await self.limiter.hit(limit, key.name):
                    continue
                end, _ = await self.limiter.get_window_stats(limit, key.name)
            except (StorageError, OSError) as error:
                log.error("limits are not counted for %.0f s: %s", STORAGE_RETRY_SECONDS, type(error).__name__)
                self.away = time.monotonic() + STORAGE_RETRY_SECONDS
                return
            self.limited(key.name)
            seconds = max(1, math.ceil(end - time.time()))
            raise LimitReached(
                f"{key.name} may send {describe_limits(limit)}; the next from {seconds} s from now", seconds
            )


def is_public(path: str) -> bool:
    """Whether no key is asked for: health, the documentation and the page, and what has a key of its own."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES)


def sent_key(scope: Scope) -> str | None:
    """The key that a request carries: a bearer token, or else ``x-api-key``."""
    headers = dict(scope["headers"])
    word, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if word.lower() == "bearer" and token.strip():
        return token.strip()
    other = headers.get(b"x-api-key", b"").decode("latin-1").strip()
    return other or None


def key_of(ring: Keyring, scope: Scope) -> ApiKey:
    """Whose key a request carries. Raises MissingKey and Unauthorized, which never show what came."""
    sent = sent_key(scope)
    if sent is None:
        raise MissingKey("there is no key; send Authorization: Bearer KEY, or x-api-key: KEY")
    found = ring.find(sent)
    if found is None:
        raise Unauthorized("the key is not known here")
    return found


def document_security(app: FastAPI) -> None:
    """Document in OpenAPI how clients send an API key, and which operations need none or the admin key.

    Every operation with an API key may answer 429, because the key may have a limit.
    """
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        schemes = document["components"].setdefault("securitySchemes", {})
        schemes["bearer"] = {"type": "http", "scheme": "bearer", "description": "an API key"}
        schemes["key"] = {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "an API key"}
        document["security"] = [{"bearer": []}, {"key": []}]
        for path, operations in document["paths"].items():
            for operation in operations.values():
                if is_public(path):
                    operation.setdefault("security", [])
                    continue
                responses = operation["responses"]
                responses.setdefault("429", error_document("The API key has reached its limit.", RETRY_AFTER))
                if "4XX" not in responses:
                    responses["401"] = error_document("Missing or unknown API key.")
        return document

    app.openapi = cache(openapi)  # type: ignore[method-assign]  # as FastAPI's own documentation has it


def describe_limits(limit: RateLimitItem) -> str:
    """``600 requests per minute``."""
    span = limit.GRANULARITY.name if limit.multiples == 1 else f"{limit.multiples} {limit.GRANULARITY.name}s"
    return f"{limit.amount:,} requests per {span}"


def limit_storage(settings: Settings) -> Storage | None:
    """Where requests are counted, to be made before workers are forked; None without keys. Raises SettingsError."""
    if settings.keys_file is None:
        return None
    if settings.rate_limit_storage == "memory":
        return SharedCounters()
    try:
        found = storage_from_string(f"async+{settings.rate_limit_storage}", wrap_exceptions=True, **REDIS)
    except Exception as error:  # each kind of storage has its own: a wrong address, a package that is missing
        why = (
            type(error).__name__ if "@" in settings.rate_limit_storage else error
        )  # it may quote a part of the password
        raise SettingsError(
            f"QUARTET_RATE_LIMIT_STORAGE is {hide_password(repr(settings.rate_limit_storage))}: {why}"
        ) from None
    assert isinstance(found, Storage)
    return found


async def close_storage(counted: Storage) -> None:
    """End the connections that counting has opened (a Redis'): their event loop could not be closed with them."""
    if bridge := getattr(counted, "bridge", None):
        await bridge.get_connection().aclose()


def load_keyring(settings: Settings) -> Keyring | None:
    """The keys of those who may call; none where nobody needs one. Raises SettingsError."""
    if settings.keys_file is None:
        return None
    try:
        return Keyring(settings.keys_file)
    except KeysError as error:
        raise SettingsError(f"QUARTET_KEYS_FILE is {str(settings.keys_file)!r}: {error}") from None


def with_api_keys(
    app: ASGIApp,
    settings: Settings,
    shared: Storage | None,
    failure: Callable[[QuartetError], ASGIApp],
    limited: Callable[[str], None],
) -> ASGIApp:
    """The application behind its keys; without a file of keys itself. Raises SettingsError."""
    ring = load_keyring(settings)
    if ring is None:
        return app
    try:
        limits = parse_limits(settings.rate_limit)
    except ValueError:
        raise SettingsError(f"QUARTET_RATE_LIMIT is {settings.rate_limit!r}: it is not like 600/minute") from None
    assert shared is not None
    return ApiKeys(app, ring, limits, shared, failure, limited)
