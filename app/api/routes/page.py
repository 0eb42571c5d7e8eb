"""The web page at ``/`` and its files, and Swagger UI. The files are read from ``app/web`` once and stay in memory."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import HTMLResponse, Response

from app.api.operation import Operation, Request
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


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Return the content and the hash of each file, by its path."""
    paths = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in TYPES]
    contents = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in paths}
    return {name: (content, hashlib.sha256(content).hexdigest()[:32]) for name, content in contents.items()}


def _file_response(request: Request, name: str) -> Response:
    content, etag = _files()[name]
    return cached_response(request, content, TYPES[Path(name).suffix], etag)


async def page(request: Request) -> Response:
    """Return the web page."""
    response = _file_response(request, "index.html")
    response.headers.update(PAGE_HEADERS)
    return response


async def web_file(request: Request) -> Response:
    """Return a script, style sheet or picture of the page."""
    file = request.path_params["file"]
    if file not in _files():  # the name is only looked up, never used as a path
        raise NotFound(f"the page has no file {quote_value(file)}")
    return _file_response(request, file)


def cached_response(request: Request, content: bytes, media_type: str, etag: str) -> Response:
    """Return content with an ETag, or 304 if the browser's copy has the same ETag (RFC 9110, 13.1.2)."""
    headers = {"etag": f'"{etag}"', "cache-control": "no-cache"}
    known = request.headers.get("if-none-match", "")
    if known.strip() == "*" or headers["etag"] in (part.strip().removeprefix("W/") for part in known.split(",")):
        return Response(None, 304, headers)
    return Response(content, 200, headers, media_type)


# The classes of Swagger UI give the link the colours of both themes.
LINK = b'<nav class="swagger-ui"><p class="info wrapper"><a href="./">Quartet: try the models</a></p></nav>'


async def swagger_ui(request: Request) -> Response:
    """Return Swagger UI, with a link to the web page and its theme. Its files come from the package fastapi_offline."""
    files = f"{request.scope.get('root_path', '')}/static-offline-docs"
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Quartet: API",
        swagger_js_url=f"{files}/swagger-ui-bundle.js",
        swagger_css_url=f"{files}/swagger-ui.css",
        swagger_favicon_url="web/icon.svg",
    )
    content = bytes(page.body).replace(b"<body>", b"<body>" + LINK)
    return HTMLResponse(content.replace(b"</head>", b'<script src="web/scripts/theme.js"></script></head>'))


async def openapi_document(request: Request) -> Response:
    """Return the OpenAPI document."""
    return Response(request.service.document(request.scope.get("root_path", "")), media_type="application/json")


OPERATIONS = [
    Operation("GET", "/", page),
    Operation("GET", "/web/{file:path}", web_file),
    Operation("GET", "/docs", swagger_ui),
    Operation("GET", "/openapi.json", openapi_document),
]
