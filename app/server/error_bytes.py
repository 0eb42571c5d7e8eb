"""The bytes of an error response to a request that the application does not receive."""

from __future__ import annotations

from http import HTTPStatus

from app.api.errors import ErrorResponse
from app.errors import QuartetError
from app.observability.middleware import SECURITY_HEADERS


def error_bytes(error: QuartetError, path: str, request_id: str) -> bytes:
    """Return an HTTP/1.1 response in the error format of ``path``. It tells the client that the connection ends."""
    response = ErrorResponse(error, path)
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "connection: close"]
    lines.append(f"x-request-id: {request_id}")
    lines += [f"{name.decode()}: {value.decode()}" for name, value in (*response.raw_headers, *SECURITY_HEADERS)]
    return "\r\n".join([*lines, "", ""]).encode() + bytes(response.body)
