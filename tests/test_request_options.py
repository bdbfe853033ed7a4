"""What `SamplingParams` asks of an engine: penalties, transforms, ends, log probabilities; alone and in batches."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prompts import random_ids
from radixkv import Engine, RequestOutput, SamplingParams, Usage
from radixkv.engine.gpu_sampling import DeviceSampler
from radixkv.engine.scheduler import MAX_PROMPT_LOGITS
from radixkv.engine.step_input import StepInput
from radixkv.errors import InvalidRequestError, InvalidSamplingParamsError, NonFiniteLogitsError
from tiny_models import VOCAB_SIZE, tiny_model

MakeEngine = Callable[..., Engine]
Compute = Callable[[], Tensor]
ASKED: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"logit_bias": {5: 100.0, 6: 99.0}, "presence_penalty": 2.0},
    {"temperature": 1.5, "seed": 3, "frequency_penalty": -1.0},
    {"temperature": 1.5, "seed": 4, "repetition_penalty": 0.8, "top_p": 0.9, "logprobs": 2},
]


@cache
def unmodified() -> PreTrainedModel:
    """The model that the engines are made of, before one of them takes it over."""
    return tiny_model("llama")


@torch.inference_mode()
def model_logits(ids: Sequence[int]) -> Tensor:
    """The unmodified model's logits of each token, [tokens, vocab_size]."""
    logits: Tensor = unmodified()(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def theirs(prompt: list[int], num_tokens: int, **options: Any) -> list[int]:
    """What transformers' own `generate` answers, greedily."""
    ids = unmodified().generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    return ids[0, len(prompt) :].tolist()


def params_of(**asked: Any) -> SamplingParams:
    return SamplingParams(max_tokens=20, ignore_eos=True, **asked)


def test_repetition_penalty_gives_the_tokens_of_transformers(make_engine: MakeEngine) -> None:
    engine, prompt = make_engine(), random_ids(1, 20)
    for penalty in (1.3, 2.0):
        (output,) = engine.generate(prompt, params_of(repetition_penalty=penalty))
        assert output.token_ids == theirs(prompt, 20, repetition_penalty=penalty)


@pytest.mark.parametrize("ahead", [False, True], ids=["on the CPU", "with a device sampler"])
def test_alone_batched_and_retracted_give_the_same(make_engine: MakeEngine, ahead: bool) -> None:
    parts = {"device_sampler": DeviceSampler(None, torch.device("cpu"), seed=0)} if ahead else {}
    prompts = [random_ids(seed, 9) for seed in range(len(ASKED))]
    all_params = [params_of(**asked) for asked in ASKED]
    engine = make_engine(parts=parts)
    alone = [engine.generate(prompt, p)[0] for prompt, p in zip(prompts, all_params, strict=True)]
    assert len({tuple(output.token_ids) for output in alone}) == len(alone)
    small = make_engine(kv_cache_tokens=72, max_batch_tokens=8, parts=parts)
    for other in (make_engine(parts=parts), small):
        together = other.generate(prompts, all_params)
        assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert small.stats().retractions > 0


def test_log_probabilities_are_of_the_model_without_edits(make_engine: MakeEngine) -> None:
    engine, prompt = make_engine(), random_ids(1, 20)
    (output,) = engine.generate(prompt, SamplingParams(max_tokens=3, logit_bias={5: 100}, logprobs=2, ignore_eos=True))
    assert output.token_ids == [5, 5, 5]
    values = model_logits([*prompt, 5, 5]).log_softmax(-1)[-3:]
    assert output.logprobs is not None
    assert [entry.logprob for entry in output.logprobs] == pytest.approx(values[:, 5].tolist(), abs=1e-4)
    pieces = list(engine.stream(prompt, SamplingParams(max_tokens=3, logit_bias={5: 100}, logprobs=2, ignore_eos=True)))
    assert [len(piece.logprobs or []) for piece in pieces] == [len(piece.token_ids) for piece in pieces]


# -- prompts -----------------------------------------------------------------------------------------------------------


def check_prompt(output: RequestOutput, num_top: int) -> None:
    """Prove that the log probabilities of the prompt are the unmodified model's."""
    ids, entries = output.prompt_token_ids, output.prompt_logprobs
    assert entries is not None
    assert (len(entries), entries[0]) == (len(ids), None)
    values = model_logits(ids).log_softmax(-1)
    for position, entry in enumerate(entries[1:], 1):
        assert entry is not None
        assert entry.token_id == ids[position]
        assert entry.logprob == pytest.approx(float(values[position - 1, ids[position]]), abs=1e-4)
        expected = values[position - 1].topk(num_top).values.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 2048])
