"""The headers of a request."""

from __future__ import annotations

from fastapi import Request

HEADERS = "quartet.heads"  # in the scope of a request: looking through its list again and again would cost more


def header(request: Request, name: bytes, default: str = "") -> str:
    """A header of the request by its lower-case name; of several the last."""
    if HEADERS not in request.scope:
        request.scope[HEADERS] = dict(request.scope["headers"])
    found = request.scope[HEADERS].get(name)
    return default if found is None else found.decode("latin-1")
