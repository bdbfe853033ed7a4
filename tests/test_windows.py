"""Engines whose layers see windows: the same tokens in a fraction of the memory; and endless ones (StreamingLLM)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from oracles import oracle_of
from prompts import random_prompts
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention.backend import AttentionNeeds
from radixkv.attention.split_backend import split_needs
from radixkv.engine.kv_memory import PoolSizes, Sight, pool_sizes
from radixkv.errors import ConfigError, UnsupportedModelError
from radixkv.memory import kv_pool
from radixkv.memory.quantized_pool import kv_bytes_per_token
from radixkv.models.probe import plug_in_paged_attention
from radixkv.models.streaming import Streaming
from stress_cases import some_of
from tiny_models import make_model, tiny_model, with_common

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


def check_nothing_is_lost(engine: Engine) -> None:
    engine.check_invariants()
    engine.reset_cache()
    stats = engine.stats().cache
    assert stats.free_pages == stats.num_pages
    assert stats.free_window_pages == stats.window_pages


# -- layers that see a window ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "family"),
    [  # windows alone, beside full layers, and chunks; every pair under `stress`
        *(("numba", family) for family in ("mistral", "gpt_oss")),
        ("torch", "llama4"),
        *(pytest.param("torch", family, marks=pytest.mark.stress) for family in ("mistral", "gpt_oss")),
        *(pytest.param("numba", family, marks=pytest.mark.stress) for family in ("gemma2", "gemma3", "llama4")),
        *(pytest.param("torch", family, marks=pytest.mark.stress) for family in ("gemma2", "gemma3")),
    ],
)
def test_same_tokens_where_windows_are_scarce(family: str, backend: str) -> None:
    """Long prompts in chunks, cold, warm and together, with hardly more window pages than one request needs."""
    model = tiny_model(family)
    prompts = random_prompts(7, [90, 61, 75], shared=40)
    expected = [oracle_of(family).continuation(prompt, 6) for prompt in prompts]
    window = 16 if family == "llama4" else 9
    config = EngineConfig(
        page_size=4,
        kv_cache_tokens=1024,
        window_cache_tokens=window + 24,
        max_batch_tokens=24,
        attention_backend=backend,
    )
    engine = Engine(model, config=config)
    assert engine.config.window_cache_tokens == -(-(window + 24) // 4) * 4
    cold = [engine.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    warm = [engine.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    together = [output.token_ids for output in engine.generate(prompts, GREEDY)]
    assert cold == warm == together == expected
    assert engine.stats().cache.window_pages == -(-(window + 24) // 4)
    check_nothing_is_lost(engine)


def test_a_conversation_goes_on_where_it_ended() -> None:
    engine = Engine(
        tiny_model("gemma3"), config=EngineConfig(page_size=4, kv_cache_tokens=1024, window_cache_tokens=64)
    )
    ids = random_prompts(1, [200], shared=0)[0]
    (first,) = engine.generate(ids, GREEDY)
    (second,) = engine.generate([*ids, *first.token_ids, 9, 8], GREEDY)
    assert second.cached_tokens == 205, "all but the last token, whose KV nobody needed"
    (branch,) = engine.generate([*ids[:100], 9, 8, 7], GREEDY)
    assert branch.cached_tokens == 0, "the window before that branch was given up"
    assert engine.generate([*ids[:100], 9, 8, 6], GREEDY)[0].cached_tokens == 102, "now it is known"
    check_nothing_is_lost(engine)


@pytest.mark.parametrize(("family", "share"), [("mistral", 0.2), ("gemma3", 0.6)])
def test_memory_shrinks(family: str, share: float) -> None:
    """All layers see a window in one, two of three in the other."""
    tokens, sizes = 2048, {}
    for window_tokens in (256, tokens):
        settings: dict[str, Any] = {"kv_cache_tokens": tokens, "window_cache_tokens": window_tokens}
        if family == "mistral" and window_tokens == 256:
            settings = {"kv_cache_tokens": 256}
        engine = Engine(tiny_model(family), config=EngineConfig(page_size=4, **settings))
        (output,) = engine.generate(random_prompts(3, [400], shared=0)[0], GREEDY)
        assert len(output.token_ids) == 6
        sizes[window_tokens] = engine.stats().pool_bytes
        check_nothing_is_lost(engine)
    assert sizes[256] < share * sizes[tokens]


def test_one_request_after_another_is_retracted_when_window_pages_lack() -> None:
    model = tiny_model("mistral")
    prompts = random_prompts(5, [3, 4, 3, 5, 4, 3], shared=0)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    engine = Engine(model, config=EngineConfig(page_size=1, kv_cache_tokens=30, max_context_tokens=100))
    outputs = engine.generate(prompts, params)
    expected = [oracle_of("mistral").continuation(prompt, 20) for prompt in prompts]
    assert [output.token_ids for output in outputs] == expected
    assert engine.stats().retractions > 0
    check_nothing_is_lost(engine)


def test_a_request_ends_with_an_error_if_others_hold_all_window_pages() -> None:
    engine = Engine(tiny_model("mistral"), config=EngineConfig(page_size=4, kv_cache_tokens=32))
    with engine.cache.acquire(list(range(100, 132))) as lease:
        lease.cover(0, 32)
        (output,) = engine.generate(random_prompts(1, [10], shared=0)[0], GREEDY)
        assert output.finish_reason == "error"
        assert "window" in str(output.error)
    (output,) = engine.generate(random_prompts(1, [10], shared=0)[0], GREEDY)
    assert output.finish_reason == "length"
    check_nothing_is_lost(engine)


@pytest.mark.parametrize("kv_dtype", some_of(["int8", "int4", "fp8_e4m3", "fp8_e5m2", "fp4"], {"int4", "fp8_e5m2"}))
def test_codes_in_both_pools(kv_dtype: str) -> None:
    engine = Engine(
        tiny_model("gemma3_wide" if kv_dtype == "fp4" else "gemma3"),
        config=EngineConfig(page_size=16, kv_cache_tokens=1024, window_cache_tokens=128, kv_cache_dtype=kv_dtype),
    )
    prompts = random_prompts(2, [120, 130], shared=100)
    cold = [engine.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    assert cold == [output.token_ids for output in engine.generate(prompts, GREEDY)]
    check_nothing_is_lost(engine)


def test_usage_counts_what_is_kept() -> None:
    engine = Engine(
        tiny_model("gemma3"), config=EngineConfig(page_size=4, kv_cache_tokens=1024, window_cache_tokens=64)
    )
    with engine.session() as session:
        session.append(random_prompts(1, [120], shared=0)[0])
        session.generate(GREEDY)
        usage = session.kv_usage()
    layer_bytes = engine.kv_bytes_per_token // 3
    assert usage.tokens == 125
    assert usage.num_bytes <= 125 * layer_bytes + 64 * 2 * layer_bytes


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"window_cache_tokens": 64}, "this one has none"),
        ("gemma3", {"window_cache_tokens": 8}, "window_cache_tokens=8 is too small: one request needs 20 tokens for"),
        ("llama", {"window": 600}, "window=600 and sinks=0 are more than the 512 tokens that the model was made for"),
        ("llama", {"sinks": 4}, "sinks=4 needs a window to stand beside; set window, too"),
        ("llama", {"window": 0}, "window must be an integer of at least 1, or None, not 0"),
        ("llama", {"window": 20, "cuda_graphs": True}, "window=20 does not run in CUDA graphs"),
    ],
)
def test_settings_that_cannot_be(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(tiny_model(family), config=EngineConfig(**{"page_size": 4, "kv_cache_tokens": 256, **settings}))


# -- StreamingLLM -----------------------------------------------------------------------------------------------------


class PaperCache:
    """StreamingLLM as its paper has it, for a Llama, token by token: keys are kept without their rotation, the first
    ones and the newest, and are rotated at each step by their places in the cache."""

    def __init__(self, model: hf.PreTrainedModel, *, window: int, sinks: int) -> None:
        self._model, self._window, self._sinks = model.double(), window, sinks
        self._kv: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in model.model.layers]

    @torch.inference_mode()
    def logits(self, token: int) -> Tensor:
        hidden = self._model.model.embed_tokens(torch.tensor([[token]]))
        for layer, kv in zip(self._model.model.layers, self._kv, strict=True):
            hidden = hidden + self._attention(layer.self_attn, layer.input_layernorm(hidden), *kv)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self._model.lm_head(self._model.model.norm(hidden))[0, 0]

    def _attention(self, module: Any, hidden: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        dim = module.head_dim
        q, k, v = (projection(hidden).view(-1, dim) for projection in (module.q_proj, module.k_proj, module.v_proj))
        keys.append(k)
        values.append(v)
        if len(keys) > self._sinks + self._window:
            del keys[self._sinks], values[self._sinks]
        group = len(q) // len(k)
        rotated = torch.stack([self._rotate(key, place) for place, key in enumerate(keys)]).repeat_interleave(group, 1)
        q = self._rotate(q, len(keys) - 1)
        weights = (torch.einsum("hd,thd->ht", q, rotated) * module.scaling).softmax(-1)
        out = torch.einsum("ht,thd->hd", weights, torch.stack(values).repeat_interleave(group, 1))
        return module.o_proj(out.reshape(1, 1, -1))

    def _rotate(self, x: Tensor, place: int) -> Tensor:
        angles = place * self._model.model.rotary_emb.inv_freq.double()
        cos, sin = angles.cos().repeat(2), angles.sin().repeat(2)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def continuation(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        for token in prompt:
            logits = self.logits(token)
        output: list[int] = []
        for _ in range(num_tokens):
            output.append(int(logits.argmax()))
            logits = self.logits(output[-1])
        return output


@pytest.mark.parametrize(
    ("backend", "window", "sinks"),
    [
        ("numba", 9, 4),
        ("torch", 7, 0),
        pytest.param("triton", 5, 2, marks=pytest.mark.stress),  # whose kernels test_triton runs
        *(pytest.param("torch", *sight, marks=pytest.mark.stress) for sight in [(9, 4), (20, 6), (12, 1)]),
        *(pytest.param("numba", *sight, marks=pytest.mark.stress) for sight in [(20, 6), (12, 1), (7, 0)]),
    ],
)
def test_streams_as_the_paper_does(backend: str, window: int, sinks: int) -> None:
    """Beyond the window, cold and on a cached prefix, in chunks of any size."""
    model, num_prompt_tokens, num_tokens = tiny_model("llama"), 70, 12
    if backend == "triton":  # it is interpreted
        sizes = with_common(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
        model, num_prompt_tokens, num_tokens = make_model(hf.LlamaConfig(**sizes)), 10, 2
    prompt = random_prompts(11, [num_prompt_tokens], shared=0)[0]
    expected = PaperCache(copy.deepcopy(model), window=window, sinks=sinks).continuation(prompt, num_tokens)
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    config = EngineConfig(
        page_size=4,
        kv_cache_tokens=2 * (window + sinks) + 16,
        window=window,
        sinks=sinks,
        max_batch_tokens=13,
        attention_backend=backend,
    )
    engine = Engine(model, config=config)
    (cold,) = engine.generate(prompt, params)
    (warm,) = engine.generate(prompt, params)
    assert cold.token_ids == warm.token_ids == expected
    assert warm.cached_tokens > 0 or sinks + window > 20
    check_nothing_is_lost(engine)


def test_a_stream_runs_on_beyond_the_models_context_in_constant_memory() -> None:
    engine = Engine(
        tiny_model("llama"),
        config=EngineConfig(page_size=4, kv_cache_tokens=64, window=24, sinks=4, max_batch_tokens=16),
    )
    assert engine.max_context_tokens == 1 << 20
    params = SamplingParams(max_tokens=130, ignore_eos=True, temperature=1.0, seed=1)
    (output,) = engine.generate(random_prompts(1, [400], shared=0)[0], params)
    assert len(output.token_ids) == 130, "and 400 of the prompt: the model was made for 512"
    stats = engine.stats()
    assert stats.pool_bytes == 17 * 4 * stats.kv_bytes_per_token, "16 pages, and one of zeros"
    check_nothing_is_lost(engine)


ROTATIONS: dict[str, tuple[hf.PretrainedConfig, str]] = {
    "half": (hf.LlamaConfig(**with_common()), "half"),
    "neighbours": (hf.CohereConfig(**with_common()), "neighbours"),
    "in part": (hf.GlmConfig(**with_common(head_dim=16, partial_rotary_factor=0.5, pad_token_id=0)), "neighbours"),
    "two kinds": (tiny_model("gemma3").config, "half"),
    "some layers without": (hf.SmolLM3Config(**with_common(num_hidden_layers=3, no_rope_layers=[1, 0, 1])), "half"),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_are_found_out(name: str) -> None:
    config, kind = ROTATIONS[name]
    model = make_model(config)
    layers = plug_in_paged_attention(model)
    streaming = Streaming(model, layers, window=32, sinks=4, limit=None)
    rotations = [rotation for rotation in streaming._rotations.values() if rotation is not None]
    assert rotations
    assert {rotation.interleaved for rotation in rotations} == {kind == "neighbours"}
    if name == "some layers without":
        assert [rotation is None for rotation in streaming._rotations.values()] == [False, True, False]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v3", "it keeps latents"),
        ("llama4", "it tunes the temperature of its attention by position"),
        ("dynamic", r"its rotary embeddings \(dynamic\) change with the length"),
        ("gpt2", "marks positions otherwise than by rotating queries and keys"),
        ("gpt2 of few positions", "marks positions otherwise than by rotating queries and keys"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_stream_is_refused(family: str, reason: str) -> None:
    if family == "dynamic":
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        model = make_model(hf.LlamaConfig(**with_common(rope_parameters=rope)))
    elif family.startswith("gpt2"):
        positions = 64 if family.endswith("few positions") else 5000
        model = make_model(hf.GPT2Config(vocab_size=211, n_positions=positions, n_embd=32, n_layer=2, n_head=4))
    else:
        model = tiny_model(family)
    for sinks in (4, 0):
        with pytest.raises(UnsupportedModelError, match=reason):
            Engine(model, config=EngineConfig(page_size=4, kv_cache_tokens=256, window=20, sinks=sinks))


# -- sizes of the pools -----------------------------------------------------------------------------------------------


@cache
def needs_of(family: str) -> AttentionNeeds:
    """What the layers of the tiny model ask of their attention."""
    model = tiny_model(family)
    return AttentionNeeds(plug_in_paged_attention(model), 4, model.dtype, model.device)


def sizes_of(family: str, memory_bytes: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[PoolSizes, int]:
    """The pool sizes of a model that has so many bytes, and the bytes that they take."""
    monkeypatch.setattr(kv_pool, "available_bytes", lambda device: memory_bytes)
    config = EngineConfig(page_size=4, mem_fraction=1.0, **settings)
    needs = needs_of(family)
    sizes = pool_sizes(needs, Sight.of(needs), config, context_tokens=512)
    full, window = (
        kv_bytes_per_token([layer.kv for layer in part.layers], "auto", needs.dtype) * 4 for part in split_needs(needs)
    )
    return sizes, sizes.num_pages * full + (sizes.num_window_pages or sizes.num_pages) * window


@pytest.mark.parametrize("settings", [{}, {"window_cache_tokens": 64}, {"window_cache_tokens": 400}])
@pytest.mark.parametrize("family", ["gemma3", "mistral", "llama4"])
@pytest.mark.parametrize("memory_bytes", [20_000, 60_000, 1_000_000, 50_000_000])
def test_pools_fill_the_memory_and_no_more(
    family: str, settings: dict[str, int], memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, taken = sizes_of(family, memory_bytes, monkeypatch, **settings)
    if family == "mistral" and settings:  # asks for so many window pages, and all KV is in these
        assert sizes.num_window_pages == settings["window_cache_tokens"] // 4
        return
    assert taken <= memory_bytes
    assert taken > 0.9 * memory_bytes or memory_bytes == 20_000
    if settings and memory_bytes == 50_000_000:
        assert sizes.num_window_pages == settings["window_cache_tokens"] // 4


def test_the_demands_of_one_request_come_before_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, _ = sizes_of("gemma3", 40_000, monkeypatch)
    assert sizes.num_window_pages is None or sizes.num_window_pages >= 5
    sizes, _ = sizes_of("gemma3", 1_000_000, monkeypatch)
    assert sizes.num_window_pages == -(-sizes.num_pages // 2)
    sizes, _ = sizes_of("mistral", 1_000_000, monkeypatch)
    assert sizes.num_window_pages is not None
    assert sizes.num_pages == 16 * sizes.num_window_pages
