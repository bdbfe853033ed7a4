"""Drafts change how many tokens a step gives, and nothing else."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drafters import Knowing, speculating
from oracles import oracle_of
from prompts import random_ids, random_prompts
from radixkv import AsyncEngine, Engine, EngineConfig, RequestOutput, SamplingParams
from radixkv.engine.arguments import CacheOptions
from radixkv.engine.assembly import assemble
from radixkv.engine.core import EngineCore
from radixkv.engine.drafts.drafter import Draft, Text
from radixkv.engine.drafts.model_drafter import ModelDrafter
from radixkv.engine.drafts.speculation import Speculation
from radixkv.engine.step_input import StepInput
from radixkv.errors import ConfigError
from runners import TamperedRunner
from stress_cases import some_of
from tiny_models import FAMILIES, LATENT, VOCAB_SIZE, tiny_model

NEW_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
SMALL = EngineConfig(page_size=4, kv_cache_tokens=512, max_batch_tokens=64)


def drafted(outputs: Sequence[RequestOutput]) -> tuple[int, int]:
    choices = [choice for output in outputs for choice in output.choices]
    return sum(choice.drafted_tokens for choice in choices), sum(choice.accepted_tokens for choice in choices)


@pytest.mark.parametrize("family", some_of([*FAMILIES, *LATENT], {"gpt_oss", "llama4", "deepseek_v2"}))
def test_greedy_tokens_are_those_of_the_unmodified_model(family: str) -> None:
    """Batches of requests with and without drafts, right ones and wrong ones; then drafts from the cache itself."""
    prompts = random_prompts(1, [37, 41, 12, 30], shared=12)
    expected = [oracle_of(family).continuation(prompt, NEW_TOKENS) for prompt in prompts]
    knowing = Knowing(*[[*prompt, *answer] for prompt, answer in zip(prompts[:3], expected, strict=False)])
    engine = speculating(tiny_model(family), SMALL, knowing)
    outputs = engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == expected
    num_drafted, num_accepted = drafted(outputs)
    assert 0 < num_accepted < num_drafted
    assert outputs[3].drafted_by == {}
    assert engine.stats().tokens_per_step > 1.2
    assert knowing.ended_ids == {0, 1, 2, 3}

    engine = speculating(tiny_model(family), SMALL)
    for _ in range(2):
        outputs = engine.generate(prompts, GREEDY)
        assert [output.token_ids for output in outputs] == expected
    assert sum(output.accepted_by.get("sibling", 0) for output in outputs) > NEW_TOKENS


def params_of(**asked: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "ignore_eos": True, **asked})


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.3, "seed": 5},
    "filters": {"temperature": 2.0, "seed": 6, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "choices": {"temperature": 0.9, "seed": 7, "n": 3},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 1.0},
    "sampled penalties": {"temperature": 1.0, "seed": 8, "presence_penalty": 1.5},
    "bias": {"logit_bias": {5: 4.0, 6: 3.0}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": list(range(0, 200, 3))},
    "logprobs": {"logprobs": 2, "temperature": 1.0, "seed": 9},
    "prompt_logprobs": {"prompt_logprobs": 1, "logprobs": 0, "repetition_penalty": 1.2},
    "one token": {"max_tokens": 1},
    "no tokens": {"max_tokens": 0},
}


@pytest.mark.parametrize("asked", ASKED)
def test_options_give_what_they_give_without_drafts(asked: str) -> None:
    """Seeded requests draw the very same tokens: from the same distributions, with the same generator."""
    params, prompts = params_of(**ASKED[asked]), random_prompts(2, [20, 9], shared=4)
    plain = Engine(tiny_model("llama"), config=SMALL).generate(prompts, params)
    known = [[*output.prompt_token_ids, *choice.token_ids] for output in plain for choice in output.choices]
    outputs = speculating(tiny_model("llama"), SMALL, Knowing(*known)).generate(prompts, params)
    for output, expected in zip(outputs, plain, strict=True):
        for choice, other in zip(output.choices, expected.choices, strict=True):
            assert choice.token_ids == other.token_ids
            assert (choice.finish_reason, choice.stopped_by) == (other.finish_reason, other.stopped_by)
            assert_close(choice.logprobs, other.logprobs)
            assert_close(choice.prompt_logprobs, other.prompt_logprobs)
        assert output.usage[:5] == expected.usage[:5]
    if params.max_tokens > 1:
        assert 0 < drafted(outputs)[1] < drafted(outputs)[0]


def assert_close(logprobs: Any, expected: Any) -> None:
    if expected is None:
        assert logprobs is None
        return
    for one, other in zip(logprobs, expected, strict=True):
        if other is not None:
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in other.top]


# -- the distribution --------------------------------------------------------------------------------------------------

CHANCES = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
"""[token, next token]: what the table below makes of four tokens."""


class Guessing:
    """Drafts token 0 again and again, which is often right and often wrong."""

    def draft(self, texts: Sequence[Text]) -> list[Draft]:
        return [Draft(np.zeros(min(3, text.most), np.int32), "guess") for text in texts]

    def ended(self, request_id: int) -> None:
        pass


def of_table(step: StepInput, compute: Callable[[], Tensor]) -> Tensor:
    logits = torch.full((len(step.logits_of), VOCAB_SIZE), -torch.inf)
    logits[:, :4] = torch.from_numpy(np.log(CHANCES[step.token_ids[step.logits_of]])).float()
    return logits


def test_drawn_tokens_have_the_models_distribution() -> None:
    """Pairs and triples of tokens against the products of their chances, by chi-square; drafts are often rejected."""
    config = EngineConfig(page_size=16, kv_cache_tokens=8192, max_batch_tokens=2048, max_running_requests=256)
    parts = assemble(tiny_model("llama"), None, config)
    speculation = Speculation(Guessing(), VOCAB_SIZE, always=True)
    parts = replace(parts, runner=TamperedRunner(parts.runner, of_table), speculation=speculation)
    num = 1000
    params = [params_of(max_tokens=4, temperature=1.0, seed=seed) for seed in range(num)]
    outputs = Engine.from_parts(parts).generate([[1]] * num, params)
    assert drafted(outputs)[1] > num / 4
    counts = Counter(tuple(output.token_ids) for output in outputs)
    statistic = 0.0
    for a in range(4):
        for b in range(4):
            for c in range(4):
                expected = num * CHANCES[1, a] * CHANCES[a, b] * CHANCES[b, c]
                seen = sum(count for ids, count in counts.items() if ids[:3] == (a, b, c))
                statistic += (seen - expected) ** 2 / expected
    assert statistic < 103.4, "63 degrees of freedom: passed by one in a thousand distributions that are right"
    last = Counter((ids[2], ids[3]) for ids in counts.elements())
    before = Counter(ids[2] for ids in counts.elements())
    statistic = sum(
        (last[a, b] - before[a] * CHANCES[a, b]) ** 2 / (before[a] * CHANCES[a, b]) for a in range(4) for b in range(4)
    )
    assert statistic < 32.9, "12 degrees of freedom"


# -- ends --------------------------------------------------------------------------------------------------------------


def continuation(prompt: list[int], num: int = NEW_TOKENS) -> list[int]:
    return oracle_of("llama").continuation(prompt, num)


def knowing_all(prompts: Sequence[list[int]], **options: Any) -> Knowing:
    return Knowing(*[[*prompt, *continuation(prompt, 40)] for prompt in prompts], **options)


@pytest.mark.parametrize("place", range(0, 12, 3))
def test_a_stop_token_within_a_draft_ends_the_output_there(place: int) -> None:
    prompt = random_ids(3, 10)
    answer = continuation(prompt)
    engine = speculating(tiny_model("llama"), SMALL, knowing_all([prompt], mistakes=0.0))
    stop = answer[place]
    (output,) = engine.generate(prompt, params_of(max_tokens=NEW_TOKENS, stop_token_ids=[stop]))
    assert output.token_ids == answer[: answer.index(stop) + 1]
    assert (output.finish_reason, output.stopped_by) == ("stop", stop)
    held = engine.cache.peek([*prompt, *answer])
    assert held == len(prompt) + len(output.token_ids) - 1, "what follows the end in the draft is not shared"


@pytest.mark.parametrize("max_tokens", [1, 2, 17, *(pytest.param(num, marks=pytest.mark.stress) for num in (5, 18))])
def test_max_tokens_is_kept_to_the_token(max_tokens: int) -> None:
    prompt = random_ids(4, 10)
    engine = speculating(tiny_model("llama"), SMALL, knowing_all([prompt], mistakes=0.0))
    (output,) = engine.generate(prompt, params_of(max_tokens=max_tokens))
    assert output.token_ids == continuation(prompt, max_tokens)
    assert output.finish_reason == "length"


def test_rejected_tokens_are_not_cached_and_their_pages_go_back() -> None:
    prompt = random_ids(5, 9)
    wrong = Knowing([*prompt, *continuation(prompt, 40)], mistakes=1.0)
    parts = assemble(tiny_model("llama"), None, replace(SMALL, page_size=2))
    parts = replace(parts, speculation=Speculation(wrong, VOCAB_SIZE, always=True))
    core = EngineCore(parts)
    (request,) = parts.new_intake().make(np.array(prompt, np.int32), GREEDY, CacheOptions(), streams=False)
    core.add(request)
    while core.has_work:
        core.step()
        core.check_invariants()
        if request.lease is not None:
            assert request.lease.capacity_tokens == -(-request.num_tokens // 2) * 2
    output = request.output()
    assert output.token_ids == continuation(prompt)
    assert output.accepted_tokens < output.drafted_tokens
    held = sum(node.num_tokens for _, node in core.cache.nodes())
    assert held == core.cache.peek([*prompt, *output.token_ids]) == len(prompt) + NEW_TOKENS - 1
    assert core.stats().free_pages == 256 - -(-held // 2)


def test_a_full_pool_gives_drafts_what_is_left_and_retracts_nobody_for_them() -> None:
    prompts = random_prompts(6, [14, 14, 14], shared=0)
    config = EngineConfig(page_size=1, kv_cache_tokens=3 * (14 + 10), max_batch_tokens=64)
    plain = Engine(tiny_model("llama"), config=config)
    plain.generate(prompts, params_of(max_tokens=10))
    engine = speculating(tiny_model("llama"), config, knowing_all(prompts))
    outputs = engine.generate(prompts, params_of(max_tokens=10))
    assert [output.token_ids for output in outputs] == [continuation(prompt, 10) for prompt in prompts]
    assert engine.stats().retractions <= plain.stats().retractions


def test_retracted_requests_go_on_with_drafts() -> None:
    prompts = random_prompts(7, [14, 11, 9, 16], shared=4)
    config = EngineConfig(page_size=2, kv_cache_tokens=72, max_batch_tokens=16)
    engine = speculating(tiny_model("llama"), config, knowing_all(prompts))
    outputs = engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [continuation(prompt) for prompt in prompts]
    assert engine.stats().retractions > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 12, "sinks": 2},
        {"kv_cache_dtype": "int8", "page_size": 16},  # which Numba reads; Triton, which reads all, is interpreted
        pytest.param({"kv_cache_dtype": "fp8_e4m3"}, marks=pytest.mark.stress),
    ],
)
def test_windows_and_quantised_pools_give_what_they_give_without_drafts(settings: dict[str, Any]) -> None:
    config = EngineConfig(**{"page_size": 4, "kv_cache_tokens": 256, "max_batch_tokens": 32, **settings})
    prompts = random_prompts(8, [30, 21], shared=8)
    expected = Engine(tiny_model("llama"), config=config).generate(prompts, GREEDY)
    known = Knowing(*[[*output.prompt_token_ids, *output.token_ids] for output in expected])
    outputs = speculating(tiny_model("llama"), config, known).generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert drafted(outputs)[1] > 0


def test_a_request_may_do_without() -> None:
    prompts = random_prompts(9, [10, 10], shared=0)
    knowing = knowing_all(prompts)
    outputs = speculating(tiny_model("llama"), SMALL, knowing).generate(
        prompts, [GREEDY, replace(GREEDY, speculate=False)]
    )
    assert outputs[0].drafted_tokens > 0
    assert outputs[1].drafted_tokens == 0
    assert {text.request_id for text in knowing.asked} == {0}


def test_drafters_see_texts_as_they_are_and_how_much_is_wanted() -> None:
    prompt = random_ids(10, 10)
    knowing = knowing_all([prompt])
    engine = speculating(tiny_model("llama"), SMALL, knowing)
    (output,) = engine.generate(prompt, params_of(max_tokens=6), extra_key="tenant")
    whole = [*prompt, *output.token_ids]
    for text in knowing.asked:
        assert text.token_ids.tolist() == whole[: len(text.token_ids)]
        assert (text.num_prompt, text.namespace) == (10, ("tenant", None))
        assert text.most == len(whole) - len(text.token_ids) - 1


# -- transforms --------------------------------------------------------------------------------------------------------


class EvenTokens:
    """Allows even tokens alone; says so beforehand if it `foresees`. Fails after `fails_after` tokens."""

    def __init__(self, foresees: bool, fails_after: int = 99) -> None:
        self.started: list[int] = []
        self.fails_after = fails_after
        if foresees:
            self.num_allowed = self._num_allowed

    def start(self, token_ids: Sequence[int]) -> None:
        self.started.append(len(token_ids))
        if len(token_ids) == self.fails_after:
            raise ValueError("no more")

    def apply(self, logits: Tensor) -> None:
        logits[1::2] = -torch.inf

    def _num_allowed(self, output_ids: Sequence[int], token_ids: Sequence[int]) -> int:
        odd = [place for place, token_id in enumerate(token_ids) if token_id % 2]
        return odd[0] if odd else len(token_ids)


@pytest.mark.parametrize("foresees", [False, True])
def test_a_transform_is_asked_for_each_token_in_turn(foresees: bool) -> None:
    prompt = random_ids(11, 10)
    (plain,) = Engine(tiny_model("llama"), config=SMALL).generate(
        prompt, params_of(logits_transform=lambda: EvenTokens(foresees))
    )
    made: list[EvenTokens] = []

    def make() -> EvenTokens:
        made.append(EvenTokens(foresees))
        return made[-1]

    knowing = Knowing([*prompt, *plain.token_ids], mistakes=0.6)
    (output,) = speculating(tiny_model("llama"), SMALL, knowing).generate(prompt, params_of(logits_transform=make))
    assert output.token_ids == plain.token_ids
    assert made[0].started == list(range(20)), "once for each length"
    assert drafted([output])[1] > 0
    if foresees:  # all mistakes are odd tokens
        assert output.accepted_tokens == output.drafted_tokens


def test_a_transform_that_fails_within_a_draft_fails_its_request_alone() -> None:
    prompts = random_prompts(12, [10, 10], shared=0)
    engine = speculating(tiny_model("llama"), SMALL, knowing_all(prompts, mistakes=0.0))
    failing = params_of(logits_transform=lambda: EvenTokens(False, fails_after=3))
    outputs = engine.generate(prompts, [failing, params_of()])
    assert [output.finish_reason for output in outputs] == ["error", "length"]
    assert outputs[1].token_ids == continuation(prompts[1], 20)
    assert engine.stats().running == 0


def test_a_transform_that_fails_to_tell_what_it_allows_fails_its_request_alone() -> None:
    class Fails(EvenTokens):
        def _num_allowed(self, output_ids: Sequence[int], token_ids: Sequence[int]) -> int:
            raise ZeroDivisionError("a grammar without end")

    prompts = random_prompts(12, [10, 10], shared=0)
    engine = speculating(tiny_model("llama"), SMALL, knowing_all(prompts, mistakes=0.0))
    outputs = engine.generate(prompts, [params_of(logits_transform=lambda: Fails(True)), params_of()])
    assert isinstance(outputs[0].error, ZeroDivisionError)
    assert outputs[1].token_ids == continuation(prompts[1], 20)
    assert engine.stats().running == 0


# -- failures ----------------------------------------------------------------------------------------------------------


class Failing:
    """Raises what it is told to."""

    def __init__(self, draft: Draft | None = None) -> None:
        self._draft = draft

    def draft(self, texts: Sequence[Text]) -> list[Draft]:
        if self._draft is None:
            raise RuntimeError("no idea")
        return [self._draft] * len(texts)

    def ended(self, request_id: int) -> None:
        if self._draft is None:
            raise RuntimeError("who?")


def test_an_engine_goes_on_without_a_drafter_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    prompt = random_ids(13, 10)
    engine = speculating(tiny_model("llama"), SMALL, Failing())
    (output,) = engine.generate(prompt, GREEDY)
    assert output.token_ids == continuation(prompt)
    assert "goes on without drafts" in caplog.text


def test_tokens_that_the_model_does_not_know_are_cut_off_and_drafts_that_are_too_long_too() -> None:
    prompt = random_ids(14, 10)
    answer = continuation(prompt)
    draft = Draft(np.array([answer[1], VOCAB_SIZE, 1], np.int32), "wild")
    (output,) = speculating(tiny_model("llama"), SMALL, Failing(draft)).generate(prompt, GREEDY)
    assert output.token_ids == answer
    assert output.drafted_by["wild"] <= NEW_TOKENS
    long = Draft(np.full(1000, answer[0], np.int32), "long")
    (output,) = speculating(tiny_model("llama"), SMALL, Failing(long)).generate(prompt, params_of(max_tokens=5))
    assert output.token_ids == answer[:5]


def test_bad_logits_within_a_draft_fail_the_request_that_gets_there() -> None:
    prompts = random_prompts(15, [10, 10], shared=0)
    answer = continuation(prompts[0])
    poisoned = answer[4]

    def around(step: StepInput, compute: Callable[[], Tensor]) -> Tensor:
        logits = compute().clone()
        ids = step.token_ids[step.logits_of]
        mine = np.array(step.request_ids)[np.searchsorted(step.layout.qo_indptr, step.logits_of, side="right") - 1] == 0
        logits[torch.from_numpy((ids == poisoned) & mine)] = torch.nan
        return logits

    parts = assemble(tiny_model("llama"), None, SMALL)
    speculation = Speculation(knowing_all(prompts, mistakes=0.0), VOCAB_SIZE, always=True)
    parts = replace(parts, runner=TamperedRunner(parts.runner, around), speculation=speculation)
    outputs = Engine.from_parts(parts).generate(prompts, GREEDY)
    assert [output.finish_reason for output in outputs] == ["error", "length"]
    assert outputs[0].token_ids == answer[: answer.index(poisoned) + 1]
    assert outputs[1].token_ids == continuation(prompts[1])


# -- what it says ------------------------------------------------------------------------------------------------------


def test_outputs_and_statistics_say_what_drafts_did() -> None:
    prompt = random_ids(16, 10)
    engine = speculating(tiny_model("llama"), SMALL, knowing_all([prompt]))
    (output,) = engine.generate(prompt, replace(GREEDY, n=2))
    stats = engine.stats()
    assert stats.speculation is not None
    (source,) = stats.speculation.sources
    assert source == ("knowing", *drafted([output]))
    assert (output.usage.drafted_tokens, output.usage.accepted_tokens) == drafted([output])
    assert stats.generated_tokens == 2 * NEW_TOKENS
    assert stats.generated_tokens == stats.sampled_steps + stats.speculation.accepted_tokens
    assert stats.tokens_per_step == stats.generated_tokens / stats.sampled_steps > 1
    assert stats.speculation.drafting_s > 0
    plain = Engine(tiny_model("llama"), config=SMALL)
    assert plain.stats().tokens_per_step == 0.0
    plain.generate(prompt, GREEDY)
    assert (plain.stats().tokens_per_step, plain.stats().speculation) == (1.0, None)


def test_streams_give_several_tokens_at_a_time_in_order() -> None:
    prompt = random_ids(17, 10)
    engine = speculating(tiny_model("llama"), SMALL, knowing_all([prompt], mistakes=0.1))
    pieces = list(engine.stream(prompt, replace(GREEDY, logprobs=0)))
    assert [token_id for piece in pieces for token_id in piece.token_ids] == continuation(prompt)
    assert max(len(piece.token_ids) for piece in pieces) > 1
    assert all(len(piece.logprobs or ()) == len(piece.token_ids) for piece in pieces)
    assert [piece.output is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_an_async_engine_takes_a_drafter_too() -> None:
    prompt = random_ids(18, 10)

    async def main() -> RequestOutput:
        async with AsyncEngine(tiny_model("llama"), config=SMALL, drafter=knowing_all([prompt])) as engine:
            (output,) = await engine.generate([prompt], GREEDY)
            return output

    output = asyncio.run(main())
    assert output.token_ids == continuation(prompt)


def test_the_setting_drafts_from_the_cache() -> None:
    prompt = random_ids(19, 10)
    engine = Engine(tiny_model("llama"), config=replace(SMALL, speculate="cache"))
    for _ in range(3):
        (output,) = engine.generate(prompt, GREEDY)
        assert output.token_ids == continuation(prompt)
    assert engine.config.speculate == "cache"
    assert engine.stats().speculation is not None


# -- a second model ----------------------------------------------------------------------------------------------------


def test_a_second_model_drafts_in_pages_of_its_own() -> None:
    prompts = random_prompts(20, [20, 12], shared=8)
    small = Engine(tiny_model("llama"), config=SMALL)
    engine = speculating(tiny_model("llama"), SMALL, ModelDrafter(small, num_tokens=3))
    outputs = engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [continuation(prompt) for prompt in prompts]
    assert outputs[0].accepted_by == outputs[0].drafted_by, "the same model is always right"
    assert engine.stats().tokens_per_step > 3
    assert small.stats().computed_tokens < 3 * (20 + 12 + 2 * NEW_TOKENS), "what it computed before is found again"


def test_a_second_model_that_knows_less_drafts_less() -> None:
    prompt = random_ids(21, 40)
    other = Engine(tiny_model("llama", seed=1), config=replace(SMALL, max_context_tokens=50))
    engine = speculating(tiny_model("llama"), SMALL, ModelDrafter(other))
    (output,) = engine.generate(prompt, GREEDY, extra_key="tenant")
    assert output.token_ids == continuation(prompt)
    assert output.drafted_tokens > 0
    assert other.cache.peek(prompt) == 0
    assert other.cache.peek(prompt, extra_key="tenant") > 0
    with pytest.raises(ConfigError, match="num_tokens must be at least 1, not 0"):
        ModelDrafter(other, num_tokens=0)
