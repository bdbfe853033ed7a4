"""Random prompts, the same in every run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tiny_models import VOCAB_SIZE


def random_ids(seed: int, num_tokens: int) -> list[int]:
    """Return ids that are neither special nor the same for two seeds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


def random_prompts(seed: int, lengths: Sequence[int], shared: int) -> list[list[int]]:
    """Return prompts of the given lengths that share their first `shared` tokens."""
    ids = iter(random_ids(seed, shared + sum(length - shared for length in lengths)))
    head = [next(ids) for _ in range(shared)]
    return [head + [next(ids) for _ in range(length - shared)] for length in lengths]
