"""Models with recurrent layers: the same tokens and logits as the unmodified model, wherever a hit ends."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from prompts import random_ids, random_prompts
from radixkv import Engine, EngineConfig, RequestOutput, SamplingParams
from radixkv.engine.step_input import StepInput
from radixkv.errors import ConfigError, UnsupportedModelError
from radixkv.models.loader import load_tokenizer
from radixkv.models.probe import plug_in_paged_attention, recurrent_modules
from radixkv.models.recurrent.finding import find_recurrent_modules
from recurrent_models import RECURRENT_FAMILIES, recurrent_model
from runners import tampered_engine
from stress_cases import some_of
from tiny_models import make_model, served_model

MAX_DIFFERENCE = 1e-4  # of log probabilities in float32
BY_DEFAULT = {"qwen3_next", "lfm2", "falcon_h1", "zamba2", "kimi_linear", "jamba"}
LIKELIEST = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=1)


@cache
def unmodified(family: str) -> PreTrainedModel:
    return make_model(RECURRENT_FAMILIES[family]())


@torch.inference_mode()
def check(family: str, outputs: Sequence[RequestOutput]) -> None:
    """All outputs are those of the unmodified model, by one pass over each, and so are their log probabilities."""
    for output in outputs:
        assert output.error is None, output.error
        assert output.logprobs is not None
        prompt, ids = output.prompt_token_ids, torch.tensor(output.token_ids)
        logits = unmodified(family)(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        assert rows.argmax(dim=-1).tolist() == ids.tolist()
        found = torch.tensor([each.logprob for each in output.logprobs])
        assert float((found - rows.gather(1, ids[:, None])[:, 0]).abs().max()) <= MAX_DIFFERENCE


@pytest.mark.parametrize("family", some_of(RECURRENT_FAMILIES, BY_DEFAULT))
def test_same_as_the_unmodified_model(family: str) -> None:
    """Cold, batched, in chunks, warm, after a branch inside a page, for a prompt asked before, and for two forks."""
    prompts = [*random_prompts(1, [33, 40, 29], shared=25), random_ids(7, 27)]
    prompts.append(prompts[0])
    config = EngineConfig(kv_cache_tokens=1024, max_batch_tokens=24, page_size=8, state_interval_tokens=16)
    with Engine(recurrent_model(family), None, config) as engine:
        for _ in range(3):
            outputs = engine.generate(prompts, LIKELIEST)
            check(family, outputs)
            engine.cache.check_invariants()
        assert [output.cached_tokens for output in outputs] == [len(prompt) - 1 for prompt in prompts]
        history = outputs[0].prompt_token_ids + outputs[0].token_ids
        forks = engine.generate([history + random_ids(seed, 5) for seed in (9, 10)], LIKELIEST)
        check(family, forks)  # both from the state after all tokens but the last, which was not fed
        assert {fork.cached_tokens for fork in forks} == {len(history) - 1}
        stats = engine.cache.stats()
        assert stats.free_states + stats.evictable_states == stats.states


@pytest.mark.parametrize("family", some_of(RECURRENT_FAMILIES, {"qwen3_next", "jamba"}))
def test_requests_that_are_retracted_resume_from_their_states(family: str) -> None:
    prompts = random_prompts(3, [6, 7, 8, 9], shared=2)
    config = EngineConfig(kv_cache_tokens=64, max_batch_tokens=16, page_size=4, state_slots=9)
    with Engine(recurrent_model(family), None, config) as engine:
        check(family, engine.generate(prompts, dataclasses.replace(LIKELIEST, max_tokens=18)))
        assert engine.stats().retractions > 0
        engine.cache.check_invariants()
        check(family, engine.generate(prompts[::-1], LIKELIEST))
        engine.cache.check_invariants()


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8_e4m3", "int4", "fp4"])
def test_pools_of_codes_give_what_they_give_without_the_cache(kv_dtype: str) -> None:
    sizes = RECURRENT_FAMILIES["qwen3_next"]()
    sizes.head_dim = 16  # of which fp4 codes no fewer
    model = make_model(sizes)
    prompts = random_prompts(11, [40, 44, 37], shared=25)
    config = EngineConfig(kv_cache_tokens=512, kv_cache_dtype=kv_dtype, state_interval_tokens=16)
    answers = []
    for caches in (True, True, False):
        with Engine(model, None, dataclasses.replace(config, prefix_cache=caches)) as engine:
            answers += [[o.token_ids for o in engine.generate(prompts, LIKELIEST)] for _ in range(2)]
            engine.cache.check_invariants()
    assert all(answer == answers[0] for answer in answers)


def test_the_fewest_states_serve_one_request_after_the_other() -> None:
    prompts = random_prompts(4, [20, 21, 22], shared=8)
    config = EngineConfig(kv_cache_tokens=256, max_batch_tokens=16, page_size=4, state_slots=3)
    with Engine(recurrent_model("lfm2"), None, config) as engine:
        check("lfm2", engine.generate(prompts, LIKELIEST))
        engine.cache.check_invariants()


def test_choices_begin_where_the_first_one_kept_a_state() -> None:
    config = EngineConfig(kv_cache_tokens=512, max_batch_tokens=64, page_size=4)
    with Engine(recurrent_model("qwen3_next"), None, config) as engine:
        prompt = random_ids(5, 30)
        params = SamplingParams(n=3, max_tokens=4, temperature=1.0, seed=3, ignore_eos=True)
        outputs = engine.generate([prompt], params)
        assert engine.stats().computed_tokens <= 30 + 3 * 5
        alone = Engine(copy.deepcopy(recurrent_model("qwen3_next")), None, EngineConfig(kv_cache_tokens=512))
        with alone:
            expected = alone.generate([prompt], params)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


def test_a_step_that_fails_costs_no_state() -> None:
    """The other requests of the batch are computed again, from the states that they had."""
    sizes: list[int] = []

    def failing(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        logits = compute()  # all states are written
        sizes.append(len(step.request_ids))
        if len(sizes) == 3:
            raise RuntimeError("a step fails")
        return logits

    config = EngineConfig(kv_cache_tokens=512, page_size=4)
    with tampered_engine(recurrent_model("nemotron_h"), failing, config) as engine:
        check("nemotron_h", engine.generate(random_prompts(6, [20, 24], shared=4), LIKELIEST))
        assert sizes[2:5] == [2, 1, 1]
        engine.cache.check_invariants()


def test_a_request_without_the_prefix_cache_keeps_no_state() -> None:
    with Engine(recurrent_model("lfm2"), None, EngineConfig(kv_cache_tokens=512)) as engine:
        check("lfm2", engine.generate([random_ids(8, 20)], LIKELIEST, prefix_cache=False))
        assert engine.cache.stats().free_states == engine.cache.stats().states


def test_explain_says_that_no_state_is_kept() -> None:
    with Engine(recurrent_model("lfm2"), None, EngineConfig(kv_cache_tokens=512)) as engine:
        prompt = random_ids(8, 40)
        engine.generate([prompt], LIKELIEST)
        explanation = engine.cache.explain([*prompt[:30], 1, 2])
        assert (explanation.reason, explanation.cached_tokens, explanation.given_up_tokens) == ("state", 0, 30)
        assert str(explanation) == (
            "0 of 32 tokens are cached; 30 more are, but no state of the recurrent layers is kept after any of them"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculate": "cache"}, "speculate and drafter are not for models with recurrent layers"),
        ({"window": 16}, "window is not for models with recurrent layers"),
        ({"window_cache_tokens": 64}, "window_cache_tokens is not for models with recurrent layers"),
    ],
)
def test_what_states_do_not_allow(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(recurrent_model("lfm2"), None, EngineConfig(kv_cache_tokens=512, **settings))  # type: ignore[arg-type]


def test_state_slots_are_for_models_that_have_states() -> None:
    with pytest.raises(ConfigError, match="state_slots is for models with recurrent layers"):
        Engine(served_model("llama"), None, EngineConfig(kv_cache_tokens=512, state_slots=8))


def test_modules_that_start_anew_with_each_chunk_are_found() -> None:
    for family, expected in ("jamba", False), ("qwen3_next", True):
        model = make_model(RECURRENT_FAMILIES[family]())
        plug_in_paged_attention(model)
        modules = recurrent_modules(model)
        assert modules is not None
        assert modules.takes_chunks is expected


@torch.inference_mode()
def test_a_model_that_goes_on_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its modules make of a state is checked, not believed; it is as before afterwards."""
    model = make_model(RECURRENT_FAMILIES["lfm2"]())
    ids = torch.tensor([random_ids(1, 9)])
    before = model(input_ids=ids, use_cache=False).logits
    found = find_recurrent_modules(model, ids[0])
    forward = type(found[0].module).forward

    def forgetful(self, hidden_states, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        if past_key_values is not None:
            past_key_values.layers[self.layer_idx].has_previous_state[0] = False
        return forward(self, hidden_states, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(type(found[0].module), "forward", forgetful)
    with pytest.raises(UnsupportedModelError, match="after its layers went on from their states"):
        plug_in_paged_attention(model)
    monkeypatch.undo()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


@torch.inference_mode()
def test_calls_from_outside_go_through() -> None:
    """A plugged-in model's recurrent modules compute a plain call as ever, though its attention refuses one."""
    model = make_model(RECURRENT_FAMILIES["lfm2"]())
    twin = copy.deepcopy(model)
    plug_in_paged_attention(model)
    layer, other = model.model.layers[0], twin.model.layers[0]
    hidden = torch.randn(1, 6, model.config.hidden_size)
    assert torch.equal(layer.conv(hidden), other.conv(hidden))


def test_forks_of_a_conversation_share_its_states() -> None:
    config = hf.Qwen3_5TextConfig(**{**RECURRENT_FAMILIES["qwen3_5"]().to_dict(), "vocab_size": 2048})
    engine = Engine(make_model(config), load_tokenizer("demo"), EngineConfig(kv_cache_tokens=1024))
    with engine, engine.session(system="You are a citizen of Rome.") as chat:
        chat.send("Who are you?", dataclasses.replace(LIKELIEST, logprobs=None))
        before = chat.kv_usage()
        assert before.num_states >= 2  # after the prompt, and after the answer
        left, right = chat.fork(), chat.fork()
        for fork in left, right:
            reply = fork.send("And what now?", dataclasses.replace(LIKELIEST, logprobs=None))
            assert reply.cached_tokens >= before.tokens - 1
        engine.cache.check_invariants()