def test_log_probabilities_of_a_prompt_are_the_models(make_engine: MakeEngine, max_batch_tokens: int) -> None:
    """In chunks and in batches, whether or not the prompt is cached, which others still find."""
    engine = make_engine(max_batch_tokens=max_batch_tokens)
    head = random_ids(0, 20)
    engine.generate(head, SamplingParams(max_tokens=1))
    prompts = [[*head, *random_ids(seed, length)] for seed, length in ((1, 1), (2, 9), (3, 0))]
    asked = SamplingParams(max_tokens=2, prompt_logprobs=3, ignore_eos=True)
    others = SamplingParams(max_tokens=2, ignore_eos=True)
    outputs = engine.generate([*prompts, prompts[1], [7]], [asked, asked, asked, others, asked])
    for output in (*outputs[:3], outputs[4]):
        check_prompt(output, 3)
        assert output.cached_tokens == 0
    assert outputs[3].cached_tokens >= 20
    assert outputs[3].prompt_logprobs is None
    assert outputs[3].token_ids == outputs[1].token_ids


def test_prompts_without_tokens_and_choices_have_them(make_engine: MakeEngine) -> None:
    engine, prompt = make_engine(), random_ids(1, 21)
    (echoed,) = engine.generate(prompt, SamplingParams(max_tokens=0, prompt_logprobs=1))
    check_prompt(echoed, 1)
    (output,) = engine.generate(prompt, SamplingParams(max_tokens=3, n=3, prompt_logprobs=0, temperature=1.0))
    check_prompt(output, 0)
    assert [choice.prompt_logprobs is None for choice in output.choices] == [False, True, True]
    assert output.usage[:3] == (21, 0, 0)
    first, *_ = (p for p in engine.stream(prompt, SamplingParams(max_tokens=3, prompt_logprobs=1)))
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == 21


def test_a_retraction_amid_the_prompt_loses_none(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_tokens=96, max_batch_tokens=6)
    prompts = [random_ids(seed, 40) for seed in range(4)]
    asked = SamplingParams(max_tokens=12, prompt_logprobs=2, ignore_eos=True)
    outputs = engine.generate(prompts, [SamplingParams(max_tokens=50, ignore_eos=True), asked, asked, asked])
    assert sum(output.metrics.retractions for output in outputs[1:]) > 0
    for output in outputs[1:]:
        check_prompt(output, 2)


