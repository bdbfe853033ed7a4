"""Kernels where Numba can write nowhere: a read-only package, and no home."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
        pytest.param("numba", "float32", marks=pytest.mark.stress),  # compiles all of them anew
    ],
)
def test_an_engine_starts_where_compiled_code_cannot_be_kept_and_says_so_once(backend: str, dtype: str) -> None:
    code = (
        "import logging, torch; logging.basicConfig(format='%(message)s')\n"
        "from tiny_models import tiny_model\n"
        "from radixkv import Engine, EngineConfig, SamplingParams\n"
        f"config = EngineConfig(attention_backend={backend!r}, kv_cache_tokens=512, page_size=16)\n"
        f"engine = Engine(tiny_model('llama').to(torch.{dtype}), config=config)\n"
        "print(engine.generate([5, 6, 7], SamplingParams(max_tokens=4))[0].finish_reason)"
    )
    environment = {**os.environ, **NOWHERE, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=300, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["length"]
    assert done.stderr.count("set NUMBA_CACHE_DIR to a writable folder") == 1
