"""Numbers of 4 bits with a scale for each 16 of them, the form of NVFP4.

    x ~ GLOBAL_SCALE * scale * code

A code is an E2M1 (OCP Microscaling Formats, 2023): a sign, 2 bits of exponent and 1 of fraction, which makes the
magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6. A scale is a float8 e4m3 that is not negative, the nearest to a sixth of the
block's largest magnitude. Both are rounded to the nearest, ties to even.

NVFP4 has a float32 for each tensor besides. A tensor's largest value is not known while KV still comes, and four bytes
for each token and head would take too much: with them heads of 64 would fit 3.2 times the tokens of 16 bit, without
them 3.56. So it is one constant, a power of two, so that what is decoded is exact in 16 bit, too. With 1/4

    blocks up to 448 * 6 / 4 = 672 are coded whole: more than fp8_e4m3 holds, and the largest keys of models whose
        projections have biases; what is larger becomes 672
    blocks whose largest is at least 6 / 4 * 2**-6 = 0.0234 have a scale of 4 bits' precision
    smaller ones have a scale that is off by up to 2**-10, and below 6 / 4 * 2**-10 = 0.0015 a block becomes zeros
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from radixkv.memory.packing import HALVES, Packing

BLOCK = 16
"""Components that share a scale."""

GLOBAL_SCALE = 0.25
LARGEST_CODE = 6.0
LARGEST_SCALE = 448.0
SIGN = 8
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_fp4(values: Tensor, packing: Packing = HALVES) -> tuple[Tensor, Tensor]:
    """Code float32 vectors [..., dim], whose `dim` is a multiple of `BLOCK`. O(values).

    A vector with NaN or infinity in it is NaN as a whole: all its scales are.

    Returns: codes, uint8 [..., dim / 2], two in a byte as `packing` says, and the bits of the scales, uint8
        [..., dim / BLOCK].

    >>> codes, scales = encode_fp4(torch.tensor([6.0] * 8 + [-1.0] * 8))
    >>> codes.tolist(), scales.view(torch.float8_e4m3fn).tolist()
    ([167, 167, 167, 167, 167, 167, 167, 167], [4.0])
    """
    blocks = values.unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    wanted = (largest / (LARGEST_CODE * GLOBAL_SCALE)).clamp(max=LARGEST_SCALE)
    spoiled = ~values.isfinite().all(-1)[..., None, None]
    scales = wanted.masked_fill(spoiled, torch.nan).to(torch.float8_e4m3fn)
    steps = scales.float() * GLOBAL_SCALE
    signed = _nearest(blocks.abs() / steps) + SIGN * (blocks < 0)
    codes = torch.where(steps > 0, signed, 0).to(torch.uint8).flatten(-2)
    return packing.pack(codes), scales.view(torch.uint8).squeeze(-1)


def decode_fp4(codes: Tensor, scales: Tensor, packing: Packing = HALVES) -> Tensor:
    """The float32 values [..., dim] of what `encode_fp4` gave with the same packing. O(values).

    >>> decode_fp4(*encode_fp4(torch.arange(16.0)))
    tensor([ 0.0000,  1.2500,  2.5000,  2.5000,  3.7500,  5.0000,  5.0000,  7.5000,
             7.5000, 10.0000, 10.0000, 10.0000, 10.0000, 15.0000, 15.0000, 15.0000])
    """
    numbers = _values(codes.device)[packing.unpack(codes).long()]
    steps = scales.view(torch.float8_e4m3fn).float() * GLOBAL_SCALE
    values: Tensor = numbers.unflatten(-1, (-1, BLOCK)) * steps[..., None]
    return values.flatten(-2)


def _nearest(magnitudes: Tensor) -> Tensor:
    """The codes of numbers that are not negative; the fraction's bit of a tie is 0."""
    small, middle = (magnitudes * 2).round(), magnitudes.round() + 2
    large = (magnitudes / 2).round().clamp(max=3) + 4
    return torch.where(magnitudes < 2, small, torch.where(magnitudes < 4, middle, large))


@cache
@torch.inference_mode(False)  # kept, and autograd may not save an inference tensor
def _values(device: torch.device) -> Tensor:
    """What each of the 16 codes stands for."""
    both = [*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)]
    return torch.tensor(both, dtype=torch.float32, device="cpu").to(device)
