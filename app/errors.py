"""All errors that a caller can receive: one class each, with HTTP status, code and message.

``type`` and ``code`` follow OpenAI's error body. OpenAI's clients turn them into typed exceptions.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import ClassVar

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class QuartetError(Exception):
    """Base class of all errors. ``param`` is the name of the wrong field, if there is one."""

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
    """A value is not allowed. The message states the name, the value and what is allowed."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class NotFound(QuartetError):
    """The path or the object does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class UnknownModel(NotFound):
    """The model or the version does not exist."""

    code = "model_not_found"

    def __init__(self, name: str, known: Iterable[str], param: str | None = "model") -> None:
        super().__init__(
            f"model {quote_value(name)} is not served here; there are: {', '.join(sorted(known)) or 'none'}", param
        )


class RetiredModel(NotFound):
    """The version has been retired. Other versions of the model may still be served."""

    code = "model_retired"


class UnloadedModel(NotFound):
    """The model has been unloaded. It is served again after it has been loaded."""

    code = "model_unloaded"


class Unauthorized(QuartetError):
    """The API key is wrong. The message never contains the key."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class MissingKey(Unauthorized):
    """The request has no API key."""

    code = "missing_api_key"


class Conflict(QuartetError):
    """The request does not fit the present state of the store."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class StoreNotWritable(QuartetError):
    """The store cannot be written: it is read-only, or its disk is full."""

    status = 507
    code = "store_not_writable"

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class MethodNotAllowed(QuartetError):
    """The path does not support the HTTP method. The header ``allow`` lists the supported methods."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow

    def headers(self) -> dict[str, str]:
        return {"allow": self.allow} if self.allow else {}


class NotEnabled(QuartetError):
    """The feature is not enabled for this caller."""

    status = 403
    type = "permission_error"
    code = "not_enabled"


class TooLarge(QuartetError):
    """The body, an image or another part of the request exceeds a limit."""

    status = 413
    type = "invalid_request_error"
    code = "too_large"


class NotAnImage(QuartetError):
    """The file is damaged, or is not an image in a supported format."""

    status = 415
    type = "invalid_request_error"
    code = "not_an_image"


class Overloaded(QuartetError):
    """The queue of the model is full. ``retry_after`` is the estimated number of seconds until it has room."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def headers(self) -> dict[str, str]:
        return {"retry-after": str(self.retry_after)}


class LimitReached(Overloaded):
    """The key has reached its rate limit. ``retry_after`` is the number of seconds until its next request."""

    code = "rate_limit_exceeded"


class TooManyVersions(Overloaded):
    """No more versions can be loaded by name now: as many as allowed are in use."""

    code = "too_many_versions"


class InferenceFailed(QuartetError):
    """The network failed on a valid input. A retry would fail again."""

    code = "inference_failed"

    def headers(self) -> dict[str, str]:
        return {"x-should-retry": "false"}


class OutOfMemory(QuartetError):
    """The memory of the device is too small for the input now. The input may work later, or divided."""

    status = 503
    type = "overloaded_error"
    code = "out_of_memory"

    def headers(self) -> dict[str, str]:
        return {"retry-after": "1"}


class NotReady(QuartetError):
    """The service is starting, is stopping, or has no valid model for the task."""

    status = 503
    type = "overloaded_error"
    code = "not_ready"

    def headers(self) -> dict[str, str]:
        return {"retry-after": "1"}


class CallerGone(QuartetError):
    """The caller closed the connection. The error is never sent, only counted."""

    status = 499
    type = "invalid_request_error"
    code = "caller_gone"


class TimedOut(QuartetError):
    """The deadline of the request passed before its result was ready."""

    status = 504
    type = "server_error"
    code = "deadline_exceeded"


class TooSlow(QuartetError):
    """The body stopped arriving, or arrived too slowly."""

    status = 408
    type = "invalid_request_error"
    code = "too_slow"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether torch or Python could not allocate memory, on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, for GPUs
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)  # torch's on the CPU


def inference_error(message: str, error: Exception) -> QuartetError:
    """Return the answer to an input on which a network failed with ``error``."""
    message = f"{message} ({type(error).__name__})"
    return OutOfMemory(message) if is_out_of_memory(error) else InferenceFailed(message)


def quote_value(value: object, max_length: int = 60) -> str:
    """Quote a caller's value for a message: on one line, and cut to about ``max_length`` characters."""
    if isinstance(value, str) and len(value) > max_length:
        return f"{value[:max_length]!r}… ({len(value):,} characters)"
    text = repr(value) if isinstance(value, str | int | float | None) else _SHORT.repr(value)
    return text if len(text) <= 2 * max_length else f"{text[: 2 * max_length]}…"
