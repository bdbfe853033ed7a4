"""Several choices for one prompt, requests without tokens, and the usage of both."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from oracles import GreedyOracle
from prompts import random_ids
from radixkv import AsyncEngine, Engine, EngineConfig, SamplingParams
from radixkv.engine.assembly import assemble
from radixkv.engine.outputs import Usage
from radixkv.errors import InvalidRequestError, PromptTooLongError
from tiny_models import tiny_model

MakeEngine = Callable[..., Engine]
DRAWN = SamplingParams(max_tokens=6, temperature=1.5, seed=4, n=3, ignore_eos=True)
GREEDY_4 = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize("num_tokens", [3, 16, 41])
def test_the_prompt_of_choices_is_computed_once(make_engine: MakeEngine, num_tokens: int) -> None:
    engine = make_engine()
    prompt = random_ids(1, num_tokens)
    (output,) = engine.generate(prompt, DRAWN)
    assert [choice.choice_index for choice in output.choices] == [0, 1, 2]
    assert len({tuple(choice.token_ids) for choice in output.choices}) == 3
    assert [choice.cached_tokens for choice in output.choices] == [0, num_tokens - 1, num_tokens - 1]
    assert engine.stats().computed_tokens == num_tokens + 2 + 3 * 5, "the others computed its last token"
    assert output.usage == Usage(num_tokens, 0, num_tokens, 18)
    (again,) = engine.generate(prompt, DRAWN)
    assert again.usage == Usage(num_tokens, num_tokens - 1, 0, 18)
    assert [choice.token_ids for choice in again.choices] == [choice.token_ids for choice in output.choices]


def test_the_first_choice_is_what_one_alone_would_be(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompts = [random_ids(seed, 9) for seed in range(3)]
    alone = SamplingParams(max_tokens=6, temperature=1.5, seed=4, ignore_eos=True)
    together = engine.generate(prompts, [DRAWN, alone, DRAWN])
    assert [len(output.choices) for output in together] == [3, 1, 3]
    for prompt, output in zip(prompts, together, strict=True):
        assert engine.generate(prompt, alone)[0].token_ids == output.token_ids


def test_choices_without_a_cache(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine(prefix_cache=False)
    prompt = random_ids(1, 21)
    (output,) = engine.generate(prompt, SamplingParams(max_tokens=4, n=2, ignore_eos=True))
    assert [choice.token_ids for choice in output.choices] == [oracle.continuation(prompt, 4)] * 2
    assert output.usage == Usage(21, 0, 0, 8)


def test_choices_stream_together_and_report_once(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = random_ids(1, 21)
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    outputs = []
    for piece in engine.stream(prompt, DRAWN):
        found[piece.choice_index] += piece.token_ids
        outputs += [] if piece.output is None else [piece.output]
    assert sorted(output.choice_index for output in outputs) == [0, 1, 2]
    assert {output.choice_index: output.token_ids for output in outputs} == found
    assert Usage.of(outputs) == Usage(21, 0, 21, 18)
    reported: list[object] = []
    (whole,) = engine.generate(prompt, DRAWN, on_finish=reported.append)
    assert reported == [whole]
    assert {choice.choice_index: choice.token_ids for choice in whole.choices} == found


def test_aborting_a_choice_aborts_all(make_engine: MakeEngine) -> None:
    engine = make_engine()
    endless = SamplingParams(max_tokens=500, n=3, temperature=1.0, ignore_eos=True)
    for number in range(3):
        stream = engine.stream(random_ids(1, 21), endless)
        first = next(stream)
        assert engine.abort(first.request_id - first.choice_index + number)
        reasons = [piece.output.finish_reason for piece in stream if piece.output is not None]
        assert reasons == ["abort"] * 3
    stream = engine.stream(random_ids(1, 21), endless)
    next(stream)
    stream.close()
    assert engine.stats().running == engine.stats().waiting == engine.stats().cache.num_leases == 0


def test_a_choice_that_has_ended_still_names_its_request(make_engine: MakeEngine) -> None:
    engine = make_engine()

    class EndsFirst:
        """Lets the first choice end at once."""

        made = 0

        def __init__(self) -> None:
            self._is_first = EndsFirst.made == 0
            EndsFirst.made += 1

        def start(self, token_ids: object) -> None:
            pass

        def apply(self, logits: object) -> None:
            logits[7] = 1e9 if self._is_first else -1e9  # type: ignore[index]

    params = SamplingParams(max_tokens=500, n=2, stop_token_ids=[7], logits_transform=EndsFirst, ignore_eos=True)
    stream = engine.stream(random_ids(1, 9), params)
    first = next(stream)
    assert first.output is not None
    assert (first.output.finish_reason, first.output.stopped_by) == ("stop", 7)
    assert engine.abort(first.request_id)
    assert [piece.output.finish_reason for piece in stream if piece.output is not None] == ["abort"]


def test_coroutines_get_choices_too() -> None:
    async def main() -> None:
        parts = assemble(tiny_model("llama"), None, EngineConfig(page_size=4, kv_cache_tokens=1024))
        async with AsyncEngine.from_parts(parts) as engine:
            prompt = random_ids(1, 21)
            (output,) = await engine.generate(prompt, DRAWN)
            found: dict[int, list[int]] = {0: [], 1: [], 2: []}
            async for piece in engine.stream(prompt, DRAWN):
                found[piece.choice_index] += piece.token_ids
            assert {choice.choice_index: choice.token_ids for choice in output.choices} == found
            stream = engine.stream(prompt, SamplingParams(max_tokens=500, n=3, ignore_eos=True))
            first = await anext(stream)
            assert await engine.abort(first.request_id)
            ends = [piece.output.finish_reason async for piece in stream if piece.output is not None]
            assert ends == ["abort"] * 3
            await engine.check_invariants()

    asyncio.run(main())


def test_a_session_has_one_answer(demo_engine: Engine) -> None:
    with demo_engine.session() as chat:
        for params in (SamplingParams(n=2), SamplingParams(max_tokens=0)):
            for use in (chat.send, chat.stream):
                with pytest.raises(InvalidRequestError, match="a session's turn"):
                    use("Hello", params)
            chat.append("Hello")
            with pytest.raises(InvalidRequestError, match="a session's turn"):
                chat.generate(params)


# -- no tokens ---------------------------------------------------------------------------------------------------------


def test_without_tokens_the_whole_prompt_is_computed_and_cached(make_engine: MakeEngine, oracle: GreedyOracle) -> None:
    engine = make_engine()
    prompt = random_ids(1, 21)
    nothing = SamplingParams(max_tokens=0)
    (output,) = engine.generate(prompt, nothing)
    assert (output.token_ids, output.finish_reason) == ([], "length")
    assert output.usage == Usage(21, 0, 21, 0)
    assert engine.cache.peek(prompt) == 21
    (longer,) = engine.generate([*prompt, 5], GREEDY_4)
    assert longer.usage == Usage(22, 21, 1, 4)
    assert longer.token_ids == oracle.continuation([*prompt, 5], 4)
    (piece,) = engine.stream(prompt, nothing)
    assert piece.output is not None
    assert piece.output.usage == Usage(21, 20, 0, 0)


def test_a_prompt_without_tokens_may_fill_the_context(make_engine: MakeEngine) -> None:
    engine = make_engine(max_context_tokens=30, max_batch_tokens=8)
    assert engine.generate(random_ids(1, 30), SamplingParams(max_tokens=0))[0].finish_reason == "length"
    for length, max_tokens in ((31, 0), (30, 1)):
        with pytest.raises(PromptTooLongError):
            engine.generate(random_ids(1, length), SamplingParams(max_tokens=max_tokens))


# -- usage -------------------------------------------------------------------------------------------------------------


def test_what_is_written_counts_once_whatever_happens(make_engine: MakeEngine) -> None:
    """Chunks, shared heads, partial pages, retractions: cached and written are disjoint parts of the prompt."""
    engine = make_engine(page_size=16, kv_cache_tokens=256, max_batch_tokens=7)
    head = random_ids(0, 37)
    prompts = [[*head, *random_ids(seed, 5 + 9 * seed)] for seed in range(1, 6)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    assert engine.stats().retractions > 0
    for output in outputs:
        assert 0 <= output.cache_write_tokens <= output.prompt_tokens - output.cached_tokens
    assert Counter(output.cached_tokens for output in outputs)[0] == 1, "one computed the head"


def test_what_was_there_is_not_written(make_engine: MakeEngine) -> None:
    engine = make_engine(page_size=16)
    head = random_ids(0, 21)
    usage = [
        engine.generate(prompt, GREEDY_4, cache_salt=salt)[0].usage[:3]
        for prompt, salt in [
            (head, None),
            ([*head, *random_ids(1, 9)], None),
            ([*head[:18], *random_ids(2, 9)], None),
            (head, None),
            (head, "other"),
        ]
    ]
    assert usage == [(21, 0, 21), (30, 21, 9), (27, 18, 9), (21, 20, 0), (21, 0, 21)]


def test_two_that_compute_the_same_at_once_write_it_once(make_engine: MakeEngine) -> None:
    engine = make_engine(page_size=4)
    prompt = random_ids(1, 12)  # too short for one to wait for the other
    outputs = engine.generate([prompt, prompt], GREEDY_4)
    assert [output.cached_tokens for output in outputs] == [0, 0]
    assert sorted(output.cache_write_tokens for output in outputs) == [0, 12]


def test_a_cache_that_is_off_is_not_written(make_engine: MakeEngine) -> None:
    (output,) = make_engine(prefix_cache=False).generate(random_ids(1, 12), GREEDY_4)
    assert output.usage == Usage(12, 0, 0, 4)
