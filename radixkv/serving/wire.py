"""JSON as it goes over the wire."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(content: Any) -> bytes:
    """`content` as JSON in UTF-8. Halves of characters, which JSON may spell and UTF-8 cannot, become "?".

    >>> to_json({"a": "\\ud800"})
    b'{"a":"?"}'
    """
    return _encode(content).encode("utf-8", "replace")


class JsonAnswer(JSONResponse):
    """An answer in JSON."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return to_json(content)
