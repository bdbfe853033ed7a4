"""Linear layers on few tokens give what torch gives, in every dtype and for every number of tokens."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from radixkv.kernels import numba_arguments, numba_linear, openmp
from radixkv.kernels.numba_modes import MODES
from radixkv.models import skinny_linear
from radixkv.models.skinny_linear import MAX_TOKENS, SkinnyLinear, speed_up_linears

DTYPES = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}  # relative: the output's rounding


def linear(in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool) -> nn.Linear:
    torch.manual_seed(in_features + out_features)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.stress)]
)
@pytest.mark.parametrize(("out_features", "bias"), [(6, True), (33, False), (131, True)])
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 64, 65])
def test_same_as_torch(dtype: torch.dtype, out_features: int, bias: bool, num_tokens: int) -> None:
    check_same(dtype, out_features, bias, num_tokens)


# 2 to 7 tokens have kernels of their own, each compiled for seconds in each dtype: every dtype under `stress`.
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=pytest.mark.stress) for dtype in DTYPES if dtype.itemsize == 2)],
)
@pytest.mark.parametrize(("out_features", "bias"), [(6, True), (33, False), (131, True)])
@pytest.mark.parametrize("num_tokens", [2, 3, 4, 7])
def test_same_as_torch_on_few_tokens(dtype: torch.dtype, out_features: int, bias: bool, num_tokens: int) -> None:
    check_same(dtype, out_features, bias, num_tokens)


def check_same(dtype: torch.dtype, out_features: int, bias: bool, num_tokens: int) -> None:
    """A layer of 96 components gives what torch gives in float64."""
    layer = linear(96, out_features, dtype, bias=bias)
    x = torch.randn(1, num_tokens, 96).to(dtype)
    expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    speed_up_linears(layer)
    assert type(layer) is SkinnyLinear
    found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize(
    "mode", [name for name, mode in MODES.items() if mode.narrow is not None and not mode.multiplies_pairs]
)
def test_every_mode_computes_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modes that this processor would not choose, too."""
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[mode]
    monkeypatch.setattr(skinny_linear, "linear_mode", lambda weight: mode)
    layer = linear(64, 40, dtype, bias=False)
    x = torch.randn(3, 64).to(dtype)
    expected = layer(x)
    speed_up_linears(layer)
    torch.testing.assert_close(layer(x), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


# With the other size of register each number of tokens is a kernel that nothing else here compiles.
@pytest.mark.parametrize(
    ("num_tokens", "is_wide"),
    [
        (11, False),
        (11, True),
        *(pytest.param(*case, marks=pytest.mark.stress) for case in itertools.product((2, 4), (False, True))),
    ],
)
def test_the_tiles_for_every_size_of_register(num_tokens: int, is_wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_linear, "has_wide_registers", lambda: is_wide)
    check_same(torch.float32, 33, True, num_tokens)


def test_what_the_kernel_cannot_read_is_left_as_it_is() -> None:
    odd, narrow = linear(40, 32, torch.bfloat16, bias=False), linear(64, 2, torch.float32, bias=False)
    double, transposed = linear(64, 32, torch.float64, bias=False), linear(64, 32, torch.float32, bias=False)
    transposed.weight.data = torch.randn(64, 32).T
    model = nn.ModuleList([odd, narrow, double, transposed])
    speed_up_linears(model)
    assert [type(module) for module in model] == [nn.Linear] * 4


def test_gradients_and_other_dtypes_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(64, 32)
    speed_up_linears(layer)
    monkeypatch.setattr(skinny_linear, "_multiply", None)  # calling it would fail
    layer(torch.randn(2, 64)).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert layer(torch.empty(0, 64)).shape == (0, 32)
        assert layer(torch.randn(MAX_TOKENS["f32"] + 1, 64)).shape == (65, 32)
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.randn(2, 64, dtype=torch.float64))


def test_a_copy_has_weights_of_its_own() -> None:
    layer = linear(64, 32, torch.float32, bias=False)
    speed_up_linears(layer)
    other = copy.deepcopy(layer)
    other.weight.data.zero_()
    x = torch.randn(1, 64)
    assert other(x).abs().max() == 0 < layer(x).abs().max()


def test_threads_share_the_rows_out() -> None:
    """On more threads than there are cores, and without OpenMP, every row is computed once."""
    weight, x = torch.randn(1000, 64), torch.randn(1, 64)
    for run in (openmp.run, openmp.on_plain_threads):
        out, counter = torch.full((1, 1000), torch.nan), np.zeros(1, np.int64)
        arguments = numba_arguments.LINEAR.fill(
            counter=counter.ctypes.data,
            weight=weight.data_ptr(),
            input=x.data_ptr(),
            bias=0,
            output=out.data_ptr(),
            num_tokens=1,
            out_features=1000,
            row_bytes=256,
        )
        run(numba_linear.linear_worker("f32", 1), arguments.ctypes.data, 7)
        torch.testing.assert_close(out, x @ weight.T)
