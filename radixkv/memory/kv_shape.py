"""How many bytes of keys and values (KV) tokens need, and how many sequences fit in a memory.

A layer keeps one K and one V vector per token and KV head, so a token costs

    sum over layers of  num_kv_heads * (k_head_dim + v_head_dim) * bytes of the dtype

which is `2 * layers * kv_heads * head_dim * dtype bytes` when all layers are alike. Grouped-query attention (GQA,
Ainslie et al. 2023) has fewer KV heads than query heads and multi-query attention (MQA, Shazeer 2019) has one.
Multi-head latent attention (MLA, DeepSeek-V2, 2024) keeps one compressed vector of `kv_lora_rank` values and one
rotary key of `qk_rope_head_dim` values for all heads together. Some layers keep nothing per token: linear attention
and Mamba layers, cross attention, and layers that read another layer's KV.

All tokens of all layers are counted, those outside a sliding window too; `savings` says what is spared without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

from radixkv.config.checks import checked_int
from radixkv.errors import ConfigError, UnsupportedModelError

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "float32": 32,
        "bfloat16": 16,
        "float16": 16,
        "fp8": 8,
        "fp8_e4m3": 8,
        "fp8_e5m2": 8,
        "int8": 8,
        "int4": 4,
        "fp4": 4,
    }
)
"""Bits of one value. The scales that quantised formats add are not in it."""

SCALE_BYTES = 2
SCALES_PER_VECTOR: Mapping[str, int] = MappingProxyType({"int8": 1, "int4": 2})
"""16-bit numbers beside the codes of each K and V vector: int8 has a scale, int4 a scale and a zero point. fp8 has one
scale for a whole tensor, which is nothing."""

VALUES_PER_SCALE: Mapping[str, int] = MappingProxyType({"fp4": 16})
"""Neighbouring values of a vector that share a scale of 8 bits."""


def dtype_bits(dtype: str) -> int:
    """Bits of one value of `dtype`.

    Raises: ConfigError if `dtype` is none of `DTYPE_BITS`.

    >>> dtype_bits("bfloat16")
    16
    """
    if dtype not in DTYPE_BITS:
        raise ConfigError(f"unknown dtype {dtype!r}; the known ones are {', '.join(DTYPE_BITS)}")
    return DTYPE_BITS[dtype]


def scale_bytes(dim: int, dtype: str) -> int:
    """Bytes of the scales beside a vector of `dim` values in `dtype`.

    >>> [scale_bytes(128, dtype) for dtype in ("bfloat16", "int8", "int4", "fp4")]
    [0, 2, 4, 8]
    """
    of_blocks = -(-dim // VALUES_PER_SCALE[dtype]) if dtype in VALUES_PER_SCALE else 0
    return SCALE_BYTES * SCALES_PER_VECTOR.get(dtype, 0) + of_blocks


def kv_budget_bytes(memory_bytes: int, weights_bytes: int = 0, reserve_fraction: float = 0.0) -> int:
    """What is left for KV: `(memory - weights) * (1 - reserve)`, rounded down; 0 if the weights do not fit.

    `reserve_fraction` keeps that share of what the weights leave for activations and fragmentation.

    Raises: ConfigError if a size is negative or not an integer, or the fraction is outside [0, 1).

    >>> kv_budget_bytes(100, weights_bytes=40, reserve_fraction=0.1)
    54
    """
    checked_int("memory_bytes", memory_bytes, minimum=0)
    checked_int("weights_bytes", weights_bytes, minimum=0)
    if not 0 <= reserve_fraction < 1:
        raise ConfigError(f"reserve_fraction must be at least 0 and below 1; got {reserve_fraction}")
    # The decimal that was written, not the binary float next to it: 0.1 of 100 bytes is exactly 10.
    kept = 1 - Fraction(str(reserve_fraction))
    return int(max(0, memory_bytes - weights_bytes) * kept)


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one layer keeps per token. All three are 0 for a layer that keeps nothing.

    Attributes:
        num_kv_heads: heads of K and V; 1 for a latent layer, whose one copy serves all heads.
        k_head_dim: values per head of K; for a latent layer the latent and the rotary key together.
        v_head_dim: values per head of V; 0 for a latent layer, which rebuilds V from the latent.
    """

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int

    @property
    def values_per_token(self) -> int:
        """Numbers kept per token, K and V together."""
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)

    @property
    def holds_kv(self) -> bool:
        """Whether the layer keeps anything per token."""
        return self.values_per_token > 0

    @property
    def is_latent(self) -> bool:
        """Whether K and V are kept as one compressed vector (MLA)."""
        return self.holds_kv and self.v_head_dim == 0

    def bytes_per_token(self, dtype: str) -> int:
        """Bytes per token in `dtype`: each K and V vector in whole bytes, and with its scales.

        >>> layer = LayerKV(num_kv_heads=8, k_head_dim=128, v_head_dim=128)
        >>> [layer.bytes_per_token(dtype) for dtype in ("bfloat16", "fp8", "int8", "int4", "fp4")]
        [4096, 2048, 2080, 1088, 1152]
        """
        vectors = [dim for dim in (self.k_head_dim, self.v_head_dim) if dim]
        return self.num_kv_heads * sum(-(-dim * dtype_bits(dtype) // 8) + scale_bytes(dim, dtype) for dim in vectors)


NO_KV = LayerKV(0, 0, 0)


@dataclass(frozen=True, slots=True)
class IndexedLayerKV(LayerKV):
    """A layer with a key more per token, by which its indexer chooses the tokens to attend to (DeepSeek-V3.2).

    >>> IndexedLayerKV(1, 576, 0, index_dim=128).bytes_per_token("bfloat16")
    1408
    """

    index_dim: int

    @property
    def values_per_token(self) -> int:
        """Numbers kept per token, the indexer's key among them."""
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim) + self.index_dim

    def bytes_per_token(self, dtype: str) -> int:
        """Bytes per token in `dtype`, as those of other layers."""
        index_key = LayerKV(1, self.index_dim, 0)
        return LayerKV.bytes_per_token(self, dtype) + index_key.bytes_per_token(dtype)


@dataclass(frozen=True, slots=True)
class KVShape:
    """What each layer of a model keeps per token, first layer first. At least one layer keeps something.

    >>> llama_3_8b = KVShape((LayerKV(8, 128, 128),) * 32)
    >>> llama_3_8b.bytes_per_token("bfloat16") // 1024
    128
    """

    layers: tuple[LayerKV, ...]

    def __post_init__(self) -> None:
        if not any(layer.holds_kv for layer in self.layers):
            raise UnsupportedModelError(f"none of the {len(self.layers)} layers keeps keys and values per token")

    @property
    def num_layers(self) -> int:
        """All layers, also those that keep nothing."""
        return len(self.layers)

    @property
    def num_kv_layers(self) -> int:
        """Layers that keep KV."""
        return sum(layer.holds_kv for layer in self.layers)

    def groups(self) -> list[tuple[LayerKV, int]]:
        """The different layers and how many there are of each, in order of first appearance."""
        return list(Counter(self.layers).items())

    def bytes_per_token(self, dtype: str) -> int:
        """Bytes of one token in all layers."""
        return sum(layer.bytes_per_token(dtype) * count for layer, count in self.groups())

    def bytes_per_sequence(self, seq_tokens: int, dtype: str) -> int:
        """Bytes of one sequence of `seq_tokens` tokens."""
        checked_int("seq_tokens", seq_tokens, minimum=1)
        return seq_tokens * self.bytes_per_token(dtype)

    def bytes_per_batch(self, batch: int, seq_tokens: int, dtype: str) -> int:
        """Bytes of `batch` sequences of `seq_tokens` tokens that share nothing."""
        checked_int("batch", batch, minimum=1)
        return batch * self.bytes_per_sequence(seq_tokens, dtype)

    def max_tokens(self, memory_bytes: int, dtype: str, weights_bytes: int = 0, reserve_fraction: float = 0.0) -> int:
        """Tokens whose KV fits in the `kv_budget_bytes` of the other arguments."""
        return kv_budget_bytes(memory_bytes, weights_bytes, reserve_fraction) // self.bytes_per_token(dtype)

    def max_batch(
        self,
        memory_bytes: int,
        seq_tokens: int,
        dtype: str,
        weights_bytes: int = 0,
        reserve_fraction: float = 0.0,
    ) -> int:
        """Sequences of `seq_tokens` tokens, sharing nothing, that fit in the `kv_budget_bytes` of the other arguments.

        Raises: ConfigError if an argument is out of its range.

        >>> llama_3_8b = KVShape((LayerKV(8, 128, 128),) * 32)
        >>> llama_3_8b.max_batch(80 * 2**30, 2048, "bfloat16", weights_bytes=16 * 2**30, reserve_fraction=0.1)
        230
        """
        budget = kv_budget_bytes(memory_bytes, weights_bytes, reserve_fraction)
        return budget // self.bytes_per_sequence(seq_tokens, dtype)
