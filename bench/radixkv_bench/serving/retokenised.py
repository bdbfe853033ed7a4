"""Case "retokenised": how often an answer that comes back as text is tokenised otherwise than it was generated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from radixkv import Engine, SamplingParams
from radixkv.cache.token_ids import common_tokens
from radixkv.serving.kept_answers import KeptAnswers
from radixkv_bench.common.device_timing import OnStep
from radixkv_bench.serving.http_cost import MODEL, texts
from radixkv_bench.serving.servers import Settings

OWNER = ("bench", None)
BATCH = 16  # answers at a time, for the progress


def measure(
    answers: int, prompt_tokens: int, output_tokens: int, seed: int, settings: Settings, advance: OnStep
) -> dict[str, Any]:
    """Sample answers at temperature 1, render the chat's next turn, and compare its ids with those that are cached."""
    with Engine.from_pretrained(MODEL, **settings) as engine:
        tokenizer = engine.require_tokenizer("a chat")
        kept = KeptAnswers(tokenizer, max_entries=answers)
        params = SamplingParams(max_tokens=output_tokens, temperature=1.0)
        lost, num_tokens, num_kept = [], 0, 0
        asked = texts(answers, prompt_tokens, seed)
        for first in range(0, answers, BATCH):
            batch = [[{"role": "user", "content": text}] for text in asked[first : first + BATCH]]
            prompts = [rendered(tokenizer, chat) for chat in batch]
            ids = [engine.encode(prompt, add_special_tokens=False) for prompt in prompts]
            outputs = engine.generate(ids, [replace(params, seed=seed + first + i) for i in range(len(batch))])
            for chat, prompt, prompt_ids, output in zip(batch, prompts, ids, outputs, strict=True):
                answer = output.text or ""
                said = [{"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]
                later = rendered(tokenizer, [*chat, *said])
                cached = [*prompt_ids.tolist(), *output.token_ids][:-1]  # the last one was not computed
                again = engine.encode(later, add_special_tokens=False)
                lost.append(len(cached) - common_tokens(again, engine.known_ids(cached)))
                num_tokens += len(output.token_ids)
                kept.add(OWNER, prompt, prompt_ids, answer, output.token_ids)
                num_kept += kept.find(OWNER, later) is not None
            advance(len(batch))
    differing = [tokens for tokens in lost if tokens]
    return {
        "answers": answers,
        "prompt_tokens": prompt_tokens,
        "output_tokens": num_tokens,
        "retokenised_answers": len(differing),
        "lost_tokens": sum(differing),
        "kept_answers": num_kept,
    }


def rendered(tokenizer: Any, chat: list[dict[str, str]]) -> str:
    """The text of a chat, up to where the answer begins."""
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
