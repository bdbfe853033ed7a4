"""The FlashInfer backend against the reference: through a fake FlashInfer on the CPU, and the real one on a GPU."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import fake_flashinfer
from attention_cases import Case
from flashinfer_cases import (
    ALWAYS,
    DECODES,
    ON_GPU,
    SPANS,
    MakeCase,
    check,
    compare,
    graph_plan,
    make_backend,
    on_gpu,
    some_decodes,
    use_fake,
)
from radixkv.attention import flashinfer_backend
from radixkv.attention.backend import AttentionNeeds, AttentionParams, LayerAttention
from radixkv.attention.flashinfer_backend import FlashInferBackend
from radixkv.attention.flashinfer_plan import first_tokens, page_lists
from radixkv.attention.metadata import SequenceSpan, build_metadata
from radixkv.engine.gpu_sampling import sampling_kernels
from radixkv.kernels.flashinfer_paged import load
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.kv_shape import LayerKV


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the cases run: the CPU with the fake, or CUDA with the real one."""
    if request.param == "cpu":
        use_fake(monkeypatch)
    yield request.param
    fake_flashinfer.calls.clear()


@pytest.fixture
def make_case(device: str) -> MakeCase:
    def make(spans: Any, **options: Any) -> Case:
        return Case(spans, device=device, **{"head_dim": 64, "dtype": torch.float16, **options})

    return make


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 7}, {"softcap": 3.0}, {"sliding_window": 11, "softcap": 3.0}]
)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_options(make_case: MakeCase, options: dict[str, Any], page_size: int, dtype: torch.dtype) -> None:
    case = make_case(SPANS, page_size=page_size, dtype=dtype)
    params = case.params(**options)
    check(case, make_backend(case, params), params)


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("spans", [SPANS, DECODES])
def test_floats_of_8_bits_are_read_as_they_are(make_case: MakeCase, kv_dtype: str, spans: Any) -> None:
    case = make_case(spans, kv_dtype=kv_dtype, dtype=torch.bfloat16)
    check(case, make_backend(case, case.params()), case.params())


def test_codes_with_scales_are_not_for_it(make_case: MakeCase) -> None:
    case = make_case(SPANS, kv_dtype="int8")
    reason = "reads KV in the model's dtype or as fp8_e4m3, fp8_e5m2, fp4, not as int8"
    assert FlashInferBackend.why_not(case.needs(case.params())) == reason


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_groups_and_head_sizes(make_case: MakeCase, group: int, head_dim: int) -> None:
    case = make_case(SPANS[2:6], num_q_heads=2 * group, head_dim=head_dim)
    check(case, make_backend(case, case.params()), case.params())


@pytest.mark.parametrize("spans", [DECODES, [(0, 13), (15, 33)], [(20, 21), (16, 17), (0, 13), (15, 33)]])
def test_batches_of_one_kind_and_decodes_first(make_case: MakeCase, spans: Any) -> None:
    case = make_case(spans)
    check(case, make_backend(case, case.params()), case.params())


def test_a_batch_after_another(make_case: MakeCase) -> None:
    case = make_case(SPANS, shared={(2, 3, 6): 16})
    backend = make_backend(case, case.params(), break_even=ALWAYS)
    check(case, backend, case.params())
    metadata, q = case.metadata, case.q
    table = [metadata.kv_indices[start:] for start in metadata.kv_indptr[[3, 0]]]
    alone = build_metadata(
        [SequenceSpan(37, 38, table[0]), SequenceSpan(0, 1, table[1])], page_size=16, device=case.device
    )
    plan = backend.plan(alone)
    rows = metadata.qo_indptr[[3, 0]]
    found = plan.attend(0, q[rows], case.params())
    torch.testing.assert_close(found.double().cpu(), case.expected(case.params())[rows], rtol=0, atol=4e-3)


def test_another_scale(make_case: MakeCase) -> None:
    case = make_case(SPANS, shared=SHARED["two groups"])
    params = replace(case.params(), scale=0.05)
    check(case, make_backend(case, params, break_even=ALWAYS), params)


