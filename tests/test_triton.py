"""The Triton kernels and their backend, on a CUDA device or, where there is none, in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_cases import TOLERANCE, Case
from radixkv.attention import triton_backend, triton_plan
from radixkv.attention.backend import AttentionParams, GraphPlan
from radixkv.attention.metadata import AttentionMetadata, SequenceSpan, build_metadata
from radixkv.attention.shared_prefix import BreakEven
from radixkv.attention.triton_backend import TritonBackend
from radixkv.kernels import triton_paged
from radixkv.kernels.torch_reference import paged_attention
from radixkv.kernels.triton_paged import Decodes, PagedKV, Partials, Rule, Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = [(0, 1), (37, 38), (0, 13), (15, 33)]  # [first, last) of each sequence
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 7},
    "chunk": {"chunk_size": 8},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "key bias": {"key_bias": True},
    "key bias, window, softcap and sinks": {"key_bias": True, "sliding_window": 11, "softcap": 3.0, "sinks": True},
    "window, softcap and sinks": {"sliding_window": 11, "softcap": 3.0, "sinks": True},
    "streaming": {"sliding_window": 7, "sink_tokens": 4},
    "streaming, softcap and sinks": {"sliding_window": 9, "sink_tokens": 5, "softcap": 3.0, "sinks": True},
}
TOGETHER = [  # each but "chunk", which prefixes below have
    "key bias",
    "window, softcap and sinks",
    "streaming, softcap and sinks",
]
ALWAYS_SHARE = BreakEven(min_sequences=2, min_tokens=1)
MORE = [] if DEVICE == "cuda" else [pytest.mark.stress]  # cases that are too slow in the interpreter to run every time


def more(*values: Any) -> list[Any]:
    """The values as cases of a test that run on a device, and under `stress` where there is none."""
    return [pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=MORE) for value in values]


def case(spans: list[tuple[int, int]], **options: Any) -> Case:
    return Case(spans, device=DEVICE, **options)


def check(case: Case, break_even: BreakEven = triton_backend.BREAK_EVEN, **options: Any) -> TritonBackend:
    params = case.params(**options)
    backend = TritonBackend(case.pool("nhd"), case.needs(params), break_even=break_even)
    close(backend.plan(case.metadata).attend(0, case.q, params), case.expected(params), case.dtype)
    return backend


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(found.double().cpu(), expected.double().cpu(), rtol=0, atol=TOLERANCE[dtype])


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# -- the backend -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "page_size"),
    [
        ("plain", 1),
        *((option, 16) for option in TOGETHER),
        *more(*((option, 16) for option in OPTIONS if option not in TOGETHER)),
        *more(*((option, 1) for option in OPTIONS if option != "plain")),
    ],
)
def test_decodes_and_extends_in_one_batch(option: str, page_size: int) -> None:
    check(case(MIXED, page_size=page_size, num_q_heads=2, num_kv_heads=1), **OPTIONS[option])


@pytest.mark.parametrize(
    ("kv_dtype", "option", "page_size"),
    [
        ("int8", "plain", 1),
        ("int4", "streaming, softcap and sinks", 16),
        ("fp4", "plain", 1),
        *more(("int4", "plain", 1), ("int8", "streaming, softcap and sinks", 16)),
        *more(
            *(
                (kv_dtype, option, page_size)
                for kv_dtype in ("int8", "int4", "fp4")
                for option, page_size in (
                    ("plain", 16),
                    ("window, softcap and sinks", 16),
                    ("streaming, softcap and sinks", 1),
                )
            )
        ),
    ],
)
def test_codes_are_read_in_place(kv_dtype: str, option: str, page_size: int) -> None:
    few = case(MIXED[1:3], page_size=page_size, num_q_heads=2, num_kv_heads=1, kv_dtype=kv_dtype)
    check(few, **OPTIONS[option])


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_floats_of_8_bits_are_read_in_place(kv_dtype: str) -> None:
    few = case([(20, 21), (5, 9)], num_q_heads=2, num_kv_heads=1, kv_dtype=kv_dtype)  # slow in the interpreter
    check(few, sliding_window=7, sink_tokens=2)


@pytest.mark.parametrize("kv_dtype", ["int8", *more("int4")])
def test_codes_of_odd_heads_and_shared_prefixes(kv_dtype: str) -> None:
    check(case(MIXED[1:3], num_q_heads=6, head_dim=24, v_head_dim=12, kv_dtype=kv_dtype))
    spans = [(40, 41), (80, 81), (70, 71)]
    shared = case(spans, num_q_heads=3, num_kv_heads=1, shared={(0, 1, 2): 32, (1, 2): 64}, kv_dtype=kv_dtype)
    check(shared, ALWAYS_SHARE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    check(case(MIXED[1:3], dtype=dtype), softcap=3.0, sinks=True)


@pytest.mark.parametrize(
    ("group", "head_dim"),
    [(1, 64), (7, 80), *more(*((group, 64) for group in range(2, 9)), (2, 96), (71, 32))],
)
def test_groups_and_head_sizes(group: int, head_dim: int) -> None:
    check(case([(37, 38), (15, 21)], num_q_heads=group, num_kv_heads=1, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [128, *more(256)])
def test_large_heads(head_dim: int) -> None:
    check(case([(37, 38), (15, 21)], num_q_heads=2, num_kv_heads=2, head_dim=head_dim))


def test_values_of_another_size_than_keys() -> None:
    check(case(MIXED[1:3], page_size=4, num_kv_heads=4, head_dim=24, v_head_dim=16))


@pytest.mark.parametrize("last", [16, *more(15, 17, 31, 32, 33, 34)])
def test_borders_of_pages_and_blocks(last: int) -> None:
    check(case([(first, last) for first in (0, 1, last - 17, last - 2, last - 1) if first >= 0], num_kv_heads=1))


@pytest.mark.parametrize("option", ["window, softcap and sinks", *more("plain")])
def test_a_long_decode_is_read_in_splits(option: str) -> None:
    options = {**OPTIONS[option], "sliding_window": 150} if "window" in option else {}
    check(case([(199, 200), (129, 130)], page_size=4, num_q_heads=2, num_kv_heads=1), **options)


SHARING = ["chunk"]


@pytest.mark.parametrize("option", [*SHARING, *more(*(option for option in OPTIONS if option not in SHARING))])
def test_prefixes_shared_at_two_levels(option: str) -> None:
    spans = [(40, 41), (80, 81), (70, 71), (20, 41), (33, 34), (5, 6)]
    nested = case(spans, num_q_heads=3, num_kv_heads=1, shared={(0, 1, 2, 4): 32, (1, 2): 64})
    backend = check(nested, ALWAYS_SHARE, **OPTIONS[option])
    assert backend.pays_to_share(nested.metadata)


def test_a_shared_part_is_read_in_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_plan, "MIN_SPLIT_TOKENS", 64)
    spans = [(150, 151), (130, 131), (140, 141)]
    check(case(spans, num_q_heads=7, num_kv_heads=1, shared={(0, 1, 2): 128}), ALWAYS_SHARE)


@pytest.mark.parametrize("option", ["plain", *more("window, softcap and sinks")])
def test_short_extends_of_long_prefixes_are_read_in_splits(monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setattr(triton_plan, "MIN_SPLIT_TOKENS", 64)
    extend = case([(139, 143), (0, 1)], num_q_heads=2, num_kv_heads=1)
    launched = []
    monkeypatch.setattr(triton_paged, "attend", lambda *args: launched.append(args))
    check(extend, **OPTIONS[option])
    assert not launched  # in one pass


def test_a_short_prefix_is_read_by_each_for_itself() -> None:
    short = case([(40, 41), (80, 81)], shared={(0, 1): 32})
    assert not check(short).pays_to_share(short.metadata)


def test_layers_that_differ_in_their_heads() -> None:
    grouped, single = (case(MIXED[1:3], num_q_heads=3, num_kv_heads=heads) for heads in (1, 3))
    params = grouped.params()
    pool, other_pool = grouped.pool("nhd"), single.pool("nhd")
    pool.layers += other_pool.layers
    pool.k += other_pool.k
    pool.v += other_pool.v
    pool.k_scales += other_pool.k_scales
    pool.v_scales += other_pool.v_scales
    needs = grouped.needs(params)
    both = type(needs)(needs.layers + single.needs(params).layers, needs.page_size, needs.dtype, needs.device)
    backend = TritonBackend(pool, both)
    plan = backend.plan(grouped.metadata)
    close(plan.attend(0, grouped.q, params), grouped.expected(params))
    close(plan.attend(1, single.q, params), single.expected(params))


def graph_plan(case: Case, params: AttentionParams, batch_size: int, max_pages: int) -> GraphPlan:
    slots = torch.zeros(batch_size, dtype=torch.int64, device=DEVICE)
    return TritonBackend(case.pool("nhd"), case.needs(params)).graph_plan(slots, max_pages)


@pytest.mark.parametrize("batch_size", [5, *more(3)])
def test_a_fixed_batch_is_padded(batch_size: int) -> None:
    decodes = case([(40, 41), (0, 1), (79, 80)], num_q_heads=2, num_kv_heads=1)
    params = decodes.params(sinks=True, key_bias=True)
    plan = graph_plan(decodes, params, batch_size, max_pages=20)
    q = torch.full((batch_size, *decodes.q.shape[1:]), math.nan, device=DEVICE)
    q[:3] = decodes.q
    plan.update(decodes.metadata)
    out = plan.attend(0, q, params)
    close(out[:3], decodes.expected(params))
    assert (out[3:] == 0).all()

    plan.update(without_first(decodes.metadata))
    q[:2] = decodes.q[1:]
    out = plan.attend(0, q, params)
    close(out[:2], decodes.expected(params)[1:])
    assert (out[2:] == 0).all()


def test_a_graph_plan_stores_kv_where_its_slots_say_by_then() -> None:
    decodes = case([(0, 1), (20, 21)], num_q_heads=2, num_kv_heads=1)
    backend = TritonBackend(decodes.pool("nhd"), decodes.needs(decodes.params()))
    slots = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    plan = backend.graph_plan(slots, max_pages=20)
    plan.update(decodes.metadata)
    slots.copy_(decodes.metadata.slots)
    k, v = torch.ones(2, 1, 16, device=DEVICE), torch.full((2, 1, 16), 2.0, device=DEVICE)
    plan.store_kv(0, k, v)
    assert torch.equal(backend.pool.k[0].flatten(0, 1)[slots], k)
    assert torch.equal(backend.pool.v[0].flatten(0, 1)[slots], v)


def without_first(metadata: AttentionMetadata) -> AttentionMetadata:
    """A batch of decodes without its first."""
    ends = metadata.kv_indptr[1:]
    spans = [
        SequenceSpan(last - 1, last, metadata.kv_indices[start:end])
        for last, start, end in zip(metadata.kv_lens.tolist()[1:], ends[:-1], ends[1:], strict=True)
    ]
    return build_metadata(spans, page_size=metadata.page_size, device=DEVICE)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("option", ["plain", "key bias"])
def test_a_captured_run_reads_what_was_planned_last(option: str) -> None:
    decodes = case([(40, 41), (0, 1), (799, 800)], num_q_heads=8, dtype=torch.float16, head_dim=64)
    params = decodes.params(**OPTIONS[option])
    plan = graph_plan(decodes, params, 4, max_pages=100)
    q = torch.zeros(4, *decodes.q.shape[1:], dtype=decodes.dtype, device=DEVICE)
    plan.attend(0, q, params)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan.attend(0, q, params)
    for metadata, first in ((decodes.metadata, 0), (without_first(decodes.metadata), 1)):
        q[: 3 - first] = decodes.q[first:]
        plan.update(metadata)
        graph.replay()
        close(out[: 3 - first], decodes.expected(params)[first:], decodes.dtype)


@pytest.mark.parametrize("layout", ["tokens first", "heads first"])
def test_new_kv_goes_to_its_slots_and_nowhere_else(layout: str) -> None:
    few = case([(0, 5)], page_size=4, num_kv_heads=2, head_dim=24, v_head_dim=8, dtype=torch.float16)
    params = few.params()
    backend = TritonBackend(few.pool("nhd"), few.needs(params))
    shape = (5, 2) if layout == "tokens first" else (2, 5)
    k, v = (torch.randn(*shape, dim, device=DEVICE) for dim in (24, 8))
    if layout == "heads first":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    before = backend.pool.k[0].clone(), backend.pool.v[0].clone()
    slots = torch.tensor([7, -1, 2, 21, -1], device=DEVICE)
    backend.plan(replace(few.metadata, slots=slots)).store_kv(0, k, v)
    for pages, expected, new in zip((backend.pool.k[0], backend.pool.v[0]), before, (k, v), strict=True):
        expected.flatten(0, 1)[slots[[0, 2, 3]]] = new[[0, 2, 3]].half()
        torch.testing.assert_close(pages, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "reads float32, float16 and bfloat16 KV, and the model's is torch.float64"),
        ({"head_dim": 320}, "reads heads of at most 256 values, and the model's have 320"),
        ({"head_dim": 320, "dtype": torch.float16}, None),
    ],
)
def test_what_it_cannot_serve(options: dict[str, Any], reason: str | None) -> None:
    unusual = case([(0, 1)], **options)
    assert TritonBackend.why_not(unusual.needs(unusual.params())) == reason


@pytest.mark.parametrize(
    ("capability", "kv_dtype", "reason"),
    [
        ((7, 5), "auto", "needs compute capability 8.0 or newer; cuda is older"),
        ((8, 0), "auto", None),
        ((8, 6), "fp8_e4m3", "needs compute capability 8.9 or newer to read fp8_e4m3 KV; use fp8_e5m2 on cuda"),
        ((8, 6), "fp8_e5m2", None),
        ((8, 9), "fp8_e4m3", None),
        ((9, 0), "int3", "cannot read int3 KV"),
    ],
)
def test_which_gpus_it_serves(
    capability: tuple[int, int], kv_dtype: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    few = Case([(0, 1)])
    needs = replace(few.needs(few.params()), device=torch.device("cuda"), kv_dtype=kv_dtype)
    assert TritonBackend.why_not(needs) == reason


def test_the_cpu_is_served_by_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = Case([(0, 1)])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert TritonBackend.why_not(on_cpu.needs(on_cpu.params())) == "runs on CUDA devices, and the model is on cpu"


# -- the kernels -------------------------------------------------------------------------------------------------------


class Quantised:
    """Two sequences of int8 codes with scales; those of unused slots are NaN."""

    def __init__(self, scale_dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.page_size, self.kv_lens, self.pages = 4, [37, 9], np.random.default_rng(0).permutation(16)[:13]
        self.kv_indptr = [0, 10, 13]
        shape = (16, self.page_size, 2)
        self.k, self.v = (torch.randint(-127, 128, (*shape, dim), generator=generator) for dim in (32, 16))
        self.k_scale, self.v_scale = (torch.rand(shape, generator=generator).div(64).to(scale_dtype) for _ in "kv")
        self.q = torch.randn(7, 6, 32, generator=generator)

    def kv(self) -> PagedKV:
        unused = torch.ones(self.k_scale.shape, dtype=torch.bool)
        for i, kv_len in enumerate(self.kv_lens):
            slots = np.arange(kv_len)
            unused[self.pages[self.kv_indptr[i] + slots // self.page_size], slots % self.page_size] = False
        scales = [scale.masked_fill(unused, math.nan).to(DEVICE) for scale in (self.k_scale, self.v_scale)]
        return PagedKV(self.k.to(DEVICE, torch.int8), self.v.to(DEVICE, torch.int8), *scales)

    def expected(self, qo_indptr: list[int]) -> Tensor:
        return paged_attention(
            self.q[: qo_indptr[-1]].double(),
            self.k * self.k_scale.double()[..., None],
            self.v * self.v_scale.double()[..., None],
            qo_indptr=qo_indptr,
            kv_indptr=self.kv_indptr,
            kv_indices=torch.from_numpy(self.pages),
            kv_lens=self.kv_lens,
            scale=0.2,
        )


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_decodes_of_codes(scale_dtype: torch.dtype) -> None:
    quantised = Quantised(scale_dtype)
    decodes = Decodes(int32([0, 1]), int32([0, 10]), int32(quantised.pages), int32([0, 0]), int32(quantised.kv_lens))
    q = quantised.q[:2].to(DEVICE)
    out = q.new_empty(2, 6, 16)
    triton_paged.decode(q, quantised.kv(), decodes, Rule(0.2), out)
    close(out, quantised.expected([0, 1, 2]))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_extends_of_codes(scale_dtype: torch.dtype) -> None:
    quantised = Quantised(scale_dtype)
    table = [(0, 4, 0, 0, 0, 37, 0, 0), (4, 3, 0, 10, 0, 9, 0, 0)]  # 12 and 9 rows of 16
    positions = torch.tensor([33, 34, 35, 36, 6, 7, 8], device=DEVICE)
    q = quantised.q.to(DEVICE)
    out = q.new_empty(7, 6, 16)
    tiles = Tiles(int32(table), 16, int32(quantised.pages), positions)
    triton_paged.attend(q, quantised.kv(), tiles, Rule(0.2), out)
    close(out, quantised.expected([0, 4, 7]))


@pytest.mark.parametrize("sinks", [False, True])
def test_partials_merge_into_the_whole(sinks: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    scores, values = (torch.randn(*shape, generator=generator) for shape in ((2, 11, 3), (2, 11, 3, 5)))
    sink = torch.randn(3, generator=generator) if sinks else None
    cuts = [0, 1, 4, 4, 11]  # one part holds nothing
    parts = [(scores[:, a:b], values[:, a:b]) for a, b in itertools.pairwise(cuts)]
    lses = torch.stack([s.logsumexp(1) for s, _ in parts], 1)  # [2, 4, 3]
    outs = torch.stack([(s.softmax(1)[..., None] * v).sum(1) for s, v in parts], 1)
    outs[:, 2] = math.nan
    indptr = int32([0, 4, 8])
    partials = Partials(outs.flatten(0, 1).to(DEVICE), lses.flatten(0, 1).to(DEVICE), indptr)
    out, lse = torch.full((4, 3, 5), math.nan, device=DEVICE), torch.full((4, 3), math.nan, device=DEVICE)
    triton_paged.merge(partials, int32([3, 1]), None if sink is None else sink.to(DEVICE), out, lse)
    denominators = scores if sink is None else torch.cat([scores, sink.expand(2, 1, 3)], 1)
    close(lse[[3, 1]], denominators.logsumexp(1))
    close(out[[3, 1]], ((scores - denominators.logsumexp(1, keepdim=True)).exp()[..., None] * values).sum(1))
    assert out[[0, 2]].isnan().all()


def test_merging_nothing_gives_zero() -> None:
    partials = Partials(torch.full((2, 1, 4), math.nan), torch.full((2, 1), -math.inf), int32([0, 2]))
    out, lse = torch.ones(1, 1, 4, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    triton_paged.merge(Partials(*(x.to(DEVICE) for x in partials)), int32([0]), None, out, lse)
    assert (out == 0).all()
    assert lse.item() == -math.inf


@pytest.mark.parametrize("shapes", ["few", pytest.param("all", marks=pytest.mark.stress)])
def test_the_kernels_compile_for_a_gpu(tmp_path: Path, shapes: str) -> None:
    """What the interpreter does not see: types, the blocks of real launches, and the compiler's own checks."""
    script = Path(__file__).parent / "compile_triton.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-P", "-W", "error", script, shapes], env=environment, check=True, timeout=300)
