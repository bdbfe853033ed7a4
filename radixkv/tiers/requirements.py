"""The optional packages that tiers need: imported here, when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from radixkv.errors import MissingPackageError

PACKAGES = {"msgpack": "msgpack", "redis": "redis"}
"""Each module and the package that it comes with."""


def optional_module(name: str) -> Any:
    """A module of `PACKAGES`. Raises: MissingPackageError, which says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(
            f"this needs {PACKAGES[name]}, which is not installed; run: pip install 'radixkv[tiers]'"
        ) from None
