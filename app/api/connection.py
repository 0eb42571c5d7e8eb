"""What the service's own HTTP server offers besides ASGI messages, which take longer.

Other servers and test clients do not offer it; requests then use the messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fastapi import Request

CONNECTION = "quartet.connection"  # key in the ASGI scope


class Connection(Protocol):
    """The connection of the running request. ``on_disconnect`` is called if the client disconnects during it."""

    on_disconnect: Callable[[], None] | None

    def take_body(self) -> bytes | None:
        """Return the body if all of it has arrived, otherwise None. Call this instead of the first ``receive``."""


def connection(request: Request) -> Connection | None:
    """Return the connection of a request; None if the server does not offer it, or after a disconnect."""
    offered: Connection | None = request.scope.get(CONNECTION)
    return offered
