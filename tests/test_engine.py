"""The engine end to end on a tiny model: same tokens as the model alone, whatever happens in between."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from oracles import GreedyOracle
from prompts import random_ids
from radixkv import Engine, EngineConfig, RequestOutput, SamplingParams
from radixkv.attention import numba_backend
from radixkv.attention.metadata import AttentionMetadata
from radixkv.attention.shared_prefix import BreakEven, CascadePlan, plan_cascade
from radixkv.engine.assembly import assemble
from radixkv.engine.sampling import Sampler
from radixkv.engine.scheduler import Scheduler
from radixkv.engine.span import Span
from radixkv.engine.step_input import StepInput
from radixkv.errors import (
    ConfigError,
    InvalidRequestError,
    InvalidSamplingParamsError,
    InvalidTokenIdsError,
    MissingTokenizerError,
    NonFiniteLogitsError,
    PromptTooLongError,
    TokenIdsTypeError,
    UnsupportedBackendError,
)
from radixkv.models.loader import load

MakeEngine = Callable[..., Engine]
GREEDY_8 = SamplingParams(max_tokens=8, ignore_eos=True)


def test_prompts_of_every_type_give_the_same(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine()
    ids = random_ids(0, 21)
    expected = oracle.continuation(ids, 8)
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.int16), torch.tensor(ids)):
        (output,) = engine.generate(prompt, GREEDY_8)
        assert output.token_ids == expected
        assert output.prompt_token_ids == ids
        assert output.text is None, "there is no tokenizer"


def test_a_batch_of_mixed_lengths(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine()
    prompts = [random_ids(seed, length) for seed, length in enumerate((1, 2, 4, 5, 17, 64))]
    outputs = engine.generate(prompts, GREEDY_8)
    assert [output.token_ids for output in outputs] == [oracle.continuation(prompt, 8) for prompt in prompts]
    assert all(output.finish_reason == "length" for output in outputs)


@pytest.mark.parametrize(
    ("page_size", "schedule_policy"),
    [
        *((1, "lpm"), (3, "fcfs"), (16, "lpm")),
        *(pytest.param(*pair, marks=pytest.mark.stress) for pair in ((1, "fcfs"), (3, "lpm"), (16, "fcfs"))),
    ],
)
def test_chunked_prefill(make_engine: MakeEngine, oracle: GreedyOracle, page_size: int, schedule_policy: str) -> None:
    engine = make_engine(page_size=page_size, max_batch_tokens=7, schedule_policy=schedule_policy)
    head = random_ids(1, 40)
    prompts = [head + random_ids(seed, 9) for seed in range(2, 6)]
    outputs = engine.generate(prompts, GREEDY_8)
    assert [output.token_ids for output in outputs] == [oracle.continuation(prompt, 8) for prompt in prompts]
    assert [output.cached_tokens for output in outputs[1:]] == [40] * 3


def test_cached_tokens_are_the_same_at_every_page_size(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    head = random_ids(1, 37)
    shared, params = (37, 35, 18, 37, 3, 2, 1, 0, 36), SamplingParams(max_tokens=4, ignore_eos=True)
    prompts = [[*head[:end], *random_ids(seed, 5)] for seed, end in enumerate(shared, start=2)]
    found: dict[int, list[int]] = {}
    for page_size in (1, 3, 16, 64):
        engine = make_engine(page_size=page_size, kv_cache_tokens=2048)
        one_by_one = [engine.generate(prompt, params)[0] for prompt in prompts]
        again = engine.generate([[*o.prompt_token_ids, *o.token_ids, 5] for o in one_by_one], params)
        for output in one_by_one + again:
            assert output.token_ids == oracle.continuation(output.prompt_token_ids, 4)
        found[page_size] = [output.cached_tokens for output in one_by_one + again]
    assert found[1] == [0, *shared[1:], *(len(prompt) + 3 for prompt in prompts)]
    assert all(cached_tokens == found[1] for cached_tokens in found.values()), found


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_what_was_copied_is_written_behind(make_engine: MakeEngine, oracle: GreedyOracle, backend: str) -> None:
    """Requests that run together go on from the same partial page, each in its own copy."""
    engine = make_engine(page_size=16, attention_backend=backend)
    head = random_ids(1, 21)
    engine.generate(head, SamplingParams(max_tokens=1))
    prompts = [[*head, *random_ids(seed, length)] for seed, length in ((2, 1), (3, 2), (4, 12), (5, 30))]
    outputs = engine.generate(prompts, GREEDY_8)
    assert [output.token_ids for output in outputs] == [oracle.continuation(prompt, 8) for prompt in prompts]
    assert [output.cached_tokens for output in outputs] == [21] * 4
    assert engine.stats().cache.copied_tokens == 4 * 5
    assert engine.generate(head, GREEDY_8)[0].token_ids == oracle.continuation(head, 8)


def test_what_is_kept_outlives_what_is_not(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_tokens=128)
    params = SamplingParams(max_tokens=1)
    kept, other = random_ids(1, 40), random_ids(2, 40)
    engine.generate(kept, params, keep_for_s=1000)
    list(engine.stream(other, params))
    engine.generate(random_ids(3, 60), params)
    assert engine.generate(kept, params)[0].cached_tokens == 39
    assert engine.generate(other, params)[0].cached_tokens == 24, "its end made room"
    assert engine.generate(random_ids(4, 120), params)[0].finish_reason == "length", "it blocks nobody"
    assert engine.generate(kept, params)[0].cached_tokens == 8


def test_priority_of_requests(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_tokens=128, eviction_policy="priority")
    params = SamplingParams(max_tokens=1)
    high, low = random_ids(1, 40), random_ids(2, 40)
    engine.generate(high, params, priority=1)
    list(engine.stream(low, params))
    engine.generate(random_ids(3, 60), params)
    assert engine.generate(high, params)[0].cached_tokens == 39
    assert engine.generate(low, params)[0].cached_tokens == 24, "its end made room"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": "high"}, "priority must be an integer, not 'high'"),
        ({"priority": 1.5}, "priority must be an integer, not 1.5"),
        ({"priority": True}, "priority must be an integer, not True"),
        ({"keep_for_s": -1}, "keep_for_s must be a number of seconds of at least 0, not -1"),
        ({"keep_for_s": "long"}, "keep_for_s must be a number of seconds of at least 0, not 'long'"),
        ({"keep_for_s": float("nan")}, "keep_for_s must be a number of seconds of at least 0, not nan"),
        ({"keep_for_s": 10**400}, "keep_for_s must be at most 315360000 s"),
        ({"priority": 2**63}, "priority must lie from -2"),
    ],
)
def test_cache_options_are_checked(make_engine: MakeEngine, options: dict[str, object], message: str) -> None:
    engine = make_engine()
    for call in (engine.generate, engine.stream):
        with pytest.raises(InvalidRequestError, match=message):
            call(random_ids(1, 5), GREEDY_8, **options)
    with pytest.raises(InvalidRequestError, match=message):
        engine.session(**options)


def test_budget_of_one_token_a_step(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine(max_batch_tokens=1)
    prompts = [random_ids(1, 9), random_ids(1, 9)]
    outputs = engine.generate(prompts, GREEDY_8)
    assert [output.token_ids for output in outputs] == [oracle.continuation(prompts[0], 8)] * 2
    assert outputs[1].cached_tokens == 8, "the second waited for the first and hit it"


def test_in_batch_sharing_computes_a_prefix_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    head = random_ids(1, 64)
    prompts = [head + random_ids(seed, 8) for seed in range(2, 10)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=1))
    assert sorted(output.cached_tokens for output in outputs) == [0] + [64] * 7
    assert engine.stats().computed_tokens == 72 + 7 * 8


def test_the_cache_switched_off_computes_everything(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine(prefix_cache=False)
    prompt = random_ids(1, 33)
    outputs = engine.generate([prompt, prompt], GREEDY_8)
    again = engine.generate(prompt, GREEDY_8)
    assert [output.token_ids for output in outputs + again] == [oracle.continuation(prompt, 8)] * 3
    assert {output.cached_tokens for output in outputs + again} == {0}
    assert engine.stats().cache.total_tokens == 0


@pytest.mark.parametrize("n", [1, 3])
def test_requests_without_the_cache_find_and_leave_nothing(
    make_engine: MakeEngine, oracle: GreedyOracle, n: int
) -> None:
    engine, prompt = make_engine(), random_ids(1, 41)
    other = engine.generate(prompt[:30], GREEDY_8)[0]
    before = engine.stats().cache
    outputs = engine.generate([prompt, prompt], SamplingParams(max_tokens=8, ignore_eos=True, n=n), prefix_cache=False)
    for output in outputs:
        assert [choice.token_ids for choice in output.choices] == [oracle.continuation(prompt, 8)] * n
        assert (output.usage.cached_tokens, output.usage.cache_write_tokens) == (0, 0)
    after = engine.stats().cache
    assert (after.query_tokens, after.total_tokens) == (before.query_tokens, before.total_tokens), "nothing is counted"
    assert engine.generate(other.prompt_token_ids, GREEDY_8)[0].cached_tokens == 29
    with pytest.raises(InvalidRequestError, match="prefix_cache must be True or False, not 'no'"):
        engine.generate(prompt, prefix_cache="no")


def test_namespaces_do_not_share(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = random_ids(1, 33)
    cached = [
        engine.generate(prompt, GREEDY_8, extra_key=extra_key, cache_salt=cache_salt)[0].cached_tokens
        for extra_key, cache_salt in [("a", None), ("b", None), (None, "a"), ("a", None), (None, "a"), (None, None)]
    ]
    assert cached == [0, 0, 0, 32, 32, 0]


def test_an_output_becomes_the_prefix_of_the_next_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine()
    (first,) = engine.generate(random_ids(1, 14), SamplingParams(max_tokens=15, ignore_eos=True))
    (second,) = engine.generate(first.prompt_token_ids + first.token_ids + [5], GREEDY_8)
    assert second.cached_tokens == 28  # of 14 + 15 tokens the last one's KV was never computed


def test_stop_ids_and_end_of_sequence(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    prompt = random_ids(1, 20)
    continuation = oracle.continuation(prompt, 8)
    engine = make_engine()
    stop_id = continuation[3]
    (output,) = engine.generate(prompt, SamplingParams(max_tokens=8, stop_token_ids=[stop_id]))
    assert output.token_ids == continuation[: continuation.index(stop_id) + 1]
    assert output.finish_reason == "stop"
    engine = make_engine(parts={"eos_ids": frozenset([stop_id])})
    assert engine.generate(prompt, SamplingParams(max_tokens=8))[0].finish_reason == "stop"
    assert engine.generate(prompt, GREEDY_8)[0].finish_reason == "length", "ignore_eos"


def test_generation_ends_at_the_context_limit(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine(max_context_tokens=30)
    prompt = random_ids(1, 26)
    (output,) = engine.generate(prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    assert output.token_ids == oracle.continuation(prompt, 4)
    assert output.finish_reason == "length"


def test_generation_ends_at_the_pool_limit(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine(kv_cache_tokens=32)
    prompt = random_ids(1, 26)
    (output,) = engine.generate(prompt, SamplingParams(max_tokens=100, ignore_eos=True))
    assert output.token_ids == oracle.continuation(prompt, 6)


def test_seeded_sampling_does_not_depend_on_the_batch(make_engine: MakeEngine) -> None:
    engine = make_engine()
    params = [SamplingParams(max_tokens=12, temperature=1.5, seed=seed, ignore_eos=True) for seed in range(4)]
    prompt = random_ids(1, 20)
    together = engine.generate([prompt] * 4, params)
    alone = [engine.generate(prompt, p)[0] for p in params]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert len({tuple(output.token_ids) for output in together}) > 1


def test_unseeded_sampling_is_repeatable_by_the_engine_seed(make_engine: MakeEngine) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
    first, same, other = (make_engine(seed=seed).generate(random_ids(1, 20), params)[0] for seed in (5, 5, 6))
    assert first.token_ids == same.token_ids != other.token_ids


def test_logprobs(make_engine: MakeEngine) -> None:
    engine = make_engine()
    (output,) = engine.generate(random_ids(1, 20), SamplingParams(max_tokens=4, logprobs=3, ignore_eos=True))
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    for entry in output.logprobs:
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token_id, entry.logprob), "greedy took the likeliest"
    (without,) = engine.generate(random_ids(1, 20), GREEDY_8)
    assert without.logprobs is None


def test_metrics_and_stats_add_up(make_engine: MakeEngine) -> None:
    engine = make_engine()
    outputs = engine.generate([random_ids(seed, 10) for seed in range(3)], GREEDY_8)
    for output in outputs:
        metrics = output.metrics
        assert 0 <= metrics.queue_s <= metrics.ttft_s <= metrics.total_s
        assert metrics.tpot_s > 0
    stats = engine.stats()
    assert stats.generated_tokens == 24
    assert stats.computed_tokens == 3 * (10 + 7)
    assert stats.hit_rate == 0
    assert stats.free_pages + stats.evictable_pages + stats.protected_pages == stats.cache.num_pages
    assert stats.pool_bytes == engine.pool.num_bytes


def test_on_finish_reports_each_output_once(make_engine: MakeEngine) -> None:
    reported: list[RequestOutput] = []
    outputs = make_engine().generate([random_ids(s, 10) for s in range(3)], GREEDY_8, on_finish=reported.append)
    assert sorted(o.request_id for o in reported) == [o.request_id for o in outputs]


# -- streams ---------------------------------------------------------------------------------------------------------


def test_streams_interleave(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine()
    prompts = [random_ids(seed, 15) for seed in range(2)]
    streams = [engine.stream(prompt, GREEDY_8) for prompt in prompts]
    ids: list[list[int]] = [[], []]
    outputs = [None, None]
    while not all(outputs):
        for i, stream in enumerate(streams):
            if outputs[i] is None:
                chunk = next(stream)
                ids[i] += chunk.token_ids
                outputs[i] = chunk.output
    assert ids == [oracle.continuation(prompt, 8) for prompt in prompts]


def test_closing_a_stream_aborts_it(make_engine: MakeEngine) -> None:
    engine = make_engine()
    stream = engine.stream(random_ids(1, 15), GREEDY_8)
    next(stream)
    assert engine.stats().running == 1
    stream.close()
    assert engine.stats().running == 0


def test_abort_ends_a_request_with_what_it_has(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine()
    stream = engine.stream(random_ids(1, 15), GREEDY_8)
    first = next(stream)
    assert engine.abort(first.request_id)
    last = next(stream)
    assert last.output is not None
    assert last.output.finish_reason == "abort"
    assert last.output.token_ids == oracle.continuation(random_ids(1, 15), 1)
    assert not engine.abort(first.request_id), "it has ended"
    assert list(stream) == []


def test_abort_from_a_callback_ends_another_request_of_the_call(make_engine: MakeEngine) -> None:
    engine = make_engine()
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 50)]
    outputs = engine.generate(
        [random_ids(i, 10) for i in range(2)], params, on_finish=lambda output: engine.abort(output.request_id + 1)
    )
    assert [output.finish_reason for output in outputs] == ["length", "abort"]
    assert len(outputs[1].token_ids) == 2


def test_a_stream_never_started_holds_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.stream(random_ids(1, 15), GREEDY_8)
    assert engine.stats().waiting == 0


# -- failures --------------------------------------------------------------------------------------------------------


def test_one_failing_forward_fails_that_request_alone(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    prompts = [random_ids(seed, 12) for seed in range(3)]

    def fails_for_the_second(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if {1, 3} & set(step.request_ids):
            raise RuntimeError("a worn bit")
        return compute()

    engine = make_engine(around=fails_for_the_second)
    outputs = engine.generate(prompts, GREEDY_8)
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert str(outputs[1].error) == "a worn bit"
    for i in (0, 2):
        assert outputs[i].token_ids == oracle.continuation(prompts[i], 8)
    with pytest.raises(RuntimeError, match="worn"):
        list(engine.stream(prompts[1], GREEDY_8))


def test_non_finite_logits_fail_that_request_alone(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    prompts = [random_ids(seed, 12) for seed in range(3)]

    def poisoned(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        logits = compute().clone()
        for row, request_id in enumerate(step.request_ids):
            if request_id == 1:
                logits[row, 7] = float("nan")
        return logits

    engine = make_engine(around=poisoned)
    outputs = engine.generate(prompts, GREEDY_8)
    assert isinstance(outputs[1].error, NonFiniteLogitsError)
    assert outputs[0].token_ids == oracle.continuation(prompts[0], 8)


def test_an_interrupted_call_leaves_nothing_behind(make_engine: MakeEngine) -> None:
    engine = make_engine()

    def interrupt(output: RequestOutput) -> None:
        raise KeyboardInterrupt

    params = [SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(max_tokens=50, ignore_eos=True)]
    with pytest.raises(KeyboardInterrupt):
        engine.generate([random_ids(1, 10), random_ids(2, 10)], params, on_finish=interrupt)
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


def test_an_interrupt_amid_the_bookkeeping_loses_no_other_request(
    make_engine: MakeEngine, oracle: GreedyOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    prompts = [random_ids(seed, 11) for seed in range(2)]
    stream = engine.stream(prompts[0], GREEDY_8)
    ids = next(stream).token_ids
    computed = Scheduler.computed

    def interrupted(scheduler: Scheduler, span: Span) -> None:
        monkeypatch.setattr(Scheduler, "computed", computed)
        raise KeyboardInterrupt

    monkeypatch.setattr(Scheduler, "computed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts[1], GREEDY_8)
    for chunk in stream:
        ids += chunk.token_ids
    assert ids == oracle.continuation(prompts[0], 8)


def test_what_gave_bad_logits_is_not_shared(make_engine: MakeEngine) -> None:

    class FindsNoFiniteLogits(Sampler):
        def likeliest(self, logits: torch.Tensor) -> tuple[list[int], list[bool]]:
            return [0] * len(logits), [False] * len(logits)

    engine = make_engine(parts={"sampler": FindsNoFiniteLogits()})
    (output,) = engine.generate(random_ids(1, 20), GREEDY_8)
    assert isinstance(output.error, NonFiniteLogitsError)
    assert engine.stats().cache.total_tokens == 0


def test_bad_logits_of_an_unfinished_prompt_are_not_shared_either(make_engine: MakeEngine) -> None:
    steps: list[StepInput] = []

    def first_chunk_poisoned(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        steps.append(step)
        return compute() * (float("nan") if len(steps) == 1 else 1.0)

    engine = make_engine(around=first_chunk_poisoned, max_batch_tokens=8)
    (output,) = engine.generate(random_ids(1, 30), GREEDY_8)
    assert isinstance(output.error, NonFiniteLogitsError)
    assert engine.stats().cache.total_tokens == 0


def test_a_tokenizer_that_fails_fails_its_request_alone(demo_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = demo_engine.tokenizer.decode
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 4, 5)]

    def fails_for_four(ids, **options):  # type: ignore[no-untyped-def]
        if len(ids) == 4:
            raise ValueError("no such piece")
        return decode(ids, **options)

    monkeypatch.setattr(demo_engine.tokenizer, "decode", fails_for_four)
    outputs = demo_engine.generate(["ROMEO:", "JULIET:", "NURSE:"], params)
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[2].text


def test_a_stream_finalised_amid_a_step_waits_for_its_end(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    streams: list[object] = []

    def dropped_inside(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if 1 in step.request_ids:
            streams.clear()  # its finaliser runs here
        return compute()

    engine = make_engine(around=dropped_inside)
    stream = engine.stream(random_ids(1, 15), GREEDY_8)
    next(stream)
    streams.append(stream)
    del stream
    (output,) = engine.generate(random_ids(2, 15), GREEDY_8)
    assert output.token_ids == oracle.continuation(random_ids(2, 15), 8)
    assert engine.stats().running == 0


def test_ctrl_c_waits_for_the_end_of_a_step_and_the_second_one_does_not(make_engine: MakeEngine) -> None:
    presses: list[int] = []

    def pressed_inside(step: StepInput, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        for _ in range(presses[0]):
            signal.raise_signal(signal.SIGINT)
        computed.append(compute())
        return computed[-1]

    engine = make_engine(around=pressed_inside)
    for num_presses, num_computed in ((1, 1), (2, 0)):
        computed: list[torch.Tensor] = []
        presses[:] = [num_presses]
        with pytest.raises(KeyboardInterrupt):
            engine.generate(random_ids(1, 15), GREEDY_8)
        assert len(computed) == num_computed
        engine.check_invariants()
        assert (engine.stats().running, engine.stats().waiting) == (0, 0)


@pytest.mark.parametrize("namespace", [{"extra_key": 5}, {"cache_salt": ["a"]}])
def test_namespaces_are_text(make_engine: MakeEngine, namespace: dict[str, object]) -> None:
    engine = make_engine()
    for call in (engine.generate, engine.stream):
        with pytest.raises(InvalidRequestError, match="must be text or None"):
            call(random_ids(1, 5), GREEDY_8, **namespace)
    with pytest.raises(InvalidRequestError, match="must be text or None"):
        engine.session(**namespace)


def test_pages_leased_by_others_end_a_request_instead_of_hanging(make_engine: MakeEngine) -> None:
    engine = make_engine(kv_cache_tokens=64)
    with engine.cache.acquire(random_ids(9, 60)):
        (output,) = engine.generate(random_ids(1, 20), GREEDY_8)
        assert output.finish_reason == "error"
        (output,) = engine.generate(random_ids(1, 4), GREEDY_8)
        assert output.finish_reason == "error", "it began, and found no page for its second token"
    (output,) = engine.generate(random_ids(1, 20), GREEDY_8)
    assert output.finish_reason == "length"


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], InvalidRequestError, "no prompts"),
        ([[]], InvalidRequestError, "empty"),
        (np.array([], np.int32), InvalidRequestError, "empty"),
        ([1, -5, 2], InvalidTokenIdsError, "-5 at position 1"),
        ([1, 2, 2**40], InvalidTokenIdsError, "at position 2"),
        ([1, 2, 211], InvalidTokenIdsError, "211 at position 2 is not in the vocabulary of 211"),
        ([1, 2.5], TokenIdsTypeError, "2.5 at position 1"),
        (np.array([0.5]), TokenIdsTypeError, "0.5 at position 0"),
        ([[1, 2], [3, "x"]], TokenIdsTypeError, "'x' at position 1"),
        (None, TokenIdsTypeError, "NoneType"),
        (5, TokenIdsTypeError, "int"),
        ("text", MissingTokenizerError, "no tokenizer"),
        (list(range(3, 103)), PromptTooLongError, "100 tokens, and prompt and output together may have 64"),
    ],
)
def test_bad_prompts(make_engine: MakeEngine, prompt: object, error: type[Exception], message: str) -> None:
    engine = make_engine(kv_cache_tokens=64)
    with pytest.raises(error, match=message):
        engine.generate(prompt, GREEDY_8)


def test_one_bad_prompt_runs_none(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(InvalidTokenIdsError):
        engine.generate([[5, 6], [-1]], GREEDY_8)
    assert engine.stats().steps == 0


def test_bad_params_for_this_model(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(InvalidSamplingParamsError, match="stop_token_ids holds 999"):
        engine.generate([5, 6], SamplingParams(stop_token_ids=[999]))
    with pytest.raises(MissingTokenizerError):
        engine.generate([5, 6], SamplingParams(stop="x"))
    with pytest.raises(InvalidRequestError, match="params must be SamplingParams, or a list of them, not 8"):
        engine.generate([5, 6], 8)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="params must be SamplingParams, or a list of them"):
        engine.generate([5, 6], [8])  # type: ignore[list-item]
    with pytest.raises(InvalidRequestError, match="2 SamplingParams were given for 1 prompts"):
        engine.generate([5, 6], [GREEDY_8, GREEDY_8])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"page_size": 0}, ConfigError, r"page_size must be an integer in \[1, 2147483647\], not 0"),
        ({"page_size": 2.5}, ConfigError, r"page_size must be an integer in \[1, 2147483647\], not 2.5"),
        ({"kv_cache_tokens": -1}, ConfigError, "kv_cache_tokens"),
        ({"mem_fraction": 1.5}, ConfigError, r"mem_fraction must be a number in \(0, 1\], or None, not"),
        ({"mem_fraction": 0.5, "kv_cache_tokens": 5}, ConfigError, "give one of them"),
        ({"schedule_policy": "sjf"}, ConfigError, "lpm, fcfs"),
        ({"eviction_policy": "mru"}, ConfigError, "unknown eviction policy 'mru'"),
        ({"attention_backend": "abacus"}, UnsupportedBackendError, "unknown attention backend 'abacus'"),
        ({"max_running_requests": 9, "max_batch_tokens": 8}, ConfigError, "must not exceed"),
        ({"dtype": "float8"}, ConfigError, "dtype must be"),
        ({"device": "abacus"}, ConfigError, "unknown device"),
        ({"pagesize": 4}, ConfigError, "unknown setting 'pagesize'"),
    ],
)
def test_bad_settings(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Engine.from_pretrained(
            "demo", **{"kv_cache_tokens": 64, **settings} if "mem_fraction" not in settings else settings
        )


def test_the_pool_is_sized_by_free_memory() -> None:
    engine = Engine.from_pretrained("demo", mem_fraction=0.001)
    assert engine.config.kv_cache_tokens == engine.cache.num_pages * 16 > 0
    assert engine.config.as_engine_config().mem_fraction is None, "resolved"
    assert EngineConfig(mem_fraction=0.001).kv_cache_tokens is None


def test_what_the_tree_shares_is_read_once_and_gives_the_same_tokens(
    make_engine: MakeEngine, oracle: GreedyOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two levels of the tree: a preamble that all share, and a document that half of them share."""
    head, document = random_ids(1, 33), random_ids(2, 21)
    prompts = [[*head, *(document if seed % 2 else []), *random_ids(10 + seed, 5)] for seed in range(6)]
    read_once: set[tuple[int, int, int]] = set()

    def plan_noting(metadata: AttentionMetadata, gate: BreakEven) -> CascadePlan:
        plan = plan_cascade(metadata, gate)
        read_once.update((len(part.sequences), part.first, part.last) for part in plan.parts)
        return plan

    monkeypatch.setattr(numba_backend, "plan_cascade", plan_noting)
    for gate, expected in ((BreakEven(2, 4), {(6, 0, 32), (3, 32, 52)}), (BreakEven(7, 4), set())):
        monkeypatch.setattr(numba_backend, "break_even", lambda group, gate=gate: gate)
        engine, found = make_engine(attention_backend="numba"), read_once.copy()
        engine.generate(head, SamplingParams(max_tokens=1))
        engine.generate([*head, *document], SamplingParams(max_tokens=1))
        outputs = engine.generate(prompts, GREEDY_8)
        assert [output.token_ids for output in outputs] == [oracle.continuation(prompt, 8) for prompt in prompts]
        assert read_once - found == expected


