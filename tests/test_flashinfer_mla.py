"""FlashInfer's latent attention against the reference: through a fake FlashInfer on the CPU, and the real one on a GPU.

The real one has run in none of these tests so far: those marked for a GPU are written against its source.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import fake_flashinfer_mla
from latent_cases import LatentCase
from radixkv.attention import flashinfer_mla_backend
from radixkv.attention.backend import AttentionNeeds, AttentionParams, GraphableBackend, GraphPlan, LayerAttention
from radixkv.attention.flashinfer_mla_backend import FlashInferLatentBackend
from radixkv.attention.metadata import AttentionMetadata, SequenceSpan, build_metadata
from radixkv.kernels.flashinfer_mla import load
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.latent_pool import LatentKV, LatentKVPool

HAS_FLASHINFER = torch.cuda.is_available() and importlib.util.find_spec("flashinfer") is not None
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FLASHINFER, reason="needs CUDA and flashinfer")]

SPANS = [(0, 1), (0, 13), (20, 21), (37, 38), (15, 33), (16, 17), (31, 32), (3, 40)]  # [first, last) of each sequence
DECODES = [(20, 21), (37, 38), (16, 17), (31, 32)]

MakeCase = Callable[..., LatentCase]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the cases run: the CPU with the fake, or CUDA with the real one."""
    if request.param == "cpu":
        monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer_mla)
        monkeypatch.setattr(flashinfer_mla_backend, "DEVICE_TYPE", "cpu")
        monkeypatch.setattr(flashinfer_mla_backend, "WORKSPACE_BYTES", 1 << 10)
    fake_flashinfer_mla.calls.clear()
    yield request.param
    fake_flashinfer_mla.calls.clear()


@pytest.fixture
def make_case(device: str) -> MakeCase:
    def make(spans: Any, **options: Any) -> LatentCase:
        defaults = {"latent_dim": 512, "rope_dim": 64, "dtype": torch.bfloat16, "num_q_heads": 16}
        return LatentCase(spans, device=device, **{**defaults, **options})

    return make


def make_backend(case: LatentCase, params: AttentionParams) -> FlashInferLatentBackend:
    needs = case.needs(params)
    assert FlashInferLatentBackend.why_not(needs) is None
    return FlashInferLatentBackend(case.latent_pool(), needs)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_q_heads", [1, 16])
def test_as_the_reference(make_case: MakeCase, page_size: int, dtype: torch.dtype, num_q_heads: int) -> None:
    case = make_case(SPANS, page_size=page_size, dtype=dtype, num_q_heads=num_q_heads)
    case.compare(make_backend(case, case.params()), case.params())
    assert fake_flashinfer_mla.calls in ([len(SPANS)], []), "all sequences in one call; none in the real one"


def test_another_scale(make_case: MakeCase) -> None:
    case = make_case(SPANS)
    params = replace(case.params(), scale=0.02)
    case.compare(make_backend(case, params), params)


def test_queries_in_any_memory_order(make_case: MakeCase) -> None:
    """A model hands over what it put together head by head."""
    case = make_case(SPANS)
    case.q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    case.compare(make_backend(case, case.params()), case.params())


def test_a_batch_after_another(make_case: MakeCase) -> None:
    case = make_case(SPANS)
    params = case.params()
    backend = make_backend(case, params)
    case.compare(backend, params)
    plan = backend.plan(some_sequences(case.metadata, [3, 0]))
    rows = case.metadata.qo_indptr[[3, 0]]
    found = plan.attend(0, case.q[rows], params)
    torch.testing.assert_close(found.double().cpu(), case.expected(params)[rows], rtol=0, atol=3e-2)


def test_layers_of_several_scales(make_case: MakeCase) -> None:
    case = make_case(SPANS)
    all_params = [replace(case.params(), scale=scale) for scale in (0.04, 0.02, 0.04)]
    layers = tuple(LayerAttention(case.layer, 16, params) for params in all_params)
    needs = replace(case.needs(all_params[0]), layers=layers)
    pool = LatentKVPool([case.layer] * 3, num_pages=case.num_pages, page_size=16, dtype=case.dtype, device=case.device)
    for k in pool.k:
        k.copy_(case.latent_pool().k[0])
    backend = FlashInferLatentBackend(pool, needs)
    plan = backend.plan(case.metadata)
    for layer, params in enumerate(all_params):
        found = plan.attend(layer, case.q, params)
        torch.testing.assert_close(found.double().cpu(), case.expected(params), rtol=0, atol=3e-2)
    assert backend.num_layers == 3
    with pytest.raises(AssertionError, match="layer 1 changed its scale"):
        plan.attend(1, case.q, all_params[0])


# -- one batch size, for graphs --------------------------------------------------------------------------------------


def some_sequences(metadata: AttentionMetadata, sequences: list[int]) -> AttentionMetadata:
    """A batch of some of the decodes."""
    spans = []
    for i in sequences:
        last = int(metadata.kv_lens[i])
        spans.append(SequenceSpan(last - 1, last, metadata.kv_indices[slice(*metadata.kv_indptr[i : i + 2])]))
    return build_metadata(spans, page_size=metadata.page_size, device=metadata.slots.device)


