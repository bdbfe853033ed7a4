"""How keys and values become codes of 8 or 4 bits, and numbers again.

Every form codes the vector of one token and head by itself, so that a page can be read whenever it holds a token, and
copied, shared and evicted as any other. Scales and zeros of whole numbers are bfloat16, rounded so that no code is out
of its range:

    int8        x ~ scale * code, code in [-127, 127]
    int4        x ~ zero + scale * code, code in [0, 15]; K is rotated first
    fp4         x in a sign, 2 bits of exponent and 1 of fraction, with a scale for each 16 components: `fp4_codes`
    fp8_e4m3    x in 4 bits of exponent and 3 of fraction, beyond +-448 the nearest number that there is
    fp8_e5m2    x in 5 bits of exponent and 2 of fraction, beyond +-57344 likewise

Some components of K are much larger than the others, the same ones for all tokens, and would leave few of 16 steps to
the rest. KIVI (Liu et al., 2024) scales each component over many tokens instead, which must then be kept unquantised
until there are enough of them. A rotation needs no other tokens: it spreads what is large over all components, and
leaves the products of queries and keys as they are if both are rotated (QuaRot, Ashkboos et al., 2024). V has no such
components, and is not rotated.

In fp4 they leave few steps only to the 15 components that share their scale, and K is not rotated.

What is not finite never becomes a number: a vector with NaN or infinity in it is NaN as a whole in int8, int4 and fp4,
as is in int8 and int4 one whose spread float32 cannot hold; in fp8 the component alone is, and infinity stays infinity
in e5m2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from radixkv.errors import ConfigError
from radixkv.memory.fp4_codes import BLOCK, decode_fp4, encode_fp4
from radixkv.memory.packing import HALVES, Packing

KVCode = Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2", "fp4"]

LARGEST_INT8 = 127
LARGEST_INT4 = 15


@dataclass(frozen=True, slots=True)
class CodeForm:
    """What a vector is coded into.

    Attributes:
        codes_per_byte: 1, or 2, which lie in it as a `Packing` says.
        scales_per_vector: bfloat16 numbers beside the codes; a scale, or a scale and a zero.
        rotates_keys: whether codes of K are of rotated keys, to be multiplied with rotated queries.
        block: components that share a scale of 8 bits; None if vectors are scaled as a whole, or not at all.
    """

    codes_per_byte: int
    scales_per_vector: int = 0
    rotates_keys: bool = False
    block: int | None = None

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the scales as pools keep them: those of blocks are the bits of float8 e4m3."""
        return torch.bfloat16 if self.block is None else torch.uint8

    def num_scales(self, dim: int) -> int:
        """Scales and zeros of a vector."""
        return self.scales_per_vector if self.block is None else dim // self.block

    def bytes_per_vector(self, dim: int) -> int:
        """Of codes and scales.

        >>> [CODE_FORMS[name].bytes_per_vector(64) for name in ("int8", "int4", "fp8_e4m3", "fp4")]
        [66, 36, 64, 36]
        """
        return dim // self.codes_per_byte + self.num_scales(dim) * self.scale_dtype.itemsize

    def why_not(self, dim: int) -> str | None:
        """Why vectors of `dim` components cannot be coded; None if they can."""
        if dim % (self.block or self.codes_per_byte) == 0:
            return None
        if self.block is not None:
            return f"has a scale for each {self.block} components, and the model's heads have {dim}"
        return f"puts {self.codes_per_byte} components in a byte, and the model's heads have {dim}"


CODE_FORMS: Mapping[str, CodeForm] = MappingProxyType(
    {
        "int8": CodeForm(codes_per_byte=1, scales_per_vector=1),
        "int4": CodeForm(codes_per_byte=2, scales_per_vector=2, rotates_keys=True),
        "fp8_e4m3": CodeForm(codes_per_byte=1),
        "fp8_e5m2": CodeForm(codes_per_byte=1),
        "fp4": CodeForm(codes_per_byte=2, block=BLOCK),
    }
)
"""The forms that KV can be kept in besides a dtype of its own."""

_FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def is_quantized(kv_dtype: str) -> bool:
    """Whether KV of that name is kept as codes."""
    return kv_dtype in CODE_FORMS


def code_form(kv_dtype: str) -> CodeForm:
    """The form of that name. Raises: ConfigError if there is none."""
    if kv_dtype not in CODE_FORMS:
        raise ConfigError(f"unknown form of quantised KV {kv_dtype!r}; there are {', '.join(CODE_FORMS)}")
    return CODE_FORMS[kv_dtype]


