"""How two codes of 4 bits share a byte.

HALVES    byte j holds components j (low bits) and j + dim / 2 (high bits): two contiguous reads, no shuffling
PAIRS     byte j holds components 2j (low bits) and 2j + 1 (high bits), as NVFP4's kernels expect
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOW = 15


class Packing(NamedTuple):
    """Two functions that undo each other.

    Attributes:
        pack: bytes [..., dim / 2] of codes [..., dim], uint8 below 16.
        unpack: the codes of bytes.
    """

    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


def _pack_halves(codes: Tensor) -> Tensor:
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def _unpack_halves(packed: Tensor) -> Tensor:
    return torch.cat([packed & LOW, packed >> 4], dim=-1)


def _pack_pairs(codes: Tensor) -> Tensor:
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _unpack_pairs(packed: Tensor) -> Tensor:
    return torch.stack([packed & LOW, packed >> 4], dim=-1).flatten(-2)


HALVES = Packing(_pack_halves, _unpack_halves)
PAIRS = Packing(_pack_pairs, _unpack_pairs)
