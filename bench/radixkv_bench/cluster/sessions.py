"""Sessions whose prompts grow turn by turn, and what the unmodified model answers to each prompt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from radixkv.models.loader import load

SYSTEM_PROMPTS = 4
BATCH = 32
FIRST_ID = 100  # the tokens before it are control tokens and single bytes


class Turn(NamedTuple):
    """One request of a session, and the answer of the model alone."""

    session: int
    number: int
    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str


class Sizes(NamedTuple):
    """Tokens of each part of a session."""

    system: int = 160
    user: int = 20
    answer: int = 6


def sessions_of(num_sessions: int, num_turns: int, sizes: Sizes, seed: int = 0) -> list[list[Turn]]:
    """For each turn, that of every session. Each prompt is the one before it, its answer, and a user's turn.

    The answers are transformers' own `generate` on the unmodified model: float32, greedy, without any cache of ours.
    """
    model, tokenizer = load("demo", dtype="float32", device="cpu")
    assert tokenizer is not None
    rng = np.random.default_rng(seed)
    vocab_size: int = model.config.vocab_size

    def text_ids(num: int) -> list[int]:
        ids: list[int] = rng.integers(FIRST_ID, vocab_size, num).tolist()
        return ids

    systems = [text_ids(sizes.system) for _ in range(SYSTEM_PROMPTS)]
    prompts = [list(systems[session % SYSTEM_PROMPTS]) for session in range(num_sessions)]
    turns: list[list[Turn]] = []
    for number in range(num_turns):
        for prompt in prompts:
            prompt += text_ids(sizes.user)
        answers = _answers(model, prompts, sizes.answer)
        turns.append(
            [
                Turn(session, number, list(prompt), ids, tokenizer.decode(ids, skip_special_tokens=True))
                for session, (prompt, ids) in enumerate(zip(prompts, answers, strict=True))
            ]
        )
        for prompt, ids in zip(prompts, answers, strict=True):
            prompt += ids
    return turns


def _answers(model: torch.nn.Module, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The model's greedy answers, `num_tokens` each. All prompts have one length as they are made: no padding."""
    answers: list[list[int]] = []
    for first in range(0, len(prompts), BATCH):
        ids = torch.tensor(prompts[first : first + BATCH])
        with torch.inference_mode():
            made = model.generate(  # type: ignore[operator]  # a mixin of transformers has it
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                pad_token_id=0,
            )
        answers += made[:, ids.shape[1] :].tolist()
    return answers
