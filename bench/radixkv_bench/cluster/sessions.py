"""Sessions whose prompts grow turn by turn, with the answers of one engine, which are the unmodified model's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from radixkv import AsyncEngine, SamplingParams
from radixkv.models.loader import load
from radixkv_bench.common.errors import BenchError

SHARE_SYSTEM = 5  # sessions that share a system prompt
CLIENTS = 8
FIRST_ID = 100  # the tokens before it are control tokens and single bytes


class Turn(NamedTuple):
    """One request of a session, its greedy answer, and how much of the prompt one engine found cached."""

    session: int
    number: int
    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str
    cached_tokens: int


class Sizes(NamedTuple):
    """Tokens of each part of a session."""

    system: int = 160
    user: int = 20
    answer: int = 6


def sessions_of(num_sessions: int, num_turns: int, sizes: Sizes, settings: dict[str, Any]) -> list[list[Turn]]:
    """The turns of each round. Each prompt of a session is the one before, its answer, and what the user says next.

    Sessions begin one after another, over twice as many rounds as one has turns; five in a row share a system prompt.

    settings: of the one engine. Raises: BenchError unless the unmodified model answers the same.
    """
    rounds = asyncio.run(_converse(num_sessions, num_turns, sizes, settings))
    _check(rounds)
    return rounds


async def _converse(num_sessions: int, num_turns: int, sizes: Sizes, settings: dict[str, Any]) -> list[list[Turn]]:
    rng = np.random.default_rng(0)
    room = asyncio.Semaphore(CLIENTS)
    params = SamplingParams(max_tokens=sizes.answer, temperature=0, ignore_eos=True)
    async with AsyncEngine.from_pretrained("demo", **settings) as engine:

        def text_ids(num: int) -> list[int]:
            ids: list[int] = rng.integers(FIRST_ID, engine.vocab_size, num).tolist()
            return ids

        async def answered(session: int, number: int, prompt: list[int]) -> Turn:
            async with room:
                (output,) = await engine.generate([prompt], params)
            text = output.text or ""
            return Turn(session, number, prompt, output.token_ids, text, output.cached_tokens)

        systems = [text_ids(sizes.system) for _ in range(0, num_sessions, SHARE_SYSTEM)]
        prompts = [systems[session // SHARE_SYSTEM] for session in range(num_sessions)]
        begins = [2 * num_turns * session // num_sessions for session in range(num_sessions)]
        rounds: list[list[Turn]] = []
        for number in range(begins[-1] + num_turns):
            active = [s for s in range(num_sessions) if begins[s] <= number < begins[s] + num_turns]
            asked = [answered(s, number - begins[s], [*prompts[s], *text_ids(sizes.user)]) for s in active]
            rounds.append(list(await asyncio.gather(*asked)))
            for turn in rounds[-1]:
                prompts[turn.session] = [*turn.prompt_ids, *turn.answer_ids]
    return rounds


def _check(rounds: Sequence[Sequence[Turn]]) -> None:
    """Read each session once with the unmodified model: every token of an answer must be the likeliest there.

    By induction over its tokens, each answer is then what the model alone would answer, greedily.
    """
    model, _ = load("demo", dtype="float32", device="cpu")
    of_session: dict[int, list[Turn]] = {}
    for turn in (turn for of_round in rounds for turn in of_round):
        of_session.setdefault(turn.session, []).append(turn)
    for session in of_session.values():
        last = session[-1]
        ids = [*last.prompt_ids, *last.answer_ids]
        with torch.inference_mode():
            likeliest = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        for turn in session:
            first = len(turn.prompt_ids) - 1
            if likeliest[first : first + len(turn.answer_ids)] != turn.answer_ids:
                raise BenchError(f"session {turn.session}, turn {turn.number}: the unmodified model answers otherwise")
