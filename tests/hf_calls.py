"""Calls of transformers' `generate` with and without a `RadixCache`, and what they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radixkv.hf import RadixCache
from tiny_models import VOCAB_SIZE

NEW_TOKENS = 6
Rows = list[list[int]]


def endless(model: PreTrainedModel) -> PreTrainedModel:
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


def draw(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


def padded(prompts: Rows) -> dict[str, Tensor]:
    """`prompts` as generate takes them, padded on the left."""
    length = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def run(model: PreTrainedModel, prompts: Rows, cache: RadixCache | None = None, **kwargs: Any) -> Tensor:
    """Sequences with the padding on their left, [rows, columns]."""
    kwargs = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "use_cache": True, **kwargs}
    if cache is not None:
        kwargs["past_key_values"] = cache
    sequences: Tensor = model.generate(**padded(prompts), **kwargs)
    return sequences


_ANSWERS: WeakKeyDictionary[PreTrainedModel, dict[str, Tensor]] = WeakKeyDictionary()


def tokens_without_it(model: PreTrainedModel, prompts: Rows, **kwargs: Any) -> Tensor:
    """The tokens of a greedy call without the cache, computed when they are asked for first."""
    answers, call = _ANSWERS.setdefault(model, {}), repr((prompts, sorted(kwargs.items())))
    if call not in answers:
        answers[call] = run(model, prompts, **kwargs)
    return answers[call]


def check_same(model: PreTrainedModel, prompts: Rows, cache: RadixCache, **kwargs: Any) -> tuple[int, ...]:
    """Check the tokens of one call against those of a call without the cache. Returns: the tokens read from it."""
    assert torch.equal(run(model, prompts, cache, **kwargs), tokens_without_it(model, prompts, **kwargs))
    cache.check_invariants()
    return cache.cached_tokens


class ComputedColumns:
    """Counts rows × columns that go through a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.total = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        self.total += args[0].numel()


def picker(seed: int) -> Callable[[int], int]:
    """Draws integers below its argument."""
    generator = torch.Generator().manual_seed(seed)
    return lambda n: int(torch.randint(n, (), generator=generator))


class StopError(Exception):
    """What the tests raise inside generate."""


def raise_after(steps: int) -> Callable[..., Any]:
    calls = iter(range(steps))

    def step(*args: Any) -> Any:
        if next(calls, None) is None:
            raise StopError
        return args[1] if len(args) > 1 else None

    return step
