"""A baseline: Hugging Face's `generate_batch`, on unmodified models."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from radixkv_bench.common.errors import BaselineError
from radixkv_bench.common.models import twin
from radixkv_bench.common.runners import Answer, TokenMeter, Usage
from radixkv_bench.shared_prompt.oracle import distinct_tokens
from radixkv_bench.shared_prompt.workloads import Workload


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
        self._meter = TokenMeter(self._model)
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
        started_s, first_s, last_s = result.created_time, result.timestamps[0], result.timestamps[-1]
        return Answer(list(result.generated_tokens), first_s - started_s, last_s - started_s)

    def _refusal(self, reason: str) -> str:
        return f"{self.name} cannot serve this ({reason}); leave it out with --baselines"

    def usage(self) -> Usage:
        reused_tokens = max(0, self._fed_tokens - self._meter.tokens)
        return Usage(self._meter.tokens, reused_tokens, self._meter.peak_pool_bytes)