def encode(kv_dtype: KVCode, values: Tensor, packing: Packing = HALVES) -> tuple[Tensor, Tensor]:
    """Code vectors [..., dim]; `packing` is of no effect on codes of 8 bits. O(values).

    Returns: codes, uint8 [..., dim / codes_per_byte], and scales, [..., num_scales] of the form's `scale_dtype`.

    >>> codes, scales = encode("int8", torch.tensor([[127.0, -1.0]]))
    >>> codes.view(torch.int8).tolist(), scales.tolist()
    ([[127, -1]], [[1.0]])
    """
    values = values.float()
    if kv_dtype == "int8":
        return _encode_int8(values)
    if kv_dtype == "int4":
        return _encode_int4(values, packing)
    if kv_dtype == "fp4":
        return encode_fp4(values, packing)
    return _encode_fp8(values, _FLOAT8[kv_dtype])


def decode(kv_dtype: KVCode, codes: Tensor, scales: Tensor, packing: Packing = HALVES) -> Tensor:
    """The float32 values [..., dim] of what `encode` gave with the same packing. O(values)."""
    if kv_dtype == "int8":
        return codes.view(torch.int8) * scales.float()
    if kv_dtype == "int4":
        return packing.unpack(codes) * scales[..., :1].float() + scales[..., 1:].float()
    if kv_dtype == "fp4":
        return decode_fp4(codes, scales, packing)
    return codes.view(_FLOAT8[kv_dtype]).float()


def rotate(vectors: Tensor) -> Tensor:
    """Rotate vectors [..., dim] in float32, so that whatever is large in one component is spread over many.

    Signs that look random, and a Walsh-Hadamard transform of the largest power of two that divides `dim`, block by
    block. Products of two vectors stay what they are. O(dim) a component.
    """
    return vectors.float() @ _rotation(vectors.shape[-1], vectors.device)


def rotate_back(vectors: Tensor) -> Tensor:
    """Undo `rotate`.

    >>> torch.allclose(rotate_back(rotate(torch.eye(24))), torch.eye(24), atol=1e-6)
    True
    """
    return vectors.float() @ _rotation(vectors.shape[-1], vectors.device).T


def _encode_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    scales = _finite(_rounded_up(values.abs().amax(-1, keepdim=True) / LARGEST_INT8))
    codes = (values / scales).round().nan_to_num(0.0)  # NaN of 0 / 0, and where the scale is NaN
    return codes.to(torch.int8).view(torch.uint8), scales.bfloat16()


def _encode_int4(values: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    zeros = -_rounded_up(-values.amin(-1, keepdim=True))
    scales = _finite(_rounded_up((values.amax(-1, keepdim=True) - zeros) / LARGEST_INT4))
    codes = ((values - zeros) / scales).round().nan_to_num(0.0).clamp(0, LARGEST_INT4).to(torch.uint8)
    return packing.pack(codes), torch.cat([scales, zeros], dim=-1).bfloat16()


def _encode_fp8(values: Tensor, float8: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = torch.finfo(float8).max
    saturated = values.clamp(-largest, largest)  # NaN stays NaN
    beyond = values if float8 == torch.float8_e5m2 else math.nan  # e4m3 has no infinity
    codes = torch.where(values.isinf(), beyond, saturated).to(float8).view(torch.uint8)
    return codes, values.new_empty(*values.shape[:-1], 0, dtype=torch.bfloat16)


def _rounded_up(values: Tensor) -> Tensor:
    """The next bfloat16 towards infinity, as float32; NaN and infinity come out as one of the two."""
    bits = values.contiguous().view(torch.int32)
    away_from_zero = torch.where(values > 0, bits + 0xFFFF, bits)
    return torch.where(values.isfinite(), away_from_zero.bitwise_and(~0xFFFF).view(torch.float32), values)


def _finite(scales: Tensor) -> Tensor:
    """NaN in place of infinity: a code of 0 must not make a number of it."""
    return torch.where(scales.isfinite(), scales, math.nan)


@cache
@torch.inference_mode(False)  # kept, and autograd may not save an inference tensor
def _rotation(dim: int, device: torch.device) -> Tensor:
    """The orthogonal matrix of `rotate`, float32 [dim, dim]."""
    size = dim & -dim
    hadamard = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while hadamard.shape[0] < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)], 0)
    generator = torch.Generator("cpu").manual_seed(0)
    signs = 1 - 2 * torch.randint(2, (dim, 1), generator=generator, dtype=torch.int64, device="cpu")
    blocks: Tensor = torch.block_diag(*[hadamard / math.sqrt(size)] * (dim // size))
    return (signs * blocks).to(device)