@pytest.mark.parametrize("spans", [SPANS, DECODES])
def test_queries_in_any_memory_order(make_case: MakeCase, spans: Any) -> None:
    """A model hands over a transposed view."""
    case = make_case(spans)
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not case.q.is_contiguous()
    check(case, make_backend(case, case.params()), case.params())


def test_what_lies_before_a_window_is_not_read(make_case: MakeCase) -> None:
    case = make_case([(60, 61), (40, 50), (90, 91)], page_size=4)
    params = case.params(sliding_window=9)
    backend = make_backend(case, params)
    for i, (first, _) in enumerate([(60, 61), (40, 50), (90, 91)]):
        start = int(case.metadata.kv_indptr[i])
        before = torch.from_numpy(case.metadata.kv_indices[start : start + (first - 8) // 4]).long()
        backend.pool.k[0][before.to(case.device)] = math.nan
        backend.pool.v[0][before.to(case.device)] = math.nan
    check(case, backend, params)


def test_write_then_run(make_case: MakeCase) -> None:
    case = make_case(SPANS)
    backend = make_backend(case, case.params())
    slots = case.metadata.slots
    k, v = (x[slots.cpu()].to(case.device) for x in (case.k, case.v))
    for pages in (backend.pool.k[0], backend.pool.v[0]):
        pages.flatten(0, 1)[slots] = math.nan
    backend.plan(case.metadata).store_kv(0, k, v)
    check(case, backend, case.params())


# -- prefixes that decodes share -------------------------------------------------------------------------------------

SHARED: dict[str, dict[tuple[int, ...], int]] = {
    "all": {(2, 3, 5, 6): 16},
    "some, apart": {(2, 6): 16},
    "two groups": {(2, 5): 16, (3, 6): 32},
    "nested": {(2, 3, 5, 6): 16, (3, 6): 32},
}


MIXED = [(0, 1), (0, 13), (40, 41), (57, 58), (35, 53), (36, 37), (51, 52), (3, 40)]


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
@pytest.mark.parametrize("spans", [MIXED, [(40 + i, 41 + i) for i in range(8)]], ids=["mixed", "decodes"])
def test_shared_prefixes(make_case: MakeCase, shared: str, options: dict[str, Any], spans: Any) -> None:
    case = make_case(spans, shared=SHARED[shared])
    params = case.params(**options)
    check(case, make_backend(case, params, break_even=ALWAYS), params)


@pytest.mark.parametrize(("shared", "levels"), [("all", 1), ("two groups", 1), ("nested", 2)])
def test_each_level_is_one_call(make_case: MakeCase, device: str, shared: str, levels: int) -> None:
    if device != "cpu":
        pytest.skip("counts calls of the fake")
    spans = [(40, 41) for _ in SPANS]
    case = make_case(spans, shared=SHARED[shared])
    check(case, make_backend(case, case.params(), break_even=ALWAYS), case.params())
    assert fake_flashinfer.calls == ["decode", *["prefill"] * levels]


def test_layers_with_a_window_share_nothing(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(40, 41) for _ in SPANS], shared=SHARED["all"])
    params = case.params(sliding_window=30)
    backend = make_backend(case, params, break_even=ALWAYS)
    check(case, backend, params)
    assert "prefill" not in fake_flashinfer.calls
    monkeypatch.setattr(flashinfer_backend, "GRAPH_BYTES", 0)
    assert not backend.pays_to_share(case.metadata)


def test_where_sharing_pays(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens of 4 sequences: 192 reads of 2 heads of 64 are spared, 512 bytes each."""
    case = make_case([(70, 71) for _ in range(4)], shared={(0, 1, 2, 3): 64})
    monkeypatch.setattr(flashinfer_backend, "MIN_SHARED_TOKENS", 64)
    for level_bytes, calls in ((192 * 512, ["decode", "prefill"]), (193 * 512, ["decode"])):
        monkeypatch.setattr(flashinfer_backend, "LEVEL_BYTES", level_bytes)
        fake_flashinfer.calls.clear()
        check(case, make_backend(case, case.params()), case.params())
        assert fake_flashinfer.calls in (calls, []), "none in the real one"


def test_where_sharing_pays_more_than_a_graph(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(70, 71) for _ in range(4)], shared={(0, 1, 2, 3): 64})
    params = case.params()
    for graph_bytes, pays in ((192 * 512 - 1, True), (192 * 512, False)):
        monkeypatch.setattr(flashinfer_backend, "GRAPH_BYTES", graph_bytes)
        assert make_backend(case, params, break_even=ALWAYS).pays_to_share(case.metadata) == pays
    assert not make_backend(case, params).pays_to_share(case.metadata)


# -- layers that differ ----------------------------------------------------------------------------------------------


def test_layers_of_several_kinds(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gemma and gpt-oss have them: every other layer with a window, in one pool."""
    case = make_case(SPANS, shared=SHARED["two groups"])
    all_params = [case.params(sliding_window=9), case.params(softcap=3.0), case.params(sliding_window=9)]
    needs = replace(
        case.needs(all_params[0]), layers=tuple(LayerAttention(case.layer, 4, params) for params in all_params)
    )
    pool = KVPool([case.layer] * 3, num_pages=case.num_pages, page_size=16, dtype=torch.float16, device=case.device)
    filled = case.pool("nhd")
    for layer in range(3):
        pool.k[layer].copy_(filled.k[0])
        pool.v[layer].copy_(filled.v[0])
    backend = FlashInferBackend(pool, needs, break_even=ALWAYS)
    plan = backend.plan(case.metadata)
    for layer, params in enumerate(all_params):
        compare(case, plan.attend(layer, case.q, params), params)
    assert backend.num_layers == 3
    for graph_bytes, pays in ((5461, True), (5462, False)):  # 32 tokens of 512 bytes, in one layer of three
        monkeypatch.setattr(flashinfer_backend, "GRAPH_BYTES", graph_bytes)
        assert backend.pays_to_share(case.metadata) == pays


# -- one batch size, for graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sliding_window": 7, "softcap": 3.0}])
@pytest.mark.parametrize("num_q_heads", [4, 14])
def test_fixed_sizes_share_buffers(make_case: MakeCase, options: dict[str, Any], num_q_heads: int) -> None:
    case = make_case([*DECODES, (5, 6), (47, 48)], num_q_heads=num_q_heads)
    params = case.params(**options)
    expected = case.expected(params)
    backend = make_backend(case, params)
    siblings = {size: graph_plan(backend, size, max_pages=20) for size in (4, 2, 1)}
    for first, last in ((0, 4), (0, 1), (2, 4), (1, 5), (4, 6), (5, 6), (2, 6)):
        sibling = siblings[last - first]
        sibling.update(some_decodes(case.metadata, first, last))
        found = sibling.attend(0, case.q[first:last], params)
        torch.testing.assert_close(found.double().cpu(), expected[first:last], rtol=0, atol=4e-3)
    assert fake_flashinfer.calls.count("fast plan") in (4, 0), "none in the real one"


def test_a_larger_size_leaves_the_smaller_ones_alone(make_case: MakeCase) -> None:
    case = make_case(DECODES)
    backend = make_backend(case, case.params())
    small, large = graph_plan(backend, 2, max_pages=20), graph_plan(backend, 4, max_pages=30)
    small.update(some_decodes(case.metadata, 0, 2))
    large.update(case.metadata)
    for size, sibling in ((2, small), (4, large)):
        found = sibling.attend(0, case.q[:size], case.params())
        torch.testing.assert_close(found.double().cpu(), case.expected(case.params())[:size], rtol=0, atol=4e-3)


def test_fixed_takes_only_its_own_batch(make_case: MakeCase) -> None:
    case = make_case(DECODES)
    fixed = graph_plan(make_backend(case, case.params()), 2, max_pages=20)
    with pytest.raises(AssertionError, match="captured"):
        fixed.update(case.metadata)
    with pytest.raises(AssertionError, match="captured"):
        fixed.update(make_case([(0, 1), (3, 5)]).metadata)


def test_fixed_writes_to_the_same_pool(make_case: MakeCase) -> None:
    case = make_case(DECODES)
    backend = make_backend(case, case.params())
    slots = case.metadata.slots
    k = torch.ones(len(slots), 2, 64, dtype=torch.float16, device=case.device)
    backend.graph_plan(slots, max_pages=20).store_kv(0, k, k)
    assert bool((backend.pool.v[0].flatten(0, 1)[slots] == 1).all())


# -- what it cannot do -----------------------------------------------------------------------------------------------


def needs_of(device: str, **layer: Any) -> AttentionNeeds:
    kv = LayerKV(layer.pop("num_kv_heads", 2), layer.pop("head_dim", 64), layer.pop("v_head_dim", 64))
    dtype = layer.pop("dtype", torch.float16)
    params = AttentionParams(scale=0.125, **layer)
    return AttentionNeeds((LayerAttention(kv, 4, params),), 16, dtype, torch.device(device))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"dtype": torch.float32}, "reads float16 and bfloat16 KV, and the model's is torch.float32"),
        ({"head_dim": 80, "v_head_dim": 80}, "knows heads of 64, 128, 256 with values like the keys, not 80 and 80"),
        ({"head_dim": 128}, "not 128 and 64, as layer 0 asks"),
        ({"num_kv_heads": 3}, "cannot share 3 KV heads among 4 query heads"),
        ({"chunk_size": 16}, "has no chunked attention"),
        ({"sinks": torch.zeros(4)}, "has no attention sinks here"),
        ({"key_bias": torch.zeros(4)}, "has no biases of keys"),
    ],
)
def test_why_not(device: str, layer: dict[str, Any], reason: str) -> None:
    found = FlashInferBackend.why_not(needs_of(device, **layer))
    assert found is not None
    assert reason in found
    assert FlashInferBackend.why_not(needs_of(device)) is None


