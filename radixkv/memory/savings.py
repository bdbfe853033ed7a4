"""What a model's KV would cost if it were kept otherwise: in other dtypes, with other heads, or in windows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from radixkv.memory.kv_shape import LayerKV
from radixkv.memory.sizing import LayerConfig

COMPARED_DTYPES = ("bfloat16", "fp8", "int8", "int4", "fp4")

Kind = Literal["dtype", "heads", "window"]


class Alternative(NamedTuple):
    """Another way to keep the same tokens.

    Attributes:
        name: the dtype; "multi-head" or "multi-query"; or "window".
        bytes_per_token: None for a window: what a token costs depends on how many there are.
        bytes_per_sequence: None if no length was given.
    """

    kind: Kind
    name: str
    bytes_per_token: int | None
    bytes_per_sequence: int | None


def alternatives(layers: Sequence[LayerConfig], dtype: str, seq_tokens: int | None) -> Iterator[Alternative]:
    """Each dtype with its scales; in `dtype`, a K and a V for each query head, and one for all; windows kept alone.

    Heads are left out where the config does not tell the query heads, the window where no layer has one or no length
    is given. O(layers).
    """
    for other in COMPARED_DTYPES:
        per_token = sum(layer.kv.bytes_per_token(other) for layer in layers)
        yield Alternative("dtype", other, per_token, _times(per_token, seq_tokens))
    full_heads = [layer.full_heads for layer in layers]
    if (full := _all_known(full_heads)) is not None:
        for name, kept in (("multi-head", full), ("multi-query", list(map(_one_head, full)))):
            per_token = sum(layer.bytes_per_token(dtype) for layer in kept)
            yield Alternative("heads", name, per_token, _times(per_token, seq_tokens))
    if seq_tokens is not None and any(layer.window for layer in layers):
        kept_bytes = sum(
            min(seq_tokens, layer.window or seq_tokens) * layer.kv.bytes_per_token(dtype) for layer in layers
        )
        yield Alternative("window", "window", None, kept_bytes)


def _one_head(layer: LayerKV) -> LayerKV:
    return LayerKV(min(1, layer.num_kv_heads), layer.k_head_dim, layer.v_head_dim)


def _all_known(layers: Sequence[LayerKV | None]) -> list[LayerKV] | None:
    known = [layer for layer in layers if layer is not None]
    return known if len(known) == len(layers) else None


def _times(per_token: int, seq_tokens: int | None) -> int | None:
    return None if seq_tokens is None else per_token * seq_tokens
