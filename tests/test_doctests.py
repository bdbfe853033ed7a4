"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import radixkv

MODULES = [
    module.name
    for module in pkgutil.walk_packages(radixkv.__path__, "radixkv.")
    if not module.name.startswith("radixkv.kernels.") and module.name != "radixkv.cluster.serve_router"  # needs ray
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    found = [case for name in MODULES for case in doctest.DocTestFinder().find(importlib.import_module(name))]
    assert sum(bool(case.examples) for case in found) >= 10
