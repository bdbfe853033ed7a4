"""Imports run one way only, read from the source: lazy ones inside functions and under TYPE_CHECKING count too."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each room and the rooms it may import, besides itself. "radixkv" is the package's own __init__, which re-exports.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "kernels": set(),
    "config": {"errors"},
    "demo_model": {"errors", "config"},
    "cache": {"errors", "config"},
    "publish": {"errors", "config", "cache"},
    "cluster.router": {"errors", "config"},
    "replay": {"errors", "config", "cache", "cluster.router"},
    "memory": {"errors", "config"},
    "tiers": {"errors", "config", "cache"},
    "attention": {"errors", "config", "kernels", "memory"},
    "models": {"errors", "config", "attention", "kernels", "memory", "demo_model"},
    "engine": {"errors", "config", "models", "cache", "memory", "attention", "kernels", "tiers", "publish"},
}
ARROWS["hf"] = {"errors", "config", "cache", "memory", "tiers", "models"}
ARROWS["serving"] = {"errors", "config", "engine", "cache", "tiers", "publish"}
ARROWS["cluster"] = {"errors", "config", "serving", "engine", "models", "cache", "publish", "tiers", "cluster.router"}
ARROWS["radixkv"] = set(ARROWS)
ARROWS["cli"] = set(ARROWS)

WITHOUT_TORCH = {"radixkv", "errors", "config", "cache", "replay", "tiers", "publish", "cluster", "cluster.router"}


def sources() -> Iterator[tuple[str, str]]:
    """(dotted module name, path below the repository) of everything that is installed."""
    for folder, package in [("radixkv", "radixkv"), ("kernels", "radixkv.kernels")]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), path.relative_to(ROOT).as_posix()


MODULES = dict(sources())
TREES = {module: ast.parse((ROOT / path).read_text(encoding="utf-8")) for module, path in MODULES.items()}


def room_of(module: str) -> str:
    """The room in which a module of radixkv lies; a name that `radixkv` itself exports lies in "radixkv"."""
    _, _, inside = module.partition(".")
    pure = ".".join(inside.split(".")[:2])  # a part of a room that others may import
    room = pure if pure in ARROWS else inside.split(".")[0]
    return room if room in ARROWS else "radixkv"


def modules_of(room: str) -> list[str]:
    return [module for module in MODULES if room_of(module) == room]


def imported_modules(tree: ast.Module, module: str, is_package: bool = False) -> Iterator[str]:
    """Absolute dotted names of all that `tree` imports, wherever the statement stands."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=name, names=names, level=level):
                base = importlib.util.resolve_name("." * level + (name or ""), package) if level else name or ""
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name(id=function) | ast.Attribute(attr=function), args=[ast.Constant(value=name)]):
                if function in {"import_module", "__import__"} and isinstance(name, str):
                    yield name


def forbidden(tree: ast.Module, module: str, is_package: bool = False) -> list[str]:
    """Every import in `tree` that the arrows do not allow, as "room → what"."""
    room = room_of(module)
    found = []
    for name in imported_modules(tree, module, is_package):
        top = name.split(".")[0]
        if top == "radixkv":
            wrong = room_of(name) not in {room, *ARROWS[room]}
        else:
            wrong = top == "kernels" or (room in WITHOUT_TORCH and top in {"torch", "transformers"})
        if wrong:
            found.append(f"{room} → {name}")
    return found


def test_every_room_has_its_arrows() -> None:
    rooms = {module.split(".")[1] for module in MODULES if "." in module}
    assert rooms <= set(ARROWS), "a new room needs a place in ARROWS and in the drawing"
    assert {"cache", "memory", "attention", "models", "engine", "cli", "kernels"} <= rooms


