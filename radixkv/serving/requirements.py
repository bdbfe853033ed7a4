"""The optional packages that the server needs."""

from __future__ import annotations

from importlib.util import find_spec

from radixkv.errors import MissingPackageError

PACKAGES = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
    "llguidance": "llguidance",
}
"""Each module and the package that it comes with."""


def check_installed() -> None:
    """Make sure that the server can be imported. Imports nothing.

    Raises: MissingPackageError, which says what to install.
    """
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise MissingPackageError(
            f"the server needs {', '.join(missing)}, which is not installed; run: pip install 'radixkv[serve]'"
        )
