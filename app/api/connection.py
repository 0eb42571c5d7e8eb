"""Direct access to the connection of a request, which is faster than ASGI messages.

Only the service's own HTTP server offers direct access. On other servers, and in test clients, endpoints use ASGI
messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fastapi import Request

CONNECTION = "quartet.connection"  # key in the ASGI scope


class Connection(Protocol):
    """The connection of a running request."""

    def take_body(self) -> bytes | None:
        """Return the whole body, or None if ``receive`` must be used. Call this before the first ``receive``."""

    def watch_disconnect(self, on_disconnect: Callable[[], None] | None) -> None:
        """Call ``on_disconnect`` if the client disconnects. None removes the callback. The body must have been read."""


def connection(request: Request) -> Connection | None:
    """Return the connection of a request, or None.

    The result is None if the server offers no direct access, or if the client has disconnected.
    """
    offered: Connection | None = request.scope.get(CONNECTION)
    return offered
