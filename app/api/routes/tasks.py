"""The four native endpoints: classify and sample images, continue a text, forecast series."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.responses import ERROR_RESPONSES
from app.api.routes import classify, forecast, generate_images, generate_text
from app.serving.registry import Registry
from app.settings import Settings


def router(registry: Registry, settings: Settings) -> APIRouter:
    """The routes, with the limits of the settings."""
    routes = APIRouter(prefix="/v1", tags=["Tasks"], responses=ERROR_RESPONSES)
    for task in (classify, generate_text, forecast, generate_images):
        task.add(routes, registry, settings)
    return routes
