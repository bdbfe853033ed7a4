"""FlashInfer over KV in fp4 against the reference: through a fake FlashInfer on the CPU, and the real one on a GPU.

The real one has run in none of these tests so far: the fake is written from its source. On a GPU the tests need one
compiled kernel, of heads of 128 in bfloat16; those that would need more are for the fake alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

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
    some_decodes,
    use_fake,
)
from prompts import random_prompts
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention import flashinfer_backend
from radixkv.attention.backend import AttentionNeeds, choose_backend, register_backend
from radixkv.attention.flashinfer_backend import FlashInferBackend
from radixkv.attention.flashinfer_choice import why_not_layer
from radixkv.attention.torch_backend import TorchBackend
from radixkv.errors import UnsupportedBackendError
from radixkv.kernels.flashinfer_paged import KVPages, PagedDecode, load
from radixkv.memory.fp4_codes import GLOBAL_SCALE
from radixkv.memory.page_bytes import PageBytes
from tiny_models import make_model, with_common

SHARED = {(2, 3, 5, 6): 16, (3, 6): 32}
PREFIXED = [(40, 41), (0, 13), *[(40 + i, 41 + i) for i in range(5)]]


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
        defaults = {"head_dim": 128, "dtype": torch.bfloat16, "kv_dtype": "fp4"}
        return Case(spans, device=device, **{**defaults, **options})

    return make


@pytest.fixture
def on_fake(device: str) -> None:
    if device != "cpu":
        pytest.skip("would compile one more kernel, or asks the fake")


# -- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("spans", [SPANS, DECODES, [(0, 13), (15, 33)]], ids=["mixed", "decodes", "extends"])
def test_decodes_and_extends(make_case: MakeCase, page_size: int, spans: Any) -> None:
    case = make_case(spans, page_size=page_size)
    check(case, make_backend(case, case.params()), case.params())


@pytest.mark.parametrize("options", [{"sliding_window": 7}, {"softcap": 3.0}, {"sliding_window": 11, "softcap": 3.0}])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("on_fake")
def test_options_and_head_sizes(make_case: MakeCase, options: dict[str, Any], head_dim: int, dtype: Any) -> None:
    case = make_case(SPANS, head_dim=head_dim, dtype=dtype)
    params = case.params(**options)
    check(case, make_backend(case, params), params)


@pytest.mark.parametrize("group", [1, 2, 5, 7, 8])
def test_every_group_is_for_tensor_cores(make_case: MakeCase, group: int) -> None:
    case = make_case(SPANS[2:6], num_q_heads=2 * group)
    check(case, make_backend(case, case.params()), case.params())


@pytest.mark.parametrize("scale", [2.0**-12, 1.0, 100.0])
def test_small_and_large_values(make_case: MakeCase, scale: float) -> None:
    """Scales of blocks that are subnormal, ordinary and saturated; what is compared is relative to V."""
    case = make_case(SPANS)
    case.k, case.v = case.k / 4, case.v * scale
    found = make_backend(case, case.params()).plan(case.metadata).attend(0, case.q, case.params())
    expected = case.expected(case.params())
    torch.testing.assert_close(found.double().cpu(), expected, rtol=0, atol=3e-2 * max(scale, 2.0**-12))


def test_shared_prefixes_of_two_levels(make_case: MakeCase, device: str) -> None:
    case = make_case(PREFIXED, shared=SHARED)
    check(case, make_backend(case, case.params(), break_even=ALWAYS), case.params())
    assert fake_flashinfer.calls in (["causal prefill", "decode", "prefill", "prefill"], []), "none in the real one"


def test_graph_plans(make_case: MakeCase) -> None:
    case = make_case([*DECODES, (5, 6), (47, 48)])
    params = case.params()
    expected = case.expected(params)
    backend = make_backend(case, params)
    plans = {size: graph_plan(backend, size, max_pages=20) for size in (4, 2)}
    for first, last in ((0, 4), (2, 4), (4, 6), (1, 5)):
        plan = plans[last - first]
        plan.update(some_decodes(case.metadata, first, last))
        found = plan.attend(0, case.q[first:last], params)
        torch.testing.assert_close(found.double().cpu(), expected[first:last], rtol=0, atol=3e-2)


def test_what_is_stored_is_read(make_case: MakeCase) -> None:
    case = make_case(SPANS)
    backend = make_backend(case, case.params())
    slots = case.metadata.slots
    backend.pool.write(0, slots, *(torch.full_like(x[slots.cpu()], math.nan).to(case.device) for x in (case.k, case.v)))
    k, v = (x[slots.cpu()].to(case.device) for x in (case.k, case.v))
    backend.plan(case.metadata).store_kv(0, k, v)
    check(case, backend, case.params())


def test_a_vector_that_is_not_finite_is_nan_to_its_readers_alone(make_case: MakeCase) -> None:
    case = make_case(DECODES)
    last_page = int(case.metadata.kv_indices[case.metadata.kv_indptr[2] - 1])
    case.v[last_page * case.page_size, 0, 5] = math.inf
    params = case.params()
    found = make_backend(case, params).plan(case.metadata).attend(0, case.q, params)
    assert found.isnan().any(-1).tolist() == [[False] * 4, [True, True, False, False], [False] * 4, [False] * 4]
    assert found[1, 0].isnan().all()
    case.v[last_page * case.page_size, 0, 5] = 0
    others = [0, 2, 3]
    torch.testing.assert_close(found[others].double().cpu(), case.expected(params)[others], rtol=0, atol=3e-2)


# -- what FlashInfer is given ----------------------------------------------------------------------------------------


def test_every_code_is_what_flashinfer_takes_it_for() -> None:
    """By the definition of its kernels: a pool of neighbours, all codes by all scales."""
    codes = np.arange(16)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.from_numpy(np.where(codes < 8, 1, -1) * magnitudes[codes % 8]).float()
    scales = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    vectors = (values * scales.float()[:, None] * GLOBAL_SCALE)[:, None]  # [126, 1, 16]
    case = Case([(0, 126)], num_q_heads=1, num_kv_heads=1, head_dim=16, kv_dtype="fp4")
    pool = case.pool("pairs")
    pool.write(0, case.metadata.slots, vectors, vectors)
    block_scales = pool.v_scales[0].view(torch.float8_e4m3fn)
    read = fake_flashinfer.nvfp4_values(pool.v[0], block_scales) * GLOBAL_SCALE
    assert torch.equal(read.flatten(0, 1)[case.metadata.slots], vectors)
    pages = torch.arange(case.num_pages)
    assert torch.equal(pool.gather(0, pages)[1][case.metadata.slots], vectors)
    assert pool.v[0].flatten(0, 1)[case.metadata.slots, 0, :2].tolist() == [[0x10, 0x32]] * 126


@pytest.mark.usefixtures("on_fake")
def test_scales_must_come_with_the_codes(make_case: MakeCase) -> None:
    case = make_case(DECODES)
    backend = make_backend(case, case.params())
    kind, pages = backend.layer(0)
    lists, workspace = _lists(backend, case), torch.zeros(16, dtype=torch.uint8)
    decode = PagedDecode(kind, workspace)
    decode.plan(lists)
    with pytest.raises(AssertionError, match="pages of another kind"):
        decode.run(case.q, KVPages(pages.k, pages.v), torch.empty_like(case.q))
    plain = PagedDecode(replace(kind, global_scale=None), workspace)
    with pytest.raises(AssertionError, match="CUDA cores take no scales"):
        plain.plan(lists)
    wrapper = load().BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
    wrapper.plan(
        *map(torch.from_numpy, (lists.indptr, lists.indices, lists.last_page_len)), *kind.sizes, **kind.options
    )
    with pytest.raises(ValueError, match="kv_cache_sf must be provided for NVFP4 KV cache"):
        wrapper.run(case.q, (pages.k, pages.v))


def _lists(backend: FlashInferBackend, case: Case) -> Any:
    starts = np.zeros_like(case.metadata.kv_lens)
    return flashinfer_backend.page_lists(case.metadata, np.arange(case.metadata.num_sequences), starts)


def test_pages_of_the_two_packings_are_told_apart() -> None:
    """The same numbers, other bytes, and another layout for the stores below the pool."""
    case = Case(SPANS, kv_dtype="fp4")
    halves, pairs = case.pool("nhd"), case.pool("pairs")
    pages = torch.arange(case.num_pages)
    for found, expected in zip(pairs.gather(0, pages), halves.gather(0, pages), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(pairs.k[0], halves.k[0])
    assert torch.equal(pairs.k_scales[0], halves.k_scales[0])
    assert PageBytes(pairs).layout == "pairs: 2x(16+16)"
    assert PageBytes(halves).layout == "nhd: 2x(16+16)"


def test_pages_on_the_disk_are_for_the_same_packing(device: str, tmp_path: Path) -> None:
    """Full pages and one that is full in part; those of another backend's packing are those of another store."""
    prompt = random_prompts(1, [37], shared=0)[0]
    outputs = []
    for backend in ("flashinfer", "flashinfer", "torch"):
        config = EngineConfig(
            attention_backend=backend,
            kv_cache_dtype="fp4",
            kv_cache_tokens=256,
            page_size=16,
            disk_cache=str(tmp_path),
            disk_cache_gb=0.01,
            warm_start_share=0,
        )
        model = make_model(LlamaConfig(**with_common(head_dim=128))).to(device, torch.bfloat16)
        with Engine(model, config=config) as engine:
            (output,) = engine.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True))
        outputs.append(output)
    assert [output.cached_tokens for output in outputs] == [0, 36, 0]
    assert outputs[0].token_ids == outputs[1].token_ids


