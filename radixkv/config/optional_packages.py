"""Packages that only some features need, imported when those are used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from radixkv.errors import MissingPackageError


class OptionalPackages:
    """The packages of one extra.

    >>> OptionalPackages("this", "tiers", {"json": "json"}).module("json").loads("1")
    1
    >>> OptionalPackages("this", "tiers", {"redis_": "redis"}).module("redis_")
    Traceback (most recent call last):
    ...
    radixkv.errors.MissingPackageError: this needs redis, which is not installed; run: pip install 'radixkv[tiers]'
    """

    def __init__(self, feature: str, extra: str, packages: Mapping[str, str]) -> None:
        """Args: feature: what needs them, as the subject of the error. packages: that of each module."""
        self._feature, self._extra, self._packages = feature, extra, dict(packages)

    def module(self, name: str) -> Any:
        """One of the modules. Raises: MissingPackageError, which says what to install."""
        try:
            return importlib.import_module(name)
        except ImportError:
            raise MissingPackageError(
                f"{self._feature} needs {self._packages[name]}, which is not installed; "
                f"run: pip install 'radixkv[{self._extra}]'"
            ) from None

    def check(self) -> None:
        """Make sure that all are there. Raises: MissingPackageError."""
        for name in self._packages:
            self.module(name)
