"""CORS, which lets web pages of other origins call the service from a browser.

By default, no other origin may call the service.
"""

from __future__ import annotations

import re

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from app.settings import Settings, SettingsError

ALLOWED_HEADERS = ("*",)  # request headers that a page may send: all, as OpenAI's client sends many of its own
EXPOSED_HEADERS = (  # response headers that a page may read
    "x-request-id",
    "x-model",
    "x-seed",
    "retry-after",
    "x-should-retry",
    "inference-header-content-length",
)
# Browsers send origins in this form, without wildcards, paths and default ports. Other origins would never match.
ORIGIN = re.compile(r"(?!http://.*:80$|https://.*:443$)https?://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[1-9][0-9]{0,4})?")
MAX_AGE = 3600  # seconds for which a browser may cache a preflight response


def cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Wrap the application in CORS middleware if ``QUARTET_CORS_ORIGINS`` is set.

    Raises:
        SettingsError: an origin is malformed.
    """
    origins = [origin.strip().lower() for origin in settings.cors_origins.split(",") if origin.strip()]
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise SettingsError(
                f"QUARTET_CORS_ORIGINS is {settings.cors_origins!r}: {origin!r} is not like https://a.b or "
                "https://a.b:8443; wildcards, paths and the default ports 80 and 443 are not allowed"
            )
    if not origins:
        return app
    return CORSMiddleware(
        app, origins, ("GET", "POST"), ALLOWED_HEADERS, expose_headers=EXPOSED_HEADERS, max_age=MAX_AGE
    )
