"""Families whose modules compute attention by themselves, or drop the context, against the unmodified models."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterable

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from oracles import oracle_of
from prompts import random_prompts
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention.backend import AttentionParams
from radixkv.errors import UnsupportedModelError
from radixkv.hf import RadixCache
from radixkv.memory.sizing import kv_shape_from_config, layers_from_config
from radixkv.models.own_attention import OwnAttention
from radixkv.models.paged_attention import flattened_forward
from radixkv.models.probe import plug_in_paged_attention
from runners import tampered_engine
from tiny_models import OLDER, tiny_model

NEW_TOKENS = 4
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
PROMPT_ONLY = SamplingParams(max_tokens=1)
BIASED = ["bloom", "falcon_alibi", "mpt"]
# a method and forwards that are replaced, of models that prefer eager attention or torch's; a keyword that is dropped
OUTSIDE = ["gptj", "bloom", "falcon_alibi", "stablelm"]


def pairs(**families: Iterable[str]) -> pytest.MarkDecorator:
    """Each backend with the families given for it, and with all others under `stress`."""
    return pytest.mark.parametrize(
        ("backend", "family"),
        [
            pytest.param(backend, family, marks=[] if family in chosen else [pytest.mark.stress])
            for backend, chosen in families.items()
            for family in OLDER
        ],
    )


def engine_of(family: str, backend: str = "numba", max_batch_tokens: int = 64) -> Engine:
    config = EngineConfig(
        page_size=4, kv_cache_tokens=512, attention_backend=backend, max_batch_tokens=max_batch_tokens
    )
    return Engine(tiny_model(family), config=config)


def logits_of(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]


@pairs(numba=OLDER, reference=["bloom", "gpt_neo", "stablelm"])
def test_same_tokens_cold_warm_batched_and_in_chunks(family: str, backend: str) -> None:
    prompts = random_prompts(1, [37, 41, 33, 50], shared=30)  # which ends inside a page
    expected = [oracle_of(family).continuation(prompt, NEW_TOKENS) for prompt in prompts]
    engine = engine_of(family, backend)

    cold = [engine.generate(prompt, GREEDY)[0] for prompt in prompts]
    warm = [engine.generate(prompt, GREEDY)[0] for prompt in prompts]
    engine.reset_cache()
    batched = engine.generate(prompts, GREEDY)
    in_chunks = engine_of(family, backend, max_batch_tokens=9).generate(prompts, GREEDY)

    for outputs in (cold, warm, batched, in_chunks):
        assert [output.token_ids for output in outputs] == expected
    assert [output.cached_tokens for output in cold] == [0, 30, 30, 30]
    assert [output.cached_tokens for output in warm] == [36, 40, 32, 49]
    engine.check_invariants()


@pairs(numba=OLDER, reference=["falcon_alibi", "gptj", "stablelm"], torch=[*BIASED, "gpt_neo"])
def test_logits_on_a_cached_prefix(family: str, backend: str) -> None:
    model = tiny_model(family)
    unmodified = copy.deepcopy(model)
    prompts = random_prompts(3, [45, 45, 30], shared=27)
    seen: list[torch.Tensor] = []

    def keep(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        seen.append(compute())
        return seen[-1]

    config = EngineConfig(page_size=4, kv_cache_tokens=512, attention_backend=backend)
    engine = tampered_engine(model, lambda step, compute: keep(compute), config)
    engine.generate(prompts[0][:29], PROMPT_ONLY)
    seen.clear()
    outputs = engine.generate(prompts, PROMPT_ONLY)
    assert [output.cached_tokens for output in outputs] == [29, 27, 27]
    for prompt, logits in zip(prompts, torch.cat(seen), strict=True):
        torch.testing.assert_close(logits, logits_of(unmodified, prompt), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", BIASED)
def test_biases_far_into_a_sequence_are_the_models_own(family: str) -> None:
    """Falcon rounds its biases to bfloat16, which shows the more, the farther a token is from the first."""
    prompt = random_prompts(4, [400], shared=0)[0]
    engine = engine_of(family, max_batch_tokens=150)
    assert engine.generate(prompt, GREEDY)[0].token_ids == oracle_of(family).continuation(prompt, NEW_TOKENS)


@pytest.mark.parametrize("family", OLDER)
def test_every_family_is_accepted_in_16_bit(family: str) -> None:
    assert plug_in_paged_attention(tiny_model(family).to(torch.bfloat16))


@pytest.mark.parametrize("family", OLDER)
def test_sizes_read_off_the_config_are_those_that_are_kept(family: str) -> None:
    model = tiny_model(family)
    expected = kv_shape_from_config(model.config).layers
    assert tuple(layer.kv for layer in plug_in_paged_attention(model)) == expected


def test_windows_read_off_the_config_are_those_that_are_seen() -> None:
    model = tiny_model("gpt_neo")
    expected = [layer.window for layer in layers_from_config(model.config)]
    assert [layer.params.sliding_window for layer in plug_in_paged_attention(model)] == expected == [None, 9]


def test_one_kv_head_is_kept_where_all_queries_share_it() -> None:
    heads = {
        name: plug_in_paged_attention(tiny_model(name))[0].kv.num_kv_heads for name in ("falcon", "falcon_grouped")
    }
    assert heads == {"falcon": 1, "falcon_grouped": 2}


# -- calls from outside ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", OUTSIDE)
def test_only_the_engine_can_call_the_model_until_it_is_switched_back(family: str) -> None:
    model = tiny_model(family)
    prompt = random_prompts(5, [13], shared=0)[0]
    expected = logits_of(model, prompt)
    Engine(model, config=EngineConfig(page_size=4, kv_cache_tokens=128)).generate(prompt, GREEDY)
    with pytest.raises(UnsupportedModelError, match="serves a radixkv Engine") as error:
        logits_of(model, prompt)
    (before,) = re.findall(r"set_attn_implementation\('(\w+)'\)", str(error.value))
    model.set_attn_implementation(before)
    torch.testing.assert_close(logits_of(model, prompt), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", OUTSIDE)
def test_a_model_that_was_switched_back_can_serve_again(family: str) -> None:
    model = tiny_model(family)
    prompt = random_prompts(5, [13], shared=0)[0]
    before = plug_in_paged_attention(model)
    model.set_attn_implementation("sdpa" if family == "falcon_alibi" else "eager")
    engine = Engine(model, config=EngineConfig(page_size=4, kv_cache_tokens=128))
    assert engine.generate(prompt, GREEDY)[0].token_ids == oracle_of(family).continuation(prompt, NEW_TOKENS)
    assert [layer.kv for layer in plug_in_paged_attention(model)] == [layer.kv for layer in before]


@torch.inference_mode()
def test_a_falcon_that_adds_its_biases_twice_is_refused() -> None:
    """So does its own eager attention: they are in its mask, too."""
    served = tiny_model("falcon_alibi")
    model = AutoModelForCausalLM.from_config(served.config, attn_implementation="eager").eval()
    model.load_state_dict(served.state_dict())
    with pytest.raises(UnsupportedModelError, match="differ from its own"):
        plug_in_paged_attention(model)


class _CallsMeanwhile:
    """A context that calls something in each layer, and lets each token see itself alone."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.errors: list[Exception] = []

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        try:
            self._call()
        except UnsupportedModelError as error:
            self.errors.append(error)
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


