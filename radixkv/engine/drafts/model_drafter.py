"""Drafts from a second, smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from radixkv.engine.drafts.drafter import NO_DRAFT, Draft, Text
from radixkv.engine.sampling import SamplingParams
from radixkv.errors import ConfigError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine

MODEL = "model"
DRAFT_TOKENS = 4


class ModelDrafter:
    """Drafts what a smaller model with the same tokens would say, greedily (Leviathan et al. 2023).

    The model runs in an engine of its own, whose pages hold its KV: what a text has in common with the last draft, or
    with another request of its namespace, is found there and not computed again. Each draft takes its tokens' steps of
    that model. Texts that are longer than its context, or hold tokens that it does not know, get no drafts.

    >>> import radixkv
    >>> from radixkv.engine.drafts.model_drafter import ModelDrafter
    >>> small = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=2048)
    >>> engine = radixkv.Engine.from_pretrained("demo", kv_cache_tokens=2048, drafter=ModelDrafter(small))
    >>> output, = engine.generate("ROMEO:", radixkv.SamplingParams(max_tokens=12))
    >>> len(output.token_ids)
    12
    """

    def __init__(self, engine: Engine, num_tokens: int = DRAFT_TOKENS) -> None:
        """Draft `num_tokens` tokens at most by `engine`, which nobody else should use.

        Raises: ConfigError.
        """
        if num_tokens < 1:
            raise ConfigError(f"num_tokens must be at least 1, not {num_tokens}")
        self._engine = engine
        self._num_tokens = num_tokens
        self._vocab_size = int(engine.model.config.get_text_config().vocab_size)

    def draft(self, texts: Sequence[Text]) -> list[Draft]:
        """As `Drafter.draft`: texts of one namespace in one batch."""
        drafts = [NO_DRAFT] * len(texts)
        by_namespace: dict[tuple[str | None, str | None], list[int]] = {}
        for place, text in enumerate(texts):
            if self._can_read(text):
                by_namespace.setdefault(text.namespace, []).append(place)
        for (extra_key, cache_salt), places in by_namespace.items():
            prompts = [texts[place].token_ids for place in places]
            params = [self._params(texts[place]) for place in places]
            outputs = self._engine.generate(prompts, params, extra_key=extra_key, cache_salt=cache_salt)
            for place, output in zip(places, outputs, strict=True):
                drafts[place] = Draft(np.array(output.token_ids, np.int32), MODEL)
        return drafts

    def ended(self, request_id: int) -> None:
        """Nothing to do: what the engine has cached is evicted in its time."""

    def _can_read(self, text: Text) -> bool:
        ids = text.token_ids
        return len(ids) < self._engine.max_context_tokens and int(ids.max()) < self._vocab_size

    def _params(self, text: Text) -> SamplingParams:
        return SamplingParams(max_tokens=min(text.most, self._num_tokens), ignore_eos=True)
