"""Which version answers a request."""

from __future__ import annotations

from fastapi import Request

from app.observability.middleware import REQUEST_ID
from app.serving.loader import LoadedModel, P
from app.serving.registry import Registry
from app.tasks import Task


async def resolve_model(
    request: Request, registry: Registry, task: Task[P], model: str | None, until: float
) -> LoadedModel[P]:
    """The version that serves a request; one that is not in memory is waited for. Raises as ``Registry.reach`` does.

    While a canary is tried, the request's id decides: who sends the same ``x-request-id`` again, as in a second try,
    gets the same version.
    """
    return await registry.wait_for(task, model, request.scope.get(REQUEST_ID, ""), until)
