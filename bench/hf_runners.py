"""The baselines: Hugging Face's `generate` and `generate_batch`, on unmodified models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from errors import BaselineError
from measure import Answer, Usage
from models import twin
from oracle import distinct_tokens
from workloads import Workload


class _Meter:
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


class _FirstTokenClock:
    """A streamer for `generate` that notes when the first new tokens of a batch are known."""

    def __init__(self) -> None:
        self.first_token_at_s: float | None = None
        self._prompt_seen = False

    def put(self, _ids: torch.Tensor) -> None:
        """`generate` hands over the prompts first, then each step's tokens."""
        if self._prompt_seen and self.first_token_at_s is None:
            self.first_token_at_s = time.perf_counter()
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to flush."""


class GenerateRunner:
    """`model.generate`, in batches of `batch_size` with padding on the left; nothing is kept between batches."""

    def __init__(self, name: str, model: Any, batch_size: int, kv_bytes_per_token: int) -> None:
        self.name = name
        self._model = twin(model)
        self._meter = _Meter(self._model)
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
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])  # [B, longest]
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        clock = _FirstTokenClock()
        with torch.inference_mode():
            out = self._model.generate(ids, attention_mask=mask, max_new_tokens=output_tokens, streamer=clock)
        self._peak_kv_tokens = max(self._peak_kv_tokens, len(prompts) * (longest + output_tokens - 1))
        assert clock.first_token_at_s is not None
        assert out.shape == (len(prompts), longest + output_tokens)
        ttft_s = clock.first_token_at_s - started_s
        return [Answer(row, ttft_s) for row in out[:, longest:].tolist()]

    def usage(self) -> Usage:
        return Usage(self._meter.tokens, 0, self._peak_kv_tokens * self._kv_bytes_per_token)


class GenerateBatchRunner:
    """`model.generate_batch`: transformers' continuous batching, with blocks shared between requests and waves.

    Its settings are those it ran best with on two CPU cores. Its defaults (pages of 256 tokens, batches of 8,192) took
    three times as long: on the CPU its attention reads all sequences of a batch under one dense mask, so it is fastest
    with few sequences a batch.
    """

    PAGE_SIZE = 16
    MAX_BATCH_TOKENS = 512
    MAX_BATCH_REQUESTS = 4
    SEQUENCES_IN_FLIGHT = 8
    POOL_SHARE = 0.8  # its scheduler drops the shared blocks when less than 15 % of the pool is free

    def __init__(self, name: str, model: Any, pool_tokens: int) -> None:
        self.name = name
        self._model = twin(model)
        self._meter = _Meter(self._model)
        self._num_blocks = ceil(pool_tokens / self.PAGE_SIZE)
        self._fed_tokens = 0

    @classmethod
    def pool_tokens(cls, workload: Workload) -> int:
        """The pool it ran best with: room for every distinct token, and for some whole sequences in flight.

        A smaller pool loses shared blocks; in a larger one it batches more sequences, which costs it more than it wins.
        """
        roots = [request.tokens for request in workload.requests if request.parent is None]
        grown = sum(len(request.tokens) for request in workload.requests if request.parent is not None)
        answers = len(workload.requests) * workload.output_tokens
        distinct = distinct_tokens(roots, cls.PAGE_SIZE) + grown + answers
        return ceil(max(distinct, cls.SEQUENCES_IN_FLIGHT * workload.longest_tokens) / cls.POOL_SHARE)

    def reset(self) -> None:
        self._model.destroy_cached_continuous_batching_manager()
        self._meter.reset()
        self._fed_tokens = 0

    def serve(self, prompts: Sequence[list[int]], output_tokens: int) -> list[Answer]:
        results = self._model.generate_batch(
            list(prompts),
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=output_tokens),
            continuous_batching_config=self._config(),
            record_timestamps=True,
            persistent_manager=True,
        )
        self._fed_tokens += sum(len(prompt) + output_tokens - 1 for prompt in prompts)
        answers = [self._answer(result, output_tokens) for result in results.values()]
        if len(answers) != len(prompts):
            raise BaselineError(self._refusal(f"{len(answers)} of {len(prompts)} requests were answered"))
        return answers

    def _config(self) -> Any:
        return ContinuousBatchingConfig(
            page_size=self.PAGE_SIZE,
            num_blocks=self._num_blocks,
            max_batch_tokens=self.MAX_BATCH_TOKENS,
            max_requests_per_batch=self.MAX_BATCH_REQUESTS,
            allow_block_sharing=True,
        )

    def _answer(self, result: Any, output_tokens: int) -> Answer:
        answered = len(result.generated_tokens)
        if result.error is not None or answered != output_tokens:
            raise BaselineError(self._refusal(result.error or f"{answered} of {output_tokens} tokens were given"))
        return Answer(list(result.generated_tokens), result.timestamps[0] - result.created_time)

    def _refusal(self, reason: str) -> str:
        return f"{self.name} cannot serve this ({reason}); leave it out with --baselines"

    def usage(self) -> Usage:
        reused_tokens = max(0, self._fed_tokens - self._meter.tokens)
        return Usage(self._meter.tokens, reused_tokens, self._meter.peak_pool_bytes)
