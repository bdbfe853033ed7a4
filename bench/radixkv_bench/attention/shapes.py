"""What bench/attention.py measures: batches of equal requests, and what they have to read and compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from radixkv_bench.common.errors import BenchError


@dataclass(frozen=True, slots=True)
class Case:
    """Requests of one length, whose pages lie in random order.

    Attributes:
        context: tokens that each request has, those computed now included.
        shared: the first of them, which lie in the same pages for all requests; whole pages.
        new: the last of them, which are computed now; 1 is a decode.
    """

    name: str
    batch: int
    context: int
    shared: int = 0
    new: int = 1
    page_size: int = 16
    q_heads: int = 14
    kv_heads: int = 2
    head_dim: int = 64

    @property
    def distinct_tokens(self) -> int:
        """Tokens whose KV has to be read."""
        return self.shared + self.batch * (self.context - self.shared)

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Their KV, each read once."""
        return self.distinct_tokens * self.kv_heads * 2 * self.head_dim * dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the scores and the weighted sums, over the tokens that each query sees.

        >>> Case("", batch=2, context=3, new=2, q_heads=1, head_dim=1).flops  # 2 requests, 2 + 3 tokens, 4 each
        40
        """
        first = self.context - self.new + 1
        seen = self.batch * self.new * (first + self.context) // 2
        return 4 * self.q_heads * self.head_dim * seen


_SHORT_PREFIX = Case("shared-32x64+128", 32, 64 + 128, shared=64)
_LONG_PREFIX = Case("shared-32x4096+128", 32, 4096 + 128, shared=4096)
_EXTEND = Case("extend-512on3584", 1, 4096, new=512)


def _large(case: Case) -> Case:
    """The same with the heads of a model of 8 billion weights."""
    return replace(case, q_heads=32, kv_heads=8, head_dim=128)


_CPU = (
    Case("decode-1x4096", 1, 4096),
    Case("decode-1x32768", 1, 32768),
    Case("decode-8x4096", 8, 4096),
    Case("decode-8x4096-page1", 8, 4096, page_size=1),
    Case("decode-32x512", 32, 512),
    _SHORT_PREFIX,
    _LONG_PREFIX,
    replace(_LONG_PREFIX, name=f"{_LONG_PREFIX.name}-mha", kv_heads=14),
    _EXTEND,
)
_CUDA = (
    *(_large(Case(f"decode-{n}x{context}", n, context)) for context in (4096, 8192) for n in (32, 64, 128)),
    _large(_SHORT_PREFIX),
    _large(_LONG_PREFIX),
    _large(Case("shared-128x4096+128", 128, 4096 + 128, shared=4096)),
    _large(_EXTEND),
)

CASES: Mapping[str, Sequence[Case]] = {"cpu": _CPU, "cuda": _CUDA}
"""By type of device."""


def choose_cases(names: Sequence[str], device: torch.device) -> Sequence[Case]:
    """The cases of those names, all if there are none. Raises: BenchError for an unknown one."""
    known = {case.name: case for case in CASES[device.type]}
    for name in names:
        if name not in known:
            raise BenchError(f"unknown case {name!r} on {device.type}; the cases are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] or CASES[device.type]