# -- every kind of pool ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "kv_cache_dtype"),
    [  # every form once, the first of them twice; every pair under `stress`
        *(("auto", form) for form in ("auto", "int4", "fp8_e5m2")),
        *(("torch", form) for form in ("auto", "int8", "fp8_e4m3")),
        *(pytest.param("auto", form, marks=pytest.mark.stress) for form in ("int8", "fp8_e4m3")),
        *(pytest.param("torch", form, marks=pytest.mark.stress) for form in ("int4", "fp8_e5m2")),
    ],
)
def test_cold_and_warm_agree_in_every_form_of_kv(make_engine: MakeEngine, kv_cache_dtype: str, backend: str) -> None:
    """Shared, copied in part, evicted and retracted: the codes are those that were written."""
    head = random_ids(1, 21)
    prompts = [[*head, *random_ids(seed, 6)] for seed in range(2, 6)]
    settings = {"kv_cache_dtype": kv_cache_dtype, "attention_backend": backend, "page_size": 16}
    fresh = make_engine(prefix_cache=False, **settings)
    alone = [fresh.generate(prompt, GREEDY_8)[0].token_ids for prompt in prompts]
    engine = make_engine(kv_cache_tokens=128, **settings)
    for _ in range(2):
        outputs = engine.generate(prompts, GREEDY_8)
        assert [output.token_ids for output in outputs] == alone
        engine.check_invariants()
    assert outputs[0].cached_tokens >= 21
    assert engine.config.kv_cache_dtype == kv_cache_dtype
    stats = engine.stats()
    assert stats.cache.evicted_tokens > 0


