"""Compiled loops run on the OpenMP library that torch runs on, or on plain threads where there is none to call."""

from __future__ import annotations

import sys

import pytest
import torch

from radixkv.kernels import openmp


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another kind of threads there")
def test_the_library_that_is_called_has_the_threads_that_torch_has() -> None:
    library = openmp.torchs_openmp()
    assert library is not None
    before = torch.get_num_threads()
    try:
        for num_threads in (3, 5):
            torch.set_num_threads(num_threads)
            assert library.omp_get_max_threads() == num_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pools", [[], [{"user_api": "blas", "filepath": "/nowhere/libblas.so"}]])
def test_without_an_openmp_library_there_is_none_to_call(
    pools: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openmp, "threadpool_info", lambda: pools)
    assert openmp.torchs_openmp() is None