def test_it_runs_on_cuda() -> None:
    assert FlashInferBackend.why_not(needs_of("cpu")) == "runs on CUDA, and the model is on cpu"


def test_without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(flashinfer_backend, "DEVICE_TYPE", "cpu")
    reason = FlashInferBackend.why_not(needs_of("cpu"))
    assert reason is not None
    assert "pip install radixkv[flashinfer]" in reason
    assert sampling_kernels() is None


@on_gpu
def test_the_fake_has_the_real_signatures() -> None:
    """Each parameter of the fake is one of the real one, with the same default, and in the same place if positional."""
    real = load()
    decode, prefill = (
        (getattr(module, name) for module in (fake_flashinfer, real))
        for name in ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper")
    )
    (fake_decode, real_decode), (fake_prefill, real_prefill) = decode, prefill
    pairs = [(fake_decode.__init__, real_decode.__init__), (fake_decode.plan, real_decode._plan_impl)]
    pairs += [(fake_flashinfer.fast_decode_plan, real.fast_decode_plan)]
    pairs += [(fake_decode.run, real_decode.run), (fake_prefill.__init__, real_prefill.__init__)]
    pairs += [(fake_prefill.plan, real_prefill.plan), (fake_prefill.run, real_prefill.run)]
    names = ["merge_state_in_place", "softmax", "top_k_renorm_probs", "top_p_renorm_probs", "sampling_from_probs"]
    names += ["top_p_sampling_from_probs", "min_p_sampling_from_probs", "top_k_top_p_sampling_from_probs"]
    pairs += [(getattr(fake_flashinfer, name), getattr(real, name)) for name in names]
    for fake, original in pairs:
        ours, theirs = (inspect.signature(function).parameters for function in (fake, original))
        positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == list(theirs)[: len(positional)], fake
        assert set(ours) <= set(theirs), fake


@on_gpu
@pytest.mark.parametrize("prefill", ["fa2", "fa3", "auto"])
def test_prefill_implementations(prefill: Any) -> None:
    if prefill == "fa3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("fa3 is for Hopper")
    spans = [(first + 1000, last + 1000) for first, last in SPANS]
    case = Case(spans, head_dim=128, dtype=torch.bfloat16, device="cuda")
    check(case, make_backend(case, case.params(), prefill=prefill), case.params())


def test_lists_of_pages_are_int32(make_case: MakeCase) -> None:
    """FlashInfer reads them as such, whatever they are."""
    case = make_case(SPANS)
    params = case.params(sliding_window=7)
    starts = first_tokens(case.metadata, 6)
    lists = page_lists(case.metadata, np.array([1, 3, 7]), starts)
    assert {array.dtype for array in lists} == {np.dtype(np.int32)}
    check(case, make_backend(case, params), params)
