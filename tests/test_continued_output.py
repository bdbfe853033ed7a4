"""An output that another engine began: this one goes on as if it had made all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from http_server import new_demo_engine
from radixkv import AsyncEngine, SamplingParams
from radixkv.errors import InvalidRequestError, InvalidTokenIdsError, PromptTooLongError

PROMPT = "ROMEO: what"


def with_engine(work: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        async with new_demo_engine(kv_cache_tokens=2048) as engine:
            await work(engine)
            stats = await engine.stats()
            assert (stats.running, stats.waiting, stats.cache.num_leases) == (0, 0, 0)
            await engine.check_invariants()

    asyncio.run(main())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=14, temperature=0),
        SamplingParams(max_tokens=14, temperature=0, stop=("woman", "man,")),
        SamplingParams(max_tokens=14, temperature=0, presence_penalty=0.7, repetition_penalty=1.2),
        SamplingParams(max_tokens=14, temperature=0, min_tokens=9, ignore_eos=True),
    ],
    ids=["plain", "stop texts", "penalties", "least tokens"],
)
def test_it_is_the_same_output_wherever_it_is_taken_up(params: SamplingParams) -> None:
    async def work(engine: AsyncEngine) -> None:
        (whole,) = await engine.generate([PROMPT], params)
        last = len(whole.token_ids)
        for begun in sorted({0, 1, *range(0, last, 4), last - 1, last}):
            pieces = [piece async for piece in engine.stream(PROMPT, params, output_ids=whole.token_ids[:begun])]
            output = pieces[-1].output
            assert output is not None
            assert output.token_ids == whole.token_ids
            assert (output.text, output.finish_reason) == (whole.text, whole.finish_reason)
            assert "".join(piece.text for piece in pieces) == whole.text
            assert [token_id for piece in pieces for token_id in piece.token_ids] == whole.token_ids
            assert output.usage.output_tokens == len(whole.token_ids)
            assert output.cached_tokens <= output.prompt_tokens

    with_engine(work)


@pytest.mark.parametrize(
    ("params", "output_ids", "error"),
    [
        ({"n": 2}, [5], InvalidRequestError),
        ({"logprobs": 1}, [5], InvalidRequestError),
        ({"prompt_logprobs": 1}, [5], InvalidRequestError),
        ({"logits_transform": object}, [5], InvalidRequestError),
        ({"max_tokens": 2}, [5, 6, 7], InvalidRequestError),
        ({"max_tokens": 5000}, [5] * 3000, PromptTooLongError),
        ({}, [10**6], InvalidTokenIdsError),
    ],
)
def test_what_cannot_be_taken_up_is_refused(
    params: dict[str, Any], output_ids: list[int], error: type[Exception]
) -> None:
    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(error):
            async for _ in engine.stream(PROMPT, SamplingParams(**params), output_ids=output_ids):
                pass

    with_engine(work)