def test_codes_take_less_room(make_engine: MakeEngine) -> None:
    sizes = [
        make_engine(kv_cache_dtype=form).stats().kv_bytes_per_token for form in ("auto", "fp8_e4m3", "int8", "int4")
    ]
    assert sizes[0] == 4 * sizes[1], "float32 against a byte"
    assert sizes[3] < sizes[2] < sizes[0]


def test_an_unknown_form_of_kv() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype must be one of auto, fp8_e4m3, .* not 'int2'"):
        EngineConfig(kv_cache_dtype="int2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": ["float32"]}, r"dtype must be text, not \['float32'\]"),
        ({"device": None}, "device must be text, not None"),
        ({"attention_backend": 3}, "attention_backend must be text, not 3"),
        ({"seed": None}, "seed must be an integer of at least 0, not None"),
        ({"prefix_cache": "no"}, "prefix_cache must be True or False, not 'no'"),
        ({"kv_cache_tokens": 10**40}, r"kv_cache_tokens must be an integer in \[1, 2147483647\], or None, not 10000"),
        ({"max_running_requests": 10**9}, "must not exceed max_batch_tokens"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_more_running_requests_than_pages_take_no_memory(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine(max_running_requests=10**9, max_batch_tokens=10**9)
    prompts = [random_ids(seed, 9) for seed in range(3)]
    outputs = engine.generate(prompts, GREEDY_8)
    assert [output.token_ids for output in outputs] == [oracle.continuation(prompt, 8) for prompt in prompts]


def test_text_with_a_token_beyond_the_embeddings_is_refused_at_once(demo_engine: Engine) -> None:
    parts = assemble(*load("demo", dtype="auto", device="cpu"), EngineConfig(kv_cache_tokens=1024))
    highest = int(demo_engine.encode("ROMEO:").max())
    engine = Engine.from_parts(replace(parts, vocab_size=highest))
    for call in (engine.generate, engine.stream):
        with pytest.raises(InvalidTokenIdsError, match=f"token id {highest} at position . is not in the vocabulary"):
            call("ROMEO:", GREEDY_8)
    assert engine.stats().waiting == 0


def test_a_name_in_place_of_a_model_is_told_the_way() -> None:
    name: Any = "demo"
    with pytest.raises(
        ConfigError, match=r"model must be a loaded model, not 'demo'; .* use from_pretrained\('demo'\)"
    ):
        Engine(name)
