"""What unmodified models answer: the truth that engines are compared with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import torch
from transformers import PreTrainedModel

from tiny_models import tiny_model


class GreedyOracle:
    """The unmodified model, which computes everything anew for each token. Its answers are remembered."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model)
        self._next: dict[tuple[int, ...], int] = {}

    def continuation(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Return the `num_tokens` likeliest tokens after `prompt`, one by one."""
        ids = list(prompt)
        for _ in range(num_tokens):
            ids.append(self._likeliest(tuple(ids)))
        return ids[len(prompt) :]

    @torch.inference_mode()
    def _likeliest(self, ids: tuple[int, ...]) -> int:
        if ids not in self._next:
            logits = self._model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            self._next[ids] = int(logits.argmax())
        return self._next[ids]


@cache
def oracle_of(family: str, seed: int = 0) -> GreedyOracle:
    """Return the oracle of `tiny_model(family, seed)`, one for all tests of a process."""
    return GreedyOracle(tiny_model(family, seed))
