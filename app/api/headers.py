"""The headers of a request."""

from __future__ import annotations

from fastapi import Request

HEADS = "quartet.heads"  # in the scope of a request: looking through its list again and again would cost more


def head(request: Request, name: bytes, otherwise: str = "") -> str:
    """A header of the request by its lower-case name; of several the last."""
    if HEADS not in request.scope:
        request.scope[HEADS] = dict(request.scope["headers"])
    found = request.scope[HEADS].get(name)
    return otherwise if found is None else found.decode("latin-1")
