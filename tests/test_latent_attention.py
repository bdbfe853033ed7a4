"""Latent attention (MLA): the same logits and tokens as the unmodified model, over pages that hold latents alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

from latent_cases import LatentCase
from oracles import oracle_of
from prompts import random_prompts
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention import latent_backend
from radixkv.attention.backend import AttentionNeeds, AttentionParams, LayerAttention
from radixkv.attention.key_bias import KeyBias
from radixkv.attention.latent_backend import LatentBackend
from radixkv.attention.metadata import SequenceSpan, build_metadata
from radixkv.attention.reference_backend import ReferenceBackend
from radixkv.attention.shared_prefix import NEVER, BreakEven
from radixkv.errors import UnsupportedBackendError, UnsupportedModelError
from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.latent_pool import LatentKV, LatentKVPool
from radixkv.memory.sizing import kv_shape_from_config
from radixkv.models import probe
from radixkv.models.latent_attention import LatentAttention
from radixkv.models.paged_attention import PagedContext, flattened_forward
from radixkv.models.probe import plug_in_paged_attention
from stress_cases import some_of
from tiny_models import LATENT, make_model, served_model, tiny_model

SPANS = [(0, 1), (0, 13), (20, 21), (37, 38), (15, 33), (16, 17), (31, 32), (3, 40)]  # [first, last) of each sequence
NESTED = {(0, 1, 2, 3, 4, 5): 32, (0, 1, 2): 64, (3, 4): 48}
ALWAYS = BreakEven(min_sequences=2, min_tokens=1)
PAGE = 4
NEW_TOKENS = 6
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


# -- the backend -----------------------------------------------------------------------------------------------------


def check(case: LatentCase, break_even: BreakEven = ALWAYS) -> None:
    params = case.params()
    case.compare(LatentBackend(case.latent_pool(), case.needs(params), break_even=break_even), params)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_backend_as_the_reference(page_size: int, dtype: torch.dtype) -> None:
    check(LatentCase(SPANS, page_size=page_size, dtype=dtype))


@pytest.mark.parametrize(("latent_dim", "rope_dim", "num_q_heads"), [(64, 64, 1), (16, 0, 3), (48, 16, 16)])
def test_backend_with_other_sizes(latent_dim: int, rope_dim: int, num_q_heads: int) -> None:
    check(LatentCase(SPANS, latent_dim=latent_dim, rope_dim=rope_dim, num_q_heads=num_q_heads))


@pytest.mark.parametrize("break_even", [ALWAYS, NEVER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_prefixes_count_the_same(break_even: BreakEven, dtype: torch.dtype) -> None:
    spans = [*((last - 1, last) for last in (65, 70, 99, 49, 50, 33, 12)), (20, 45)]
    check(LatentCase(spans, shared=NESTED, dtype=dtype), break_even)


def test_latents_are_not_coded() -> None:
    settings = EngineConfig(page_size=4, kv_cache_tokens=200, kv_cache_dtype="int8")
    with pytest.raises(UnsupportedBackendError, match="no attention backend can serve this model with these settings"):
        Engine(tiny_model("deepseek_v3"), config=settings)


def test_long_ones_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_backend, "BLOCK_SCORES", 200)  # of 4 heads: a row of an extend, a page of a shared part
    monkeypatch.setattr(latent_backend, "GATHERED_TOKENS", 70)
    spans = [*((last - 1, last) for last in (65, 70, 99, 49, 50, 33, 12)), (20, 45), (0, 9)]
    check(LatentCase(spans, shared=NESTED))


def test_a_shared_prefix_is_gathered_once() -> None:
    case = LatentCase([(n - 1, n) for n in (65, 66, 67)], shared={(0, 1, 2): 64})
    backend = LatentBackend(case.latent_pool(), case.needs(case.params()), break_even=ALWAYS)
    plan = backend.plan(case.metadata)
    (shared,), (decodes,) = plan.shared, plan.decodes
    assert (len(shared.places), len(shared.pages)) == (3, 4)
    assert decodes.slots.shape == (3, 3), "of their own the longest has three"


def test_the_pool_holds_one_vector_a_token() -> None:
    layers = [LatentKV.of(latent_dim=6, rope_dim=2), LatentKV.of(latent_dim=4, rope_dim=0)]
    pool = LatentKVPool(layers, num_pages=3, page_size=2, dtype=torch.float32)
    assert pool.bytes_per_token == (8 + 4) * 4
    assert {v.untyped_storage().data_ptr() for v in pool.v} == {k.untyped_storage().data_ptr() for k in pool.k}
    k = torch.randn(2, 1, 8)
    pool.write(0, torch.tensor([5, 2]), k, k[..., :6])
    pool.copy_page(2, 0, 2)
    found_k, found_v = pool.gather(0, torch.tensor([0, 1]))
    assert torch.equal(found_k[1], k[0])
    assert torch.equal(found_k[2], k[1])
    assert torch.equal(found_v[1:3], found_k[1:3, ..., :6]), "nobody wrote the others"
    with pytest.raises(AssertionError, match="another latent"):
        pool.write(0, torch.tensor([5, 2]), k, k)


@pytest.mark.parametrize(
    ("kv", "options", "reason"),
    [
        (LayerKV(1, 24, 16), {}, "reads latents (MLA), not keys and values of their own, as layer 1 asks"),
        (LatentKV.of(latent_dim=16, rope_dim=8), {"sliding_window": 7}, "has no limits of sight on latents"),
        (LatentKV.of(latent_dim=16, rope_dim=8), {"softcap": 3.0}, "has no soft cap and no sinks on latents"),
        (
            LatentKV.of(latent_dim=16, rope_dim=8),
            {"key_bias": KeyBias(torch.zeros)},
            "has no biases of keys",
        ),
    ],
)
def test_why_not(kv: LayerKV, options: dict[str, Any], reason: str) -> None:
    latent = LayerAttention(LatentKV.of(latent_dim=16, rope_dim=8), 4, AttentionParams(0.1))
    layers = (latent, LayerAttention(kv, 4, AttentionParams(0.1, **options)))
    needs = AttentionNeeds(layers, PAGE, torch.float32, torch.device("cpu"))
    found = LatentBackend.why_not(needs)
    assert found is not None
    assert found.startswith(reason)


def test_latents_are_not_quantised() -> None:
    case = LatentCase(SPANS)
    found = LatentBackend.why_not(replace(case.needs(case.params()), kv_dtype="int8"))
    assert found == "keeps latents in the model's dtype, not as int8"
    assert LatentBackend.why_not(case.needs(case.params())) is None


# -- models ----------------------------------------------------------------------------------------------------------


def latent_engine(model: PreTrainedModel, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {"page_size": PAGE, "kv_cache_tokens": 512, "attention_backend": "latent"}
    return Engine(model, config=EngineConfig(**{**defaults, **settings}))


@pytest.mark.parametrize("family", some_of(LATENT, ["deepseek_v3", "longcat_flash"]))
def test_same_tokens_cold_warm_alone_and_batched(family: str) -> None:
    model = served_model(family)
    prompts = random_prompts(1, [37, 41, 33, 50], shared=32)
    expected = [oracle_of(family).continuation(prompt, NEW_TOKENS) for prompt in prompts]
    engine = latent_engine(model, max_batch_tokens=64)

    cold = [engine.generate(prompt, GREEDY)[0] for prompt in prompts]
    warm = [engine.generate(prompt, GREEDY)[0] for prompt in prompts]
    engine.reset_cache()
    batched = engine.generate(prompts, GREEDY)

    for outputs in (cold, warm, batched):
        assert [output.token_ids for output in outputs] == expected
    assert [output.cached_tokens for output in cold] == [0, 32, 32, 32]
    assert [output.cached_tokens for output in warm] == [36, 40, 32, 49]
    engine.check_invariants()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family, marks=[] if family in ("deepseek_v2", "deepseek_v3", "longcat_flash") else [pytest.mark.stress]
        )
        for family in LATENT
    ],
)
def test_same_tokens_in_chunks(family: str) -> None:
    model = served_model(family)
    prompts = random_prompts(2, [61, 23], shared=0)
    expected = [oracle_of(family).continuation(prompt, NEW_TOKENS) for prompt in prompts]
    outputs = latent_engine(model, max_batch_tokens=9).generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == expected


@pytest.mark.parametrize(
    ("backend", "family"),
    [  # the reference with the two that differ most, and with all under `stress`
        *((LatentBackend, family) for family in LATENT),
        *(
            pytest.param(
                ReferenceBackend, family, marks=[] if family in ("deepseek_v2", "minicpm3") else [pytest.mark.stress]
            )
            for family in LATENT
        ),
    ],
)
@torch.inference_mode()
def test_same_logits_on_cached_pages(family: str, backend: type[LatentBackend]) -> None:
    """An extend and decodes over pages that an earlier batch wrote, against each sequence computed at once."""
    model = tiny_model(family)
    prompts = random_prompts(3, [45, 29, 30], shared=28)
    expected = torch.stack([model(input_ids=torch.tensor([p]), use_cache=False).logits[0, -1] for p in prompts])
    layers = plug_in_paged_attention(model)
    pool = LatentKVPool([layer.kv for layer in layers], num_pages=40, page_size=PAGE, dtype=torch.float32)
    for k in pool.k:
        k.fill_(torch.nan)
    needs = AttentionNeeds(layers, PAGE, torch.float32, torch.device("cpu"))
    paged = backend(pool, needs)
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(1)).to(torch.int32).numpy()
    tables = [pages[0:12], pages[[0, 1, 2, 3, 4, 5, 6, 20]], pages[[0, 1, 2, 3, 4, 5, 6, 21]]]

    def forward(bounds: list[tuple[int, int]]) -> Tensor:
        spans = [SequenceSpan(*bound, table) for bound, table in zip(bounds, tables, strict=False)]
        metadata = build_metadata(spans, page_size=PAGE)
        ids = torch.tensor([i for (a, b), p in zip(bounds, prompts, strict=False) for i in p[a:b]])
        context = PagedContext(paged.plan(metadata), paged.num_layers)
        last_rows = torch.from_numpy(metadata.qo_indptr[1:]).long() - 1
        logits = flattened_forward(model, ids, metadata.positions, last_rows, context)
        context.check_complete()
        return logits

    forward([(0, 28)])
    forward([(28, 31)])
    found = forward([(31, 45), (28, 29), (28, 30)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # the logits of MiniCPM3 reach 18


@pytest.mark.parametrize("family", LATENT)
def test_bytes_per_token_are_those_of_the_sizing(family: str) -> None:
    model = served_model(family)
    shape = kv_shape_from_config(model.config)
    engine = latent_engine(model)
    assert engine.kv_bytes_per_token == engine.pool.bytes_per_token == shape.bytes_per_token("float32")
    assert sum(k.nbytes for k in engine.pool.k) == engine.pool.num_bytes
    assert [(kv.num_kv_heads, kv.k_head_dim, kv.v_head_dim) for kv in engine.pool.layers] == [
        (kv.num_kv_heads, kv.k_head_dim, kv.v_head_dim) for kv in shape.layers
    ]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_half_types_are_close(family: str) -> None:
    config = LATENT[family]()
    model = make_model(config).to(torch.bfloat16)
    prompt = random_prompts(4, [40], shared=0)[0]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].float()
    engine = latent_engine(model)
    (output,) = engine.generate(prompt, SamplingParams(max_tokens=1))
    assert engine.pool.dtype == torch.bfloat16
    token = output.token_ids[0]
    assert expected[token] >= expected.max() - 0.05 * expected.abs().max()


# -- the modules -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["deepseek_v2", "deepseek_v3"])
def plugged_in(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = tiny_model(request.param)
    plug_in_paged_attention(model)
    return model


def attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def test_a_module_stays_what_it_was(plugged_in: PreTrainedModel) -> None:
    plain = type(attentions(tiny_model(plugged_in.config.model_type))[0])
    for module in attentions(plugged_in):
        assert isinstance(module, plain)
        assert isinstance(module, LatentAttention)
    assert len({type(module) for module in attentions(plugged_in)}) == 1


def test_a_copy_has_weights_of_its_own(plugged_in: PreTrainedModel) -> None:
    other = copy.deepcopy(plugged_in)
    for module in attentions(other):
        module.kv_b_proj.weight.data.zero_()
    prompt = random_prompts(5, [21], shared=0)[0]
    expected = oracle_of(plugged_in.config.model_type).continuation(prompt, NEW_TOKENS)
    assert latent_engine(plugged_in).generate(prompt, GREEDY)[0].token_ids == expected
    assert latent_engine(other).generate(prompt, GREEDY)[0].token_ids != expected


def test_under_another_implementation_it_attends_as_ever(plugged_in: PreTrainedModel) -> None:
    unmodified = tiny_model(plugged_in.config.model_type)
    ids = torch.tensor(random_prompts(6, [21], shared=0))
    with torch.inference_mode():
        expected = unmodified(input_ids=ids).logits
        for implementation in ("eager", "sdpa"):
            plugged_in.set_attn_implementation(implementation)
            torch.testing.assert_close(plugged_in(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_without_a_context_it_fails_instead_of_lying(plugged_in: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModelError):
        plugged_in(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)


def test_two_engines_on_one_model(plugged_in: PreTrainedModel) -> None:
    prompt = random_prompts(7, [21], shared=0)[0]
    expected = oracle_of(plugged_in.config.model_type).continuation(prompt, NEW_TOKENS)
    engines = [latent_engine(plugged_in) for _ in range(2)]
    for engine in [*engines, *engines]:
        assert engine.generate(prompt, GREEDY)[0].token_ids == expected


def test_a_model_that_is_refused_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("deepseek_v3")
    before = type(attentions(model)[0])
    monkeypatch.setitem(probe.MAX_DIFFERENCE, torch.float32, -1.0)
    with pytest.raises(UnsupportedModelError, match="differ from its own"):
        plug_in_paged_attention(model)
    assert {type(module) for module in attentions(model)} == {before}
    assert model.config._attn_implementation != "radixkv"


def test_the_probe_sees_a_wrong_absorption(monkeypatch: pytest.MonkeyPatch) -> None:
    up_projections = LatentAttention.up_projections
    monkeypatch.setattr(LatentAttention, "up_projections", lambda self: [x.flip(0) for x in up_projections(self)])
    with pytest.raises(UnsupportedModelError, match="differ from its own"):
        plug_in_paged_attention(tiny_model("deepseek_v3"))


def test_what_cannot_be_absorbed_is_expanded() -> None:
    """As a quantised matrix cannot: here one with a bias, which no head's key or value has of its own."""
    model = tiny_model("deepseek_v3")
    for module in attentions(model):
        up = module.kv_b_proj
        biased = nn.Linear(up.in_features, up.out_features)
        biased.weight.data.copy_(up.weight.data)
        module.kv_b_proj = biased
    layers = plug_in_paged_attention(model)
    assert {layer.kv for layer in layers} == {LayerKV(4, 20, 10)}


def test_latents_beside_keys_and_values_are_refused() -> None:
    model = tiny_model("deepseek_v3")
    up = attentions(model)[1].kv_b_proj
    up.bias = nn.Parameter(torch.zeros(up.out_features))
    with pytest.raises(UnsupportedModelError, match="some of its layers keep latents"):
        plug_in_paged_attention(model)


def test_sparse_attention_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="its attention is sparse, and the keys of the indexer") as caught:
        plug_in_paged_attention(tiny_model("deepseek_v32"))
    assert "\n" not in str(caught.value)


def test_kimi_k2_is_a_deepseek_v3() -> None:
    """Its published config names a type of its own, and its model is loaded as DeepSeek's."""
    text = {**LATENT["deepseek_v3"]().to_dict(), "model_type": "kimi_k2"}
    config = hf.AutoConfig.for_model("kimi_k25", text_config=text).get_text_config()
    assert isinstance(config, hf.DeepseekV3Config)
    layers = plug_in_paged_attention(make_model(config))
    assert all(isinstance(layer.kv, LatentKV) for layer in layers)
