"""StreamingLLM: layers that see the first tokens and the newest, at the positions that they have among these.

Xiao et al. ("Efficient Streaming Language Models with Attention Sinks", 2023) found that models rest much of their
attention on the first tokens, and break when a window leaves these behind. So the window keeps `sinks` first tokens,
and positions are counted inside the cache: a sequence of any length looks like one of `sinks + window` tokens.

With rotary embeddings a score depends on the distance of two tokens alone (Su et al., "RoFormer", 2021). Within the
window distances are what they were. So keys stay as they were rotated when they came, and all that is needed is a
second query for the sinks: the same one, turned back from its own position to the last one in the cache, which is
`sinks + window - 1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radixkv.attention.backend import AttentionParams, LayerAttention
from radixkv.errors import ConfigError, UnsupportedModelError
from radixkv.memory.rope import length_dependent_types
from radixkv.models.paged_attention import flattened_forward

MAX_CONTEXT_TOKENS = 1 << 20  # angles are float32: at that position they are right to 0.03
PROBED_POSITIONS = (1, 37, 4001)
MAX_DIFFERENCE = {torch.float32: 2e-3, torch.float64: 2e-3}  # of queries, relative to their largest component
MAX_HALF_DIFFERENCE = 5e-2


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a layer rotates its queries.

    Attributes:
        frequencies: float64 [n], of the first 2 n components.
        interleaved: whether neighbours are a pair, rather than components i and n + i.
    """

    frequencies: Tensor
    interleaved: bool

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [tokens, 1, n], of what turns by so many positions, int64 [tokens]."""
        angles = positions.double()[:, None, None] * self.frequencies
        return angles.cos().float(), angles.sin().float()

    def turn(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q [tokens, heads, head_dim], rotated further."""
        size = 2 * len(self.frequencies)
        turning, rest = q[..., :size].float(), q[..., size:]
        if self.interleaved:
            x, y = turning[..., ::2], turning[..., 1::2]
            turned = torch.stack([x * cos - y * sin, y * cos + x * sin], dim=-1).flatten(-2)
        else:
            x, y = turning.chunk(2, dim=-1)
            turned = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)
        return torch.cat([turned.to(q.dtype), rest], dim=-1)