# -- where it is not for fp4 -----------------------------------------------------------------------------------------


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> AttentionNeeds:
    """Of a model on a GPU of compute capability 9.0, with the fake installed."""
    use_fake(monkeypatch)
    monkeypatch.setattr(flashinfer_backend, "DEVICE_TYPE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    case = Case([(0, 1)], head_dim=64, dtype=torch.bfloat16, kv_dtype="fp4")
    return replace(case.needs(case.params()), device=torch.device("cuda"))


def test_why_not_a_layer(needs: AttentionNeeds) -> None:
    """Told before anything is loaded, so that it can be asked where there is no GPU."""
    (layer,) = needs.layers
    for changes, reason in (
        ({"chunk_size": 16}, "has no chunked attention"),
        ({"sinks": torch.zeros(4)}, "has no attention sinks here"),
        ({"sink_tokens": 2}, "has no attention sinks here"),
        ({"key_bias": torch.zeros(4)}, "has no biases of keys (ALiBi) here"),
    ):
        found = why_not_layer(replace(layer, params=replace(layer.params, **changes)))
        assert found == reason
    assert why_not_layer(layer) is None


def test_why_not(needs: AttentionNeeds, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FlashInferBackend.why_not(needs) is None
    small = Case([(0, 1)], head_dim=32, dtype=torch.bfloat16, kv_dtype="fp4")
    reason = FlashInferBackend.why_not(replace(needs, layers=small.needs(small.params()).layers))
    assert reason is not None
    assert "knows heads of 64, 128, 256" in reason
    for capability, said in (
        ((7, 5), "needs compute capability 8.0"),
        ((10, 0), None),
        ((10, 7), "for compute capability 10.7"),
        ((12, 1), "for compute capability 12.1"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        reason = FlashInferBackend.why_not(needs)
        assert (said is None) == (reason is None)
        assert said is None or said in str(reason)
        assert capability < (8, 0) or FlashInferBackend.why_not(replace(needs, kv_dtype="fp8_e4m3")) is None


def test_fa3_is_refused(needs: AttentionNeeds) -> None:
    case = Case([(0, 1)], head_dim=64, dtype=torch.bfloat16, kv_dtype="fp4")
    with pytest.raises(UnsupportedBackendError, match="fa3 reads no fp4 KV; take fa2 or auto"):
        FlashInferBackend(case.pool("pairs"), needs, prefill="fa3")


def test_auto_takes_another_for_fp4_where_there_is_one(needs: AttentionNeeds) -> None:
    assert choose_backend("flashinfer", needs) is FlashInferBackend
    assert choose_backend("auto", replace(needs, kv_dtype="fp8_e4m3")) is FlashInferBackend
    assert choose_backend("auto", needs) is not FlashInferBackend


def test_auto_takes_what_is_left_to_others_if_there_are_none(
    needs: AttentionNeeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("radixkv.attention.backend._REGISTRY", {})
    register_backend(FlashInferBackend)
    assert choose_backend("auto", needs) is FlashInferBackend
    register_backend(TorchBackend)
    assert choose_backend("auto", needs) is TorchBackend


def test_graphs_and_sharing_are_weighed_by_the_bytes_of_the_codes(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 tokens of 4 sequences: 192 reads of 2 heads of 128 are spared, 144 bytes each."""
    case = make_case([(70, 71) for _ in range(4)], shared={(0, 1, 2, 3): 64})
    backend = make_backend(case, case.params(), break_even=ALWAYS)
    for graph_bytes, pays in ((192 * 288 - 1, True), (192 * 288, False)):
        monkeypatch.setattr(flashinfer_backend, "GRAPH_BYTES", graph_bytes)
        assert backend.pays_to_share(case.metadata) == pays
    compare(case, backend.plan(case.metadata).attend(0, case.q, case.params()), case.params())
