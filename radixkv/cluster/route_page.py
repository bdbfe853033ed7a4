"""The router's page: its files ship with the package. It has the live pages of the replicas in frames."""

from __future__ import annotations

from importlib.resources import files

from radixkv.serving import live_page
from radixkv.serving.live_page import PageFile

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/route/replicas.css": ("replicas.css", "text/css; charset=utf-8"),
    "/route/replicas.js": ("replicas.js", "text/javascript; charset=utf-8"),
}


def page_files() -> dict[str, PageFile]:
    """The files of the page, by their paths, those of the live page among them, which it shares.

    They answer without a key: the page asks for it.
    """
    folder = files("radixkv.cluster") / "page"
    own = {path: PageFile((folder / name).read_bytes(), media_type) for path, (name, media_type) in _FILES.items()}
    return live_page.page_files() | own
