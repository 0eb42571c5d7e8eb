"""Which other sites' pages may call the service from a browser (CORS): none, where the settings do not name them."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from app.settings import Settings, SettingsError

ALLOWED_HEADERS = (
    "authorization",
    "x-api-key",
    "x-request-id",
    "x-request-timeout",
)  # headers that a page may send ...
EXPOSED_HEADERS = ("x-request-id", "x-model", "x-seed", "retry-after")  # ... and see
HOUR = 3600


def cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The application as the named origins may call it; with none named itself. Raises SettingsError."""
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    for origin in origins:
        if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.count("/") != 2):
            raise SettingsError(
                f"QUARTET_CORS_ORIGINS is {settings.cors_origins!r}: {origin!r} is not like https://a.b"
            )
    if not origins:
        return app
    return CORSMiddleware(app, origins, ("GET", "POST"), ALLOWED_HEADERS, expose_headers=EXPOSED_HEADERS, max_age=HOUR)
