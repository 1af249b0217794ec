"""The page at `/`: files of the folder page/, served from memory.

Their content security policy lets the browser load nothing from elsewhere.
"""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # images come as base64 in the API's answers
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
INDEX = "index.html"


def page_routes() -> list[Route]:
    """Routes `/` and `/page/NAME`, one for each file. They need no key: the page asks for one where the API does."""
    files = {
        entry.name: entry.read_bytes()
        for entry in (resources.files("flashdmd_ray.serving") / "page").iterdir()
        if entry.name.endswith(tuple(MEDIA_TYPES))
    }
    return [_route("/" if name == INDEX else f"/page/{name}", name, content) for name, content in sorted(files.items())]


def _route(path: str, name: str, content: bytes) -> Route:
    media_type = MEDIA_TYPES[name[name.rindex(".") :]]

    async def respond(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return Route(path, respond, methods=["GET"], name=f"page {name}")
