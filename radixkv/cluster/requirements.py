"""The optional packages that a cluster needs, and which of their versions."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from radixkv.errors import ConfigError, MissingPackageError

RAY_VERSIONS = ("2.60",)
"""Those whose request routers are as `serve_router` takes them: their interface is alpha, and has changed before."""


def check_route_installed() -> None:
    """Make sure that a router can be imported. Imports nothing. Raises: MissingPackageError."""
    from radixkv.serving.requirements import check_installed

    check_installed()
    if find_spec("httpx2") is None:
        raise MissingPackageError("a router needs httpx2, which is not installed; run: pip install 'radixkv[route]'")


def check_ray_installed() -> None:
    """Make sure that Ray Serve is there, in a version that works. Raises: MissingPackageError, ConfigError."""
    check_route_installed()
    if find_spec("ray") is None:
        raise MissingPackageError(
            "a cluster needs ray[serve], which is not installed; run: pip install 'radixkv[cluster]'"
        )
    check_ray_version(_version_of("ray"))


def check_ray_version(found: str) -> None:
    """Raises: ConfigError if the request routers of this version of Ray are not known.

    >>> check_ray_version("2.60.1")
    >>> check_ray_version("2.9.0")
    Traceback (most recent call last):
    ...
    radixkv.errors.ConfigError: radixkv.cluster works with ray 2.60.*; got 2.9.0; run: pip install 'radixkv[cluster]'
    """
    if ".".join(found.split(".")[:2]) not in RAY_VERSIONS:
        known = ", ".join(f"{known}.*" for known in RAY_VERSIONS)
        raise ConfigError(f"radixkv.cluster works with ray {known}; got {found}; run: pip install 'radixkv[cluster]'")


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "one without metadata"