class Streaming:
    """What `window` and `sinks` make of a model's attention.

    Attributes:
        layers: as the model's, but those that saw everything see `sinks` first tokens and a window.

    Raises: UnsupportedModelError if the model's positions cannot be counted inside the cache; ConfigError if window and
        sinks are more than the model was made for.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[LayerAttention], *, window: int, sinks: int, limit: int | None
    ) -> None:
        if limit is not None and window + sinks > limit:
            raise ConfigError(
                f"window={window} and sinks={sinks} are more than the {limit} tokens that the model was made for"
            )
        if any(layer.kv.is_latent for layer in layers):
            raise _unsupported(model, "it keeps latents (MLA), whose rotary keys all heads share")
        if any(layer.params.key_bias is not None for layer in layers):
            raise _unsupported(model, "its scores have biases by position (ALiBi), which go on counting")
        self._window, self._sinks = window, sinks
        self._streams = [layer.params.sliding_window is None and layer.params.chunk_size is None for layer in layers]
        self.layers = tuple(
            replace(layer, params=replace(layer.params, sliding_window=window, sink_tokens=sinks)) if streams else layer
            for layer, streams in zip(layers, self._streams, strict=True)
        )
        _check_positions(model)  # without sinks, too: positions will go beyond those that the model knows
        streaming = [i for i, streams in enumerate(self._streams) if streams]
        self._rotations = _find_rotations(model, streaming, _probed_positions(limit))

    def step(self, positions: Tensor) -> StreamingStep:
        """For a batch of tokens at `positions`, int64 [tokens]."""
        turns = positions.clamp(max=self._sinks + self._window - 1) - positions
        return StreamingStep(self._window, self._sinks, self._streams, self._rotations, turns)


class StreamingStep:
    """The same, for one batch."""

    def __init__(
        self,
        window: int,
        sinks: int,
        streams: Sequence[bool],
        rotations: dict[int, Rotation | None],
        turns: Tensor,
    ) -> None:
        self._window, self._sinks, self._streams, self._rotations = window, sinks, streams, rotations
        self._turns = turns
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}  # by the identity of a rotation, which layers share

    def params(self, layer: int, q: Tensor, params: AttentionParams) -> AttentionParams:
        """What the layer asks of attention now."""
        if not self._streams[layer]:
            return params
        params = replace(params, sliding_window=self._window)
        if not self._sinks:
            return params
        rotation = self._rotations[layer]
        if rotation is None:  # without positions
            return replace(params, sink_tokens=self._sinks, sink_queries=q)
        if id(rotation) not in self._angles:
            self._angles[id(rotation)] = rotation.angles(self._turns)
        return replace(params, sink_tokens=self._sinks, sink_queries=rotation.turn(q, *self._angles[id(rotation)]))


class _QueryProbe:
    """Notes the queries of each layer, for sequences of one token: where nothing is seen but itself."""

    def __init__(self) -> None:
        self.queries: dict[int, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        self.queries[layer] = q[0]  # [heads, head_dim]
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    def attend_latent(self, layer: int, q: Tensor, k: Tensor, latent_dim: int, params: AttentionParams) -> Tensor:
        raise AssertionError("latents were refused")


def _check_positions(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False):
        raise _unsupported(model, "it tunes the temperature of its attention by position")
    if changing := length_dependent_types(config):
        raise _unsupported(model, f"its rotary embeddings ({changing[0]}) change with the length")


def _probed_positions(limit: int | None) -> list[int]:
    """Positions that the model has: learned embeddings of positions end where its context does."""
    return [position if limit is None else min(position, limit - 1) for position in PROBED_POSITIONS]


@torch.inference_mode()
def _find_rotations(
    model: PreTrainedModel, layers: Sequence[int], positions: Sequence[int]
) -> dict[int, Rotation | None]:
    """How each of `layers` rotates queries, found out by running one token at `positions`; None if it does not.

    A lone token has the same hidden states everywhere, so its queries differ by their rotation alone.
    """
    candidates = [
        Rotation(buffer.double(), interleaved)
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
        for interleaved in (False, True)
    ]
    at = {position: _queries_at(model, position) for position in (0, *positions)}
    found: dict[int, Rotation | None] = {}
    for layer in layers:
        turned = {position: queries[layer] for position, queries in at.items()}
        rotations: list[Rotation | None] = [None, *(c for c in candidates if _fits(c, turned[0].shape[-1]))]
        fitting = [rotation for rotation in rotations if _explains(rotation, turned)]
        if not fitting:
            raise _unsupported(model, f"layer {layer} marks positions otherwise than by rotating queries and keys")
        found[layer] = fitting[0]
    return found


def _queries_at(model: PreTrainedModel, position: int) -> dict[int, Tensor]:
    probe = _QueryProbe()
    token, place = (torch.tensor([value], dtype=torch.int64, device=model.device) for value in (5, position))
    flattened_forward(model, token, place, torch.zeros_like(token), probe)
    return probe.queries


def _fits(rotation: Rotation, head_dim: int) -> bool:
    return 2 * len(rotation.frequencies) <= head_dim


def _explains(rotation: Rotation | None, at: dict[int, Tensor]) -> bool:
    """Whether what `rotation` makes of the queries at position 0 are those at the others."""
    start = at[0]
    limit = MAX_DIFFERENCE.get(start.dtype, MAX_HALF_DIFFERENCE) * float(start.abs().max())
    for position, queries in at.items():
        turned = start
        if rotation is not None:
            place = torch.tensor([position], dtype=torch.int64, device=start.device)
            turned = rotation.turn(start[None], *rotation.angles(place))[0]
        if not float((turned - queries).abs().max()) <= limit:
            return False
    return True


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} cannot stream beyond its context: {why}; leave out window and sinks"
    )