@torch.inference_mode()
def run_beside(model: PreTrainedModel, call: Callable[[], object]) -> list[Exception]:
    """What `call` raises in each layer of a forward pass of `model`."""
    context = _CallsMeanwhile(call)
    ids = torch.arange(1, 4)
    flattened_forward(model, ids, torch.arange(3), torch.tensor([2]), context)
    return context.errors


@pytest.mark.parametrize("family", OUTSIDE)
def test_a_call_in_another_thread_does_not_join_the_pass_that_runs(family: str) -> None:
    model = tiny_model(family)
    plug_in_paged_attention(model)
    errors: list[Exception] = []

    def call() -> None:
        try:
            logits_of(model, [5, 6])
        except UnsupportedModelError as error:
            errors.append(error)

    def call_in_thread() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    run_beside(model, call_in_thread)
    assert len(errors) == 2


@pytest.mark.parametrize("family", OUTSIDE)
def test_a_call_of_another_model_does_not_join_the_pass_that_runs(family: str) -> None:
    model, other = tiny_model(family), tiny_model(family)
    plug_in_paged_attention(model)
    plug_in_paged_attention(other)
    assert len(run_beside(model, lambda: logits_of(other, [5, 6]))) == 2


@pytest.mark.parametrize("family", OUTSIDE)
def test_passes_nest_and_end(family: str) -> None:
    model, other = tiny_model(family), tiny_model(family)
    plug_in_paged_attention(model)
    plug_in_paged_attention(other)
    assert run_beside(model, lambda: run_beside(other, lambda: None)) == []
    with pytest.raises(UnsupportedModelError, match="serves a radixkv Engine"):
        logits_of(model, [5, 6])


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj", "gpt", "mpt"])
def test_a_model_that_is_refused_is_as_it_was(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    before = [(type(module), sorted(vars(module))) for module in model.modules()]
    expected = logits_of(model, [5, 6, 7])
    monkeypatch.setattr(OwnAttention, "attend", lambda self, q, k, v, **options: torch.zeros_like(q).transpose(1, 2))
    with pytest.raises(UnsupportedModelError):
        plug_in_paged_attention(model)
    assert [(type(module), sorted(vars(module))) for module in model.modules()] == before
    assert torch.equal(logits_of(model, [5, 6, 7]), expected)


# -- other ways to use such models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BIASED)
def test_biases_by_position_cannot_stream(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"biases by position \(ALiBi\)"):
        Engine(tiny_model(family), config=EngineConfig(page_size=4, kv_cache_tokens=128, window=16, sinks=4))


@pytest.mark.parametrize("family", ["falcon", "gptj", "bloom", "stablelm"])
def test_the_radix_cache_of_generate_still_serves_them(family: str) -> None:
    model = tiny_model(family)
    prompt = random_prompts(6, [23], shared=0)[0]
    cache = RadixCache(model, max_tokens=256)
    ids = torch.tensor([prompt])
    for cached_tokens in (0, 22):
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert generated[0, len(prompt) :].tolist() == oracle_of(family).continuation(prompt, NEW_TOKENS)
        assert cache.cached_tokens == (cached_tokens,)