def graph_plan(backend: FlashInferLatentBackend, batch_size: int, max_pages: int) -> GraphPlan:
    return backend.graph_plan(torch.zeros(batch_size, dtype=torch.int64, device=backend.pool.device), max_pages)


def test_fixed_sizes_share_buffers(make_case: MakeCase) -> None:
    case = make_case([*DECODES, (5, 6), (47, 48)])
    params = case.params()
    expected = case.expected(params)
    backend = make_backend(case, params)
    assert isinstance(backend, GraphableBackend)
    assert not backend.pays_to_share(case.metadata)
    siblings = {size: graph_plan(backend, size, max_pages=20) for size in (4, 2, 1)}
    for first, last in ((0, 4), (0, 1), (2, 4), (1, 5), (4, 6), (5, 6), (2, 6)):
        sibling = siblings[last - first]
        sibling.update(some_sequences(case.metadata, list(range(first, last))))
        found = sibling.attend(0, case.q[first:last], params)
        torch.testing.assert_close(found.double().cpu(), expected[first:last], rtol=0, atol=3e-2)


def test_a_larger_size_leaves_the_smaller_ones_alone(make_case: MakeCase) -> None:
    case = make_case(DECODES)
    backend = make_backend(case, case.params())
    small, large = graph_plan(backend, 2, max_pages=20), graph_plan(backend, 4, max_pages=30)
    small.update(some_sequences(case.metadata, [0, 1]))
    large.update(case.metadata)
    for size, sibling in ((2, small), (4, large)):
        found = sibling.attend(0, case.q[:size], case.params())
        torch.testing.assert_close(found.double().cpu(), case.expected(case.params())[:size], rtol=0, atol=3e-2)


def test_fixed_takes_only_its_own_batch(make_case: MakeCase) -> None:
    case = make_case(DECODES)
    fixed = graph_plan(make_backend(case, case.params()), 2, max_pages=20)
    with pytest.raises(AssertionError, match="captured"):
        fixed.update(case.metadata)


def test_fixed_writes_to_the_same_pool(make_case: MakeCase) -> None:
    case = make_case(DECODES)
    backend = make_backend(case, case.params())
    slots = case.metadata.slots
    k = torch.ones(len(slots), 1, 576, dtype=case.dtype, device=case.device)
    backend.graph_plan(slots, max_pages=20).store_kv(0, k, k[..., :512])
    assert bool((backend.pool.k[0].flatten(0, 1)[slots] == 1).all())


# -- what it cannot do -----------------------------------------------------------------------------------------------


def needs_of(device: str, kv: LayerKV, dtype: torch.dtype = torch.bfloat16, **params: Any) -> AttentionNeeds:
    layer = LayerAttention(kv, 16, AttentionParams(scale=0.1, **params))
    return AttentionNeeds((layer,), 16, dtype, torch.device(device))


KNOWN = LatentKV.of(latent_dim=512, rope_dim=64)


@pytest.mark.parametrize(
    ("kv", "options", "reason"),
    [
        (KNOWN, {"dtype": torch.float32}, "reads float16 and bfloat16 latents, and the model's are torch.float32"),
        (LayerKV(8, 128, 128), {}, "reads latents (MLA), not keys and values of their own, as layer 0 asks"),
        (KNOWN, {"sliding_window": 7}, "has no limits of sight on latents"),
        (LatentKV.of(latent_dim=256, rope_dim=32), {}, "knows latents of 512 with rotary keys of 64, not LatentKV("),
    ],
)
def test_why_not(device: str, kv: LayerKV, options: dict[str, Any], reason: str) -> None:
    found = FlashInferLatentBackend.why_not(needs_of(device, kv, **options))
    assert found is not None
    assert found.startswith(reason)
    assert FlashInferLatentBackend.why_not(needs_of(device, KNOWN)) is None


def test_it_runs_on_cuda() -> None:
    assert FlashInferLatentBackend.why_not(needs_of("cpu", KNOWN)) == "runs on CUDA, and the model is on cpu"


def test_without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(flashinfer_mla_backend, "DEVICE_TYPE", "cpu")
    reason = FlashInferLatentBackend.why_not(needs_of("cpu", KNOWN))
    assert reason is not None
    assert "pip install radixkv[flashinfer]" in reason


@pytest.mark.parametrize("name", [pytest.param(name, marks=ON_GPU) for name in ("__init__", "plan", "run")])
def test_the_fake_has_the_real_signatures(name: str) -> None:
    """Each parameter of the fake is one of the real one, in the same place."""
    wrappers = fake_flashinfer_mla.BatchMLAPagedAttentionWrapper, load().BatchMLAPagedAttentionWrapper
    fake, real = (list(inspect.signature(getattr(wrapper, name)).parameters) for wrapper in wrappers)
    assert fake == real[: len(fake)]
