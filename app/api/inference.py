"""Which version answers a request."""

from __future__ import annotations

from fastapi import Request

from app.observability.middleware import REQUEST_ID
from app.serving.loader import LoadedModel
from app.serving.registry import Registry
from app.store import Task


async def resolve_model(
    request: Request, registry: Registry, task: Task, model: str | None, until: float
) -> LoadedModel:
    """The version that serves a request; one that is not in memory is waited for. Raises as ``Registry.reach`` does.

    While a canary is tried, the request's id decides: who sends the same ``x-request-id`` again, as in a second try,
    gets the same version.
    """
    return await registry.wait_for(task, model, request.scope.get(REQUEST_ID, ""), until)
