"""Numba's cache of compiled kernels: what it depends on, and an engine where it can write nowhere."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from child_process import child_environment
from radixkv.kernels import numba_cpu, numba_linear, numba_merge, numba_task_tables
from radixkv.kernels.compiling import cache_depends_on, can_cache, kept_folder

WORKERS = [numba_cpu, numba_linear, numba_merge, numba_task_tables]

NOWHERE = {
    "HOME": "/dev/null/home",
    "XDG_CACHE_HOME": "/dev/null/cache",
    "NUMBA_CACHE_DIR": "/dev/null/numba",
    # not `__pycache__`, which is writable here
    "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator,UserWideCacheLocator",
}


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", "float64"),  # runs none of our kernels
        ("numba", "float32"),  # compiles all of them anew
    ],
)
@pytest.mark.stress
def test_an_engine_starts_where_compiled_code_cannot_be_kept_and_says_so_once(backend: str, dtype: str) -> None:
    code = (
        "import logging, torch; logging.basicConfig(format='%(message)s')\n"
        "from tiny_models import tiny_model\n"
        "from radixkv import Engine, EngineConfig, SamplingParams\n"
        f"config = EngineConfig(attention_backend={backend!r}, kv_cache_tokens=512, page_size=16)\n"
        f"engine = Engine(tiny_model('llama').to(torch.{dtype}), config=config)\n"
        "print(engine.generate([5, 6, 7], SamplingParams(max_tokens=4))[0].finish_reason)"
    )
    environment = child_environment(**NOWHERE, OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=300, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["length"]
    assert done.stderr.count("set NUMBA_CACHE_DIR to a writable folder") == 1


def test_without_a_place_for_compiled_code_a_warning_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def njit(*, cache: bool) -> object:
        raise RuntimeError("no locator available")

    monkeypatch.setattr("radixkv.kernels.compiling.nb.njit", njit)
    assert not can_cache.__wrapped__()
    assert "set NUMBA_CACHE_DIR to a writable folder (no locator available)" in caplog.text


def test_what_was_measured_is_kept_where_compiled_code_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept" / "here"))
    assert kept_folder() == tmp_path / "kept" / "here"
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert kept_folder() is None, "no other folder is taken than the one that was chosen"


def made_of(module: ModuleType) -> set[str]:
    """The modules of Numba kernels that `module` imports, and those that they import."""
    found: set[str] = set()
    ahead = [module.__name__]
    while ahead:
        for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(ahead.pop())))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                new = {name for name in names if name.startswith("radixkv.kernels.numba_") and name.count(".") == 2}
                ahead += new - found
                found |= new
    return found


@pytest.mark.parametrize("worker", WORKERS, ids=lambda module: module.__name__)
def test_the_key_of_a_worker_covers_all_that_it_is_made_of(worker: ModuleType) -> None:
    parts = {part.__name__ for part in worker.PARTS}
    assert made_of(worker) == parts
    assert parts


@pytest.mark.parametrize("worker", WORKERS, ids=lambda module: module.__name__)
def test_changing_any_part_changes_the_key(worker: ModuleType, tmp_path: Path) -> None:
    copies = []
    for part in worker.PARTS:
        copy = ModuleType(part.__name__)
        copy.__file__ = shutil.copy(part.__file__, tmp_path)
        copies.append(copy)
    keys = {cache_depends_on(*worker.PARTS)}
    assert cache_depends_on(*copies) in keys
    for copy in copies:
        with open(copy.__file__ or "", "a") as source:
            source.write("# changed\n")
        keys.add(cache_depends_on(*copies))
    assert len(keys) == 1 + len(copies)


def test_a_function_that_closes_over_another_key_is_compiled_anew(tmp_path: Path) -> None:
    """What `cache_depends_on` relies on."""
    source = tmp_path / "closing_over.py"
    source.write_text(
        "import numba as nb\n"
        "def make(key):\n"
        "    @nb.njit(cache=True)\n"
        "    def function():\n"
        "        _ = key\n"
        "        return 1\n"
        "    return function\n"
    )
    spec = importlib.util.spec_from_file_location("closing_over", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaded = []
    for key in (1, 1, 2):
        function = module.make(key)
        assert function() == 1
        loaded.append(sum(function.stats.cache_hits.values()))
    assert loaded == [0, 1, 0]
