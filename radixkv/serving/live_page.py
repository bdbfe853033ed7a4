"""The live page's files: they ship with the package, hold nothing of anybody's, and load nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

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

HEADERS = {  # of a router's page, too, which has the pages of its replicas in frames: the same origin
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class PageFile(NamedTuple):
    """A file of a page."""

    content: bytes
    media_type: str

    def answer(self) -> Response:
        """It, as an answer."""
        return Response(self.content, media_type=self.media_type, headers=HEADERS)


def page_files() -> dict[str, PageFile]:
    """The files of the page, by their paths."""
    folder = files("radixkv.serving") / "page"
    return {path: PageFile((folder / name).read_bytes(), media_type) for path, (name, media_type) in _FILES.items()}


def router() -> APIRouter:
    """The routes."""
    routes = APIRouter()
    for path, file in page_files().items():
        _add(routes, path, file)
    return routes


def _add(routes: APIRouter, path: str, file: PageFile) -> None:
    async def get_file() -> Response:
        return file.answer()

    routes.add_api_route(path, get_file, methods=["GET"], include_in_schema=False)
