"""Runners that answer prompts greedily under a clock: radixkv's engine, and Hugging Face's `generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

import radixkv
from radixkv_bench.common.models import twin


class Answer(NamedTuple):
    """What one request got: `token_ids`, the first `ttft_s` and the last `total_s` after its wave was handed in."""

    token_ids: list[int]
    ttft_s: float
    total_s: float


class Usage(NamedTuple):
    """What a runner spent since it was last reset.

    `computed_tokens` went through the model (padding too), `cached_tokens` would have without reuse.
    """

    computed_tokens: int
    cached_tokens: int
    peak_kv_bytes: int


class Runner(Protocol):
    """Answers waves of prompts greedily."""

    name: str

    def reset(self) -> None:
        """Forget every prompt; `usage` starts again."""

    def serve(self, prompts: Sequence[list[int]], output_tokens: int) -> list[Answer]:
        """Answer all prompts with exactly `output_tokens` tokens each."""

    def usage(self) -> Usage:
        """What was spent since `reset`."""


class RadixKVRunner:
    """radixkv's engine, in one `generate` call a wave."""

    def __init__(self, name: str, model: Any, config: radixkv.EngineConfig) -> None:
        self.name = name
        self.engine = radixkv.Engine(twin(model), None, config)
        self._cached_tokens = self._computed_before = 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return int(self.engine.kv_bytes_per_token)

    def reset(self) -> None:
        self.engine.reset_cache()
        self._cached_tokens = 0
        self._computed_before = self.engine.stats().computed_tokens

    def serve(self, prompts: Sequence[list[int]], output_tokens: int) -> list[Answer]:
        params = radixkv.SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        outputs = self.engine.generate(list(prompts), params)
        self._cached_tokens += sum(output.cached_tokens for output in outputs)
        return [Answer(list(out.token_ids), out.metrics.ttft_s, out.metrics.total_s) for out in outputs]

    def usage(self) -> Usage:
        stats, page_size = self.engine.stats(), self.engine.cache.page_size
        return Usage(
            stats.computed_tokens - self._computed_before,
            self._cached_tokens,
            stats.peak_used_pages * page_size * self.kv_bytes_per_token,
        )


class TokenMeter:
    """Counts the tokens that go through a Hugging Face model, by a hook before its forward pass."""

    def __init__(self, model: Any) -> None:
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.reset()

    def reset(self) -> None:
        """Start from nothing."""
        self.tokens = self.peak_pool_bytes = 0

    def _count(self, _module: Any, _args: Any, keywords: dict[str, Any]) -> None:
        self.tokens += keywords["input_ids"].numel()
        pool = keywords.get("cache")  # continuous batching hands its paged cache through the model
        if pool is not None:
            used_bytes = int(pool.num_sectors * pool.bytes_per_sector - pool.compute_free_capacity(relative=False))
            self.peak_pool_bytes = max(self.peak_pool_bytes, used_bytes)


class _TokenClock:
    """A streamer for `generate` that notes when the prompts and then each step's tokens are handed over."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, _ids: torch.Tensor) -> None:
        """Note the time."""
        self.at_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to flush."""


class GenerateRunner:
    """`model.generate`, in batches of `batch_size` with padding on the left; nothing is kept between batches."""

    def __init__(self, name: str, model: Any, batch_size: int, kv_bytes_per_token: int) -> None:
        self.name = name
        self._model = twin(model)
        self._meter = TokenMeter(self._model)
        self._batch_size, self._kv_bytes_per_token = batch_size, kv_bytes_per_token
        self.reset()

    def reset(self) -> None:
        self._meter.reset()
        self._peak_kv_tokens = 0

    def serve(self, prompts: Sequence[list[int]], output_tokens: int) -> list[Answer]:
        started_s = time.perf_counter()
        answers: list[Answer] = []
        for start in range(0, len(prompts), self._batch_size):
            answers += self._serve_batch(prompts[start : start + self._batch_size], output_tokens, started_s)
        return answers

    def _serve_batch(self, prompts: Sequence[list[int]], output_tokens: int, started_s: float) -> list[Answer]:
        longest, device = max(map(len, prompts)), self._model.device
        ids = torch.tensor(
            [[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device
        )  # [B, longest]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        clock = _TokenClock()
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, max_new_tokens=output_tokens, streamer=clock)
        self._peak_kv_tokens = max(self._peak_kv_tokens, len(prompts) * (longest + output_tokens - 1))
        assert len(clock.at_s) == 1 + output_tokens, "the prompts, then each token"
        assert out.shape == (len(prompts), longest + output_tokens)
        ttft_s, total_s = clock.at_s[1] - started_s, clock.at_s[-1] - started_s
        return [Answer(row, ttft_s, total_s) for row in out[:, longest:].tolist()]

    def usage(self) -> Usage:
        return Usage(self._meter.tokens, 0, self._peak_kv_tokens * self._kv_bytes_per_token)
