"""The errors that a client can receive. Each kind of error is a class with an HTTP status, a type and a code.

``type`` and ``code`` are fields of OpenAI's error body. OpenAI's clients raise exceptions with these two attributes.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from typing import ClassVar, Self

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class QuartetError(Exception):
    """Base class of all errors for clients. ``param`` is the name of the wrong field or header, if there is one."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    repeatable: ClassVar[bool] = True  # whether the same request may succeed later
    retry_after: int = 0  # seconds; 0 means that they are unknown

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def without_frames(self) -> Self:
        """Forget the tracebacks of this error and of its causes, and return the error.

        A traceback refers to the frames of the request, and one of these frames usually refers to the error. Because of
        this cycle, the body of each failed request would stay in memory until the next garbage collection.
        """
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self

    def headers(self) -> dict[str, str]:
        headers = {} if self.repeatable else {"x-should-retry": "false"}
        return headers | ({"retry-after": str(self.retry_after)} if self.retry_after else {})


class BadValue(QuartetError):
    """A part of the request is invalid. The message usually states its name, its value and the allowed values."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class NotFound(QuartetError):
    """The path, model, version or file does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class UnknownModel(NotFound):
    """The model or the version does not exist."""

    code = "model_not_found"

    def __init__(self, name: str, known: Iterable[str], param: str | None = "model") -> None:
        super().__init__(
            f"model {quote_value(name)} is not served here; served models: {', '.join(sorted(known)) or 'none'}", param
        )


class RetiredModel(NotFound):
    """The version has been retired. Other versions of the model may still be served."""

    code = "model_retired"


class UnloadedModel(NotFound):
    """The model has been unloaded, and answers no requests until it is loaded or one of its versions is activated."""

    code = "model_unloaded"


class Unauthorized(QuartetError):
    """The API key is unknown, or the admin key is wrong or missing. The message never contains a key."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {"www-authenticate": "Bearer"}


class MissingKey(Unauthorized):
    """The request has no API key."""

    code = "missing_api_key"


class Conflict(QuartetError):
    """The current state of the store, or a setting of the service, does not allow the request."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class StoreUnavailable(QuartetError):
    """The store cannot be read or written, for example because a permission is missing or its disk is full."""

    status = 507
    code = "store_unavailable"
    repeatable = False


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
    """The feature is not enabled in this service."""

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


class NotInstalled(QuartetError):
    """The service cannot read the file, because an extra package is not installed. The message names the extra."""

    status = 415
    type = "invalid_request_error"
    code = "not_installed"


class Overloaded(QuartetError):
    """A queue is full. The header ``Retry-After`` estimates after how many seconds a new attempt can succeed."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class MemoryFull(Overloaded):
    """All running requests together would hold too much memory. A later attempt may succeed."""

    code = "memory_full"


class LimitReached(Overloaded):
    """The API key has reached its rate limit. The header ``Retry-After`` is the number of seconds to wait."""

    code = "rate_limit_exceeded"


class TooManyVersions(Overloaded):
    """The requested version cannot be loaded now, because all versions that it could replace in memory are in use."""

    code = "too_many_versions"


class InferenceFailed(QuartetError):
    """The network failed on a valid input. The same request would fail again."""

    code = "inference_failed"
    repeatable = False


class OutOfMemory(QuartetError):
    """The device has too little free memory for the input now. A later attempt or a smaller input may succeed."""

    status = 503
    type = "overloaded_error"
    code = "out_of_memory"
    retry_after = 1


class NotReady(QuartetError):
    """The service is starting or stopping, or has no valid model for the request."""

    status = 503
    type = "overloaded_error"
    code = "not_ready"
    retry_after = 1


class CallerGone(QuartetError):
    """The client closed the connection. This error is not sent, but it is counted in the metrics."""

    status = 499
    type = "invalid_request_error"
    code = "caller_gone"


class TimedOut(QuartetError):
    """The deadline of the request passed before its response was ready. OpenAI's clients do not repeat the request."""

    status = 504
    type = "server_error"
    code = "deadline_exceeded"
    repeatable = False  # a new attempt would exceed the time that the client or a setting allows


class TooSlow(QuartetError):
    """The body stopped arriving."""

    status = 408
    type = "invalid_request_error"
    code = "too_slow"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether ``error`` means that torch or Python could not allocate memory on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # raised by torch for GPUs
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)  # on the CPU, torch raises RuntimeError
    return "allocate memory" in message or message == "could not create a primitive"  # the second is of oneDNN


def inference_error(message: str, error: Exception) -> QuartetError:
    """Return the error for a client. ``error`` is the exception that the network raised for the client's input."""
    message = f"{message} ({type(error).__name__})"
    return OutOfMemory(message) if is_out_of_memory(error) else InferenceFailed(message)


def quote_value(value: object, max_length: int = 60) -> str:
    """Return a value that a client sent, as one line of text for an error message.

    A string is cut to ``max_length`` characters. The text of any other value is cut to twice this length. None, True
    and False are written as in JSON.
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str) and len(value) > max_length:
        return f"{value[:max_length]!r}… ({len(value):,} characters)"
    text = repr(value) if isinstance(value, str | int | float | None) else _SHORT.repr(value)
    return text if len(text) <= 2 * max_length else f"{text[: 2 * max_length]}…"
