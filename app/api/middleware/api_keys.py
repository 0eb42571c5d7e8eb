"""API keys and rate limits. They apply only if ``QUARTET_KEYS_FILE`` is set."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from limits import RateLimitItem
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string
from starlette.types import Scope

from app.api.middleware.shared_counters import SharedCounters
from app.engine.fair_queue import current_caller
from app.errors import LimitReached, MissingKey, Unauthorized
from app.key_file import ApiKey, Keyring, KeysError, parse_limits
from app.settings import Settings, SettingsError, hide_password

log = logging.getLogger("quartet")

# Paths that need no API key: the web page, the documentation and health checks. Administration needs the admin key.
PUBLIC_PATHS = {"/", "/docs", "/redoc", "/openapi.json"}
PUBLIC_PREFIXES = ("/health/", "/v2/health/", "/static-offline-docs/", "/web/", "/v1/admin/", "/v2/repository/models/")
CALLER = "quartet.caller"  # key in the ASGI scope of a request of a batch job: the name of the API key of the job
REDIS: dict[str, Any] = {"implementation": "redispy", "socket_timeout": 1.0, "socket_connect_timeout": 1.0}


@dataclass(eq=False)
class ApiKeys:
    """Requires an API key, applies rate limits, and sets ``current_caller`` for the engines.

    ``ring`` has the valid keys. ``limits`` apply to keys without limits in the key file. ``limiter`` counts requests.
    ``on_rate_limited`` is called with the key's name for each request that exceeds a limit. After an error of the
    storage, no request is counted for ``retry_seconds``.
    """

    ring: Keyring
    limits: Sequence[RateLimitItem]
    limiter: FixedWindowRateLimiter
    on_rate_limited: Callable[[str], None]
    retry_seconds: float
    retry_at: float = 0.0  # requests are not counted before this time

    async def check(self, scope: Scope) -> None:
        """Raise MissingKey, Unauthorized or LimitReached for a request that may not be answered."""
        if CALLER in scope:  # a line of a batch job
            current_caller.set(scope[CALLER])
        elif not is_public(scope["path"]):
            key = key_of(self.ring, scope)
            await self._count(key)
            current_caller.set(key.name)  # only for the task of this request

    async def _count(self, key: ApiKey) -> None:
        """Count a request. If the storage (for example Redis) fails, log the error and count nothing for a while.

        Raises:
            LimitReached: the key has reached a rate limit.
        """
        if time.monotonic() < self.retry_at:
            return
        for limit in key.limits or self.limits:
            try:
                if await self.limiter.hit(limit, key.name):
                    continue
                end, _ = await self.limiter.get_window_stats(limit, key.name)
            except (StorageError, OSError) as error:
                log.error("rate limits are not counted for %.0f s: %s", self.retry_seconds, type(error).__name__)
                self.retry_at = time.monotonic() + self.retry_seconds
                return
            self.on_rate_limited(key.name)
            seconds = max(1, math.ceil(end - time.time()))
            raise LimitReached(f"{key.name} may send {describe_limits(limit)}; retry in {seconds} s", seconds)


def is_public(path: str) -> bool:
    """Return whether requests to a path need no API key."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES)


def sent_key(scope: Scope) -> str | None:
    """Return the API key that a request has sent as a bearer token or in ``x-api-key``, or None without a key."""
    headers = dict(scope["headers"])
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    other = headers.get(b"x-api-key", b"").decode("latin-1").strip()
    return other or None


def key_of(ring: Keyring, scope: Scope) -> ApiKey:
    """Return the entry of the key that a request has sent. Error messages never contain the sent key.

    Raises:
        MissingKey: the request has no key.
        Unauthorized: the key is not in the key file.
    """
    sent = sent_key(scope)
    if sent is None:
        raise MissingKey("the API key is missing; send Authorization: Bearer KEY, or x-api-key: KEY")
    key = ring.find(sent)
    if key is None:
        raise Unauthorized("unknown API key")
    return key


def describe_limits(limit: RateLimitItem) -> str:
    """Return a rate limit in words, such as ``600 requests per minute``."""
    span = limit.GRANULARITY.name if limit.multiples == 1 else f"{limit.multiples} {limit.GRANULARITY.name}s"
    return f"{limit.amount:,} requests per {span}"


def limit_storage(settings: Settings) -> Storage | None:
    """Return the storage of rate-limit counters, or None without a key file. Call this before workers are forked.

    Raises:
        SettingsError: the storage cannot be used.
    """
    if settings.keys_file is None:
        return None
    if settings.rate_limit_storage == "memory":
        return SharedCounters(settings.limits.rate_limit_counters)
    try:
        storage = storage_from_string(f"async+{settings.rate_limit_storage}", wrap_exceptions=True, **REDIS)
    except Exception as error:  # each storage has different error classes, for example for a missing package
        # The message may quote a part of the password.
        reason = type(error).__name__ if "@" in settings.rate_limit_storage else error
        raise SettingsError(
            f"QUARTET_RATE_LIMIT_STORAGE is {hide_password(repr(settings.rate_limit_storage))}: {reason}"
        ) from None
    assert isinstance(storage, Storage)
    return storage


async def close_storage(storage: Storage) -> None:
    """Close the connections of a storage in Redis. Call this before their event loop is closed."""
    if bridge := getattr(storage, "bridge", None):
        await bridge.get_connection().aclose()


def load_keyring(settings: Settings) -> Keyring | None:
    """Return the keyring of the key file, or None without a key file.

    Raises:
        SettingsError: the key file cannot be used.
    """
    if settings.keys_file is None:
        return None
    try:
        return Keyring(settings.keys_file)
    except KeysError as error:
        raise SettingsError(f"QUARTET_KEYS_FILE is {str(settings.keys_file)!r}: {error}") from None


def api_keys(settings: Settings, shared: Storage | None, on_rate_limited: Callable[[str], None]) -> ApiKeys | None:
    """Return the keys that requests need, or None without ``QUARTET_KEYS_FILE``.

    Raises:
        SettingsError: the key file or a rate limit cannot be used, or there is a rate limit without a key file.
    """
    try:
        limits = parse_limits(settings.rate_limit)
    except ValueError:
        raise SettingsError(
            f"QUARTET_RATE_LIMIT is {settings.rate_limit!r}: expected a limit such as 600/minute"
        ) from None
    ring = load_keyring(settings)
    if ring is None:
        if limits:
            raise SettingsError(
                f"QUARTET_RATE_LIMIT is {settings.rate_limit!r}; it needs QUARTET_KEYS_FILE, "
                "because limits apply to keys"
            )
        return None
    assert shared is not None
    return ApiKeys(
        ring, limits, FixedWindowRateLimiter(shared), on_rate_limited, settings.limits.rate_limit_retry_seconds
    )
