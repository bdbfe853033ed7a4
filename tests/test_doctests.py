"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import radixkv

ROOT = Path(radixkv.__path__[0]).parent

MODULES = [
    module.name
    for module in pkgutil.walk_packages(radixkv.__path__, "radixkv.")
    if not module.name.startswith("radixkv.kernels.") and module.name != "radixkv.cluster.serve_router"  # needs ray
]


def source_of(name: str) -> str:
    path = ROOT.joinpath(*name.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in MODULES if ">>>" in source_of(name)])
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    """And every module can be imported."""
    modules = [importlib.import_module(name) for name in MODULES]
    found = [
        case
        for module in modules
        if ">>>" in source_of(module.__name__)
        for case in doctest.DocTestFinder().find(module)
    ]
    assert sum(bool(case.examples) for case in found) >= 10
