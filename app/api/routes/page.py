"""The web page at ``/`` and its files. The files are read from ``app/web`` once and stay in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.errors import NotFound, quote_value

FOLDER = Path(__file__).parents[2] / "web"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
# The page may load only files of this service. Inline scripts and styles are not allowed, and text cannot become code.
# Images from answers are data: URLs.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
PAGE_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
}


def router() -> APIRouter:
    """Return the routes ``/`` and ``/web/{file}``."""
    routes = APIRouter(include_in_schema=False)
    paths = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in TYPES]
    files = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in paths}
    etags = {name: hashlib.sha256(content).hexdigest()[:32] for name, content in files.items()}

    def file_response(request: Request, name: str) -> Response:
        return cached_response(request, files[name], TYPES[Path(name).suffix], etags[name])

    @routes.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        """Return the web page."""
        response = file_response(request, "index.html")
        response.headers.update(PAGE_HEADERS)
        return response

    @routes.api_route("/web/{file:path}", methods=["GET", "HEAD"])
    async def web_file(request: Request, file: str) -> Response:
        """Return a script, style sheet or picture of the page."""
        if file not in files:  # the name is only looked up, never used as a path
            raise NotFound(f"the page has no file {quote_value(file)}")
        return file_response(request, file)

    return routes


def cached_response(request: Request, content: bytes, media_type: str, etag: str) -> Response:
    """Return content with an ETag, or 304 if the browser's copy has the same ETag (RFC 9110, 13.1.2)."""
    headers = {"etag": f'"{etag}"', "cache-control": "no-cache"}
    known = request.headers.get("if-none-match", "")
    if known.strip() == "*" or headers["etag"] in (part.strip().removeprefix("W/") for part in known.split(",")):
        return Response(None, 304, headers)
    return Response(content, 200, headers, media_type)
