"""Codes of keys and values: how far they are off, that nothing infinite gets lost, and that pages hold what was put."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from attention_cases import Case, poison
from radixkv.attention.backend import choose_backend
from radixkv.errors import ConfigError
from radixkv.memory.kv_codes import CODE_FORMS, decode, encode, rotate, rotate_back
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.quantized_pool import QuantizedKVPool, kv_bytes_per_token, make_kv_pool

DIM = 32
LAYERS = [LayerKV(2, 32, 16), LayerKV(1, 48, 48)]
STEP = 1 + 2**-7  # between two neighbouring bfloat16
SMALLEST_BF16 = 2.0**-133
EVERY_CODE = pytest.mark.parametrize("kv_dtype", CODE_FORMS)
EVERY_LAYOUT = pytest.mark.parametrize("layout", ["nhd", "pairs", "lanes"])

Array = NDArray[np.float64]


def vectors(largest: float) -> st.SearchStrategy[NDArray[np.float32]]:
    """Ordinary numbers, zeros, denormals and outliers mixed, or vectors of one kind."""
    kinds = [
        st.floats(-4, 4, width=32),
        st.just(0.0),
        st.floats(-(2.0**-126), 2.0**-126, width=32),
        st.floats(-largest, largest, width=32),
    ]
    return arrays(np.float32, (3, DIM), elements=st.one_of(*kinds)) | st.sampled_from(kinds).flatmap(
        lambda kind: arrays(np.float32, (3, DIM), elements=kind)
    )


def off_by_int8(x: Array) -> Array:
    return np.abs(x).max(-1, keepdims=True) / 127 * STEP / 2 + SMALLEST_BF16


def off_by_int4(x: Array) -> Array:
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    return (high - low + np.abs(low) / 128) / 15 * STEP / 2 + SMALLEST_BF16 + np.abs(x).max() * 1e-6


def off_by_e4m3(x: Array) -> Array:
    return np.maximum(np.abs(x) * 2.0**-4, 2.0**-10) + np.maximum(np.abs(x) - 448, 0)


def off_by_e5m2(x: Array) -> Array:
    return np.maximum(np.abs(x) * 2.0**-3, 2.0**-17) + np.maximum(np.abs(x) - 57344, 0)


def off_by_fp4(x: Array) -> Array:
    """Half of the largest step, by a scale that is off by 1/16 or by 2**-10."""
    largest = np.abs(x).reshape(*x.shape[:-1], -1, 16).max(-1).repeat(16, axis=-1)
    return largest / 6 * (1 + 2**-4) + 6 / 4 * 2.0**-10 + np.maximum(np.abs(x) - 672, 0)


BOUNDS: dict[str, Callable[[Array], Array]] = {
    "int8": off_by_int8,
    "int4": off_by_int4,
    "fp8_e4m3": off_by_e4m3,
    "fp8_e5m2": off_by_e5m2,
    "fp4": off_by_fp4,
}


def through(kv_dtype: Any, x: Tensor) -> Tensor:
    return decode(kv_dtype, *encode(kv_dtype, x))


# -- codes -----------------------------------------------------------------------------------------------------------


@EVERY_CODE
@given(x=vectors(2.0**123))
def test_no_value_is_further_off_than_half_a_step(kv_dtype: str, x: NDArray[np.float32]) -> None:
    found = through(kv_dtype, torch.from_numpy(x)).double().numpy()
    exact = x.astype(np.float64)
    assert (np.abs(found - exact) <= BOUNDS[kv_dtype](exact) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("kv_dtype", "relative"), [("int8", 0.008), ("int4", 0.1), ("fp8_e4m3", 0.03), ("fp8_e5m2", 0.06), ("fp4", 0.1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ordinary_values_come_close(kv_dtype: str, relative: float, dtype: torch.dtype) -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert float((through(kv_dtype, x) - x).norm() / x.float().norm()) < relative


@pytest.mark.parametrize("kv_dtype", ["int8", "int4", "fp4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@given(x=vectors(2.0**127), place=st.integers(0, DIM - 1))
def test_a_vector_with_something_infinite_is_nan(kv_dtype: str, bad: float, x: NDArray[np.float32], place: int) -> None:
    x[1, place] = bad
    found = through(kv_dtype, torch.from_numpy(x))
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]].nan_to_num(), through(kv_dtype, torch.from_numpy(x[[0, 2]])).nan_to_num())


@pytest.mark.parametrize(("kv_dtype", "infinite"), [("fp8_e4m3", math.nan), ("fp8_e5m2", math.inf)])
def test_fp8_keeps_what_is_infinite_and_saturates_what_is_not(kv_dtype: Any, infinite: float) -> None:
    largest = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0}[kv_dtype]
    found = through(kv_dtype, torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1.0]))
    torch.testing.assert_close(
        found, torch.tensor([math.nan, infinite, -infinite, largest, -largest, 1.0]), equal_nan=True
    )


def test_a_spread_that_float32_cannot_hold_is_nan() -> None:
    assert through("int4", torch.tensor([[3e38, -3e38]])).isnan().all()


@pytest.mark.parametrize("kv_dtype", ["int8", "int4", "fp4"])
def test_zeros_and_constants_stay_what_they_are(kv_dtype: Any) -> None:
    x = torch.tensor([[0.0] * 16, [-2.25] * 16])
    torch.testing.assert_close(through(kv_dtype, x), x, rtol=0, atol=2 / 127)
    assert torch.equal(through(kv_dtype, x)[0], x[0])


# -- the rotation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [7, 16, 24, 80, 128])
def test_a_rotation_keeps_products_and_can_be_undone(dim: int) -> None:
    q, k = torch.randn(2, 5, dim, generator=torch.Generator().manual_seed(dim))
    torch.testing.assert_close(rotate(q) @ rotate(k).T, q @ k.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate_back(rotate(q)), q, rtol=1e-5, atol=1e-5)


def test_a_rotation_leaves_steps_to_the_small_components_of_keys() -> None:
    k = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    k[:, 5] += 30
    plain, rotated = through("int4", k), rotate_back(through("int4", rotate(k)))
    assert (rotated - k).norm() < (plain - k).norm() / 2


# -- pages -----------------------------------------------------------------------------------------------------------


def make(kv_dtype: str, layout: Any, page_size: int = 4, dtype: torch.dtype = torch.float32) -> KVPool:
    pool = make_kv_pool(layout, LAYERS, kv_dtype=kv_dtype, num_pages=5, page_size=page_size, dtype=dtype)
    poison(pool)
    return pool


def random_kv(layer: LayerKV, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    k, v = (
        torch.randn(tokens, layer.num_kv_heads, dim, generator=generator)
        for dim in (layer.k_head_dim, layer.v_head_dim)
    )
    return k, v


def everything(pool: KVPool, layer: int) -> tuple[Tensor, Tensor]:
    """K and V of all slots."""
    return pool.gather(layer, torch.arange(pool.num_pages))


@EVERY_CODE
@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_hold_what_was_written_and_the_others_nothing(kv_dtype: Any, layout: str, dtype: torch.dtype) -> None:
    pool = make(kv_dtype, layout, dtype=dtype)
    slots = torch.tensor([3, 18, 4, 9, 0, 7])
    others = [slot for slot in range(20) if slot not in slots]
    for layer, kv in enumerate(LAYERS):
        k, v = random_kv(kv, len(slots))
        pool.write(layer, slots, k, v)
        found_k, found_v = everything(pool, layer)
        rotates = CODE_FORMS[kv_dtype].rotates_keys
        kept_k = rotate_back(through(kv_dtype, rotate(k))) if rotates else through(kv_dtype, k)
        torch.testing.assert_close(found_k[slots], kept_k.to(dtype))
        torch.testing.assert_close(found_v[slots], through(kv_dtype, v).to(dtype))
        assert found_k[others].isnan().all()
        assert found_v[others].isnan().all()


@EVERY_CODE
@EVERY_LAYOUT
def test_a_page_can_be_read_after_each_token(kv_dtype: str, layout: str) -> None:
    token_by_token, at_once = make(kv_dtype, layout), make(kv_dtype, layout)
    k, v = random_kv(LAYERS[0], 10)
    for count in range(1, 11):
        slots = torch.arange(count)
        token_by_token.write(0, slots[-1:], k[count - 1 : count], v[count - 1 : count])
        at_once.write(0, slots, k[:count], v[:count])
        for found, expected in zip(everything(token_by_token, 0), everything(at_once, 0), strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)


@EVERY_CODE
@EVERY_LAYOUT
@pytest.mark.parametrize("num_tokens", range(5))
def test_a_copied_page_holds_the_first_tokens_of_every_layer(kv_dtype: str, layout: str, num_tokens: int) -> None:
    pool = make(kv_dtype, layout)
    for layer, kv in enumerate(LAYERS):
        pool.write(layer, torch.arange(4, 20), *random_kv(kv, 16))
    before = [everything(pool, layer) for layer in range(2)]
    pool.copy_page(1, 3, num_tokens)
    for layer in range(2):
        for found, old in zip(everything(pool, layer), before[layer], strict=True):
            old[12 : 12 + num_tokens] = old[4 : 4 + num_tokens]
            torch.testing.assert_close(found, old, rtol=0, atol=0, equal_nan=True)


@EVERY_CODE
def test_the_compiled_backend_writes_as_the_pool_does(kv_dtype: str) -> None:
    case = Case([(0, 19), (5, 40)], kv_dtype=kv_dtype)
    needs = case.needs(case.params())
    pool, other = case.pool("lanes"), case.pool("lanes")
    slots = case.metadata.slots
    k, v = random_kv(case.layer, len(slots))
    for values in (k, v):
        values[1], values[2] = 0, -3
        values[3:9] *= torch.tensor([1e-42, 1e-30, 1e30, 3e38, math.nan, math.inf])[:, None, None]
        values[9:12, :, 4] = torch.tensor([math.nan, -math.inf, 1e20])[:, None]
    choose_backend("numba", needs)(pool, needs).plan(case.metadata).store_kv(0, k, v)
    other.write(0, slots, k, v)
    for found, expected in zip(everything(pool, 0), everything(other, 0), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# -- bytes -----------------------------------------------------------------------------------------------------------


@EVERY_CODE
@EVERY_LAYOUT
def test_bytes_are_those_of_the_tensors(kv_dtype: str, layout: str) -> None:
    pool = make(kv_dtype, layout, page_size=16)
    assert isinstance(pool, QuantizedKVPool)
    tensors = [*pool.k, *pool.v, *pool.k_scales, *pool.v_scales]
    assert pool.num_bytes == sum(x.numel() * x.element_size() for x in tensors)
    assert pool.bytes_per_token == kv_bytes_per_token(LAYERS, kv_dtype, torch.float32)
    assert pool.kv_dtype == kv_dtype


@EVERY_CODE
@pytest.mark.parametrize("head_dim", [64, 128])
def test_so_many_more_tokens_fit_than_in_16_bit(kv_dtype: str, head_dim: int) -> None:
    layers = [LayerKV(8, head_dim, head_dim)] * 4
    times = kv_bytes_per_token(layers, "auto", torch.bfloat16) / kv_bytes_per_token(layers, kv_dtype, torch.bfloat16)
    assert times >= (3.5 if kv_dtype in ("int4", "fp4") else 1.9)


def test_a_pool_of_the_models_own_dtype_is_the_plain_one() -> None:
    pool = make("auto", "nhd", dtype=torch.bfloat16)
    assert type(pool) is KVPool
    assert pool.kv_dtype == "bfloat16"
    assert pool.bytes_per_token == kv_bytes_per_token(LAYERS, "auto", torch.bfloat16)


def test_what_cannot_be_coded_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown form of quantised KV 'int2'; there are int8, int4, fp8_e4m3"):
        make("int2", "nhd")
    with pytest.raises(ConfigError, match="int4 KV puts 2 components in a byte, and the model's heads have 5"):
        make_kv_pool("nhd", [LayerKV(1, 4, 5)], kv_dtype="int4", num_pages=1, page_size=1, dtype=torch.float32)
    with pytest.raises(ConfigError, match="fp4 KV has a scale for each 16 components, and the model's heads have 72"):
        make_kv_pool("nhd", [LayerKV(1, 64, 72)], kv_dtype="fp4", num_pages=1, page_size=1, dtype=torch.float32)
