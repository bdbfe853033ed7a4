"""Case "transformers": the same conversations through radixkv and through `transformers serve`."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from radixkv_bench.common.device_timing import OnStep
from radixkv_bench.common.models import RandomModel
from radixkv_bench.serving import word_model
from radixkv_bench.serving.client import COMPLETIONS, Address, Reply, ask
from radixkv_bench.serving.servers import (
    RunningServer,
    Settings,
    check_transformers,
    radixkv_server,
    transformers_server,
)

Start = Callable[[], AbstractContextManager[RunningServer]]
FIRST_WORD = 1  # word 0 stands for unknown ones
TRANSFORMERS_PAGE = 256  # its default
BATCH_TOKENS = 2048  # of a step, for both


@dataclass(frozen=True, slots=True)
class Talk:
    """Clients that converse side by side: a system prompt that all share, then turns of a user and of the model."""

    clients: int
    system_tokens: int
    turns: int
    user_tokens: int
    output_tokens: int

    @property
    def context_tokens(self) -> int:
        """Of a conversation at its end."""
        return self.system_tokens + self.turns * (self.user_tokens + self.output_tokens)


@dataclass(frozen=True, slots=True)
class Run:
    """One server's answers to all turns of all clients."""

    replies: Sequence[Reply]
    total_s: float

    @property
    def tokens_a_second(self) -> float:
        """Output tokens of all clients together."""
        return sum(reply.output_tokens for reply in self.replies) / self.total_s

    @property
    def ttft_s(self) -> float:
        """The median time to the first text."""
        return median(reply.ttft_s for reply in self.replies)


def measure(
    talk: Talk, sizes: RandomModel, rounds: int, seed: int, settings: Settings, advance: OnStep
) -> dict[str, Any]:
    """Hold the conversations with both servers, in turns, each time with a server that was just started.

    Raises: BaselineError if `transformers serve` lacks a package.
    """
    check_transformers()
    runs: dict[str, list[Run]] = {"radixkv": [], "transformers": []}
    with tempfile.TemporaryDirectory(prefix="radixkv-bench-") as folder:
        model = Path(folder)
        word_model.save(sizes, talk.context_tokens, model)
        for number in range(rounds):
            for name, start in _servers(talk, model, settings).items():
                with start() as server:
                    asyncio.run(_hold(server.address, str(model), _warm_up(talk), sizes.vocab, seed + rounds))
                    runs[name].append(asyncio.run(_hold(server.address, str(model), talk, sizes.vocab, seed + number)))
                advance(1)
    return _figures(talk, sizes, runs)


def _servers(talk: Talk, model: Path, settings: Settings) -> dict[str, Start]:
    """How to start each: with room for everything, and the same number of tokens a step."""
    pages = talk.clients * (-(-talk.context_tokens // TRANSFORMERS_PAGE) + 1)
    batch = max(BATCH_TOKENS, talk.clients)
    ours = {**settings, "dtype": "float32", "kv_cache_tokens": pages * TRANSFORMERS_PAGE, "max_batch_tokens": batch}
    theirs = ("--cb-num-blocks", str(pages), "--cb-max-batch-tokens", str(batch))
    return {
        "radixkv": lambda: radixkv_server(str(model), ours),
        "transformers": lambda: transformers_server(model, *theirs),
    }


def _warm_up(talk: Talk) -> Talk:
    """A short talk, of other words, that lets a server load and compile what it needs."""
    return Talk(min(talk.clients, 4), min(talk.system_tokens, 64), 2, talk.user_tokens, min(talk.output_tokens, 8))


async def _hold(address: Address, model: str, talk: Talk, vocabulary: int, seed: int) -> Run:
    """Hold all conversations at once; each asks anew as soon as it was answered."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> str:
        return word_model.text_of(rng.integers(FIRST_WORD, vocabulary, count).tolist())

    system = words(talk.system_tokens)
    asked = [[words(talk.user_tokens) for _ in range(talk.turns)] for _ in range(talk.clients)]

    async def converse(questions: Sequence[str]) -> list[Reply]:
        said, replies = system, []
        for question in questions:
            said = f"{said} {question}"
            body = {"model": model, "prompt": said, "max_tokens": talk.output_tokens, "temperature": 0}
            replies.append(await ask(address, COMPLETIONS, {**body, "stream_options": {"include_usage": True}}))
            said = f"{said} {replies[-1].text.strip()}"
        return replies

    started_s = time.perf_counter()
    answered = await asyncio.gather(*map(converse, asked))
    total_s = time.perf_counter() - started_s
    return Run([reply for replies in answered for reply in replies], total_s)


def _figures(talk: Talk, sizes: RandomModel, runs: dict[str, list[Run]]) -> dict[str, Any]:
    servers = {
        name: {
            "tokens_a_second": median(run.tokens_a_second for run in of_one),
            "ttft_p50_s": median(run.ttft_s for run in of_one),
            "output_tokens": [sum(reply.output_tokens for reply in run.replies) for run in of_one],
            "prompt_tokens": [sum(reply.prompt_tokens for reply in run.replies) for run in of_one],
            "cached_tokens": [sum(reply.cached_tokens or 0 for reply in run.replies) for run in of_one],
        }
        for name, of_one in runs.items()
    }
    pairs = list(zip(runs["radixkv"], runs["transformers"], strict=True))
    texts = [a.text.split() == b.text.split() for x, y in pairs for a, b in zip(x.replies, y.replies, strict=True)]
    return {
        "clients": talk.clients,
        "system_tokens": talk.system_tokens,
        "turns": talk.turns,
        "user_tokens": talk.user_tokens,
        "output_tokens": talk.output_tokens,
        "model": str(sizes),
        "servers": servers,
        "throughput_ratio": median(x.tokens_a_second / y.tokens_a_second for x, y in pairs),
        "ttft_ratio": median(x.ttft_s / y.ttft_s for x, y in pairs),
        "same_answers": sum(texts) / len(texts),
    }