@pytest.mark.parametrize("room", ARROWS)
def test_imports_follow_the_arrows(room: str) -> None:
    for module in modules_of(room):
        assert forbidden(TREES[module], module, MODULES[module].endswith("__init__.py")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("radixkv.cache.x", "import torch"),
        ("radixkv.cache.x", "from torch.nn import functional"),
        ("radixkv.cache.x", "def f():\n    import torch.nn as nn"),
        ("radixkv.cache.x", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from radixkv.engine import y"),
        ("radixkv.cache.x", "from radixkv import Engine"),
        ("radixkv.cache.x", "from ..memory import kv_pool"),
        ("radixkv.cache.x", "from .. import memory"),
        ("radixkv.cache.x", "import os, radixkv.memory.sizing"),
        ("radixkv.memory.x", "from radixkv.cache.tree.radix_tree import RadixTree"),
        ("radixkv.attention.x", "try:\n    from radixkv.models import loader\nexcept ImportError:\n    pass"),
        ("radixkv.models.x", "class A:\n    from radixkv.engine import engine"),
        ("radixkv.cache.x", "from radixkv.kernels import numba_cpu"),
        ("radixkv.engine.x", "from radixkv.cli.app import app"),
        ("radixkv.engine.x", "from importlib import import_module\nimport_module('radixkv.cli')"),
        ("radixkv.kernels.x", "from radixkv.errors import ConfigError"),
        ("radixkv.kernels.x", "import radixkv"),
        ("radixkv.attention.x", "import kernels.numba_cpu"),
        ("radixkv.errors", "from radixkv.config import CacheConfig"),
        ("radixkv.replay.x", "from radixkv.cluster.proxy import y"),
        ("radixkv.cluster.router.x", "from radixkv.serving.app import y"),
        ("radixkv.serving.x", "from radixkv.cluster.router import y"),
        ("radixkv.config", "import torch"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str) -> None:
    assert len(forbidden(ast.parse(source), module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("radixkv.cache.x", "from radixkv.errors import ConfigError\nfrom . import lease\nimport numpy"),
        ("radixkv.kernels.x", "from radixkv.kernels import torch_reference\nimport torch"),
        ("radixkv.models.x", "from radixkv import demo_model, errors"),
        ("radixkv.replay.x", "from radixkv.cluster.router.routing import y"),
        ("radixkv.cluster.x", "from radixkv.serving.app import y"),
        ("radixkv.engine.x", "from radixkv.models.loader import load\nfrom ..cache import prefix_cache"),
        ("radixkv.cli.app", "from radixkv import Engine\nfrom radixkv.memory.sizing import x"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert forbidden(ast.parse(source), module) == []


def test_a_relative_import_in_a_package_starts_there() -> None:
    assert forbidden(ast.parse("from . import x"), "radixkv.cache", is_package=True) == []
    upwards = ast.parse("from .. import memory")
    assert forbidden(upwards, "radixkv.cache", is_package=True) == ["cache → radixkv.memory"]


def test_the_cache_needs_no_torch() -> None:
    code = (
        "import sys, radixkv\n"
        "with radixkv.PrefixCache(num_pages=2, page_size=2).acquire([1, 2]) as lease: lease.commit([1, 2])\n"
        "radixkv.RadixTree, radixkv.CacheConfig\n"
        "loaded = {'torch', 'transformers', 'numba'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_index_of_replicas_needs_nothing_that_is_optional() -> None:
    code = (
        "import sys, radixkv.cluster.index.replica_index\n"
        "loaded = {'torch', 'transformers', 'zmq', 'msgpack', 'ray', 'fastapi'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_nothing_here_shadows_hugging_faces_kernels() -> None:
    spec = importlib.util.find_spec("kernels")
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
    for place in filter(None, places):
        assert not Path(place).resolve().is_relative_to(ROOT / "kernels"), "run plain pytest, not python -m pytest"


def test_our_kernels_package_is_only_a_docstring() -> None:
    """So that even where it does shadow the other one, it does nothing."""
    assert [type(statement) for statement in TREES["radixkv.kernels"].body] == [ast.Expr]


ONE_DOOR = {"tree", "allocator", "residency"}
CACHES = {"cache", "_cache", "prefixes"}


def reached_into(tree: ast.Module) -> list[str]:
    """Where `tree` reaches through a cache for one of its parts, as "line: cache.part"."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ONE_DOOR and name_of(node.value) in CACHES
    ]


def name_of(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


@pytest.mark.parametrize("room", [room for room in ARROWS if room != "cache"])
def test_nobody_reaches_through_the_cache(room: str) -> None:
    found = {module: reached_into(TREES[module]) for module in modules_of(room)}
    assert {module: places for module, places in found.items() if places} == {}


def test_reaching_through_the_cache_is_seen() -> None:
    reaching = ast.parse("pages = self._engine.cache.tree.num_pages")
    assert reached_into(reaching) == ["1: self._engine.cache.tree"]
    assert reached_into(ast.parse("cache.stats(); tree.nodes()")) == []
