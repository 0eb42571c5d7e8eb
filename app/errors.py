"""Every failure that a caller can see: one class each, with its HTTP status, its code and a sentence.

``type`` and ``code`` follow OpenAI's error body, which their clients turn into typed exceptions.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import ClassVar

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class QuartetError(Exception):
    """The root. ``param`` names the field that was wrong, where there is one."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def headers(self) -> dict[str, str]:
        return {}


class BadValue(QuartetError):
    """A value that is not allowed: the sentence says which, what came and what is allowed."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class NotFound(QuartetError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class UnknownModel(NotFound):
    code = "model_not_found"

    def __init__(self, name: str, known: Iterable[str], param: str | None = "model") -> None:
        super().__init__(
            f"model {quote_value(name)} is not served here; there are: {', '.join(sorted(known)) or 'none'}", param
        )


class RetiredModel(NotFound):
    """A version that somebody has taken out of service; its name may serve on."""

    code = "model_retired"


class UnloadedModel(NotFound):
    """A model that somebody has unloaded, until it is loaded again."""

    code = "model_unloaded"


class Unauthorized(QuartetError):
    """No key came, or one that does not open this; the sentence never shows what came."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class MissingKey(Unauthorized):
    code = "missing_api_key"


class Conflict(QuartetError):
    """What was asked for does not fit to what is there now."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class StoreNotWritable(QuartetError):
    """The store is read-only, or its disk is full."""

    status = 507
    code = "store_not_writable"

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class MethodNotAllowed(QuartetError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow

    def headers(self) -> dict[str, str]:
        return {"allow": self.allow} if self.allow else {}


class NotEnabled(QuartetError):
    """Something that this service could do, but does not for this caller."""

    status = 403
    type = "permission_error"
    code = "not_enabled"


class TooLarge(QuartetError):
    status = 413
    type = "invalid_request_error"
    code = "too_large"


class NotAnImage(QuartetError):
    status = 415
    type = "invalid_request_error"
    code = "not_an_image"


class Overloaded(QuartetError):
    """The queue is full. ``retry_after``: seconds until there should be room, from the queue and the measured rate."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {"retry-after": str(self.retry_after)}


class LimitReached(Overloaded):
    """The key has sent as many requests as it may. ``retry_after``: seconds until it may send the next."""

    code = "rate_limit_exceeded"


class InferenceFailed(QuartetError):
    """The network failed on an input that was good: our fault, and it would fail again."""

    code = "inference_failed"

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class NotReady(QuartetError):
    """Starting, draining, or without a whole model for the task."""

    status = 503
    type = "overloaded_error"
    code = "not_ready"

    def headers(self) -> dict[str, str]:
        return {"retry-after": "1"}


class CallerGone(QuartetError):
    """The caller hung up; nobody reads this, but it is counted."""

    status = 499
    type = "invalid_request_error"
    code = "caller_gone"


class TimedOut(QuartetError):
    """The request's own deadline passed before its answer was there."""

    status = 504
    type = "server_error"
    code = "deadline_exceeded"


class TooSlow(QuartetError):
    """The body stopped arriving, or came too slowly."""

    status = 408
    type = "invalid_request_error"
    code = "too_slow"


def quote_value(value: object, longest: int = 60) -> str:
    """A caller's value as it may stand in a sentence: quoted, on one line, cut before it costs anything."""
    if isinstance(value, str) and len(value) > longest:
        return f"{value[:longest]!r}… ({len(value):,} characters)"
    text = repr(value) if isinstance(value, str | int | float | None) else _SHORT.repr(value)
    return text if len(text) <= 2 * longest else f"{text[: 2 * longest]}…"
