"""Engines whose drafts are checked at every step, and drafters that know a little too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from radixkv import Engine, EngineConfig
from radixkv.engine.assembly import assemble
from radixkv.engine.drafts.cache_drafter import CacheDrafter
from radixkv.engine.drafts.drafter import NO_DRAFT, Draft, Drafter, Text
from radixkv.engine.drafts.speculation import Speculation
from runners import checked


class Knowing:
    """Drafts what the tokens will be, now and then with a mistake; remembers what it was asked, and who ended."""

    def __init__(self, *sequences: Sequence[int], mistakes: float = 0.3, seed: int = 0) -> None:
        """sequences: prompts with what follows them."""
        self.sequences = [list(sequence) for sequence in sequences]
        self.mistakes = mistakes
        self.asked: list[Text] = []
        self.ended_ids: set[int] = set()
        self._rng = np.random.default_rng(seed)

    def draft(self, texts: Sequence[Text]) -> list[Draft]:
        self.asked += [text._replace(token_ids=text.token_ids.copy()) for text in texts]
        return [self._draft(text) for text in texts]

    def ended(self, request_id: int) -> None:
        self.ended_ids.add(request_id)

    def _draft(self, text: Text) -> Draft:
        known = text.token_ids.tolist()
        for sequence in self.sequences:
            if sequence[: len(known)] == known and len(sequence) > len(known):
                ids = np.array(sequence[len(known) : len(known) + int(self._rng.integers(1, text.most + 1))], np.int32)
                if self._rng.random() < self.mistakes:
                    place = int(self._rng.integers(len(ids)))
                    ids[place] = (ids[place] + 1) % 200
                return Draft(ids, "knowing", 3)
        return NO_DRAFT


def speculating(
    model: PreTrainedModel,
    config: EngineConfig,
    drafter: Drafter | None = None,
    tokenizer: Any | None = None,
    **parts: Any,
) -> Engine:
    """An engine that checks all of every draft, whatever it costs, and proves its invariants after every step.

    Without a `drafter` the drafts are those of the cache.
    """
    found = assemble(model, tokenizer, config)
    drafter = CacheDrafter(found.cache) if drafter is None else drafter
    speculation = Speculation(drafter, found.vocab_size, always=True)
    return checked(Engine.from_parts(replace(found, speculation=speculation, **parts)))