def test_a_step_has_few_logits_of_prompts(make_engine: MakeEngine) -> None:
    rows: list[int] = []

    def count(step: StepInput, compute: Compute) -> Tensor:
        rows.append(len(step.logits_of))
        return compute()

    engine = make_engine(around=count, kv_cache_tokens=4096, max_context_tokens=1024)
    prompts = [random_ids(seed, 400) for seed in range(3)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert max(rows) <= MAX_PROMPT_LOGITS + 3
    assert all(len(output.prompt_logprobs or []) == 400 for output in outputs)


# -- all together ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [pytest.param(1, marks=pytest.mark.stress), 3])
def test_a_mixture_in_a_small_pool_gives_what_each_gives_alone(make_engine: MakeEngine, page_size: int) -> None:
    rng = random.Random(page_size)
    head = random_ids(0, 30)
    prompts = [[*head[: rng.randrange(31)], *random_ids(seed, rng.randrange(1, 9))] for seed in range(1, 11)]
    more: list[dict[str, Any]] = [
        {},
        {"n": 3},
        {"prompt_logprobs": 1},
        {"n": 2, "prompt_logprobs": 0},
        {"max_tokens": 0},
    ]
    all_params = [
        SamplingParams(
            **{"max_tokens": rng.randrange(1, 30), "ignore_eos": True, **rng.choice(ASKED), **rng.choice(more)}
        )
        for _ in prompts
    ]
    engine = make_engine(page_size=page_size, kv_cache_tokens=96, max_batch_tokens=40)
    together = engine.generate(prompts, all_params)
    engine.check_invariants()
    assert engine.stats().retractions > 0
    for prompt, params, output in zip(prompts, all_params, together, strict=True):
        engine.reset_cache()
        (alone,) = engine.generate(prompt, params)
        assert [c.token_ids for c in output.choices] == [c.token_ids for c in alone.choices]
        assert {c.finish_reason for c in output.choices} == {"length"}
        assert alone.usage == Usage(len(prompt), 0, len(prompt), sum(len(c.token_ids) for c in alone.choices))
        prompt_tokens, cached, written, *_ = output.usage
        assert 0 <= cached < prompt_tokens
        assert 0 <= written <= prompt_tokens - cached
        if params.prompt_logprobs is not None:
            assert cached == 0
            check_prompt(output, params.prompt_logprobs)


# -- ends --------------------------------------------------------------------------------------------------------------


def test_nothing_ends_an_output_before_min_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine(parts={"eos_ids": frozenset([7, VOCAB_SIZE + 5])})
    likely = {7: 100.0, 8: 80.0}
    for asked, expected in (
        ({}, [7]),
        ({"min_tokens": 3}, [8, 8, 8, 7]),
        ({"min_tokens": 3, "stop_token_ids": [8]}, None),
        ({"min_tokens": 3, "ignore_eos": True}, [7] * 6),
    ):
        (output,) = engine.generate(random_ids(1, 9), SamplingParams(max_tokens=6, logit_bias=likely, **asked))
        if expected is None:
            assert not {7, 8} & set(output.token_ids[:3])
            assert (len(output.token_ids), output.stopped_by) == (4, None)
        else:
            assert output.token_ids == expected


def test_a_stop_text_counts_after_min_tokens(demo_engine: Engine) -> None:
    def answer(**asked: Any) -> RequestOutput:
        return demo_engine.generate("ROMEO:", SamplingParams(max_tokens=40, ignore_eos=True, **asked))[0]

    free, first = answer(), answer(stop="bawd")
    later = answer(stop=["€", "bawd"], min_tokens=len(first.token_ids))
    assert free.text is not None
    before, between, *_ = free.text.split("bawd")
    assert (first.text, first.stopped_by) == (before, "bawd")
    assert (later.text, later.stopped_by) == (f"{before}bawd{between}", "bawd")
    assert len(first.token_ids) < len(later.token_ids) < 40


# -- transforms --------------------------------------------------------------------------------------------------------


class Alternating:
    """Allows even ids after odd ones and odd ones after even ones; a thread makes the mask while the model runs."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._mask = torch.zeros(VOCAB_SIZE)
        self._thread = threading.Thread()

    def start(self, token_ids: Sequence[int]) -> None:
        self.asked.append(len(token_ids))
        parity = (token_ids[-1] + 1) % 2 if token_ids else 0
        self._thread = threading.Thread(target=self._make, args=(parity,))
        self._thread.start()

    def _make(self, parity: int) -> None:
        self._mask = torch.where(torch.arange(VOCAB_SIZE) % 2 == parity, 0.0, -math.inf)

    def apply(self, logits: Tensor) -> None:
        self._thread.join()
        logits += self._mask


def test_a_transform_decides_and_starts_before_the_forward_pass(make_engine: MakeEngine) -> None:
    made: list[Alternating] = []
    ready: list[list[int]] = []

    def make() -> Alternating:
        made.append(Alternating())
        return made[-1]

    def watch(step: StepInput, compute: Compute) -> Tensor:
        ready.append([len(transform.asked) for transform in made])
        return compute()

    engine = make_engine(around=watch, kv_cache_tokens=72)
    params = [params_of(logits_transform=make, temperature=0.7, seed=1), params_of(), params_of(logits_transform=make)]
    prompts = [random_ids(seed, 9) for seed in range(3)]
    outputs = engine.generate(prompts, params)
    for transform, output in zip(made, (outputs[0], outputs[2]), strict=True):
        assert [token_id % 2 for token_id in output.token_ids] == [0, 1] * 10
        assert transform.asked == list(range(20)), "once for each token"
    assert ready[0] == [1, 1], "started when the model runs"
    assert outputs[1].token_ids == make_engine().generate(prompts[1], params[1])[0].token_ids


class Fails:
    """Raises at a token, in `start` or in `apply`."""

    def __init__(self, where: str) -> None:
        self._where, self._length = where, 0

    def start(self, token_ids: Sequence[int]) -> None:
        self._length = len(token_ids)
        self._fail("start")

    def apply(self, logits: Tensor) -> None:
        self._fail("apply")

    def _fail(self, where: str) -> None:
        if where == self._where and self._length == 3:
            raise ZeroDivisionError("a grammar without end")


@pytest.mark.parametrize("where", ["start", "apply"])
@pytest.mark.parametrize("ahead", [False, True], ids=["on the CPU", "with a device sampler"])
def test_a_transform_that_raises_fails_its_request_alone(make_engine: MakeEngine, where: str, ahead: bool) -> None:
    parts = {"device_sampler": DeviceSampler(None, torch.device("cpu"), seed=0)} if ahead else {}
    engine = make_engine(parts=parts)
    params = [params_of(), params_of(logits_transform=lambda: Fails(where)), params_of()]
    outputs = engine.generate([random_ids(seed, 9) for seed in range(3)], params)
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert isinstance(outputs[1].error, ZeroDivisionError)
    assert len(outputs[1].token_ids) == 3
    (alone,) = engine.generate(random_ids(1, 9), params[1])
    assert isinstance(alone.error, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        list(engine.stream(random_ids(1, 9), params[1]))
    assert engine.stats().cache.num_leases == 0


class Forbids:
    """Allows no token."""

    def start(self, token_ids: Sequence[int]) -> None:
        pass

    def apply(self, logits: Tensor) -> None:
        logits.fill_(-torch.inf)


def test_no_token_left_is_the_requests_own_error(make_engine: MakeEngine) -> None:
    engine = make_engine()
    outputs = engine.generate([random_ids(1, 9)] * 2, [params_of(logits_transform=Forbids), params_of()])
    assert isinstance(outputs[0].error, InvalidRequestError)
    assert "must leave a token to choose" in str(outputs[0].error)
    assert outputs[1].error is None


def test_bad_logits_are_the_models_error_under_a_transform_too(make_engine: MakeEngine) -> None:
    def poisoned(step: StepInput, compute: Compute) -> Tensor:
        logits = compute().clone()
        logits[:, 5] = torch.nan
        return logits

    (output,) = make_engine(around=poisoned).generate(random_ids(1, 9), params_of(logits_transform=Alternating))
    assert isinstance(output.error, NonFiniteLogitsError)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, f"logit_bias holds {VOCAB_SIZE}, which is outside the model's vocabulary"),
        ({"logits_transform": dict}, "logits_transform must return an object with the methods start and apply, not {}"),
    ],
)
def test_what_the_model_cannot_serve_is_refused_at_once(
    make_engine: MakeEngine, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidSamplingParamsError, match=message):
        make_engine().generate(random_ids(1, 9), params_of(**asked))
