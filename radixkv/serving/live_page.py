"""The live page's files: they ship with the package, hold nothing of anybody's, and load nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

_TYPES = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "feed.js": "text/javascript; charset=utf-8",
    "icicle.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_FILES = {"/": ("index.html", "text/html; charset=utf-8")} | {
    f"/live/{name}": (name, media_type) for name, media_type in _TYPES.items()
}
PAGE_PATHS = frozenset(_FILES)
"""Paths that answer without a key: the page asks for it."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter()
    folder = files("radixkv.serving") / "page"
    for path, (name, media_type) in _FILES.items():
        _add(routes, path, (folder / name).read_bytes(), media_type)
    return routes


def _add(routes: APIRouter, path: str, content: bytes, media_type: str) -> None:
    async def get_file() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    routes.add_api_route(path, get_file, methods=["GET"], include_in_schema=False)
