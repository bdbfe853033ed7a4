"""radixkv under measurement, with and without its prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import radixkv
from measure import Answer, Usage
from models import twin


class RadixKVRunner:
    """radixkv's engine, in one `generate` call a wave."""

    def __init__(self, name: str, model: Any, config: radixkv.EngineConfig) -> None:
        self.name = name
        self._engine = radixkv.Engine(twin(model), None, config)
        self._cached_tokens = self._computed_before = 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return int(self._engine.kv_bytes_per_token)

    def reset(self) -> None:
        self._engine.reset_cache()
        self._cached_tokens = 0
        self._computed_before = self._engine.stats().computed_tokens

    def serve(self, prompts: Sequence[list[int]], output_tokens: int) -> list[Answer]:
        params = radixkv.SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        outputs = self._engine.generate(list(prompts), params)
        self._cached_tokens += sum(output.cached_tokens for output in outputs)
        return [Answer(list(output.token_ids), output.metrics.ttft_s) for output in outputs]

    def usage(self) -> Usage:
        stats, page_size = self._engine.stats(), self._engine.cache.page_size
        return Usage(
            stats.computed_tokens - self._computed_before,
            self._cached_tokens,
            stats.peak_used_pages * page_size * self.kv_bytes_per_token,
        )
