"""Endpoints under ``/v2`` for the server's health and metadata."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.open_inference.responses import ServerLive, ServerMetadata, ServerReady
from app.api.responses import json_response, success_response
from app.api.routes.health import status_response, status_responses
from app.serving.models import Models

EXTENSIONS = [
    *("binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters", "statistics")
]


def router(models: Models) -> APIRouter:
    """Return the routes ``/v2`` and ``/v2/health/...``."""
    routes = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

    @routes.get(
        "/health/live",
        operation_id="get_server_live",
        summary="Check that the process is alive",
        responses=status_responses(ServerLive, "The process is alive", "The compute thread hangs"),
    )
    async def check_live() -> Response:
        """Respond with status 503 if the compute thread has hung for twice `QUARTET_LIVENESS_TIMEOUT_SECONDS`.

        In this case, the process should be restarted.
        """
        live = models.executor.stalled_seconds() < 2 * models.settings.liveness_timeout_seconds
        return status_response({"live": live}, live)

    @routes.get(
        "/health/ready",
        operation_id="get_server_ready",
        summary="Check that the service is ready for requests",
        responses=status_responses(ServerReady, "The service is ready", "The service is not ready"),
    )
    async def check_ready() -> Response:
        """Respond with status 503 if the service is not ready. Clients should then use another server."""
        ready = not models.problems()
        return status_response({"live": True, "ready": ready}, ready)

    @routes.get(
        "",
        operation_id="get_server_metadata",
        summary="Get the server's name and extensions",
        responses=success_response(ServerMetadata, description="The server"),
    )
    @routes.get("/", include_in_schema=False)
    async def server_metadata(request: Request) -> Response:
        """Get the server's name, version and protocol extensions."""
        return json_response({"name": "quartet", "version": request.app.version, "extensions": EXTENSIONS})

    return routes
