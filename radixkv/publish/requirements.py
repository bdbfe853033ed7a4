"""The optional packages that events need: imported here, when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from radixkv.errors import MissingPackageError

PACKAGES = {"zmq": "pyzmq", "msgpack": "msgpack"}
"""Each module and the package that it comes with."""


def optional_module(name: str) -> Any:
    """A module of `PACKAGES`. Raises: MissingPackageError, which says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError(
            f"KV events need {PACKAGES[name]}, which is not installed; run: pip install 'radixkv[events]'"
        ) from None


def check_installed() -> None:
    """Make sure that events can be sent and read. Raises: MissingPackageError."""
    for name in PACKAGES:
        optional_module(name)
