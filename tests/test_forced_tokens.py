"""Tokens that a transform forces are taken without a step for each, and everything else stays as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from drafters import Knowing, speculating
from prompts import random_ids, random_prompts
from radixkv import Engine, EngineConfig, RequestOutput, SamplingParams
from radixkv.engine.assembly import assemble
from radixkv.engine.drafts.drafter import NO_DRAFT, Draft, Text
from radixkv.engine.drafts.speculation import Speculation
from radixkv.engine.gpu_sampling import DeviceSampler
from radixkv.engine.sampling import Sampler
from radixkv.engine.step_input import StepInput
from radixkv.engine.step_times import StepTimes
from radixkv.errors import InvalidRequestError
from recurrent_models import recurrent_model
from runners import Around, checked, tampered_parts
from tiny_models import VOCAB_SIZE, tiny_model

SMALL = EngineConfig(page_size=4, kv_cache_tokens=512, max_batch_tokens=64)
SCRIPT = [5, 6, 7, 8, 9, 10, 11]


class Form:
    """After some free tokens come those of `script`, and so on; only if it `tells`, it says so beforehand."""

    def __init__(self, tells: bool, script: Sequence[int] = SCRIPT, num_free: int = 2) -> None:
        self.script = list(script)
        self.num_free = num_free
        self.started: list[int] = []
        self.asked: list[int] = []
        self._output: list[int] = []
        if tells:
            self.forced = self._forced

    def start(self, token_ids: Sequence[int]) -> None:
        self.started.append(len(token_ids))
        self._output = list(token_ids)

    def apply(self, logits: Tensor) -> None:
        if rest := self._rest(len(self._output)):
            kept = logits[rest[0]].clone()
            logits.fill_(-torch.inf)
            logits[rest[0]] = kept

    def _forced(self, token_ids: Sequence[int]) -> list[int]:
        self.asked.append(len(token_ids))
        return self._rest(len(token_ids))

    def _rest(self, num_tokens: int) -> list[int]:
        place = num_tokens % (self.num_free + len(self.script)) - self.num_free
        return self.script[place:] if place >= 0 else []


def params_of(tells: bool = True, script: Sequence[int] = SCRIPT, **asked: Any) -> SamplingParams:
    form = {"logits_transform": lambda: Form(tells, script)}
    return SamplingParams(**{"max_tokens": 30, "ignore_eos": True, **form, **asked})


class Flat(StepTimes):
    """Says that steps of all sizes take equally long, or that more than the least is never worth it."""

    def __init__(self, is_flat: bool = True) -> None:
        super().__init__()
        self._is_flat = is_flat

    def fastest_size(self, least: int, most: int) -> int:
        return most if self._is_flat else least


def engine_of(times: StepTimes | None = None, model: PreTrainedModel | None = None, **more: Any) -> Engine:
    """An engine that proves its invariants after each step, and computes as much forced text as `times` allow."""
    parts = assemble(model or tiny_model("llama"), None, replace(SMALL, **more))
    return checked(Engine.from_parts(replace(parts, step_times=times or Flat())))


def assert_same(outputs: Sequence[RequestOutput], expected: Sequence[RequestOutput]) -> None:
    for output, other in zip(outputs, expected, strict=True):
        assert str(output.error) == str(other.error).replace(
            f"request {other.request_id}", f"request {output.request_id}"
        )
        for choice, other_choice in zip(output.choices, other.choices, strict=True):
            assert choice.token_ids == other_choice.token_ids
            assert (choice.finish_reason, choice.stopped_by) == (other_choice.finish_reason, other_choice.stopped_by)
        assert output.usage == other.usage


def num_forced(outputs: Sequence[RequestOutput]) -> int:
    return sum(choice.forced_tokens for output in outputs for choice in output.choices)


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.3, "seed": 5},
    "top_k": {"temperature": 2.0, "seed": 6, "top_k": 20},
    "top_p": {"temperature": 2.0, "seed": 6, "top_p": 0.9},
    "min_p": {"temperature": 2.0, "seed": 6, "min_p": 0.02, "top_k": 999},
    "choices": {"temperature": 0.9, "seed": 7, "n": 3},
    "penalties": {"repetition_penalty": 1.5, "frequency_penalty": 1.0},
    "bias": {"logit_bias": {50: 4.0, 60: 3.0}, "presence_penalty": 2.0},
    "stop within": {"stop_token_ids": [8]},
    "stop within, later": {"stop_token_ids": [8], "min_tokens": 5},
    "stop within, too early": {"stop_token_ids": [8], "min_tokens": 6},
    "cut short": {"max_tokens": 5},
    "one token": {"max_tokens": 1},
}


@pytest.mark.parametrize("asked", ASKED)
def test_options_give_what_they_give_where_each_token_is_chosen(asked: str) -> None:
    """Seeded requests draw the very same tokens: what is forced takes as much from their generators."""
    prompts = random_prompts(2, [20, 9, 31], shared=4)
    expected = engine_of().generate(prompts, params_of(tells=False, **ASKED[asked]))
    params = params_of(**ASKED[asked])
    outputs = engine_of().generate(prompts, params)
    assert_same(outputs, expected)
    assert num_forced(expected) == 0
    assert (num_forced(outputs) > 0) == (params.max_tokens > 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"page_size": 1},
        {"max_batch_tokens": 4, "max_running_requests": 4},
        {"kv_cache_tokens": 88, "page_size": 2, "max_batch_tokens": 16},
        {"window": 12, "sinks": 2, "kv_cache_tokens": 128},
        {"prefix_cache": False},
        {"fused_layers": False},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_any_engine_gives_what_it_gives_where_each_token_is_chosen(settings: dict[str, Any]) -> None:
    prompts = random_prompts(3, [14, 11, 9, 16, 40], shared=4)
    script = list(range(20, 35))  # longer than some budgets, and than some pages
    expected = engine_of(**settings).generate(prompts, params_of(tells=False, script=script))
    for is_flat in (True, False):
        engine = engine_of(Flat(is_flat), **settings)
        outputs = engine.generate(prompts, params_of(script=script))
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
        assert num_forced(outputs) > 0
        if settings.get("kv_cache_tokens") == 88:
            assert engine.stats().retractions > 0


@pytest.mark.parametrize("family", ["qwen3_next", "jamba"])
def test_recurrent_layers_pass_over_forced_tokens(family: str) -> None:
    config: dict[str, Any] = {"kv_cache_tokens": 1024, "max_batch_tokens": 24, "page_size": 8}
    prompts = random_prompts(4, [33, 20], shared=16)
    found = []
    for tells in (False, True):
        with engine_of(model=recurrent_model(family), state_interval_tokens=16, **config) as engine:
            found.append(engine.generate(prompts, params_of(tells)))
    assert_same(found[1], found[0])
    assert num_forced(found[1]) > 0


def test_drafts_are_made_and_checked_between_them() -> None:
    prompts = random_prompts(5, [20, 9], shared=4)
    expected = engine_of().generate(prompts, params_of(tells=False))
    knowing = Knowing(*[[*output.prompt_token_ids, *output.token_ids] for output in expected])
    engine = speculating(tiny_model("llama"), SMALL, knowing)
    outputs = engine.generate(prompts, params_of())
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert sum(output.accepted_tokens for output in outputs) > 0
    assert num_forced(outputs) > 0
    stats = engine.stats()
    assert stats.speculation is not None
    assert stats.generated_tokens == stats.sampled_steps + stats.speculation.accepted_tokens + stats.forced_tokens


def watched(around: Around, times: StepTimes | None = None) -> Engine:
    """An engine with `around` around its runner."""
    parts = replace(tampered_parts(tiny_model("llama"), around, SMALL), step_times=times or Flat())
    return checked(Engine.from_parts(parts))


def test_a_transform_is_started_and_asked_once_for_each_token_that_is_chosen() -> None:
    made: list[Form] = []
    steps: list[int] = []

    def make() -> Form:
        made.append(Form(True))
        return made[-1]

    def watch(step: StepInput, compute: Any) -> Tensor:
        steps.append(len(step.token_ids))
        return compute()

    engine = watched(watch)
    (output,) = engine.generate(random_ids(6, 10), params_of(max_tokens=20, logits_transform=make))
    assert made[0].started == [0, 1, 9, 10, 18, 19], "two free tokens, seven forced ones, and so on"
    assert made[0].asked == [1, 2, 10, 11, 19]
    assert steps == [10, 1, 8, 1, 8, 1], "each token is computed once, together with those forced after it"
    stats = engine.stats()
    assert (output.forced_tokens, stats.forced_tokens, stats.generated_tokens, stats.sampled_steps) == (14, 14, 20, 6)
    assert stats.tokens_per_step == 20 / 6


@pytest.mark.parametrize("asked", [{"speculate": False}, {"logprobs": 1}])
def test_some_requests_have_each_token_chosen(asked: dict[str, Any]) -> None:
    made: list[Form] = []

    def make() -> Form:
        made.append(Form(True))
        return made[-1]

    (output,) = engine_of().generate(random_ids(7, 10), params_of(logits_transform=make, **asked))
    assert (output.forced_tokens, made[0].asked) == (0, [])
    assert made[0].started == list(range(30))


@pytest.mark.parametrize("script", [[VOCAB_SIZE], [7, -1]])
def test_tokens_that_the_model_does_not_know_fail_the_request_alone(script: list[int]) -> None:
    prompts = random_prompts(8, [10, 12], shared=0)
    engine = engine_of()
    outputs = engine.generate(prompts, [params_of(script=script), params_of()])
    assert isinstance(outputs[0].error, InvalidRequestError)
    assert str(outputs[0].error) == (
        f"tokens that a logits_transform forces must be from 0 to {VOCAB_SIZE - 1}, not {script[-1]}"
    )
    assert_same(outputs[1:], engine_of().generate(prompts[1:], params_of(tells=False)))
    assert engine.stats().running == 0


def test_forced_tokens_may_be_integers_of_any_kind_and_nothing_else() -> None:
    class Numbers(Form):
        def _forced(self, token_ids: Sequence[int]) -> Any:
            return np.array(super()._forced(token_ids), np.float64 if len(token_ids) > 10 else np.int64)

    (output,) = engine_of().generate(random_ids(9, 10), params_of(logits_transform=lambda: Numbers(True)))
    assert isinstance(output.error, TypeError)
    assert len(output.token_ids) == 11
    assert {type(token_id) for token_id in output.token_ids} == {int}


def test_drafts_are_thought_of_although_each_step_computes_forced_tokens() -> None:
    class Nothing:
        def draft(self, texts: Sequence[Text]) -> list[Draft]:
            return [NO_DRAFT] * len(texts)

        def ended(self, request_id: int) -> None:
            pass

    parts = assemble(tiny_model("llama"), None, SMALL)
    speculation = Speculation(Nothing(), VOCAB_SIZE, times=parts.step_times)
    engine = Engine.from_parts(replace(parts, speculation=speculation))
    assert not speculation.is_on, "nothing is known of steps"
    params = params_of(max_tokens=20, logits_transform=lambda: Form(True, num_free=1))
    (output,) = engine.generate(random_ids(9, 10), params)
    assert output.forced_tokens == 17, "in each step but the first"
    assert speculation.is_on


def test_a_transform_that_fails_to_tell_fails_its_request_alone() -> None:
    class Fails(Form):
        def _rest(self, num_tokens: int) -> list[int]:
            if num_tokens == 4:
                raise ZeroDivisionError("a grammar without end")
            return []

    prompts = random_prompts(9, [10, 12], shared=0)
    outputs = engine_of().generate(prompts, [params_of(logits_transform=lambda: Fails(True)), params_of()])
    assert isinstance(outputs[0].error, ZeroDivisionError)
    assert len(outputs[0].token_ids) == 4
    assert outputs[1].error is None


@pytest.mark.parametrize("filters", [{}, {"top_k": 7}, {"top_k": 999}, {"top_p": 0.5}, {"top_k": 7, "min_p": 0.1}])
def test_the_generator_goes_on_as_if_the_token_had_been_drawn(filters: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0.8, **filters)
    logits = torch.full((VOCAB_SIZE,), -torch.inf)
    logits[17] = 0.3
    drawn, passed = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    assert Sampler().draw(logits, params, drawn) == 17
    Sampler().pass_over(VOCAB_SIZE, params, passed)
    assert torch.equal(drawn.get_state(), passed.get_state())


def test_longer_steps_are_taken_only_where_they_bring_more_tokens_a_second() -> None:
    times, steps = StepTimes(), []

    def watch(step: StepInput, compute: Any) -> Tensor:
        steps.append(len(step.token_ids))
        return compute()

    prompts = random_prompts(11, [12, 12, 12], shared=0)
    expected = engine_of().generate(prompts, params_of(tells=False))
    engine = watched(watch, times)
    for num_tokens in (3, *range(4, 17), 20, 24):
        for _ in range(50):  # a single measurement counts for little
            times.note(num_tokens, 1.0 * num_tokens**2)
    outputs = engine.generate(prompts, params_of())
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert num_forced(outputs) > 30
    assert all(num_tokens <= 3 for num_tokens in steps[1:]), steps


def test_prompts_are_computed_beside_long_forced_text() -> None:
    engine = engine_of(max_batch_tokens=16)
    params = params_of(max_tokens=200, script=range(20, 120))
    streams = [engine.stream(prompt, params) for prompt in random_prompts(12, [6, 6], shared=0)]
    for stream in streams:
        next(stream)
    before = engine.stats().steps
    (output,) = engine.generate(random_ids(13, 30), SamplingParams(max_tokens=1))
    assert len(output.token_ids) == 1
    assert engine.stats().steps - before <= 30 // 8 + 2, "half of each step is left to the prompt"
    for stream in streams:
        stream.close()


class Draws:
    """Kernels that draw on the device."""

    def softmax(self, logits: Tensor, temperatures: Tensor) -> Tensor:
        return (logits / temperatures[:, None]).softmax(-1)

    def draw(self, probabilities: Tensor, *, generator: torch.Generator, **filters: Any) -> Tensor:
        return probabilities.multinomial(1, generator=generator)[:, 0].int()


class NeverPassesOver(Sampler):
    def pass_over(self, vocab_size: int, params: SamplingParams, generator: torch.Generator) -> None:
        raise AssertionError("the request's own generator draws nothing")


def test_generators_that_draw_nothing_pass_over_nothing() -> None:
    parts = assemble(tiny_model("llama"), None, SMALL)
    sampler = DeviceSampler(Draws(), torch.device("cpu"), 0)
    engine = Engine.from_parts(replace(parts, sampler=NeverPassesOver(), device_sampler=sampler))
    (output,) = engine.generate(random_ids(1, 10), params_of(temperature=1.0))
    assert (output.error, output.forced_tokens) == (None, 22)
    (output,) = engine.generate(random_ids(1, 10), params_of(temperature=1.0, seed=3))
    assert isinstance(output.error, AssertionError), "with a seed it draws"


def test_others_that_share_a_prompt_do_not_wait_for_forced_tokens() -> None:
    """A prompt that is computed is there to be shared, whatever its request has to compute besides."""
    shared = random_ids(10, 40)
    steps: list[int] = []

    def watch(step: StepInput, compute: Any) -> Tensor:
        steps.append(len(step.token_ids))
        return compute()

    engine = watched(watch)
    params = params_of(max_tokens=12, logits_transform=lambda: Form(True, range(30, 39), num_free=1))
    outputs = engine.generate([[*shared, 1], [*shared, 2], [*shared, 3]], params)
    assert [output.cached_tokens for output in outputs] == [0, 40, 40]
    assert steps == [41, 10 + 1 + 1, 10 + 10]
