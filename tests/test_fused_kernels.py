"""The small operations of decoder layers give what transformers' modules give, and programs run them in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from radixkv.kernels import numba_arguments, numba_fused, numba_linear, numba_program
from radixkv.kernels.numba_program import Operation, Program

MODES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # a last place: sums have an order
WIDTHS = [16, 44, 768]
HEAD_DIMS = [12, 64, 80]
NUM_TOKENS = [1, 3, 8, 16]


@pytest.fixture(params=list(MODES), ids=list(MODES.values()))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    found: torch.dtype = request.param
    return found


def run(worker: object, record: np.ndarray) -> None:
    Program([[Operation(worker, record)]]).run(2)


def check_same(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("adds", [False, True])
def test_norms(dtype: torch.dtype, num_tokens: int, width: int, adds: bool) -> None:
    module = Qwen3RMSNorm(width, eps=1e-5).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(width))
    hidden, added = (3 * torch.randn(num_tokens, width).to(dtype) for _ in range(2))
    whole = hidden + added if adds else hidden.clone()
    out = torch.empty_like(hidden)
    record = numba_arguments.NORM.make(
        counter=0,
        input=hidden.data_ptr(),
        added=added.data_ptr() if adds else 0,
        weight=module.weight.data_ptr(),
        output=out.data_ptr(),
        num_rows=num_tokens,
        size=width,
        eps=1e-5,
        unused=0,
    )
    run(numba_fused.norm_worker(MODES[dtype]), record)
    assert torch.equal(hidden, whole), "the residual is rounded once"
    check_same(out, module(whole))


@pytest.mark.parametrize("num_values", [16, 1024, 3 * 1040])
def test_gates(dtype: torch.dtype, num_values: int) -> None:
    gate, up = 8 * torch.randn(num_values).to(dtype), torch.randn(num_values).to(dtype)
    gate[:4] = torch.tensor([-200.0, 200.0, 0.0, -20.0])
    out = torch.empty_like(gate)
    record = numba_arguments.GATE.make(
        counter=0, gate=gate.data_ptr(), up=up.data_ptr(), output=out.data_ptr(), num_values=num_values
    )
    run(numba_fused.gate_worker(MODES[dtype]), record)
    check_same(out, functional.silu(gate) * up)


def test_what_is_not_a_number_stays_none(dtype: torch.dtype) -> None:
    gate, up = torch.full((16,), torch.nan, dtype=dtype), torch.ones(16, dtype=dtype)
    record = numba_arguments.GATE.make(
        counter=0, gate=gate.data_ptr(), up=up.data_ptr(), output=up.data_ptr(), num_values=16
    )
    run(numba_fused.gate_worker(MODES[dtype]), record)
    assert up.isnan().all()


@pytest.mark.parametrize("num_values", [1, 1000, 2500])
def test_casts_to_the_bit(dtype: torch.dtype, num_values: int) -> None:
    wide = torch.randn(num_values) * 10.0 ** torch.randint(-9, 6, (num_values,))
    wide[:3] = torch.tensor([torch.inf, -0.0, 1.00390625])[:num_values]  # the last lies between two bfloat16
    found, back = torch.empty(num_values, dtype=dtype), torch.empty(num_values)
    run(numba_fused.narrow_worker(MODES[dtype]), cast_record(found, wide))
    assert torch.equal(found, wide.to(dtype))
    run(numba_fused.widen_worker(MODES[dtype]), cast_record(found, back))
    assert torch.equal(back, found.float())


def cast_record(narrow: Tensor, wide: Tensor) -> np.ndarray:
    return numba_arguments.CAST.make(counter=0, narrow=narrow.data_ptr(), wide=wide.data_ptr(), num_values=wide.numel())


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotary_embeddings_to_the_bit(dtype: torch.dtype, num_tokens: int, head_dim: int) -> None:
    q, k = (torch.randn(1, heads, num_tokens, head_dim).to(dtype) for heads in (6, 2))
    cos, sin = (torch.randn(1, num_tokens, head_dim).to(dtype) for _ in range(2))
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    own_q, own_k = (states[0].transpose(0, 1).contiguous() for states in (q, k))
    run(numba_fused.rotary_worker(MODES[dtype]), rotary_record(own_q, own_k, own_k, cos, sin))
    for found, states in zip((own_q, own_k), expected, strict=True):
        assert torch.equal(found, states[0].transpose(0, 1))


def test_keys_and_values_go_to_their_slots(dtype: torch.dtype) -> None:
    """As `LaneKVPool` has them: K [pages, heads, dim / w, page_size, w], V [pages, heads, page_size / w, dim, w]."""
    page_size, head_dim, heads, width = 16, 12, 2, 4 // dtype.itemsize
    k, v = (torch.randn(3, heads, head_dim).to(dtype) for _ in range(2))
    slots = torch.tensor([37, 5, 31])
    pages = torch.zeros(3, heads, 2 * head_dim * page_size, dtype=dtype)  # V of a head after its K
    k_pages = pages[:, :, : head_dim * page_size].unflatten(2, (head_dim // width, page_size, width))
    v_pages = pages[:, :, head_dim * page_size :].unflatten(2, (page_size // width, head_dim, width))
    cos, sin = torch.ones(1, 3, head_dim, dtype=dtype), torch.zeros(1, 3, head_dim, dtype=dtype)
    q = torch.randn(3, 4, head_dim).to(dtype)  # the record has its address alone
    record = rotary_record(q, k, v, cos, sin)
    record["slots"], record["page_size"] = slots.data_ptr(), page_size
    record["k_pages"], record["v_pages"] = k_pages.data_ptr(), v_pages.data_ptr()
    record["k_head_bytes"] = record["v_head_bytes"] = 2 * head_dim * page_size * dtype.itemsize
    run(numba_fused.rotary_worker(MODES[dtype]), record)
    for i, slot in enumerate(slots.tolist()):
        page, at = divmod(slot, page_size)
        assert torch.equal(k_pages[page, :, :, at].flatten(1), k[i])
        assert torch.equal(v_pages[page, :, at // width, :, at % width], v[i])
    assert int((pages != 0).sum()) == 2 * k.numel(), "and nothing else is touched"


def rotary_record(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> np.ndarray:
    """Nothing is stored."""
    return numba_arguments.ROTARY.make(
        counter=0,
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        slots=0,
        k_pages=0,
        v_pages=0,
        num_tokens=q.shape[0],
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        v_dim=v.shape[2],
        page_size=1,
        k_head_bytes=0,
        v_head_bytes=0,
    )


# -- programs ----------------------------------------------------------------------------------------------------------


def linear(weight: Tensor, x: Tensor, out: Tensor) -> Operation:
    record = numba_arguments.LINEAR.make(
        counter=0,
        weight=weight.data_ptr(),
        input=x.data_ptr(),
        bias=0,
        output=out.data_ptr(),
        num_tokens=1,
        out_features=weight.shape[0],
        row_bytes=weight.shape[1] * 4,
    )
    return Operation(numba_linear.linear_worker("f32", 1), record)


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_each_group_sees_what_the_one_before_wrote(num_threads: int) -> None:
    """On more threads than there are cores, run after run."""
    torch.manual_seed(1)
    weights = [torch.randn(96, 96) / 10 for _ in range(40)]
    states = [torch.randn(1, 96), *(torch.empty(1, 96) for _ in weights)]
    beside = [torch.empty(1, 96) for _ in weights]
    groups = [
        [linear(weight, states[i], states[i + 1]), linear(weight, states[i], beside[i])]
        for i, weight in enumerate(weights)
    ]
    program = Program(groups)
    for _ in range(20):
        for state in (*states[1:], *beside):
            state.fill_(torch.nan)
        program.run(num_threads)
        for i, weight in enumerate(weights):
            torch.testing.assert_close(states[i + 1], states[i] @ weight.T)
            assert torch.equal(beside[i], states[i + 1])


def test_a_part_of_a_program_and_exchanged_operations() -> None:
    weight, x, first, second = torch.eye(16), torch.randn(1, 16), torch.zeros(1, 16), torch.zeros(1, 16)
    program = Program([[linear(weight, x, first)], [numba_program.no_operation()]])
    assert len(program) == 2
    program.run(2, 0, 1)
    assert torch.equal(first, x)
    program.exchange(1, linear(weight, first, second))
    program.run(2, 1)
    assert torch.equal(second, x)
