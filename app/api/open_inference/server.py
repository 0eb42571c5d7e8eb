"""Endpoints under ``/v2`` for the server's health and metadata."""

from __future__ import annotations

from fastapi import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from app.api.open_inference.paths import TAG
from app.api.operation import Operation, Service
from app.api.responses import json_response
from app.api.routes.health import is_live, status_operation, status_response

EXTENSIONS = [
    *("binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters", "statistics")
]


class ServerLive(TypedDict):
    live: bool


class ServerReady(TypedDict):
    live: bool
    ready: bool


class ServerMetadata(TypedDict):
    name: str
    version: str
    extensions: list[str]


async def get_server_live(service: Service, request: Request) -> Response:
    """Respond with status 503 if the compute thread has hung for a minute.

    In this case, the process should be restarted.
    """
    live = is_live(service)
    return status_response(ServerLive(live=live), live)


async def get_server_ready(service: Service, request: Request) -> Response:
    """Respond with status 503 if the service is not ready. Clients should then use another server."""
    ready = not service.models.problems()
    return status_response(ServerReady(live=True, ready=ready), ready)


async def get_server_metadata(service: Service, request: Request) -> Response:
    """Get the server's name, version and protocol extensions."""
    return json_response(ServerMetadata(name="quartet", version=service.version, extensions=EXTENSIONS))


OPERATIONS = [
    status_operation("/v2/health/live", get_server_live, TAG, ServerLive),
    status_operation("/v2/health/ready", get_server_ready, TAG, ServerReady),
    Operation(
        "GET", "/v2", get_server_metadata, TAG, "Get the server's name and extensions", ServerMetadata, "The server"
    ),
    Operation("GET", "/v2/", get_server_metadata),
]
