"""A cache for one `generate` call whose buffers grow by chunks, where `DynamicCache` is copied at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from radixkv.config.checks import checked_int
from radixkv.errors import ConfigError, UnsupportedModelError
from radixkv.hf.chunk_buffer import ByteMeter, ChunkBuffer, round_up, rows

DEFAULT_CHUNK_TOKENS = 256


class ChunkedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer that sees all tokens. `keys` and `values` are views of the buffer.

    A step writes its own columns, and the layer is copied once every `chunk_tokens` steps: decoding n tokens copies
    O(n² / chunk_tokens) columns, where concatenation copies O(n²).
    """

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, chunk_tokens: int, meter: ByteMeter) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens
        self.buffer = ChunkBuffer(meter)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; the buffer is made as columns come."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add columns, [batch, num_kv_heads, columns, head_dim]. Returns: K and V of all columns so far."""
        self.reserve(key_states, value_states, self.buffer.end + key_states.shape[-2])
        self.buffer.append(key_states, value_states)
        self._show()
        return self.buffer.view()

    def reserve(self, like_k: Tensor, like_v: Tensor, num_tokens: int) -> None:
        """Make room for `num_tokens` columns in all, so that they come without another copy."""
        if not self.is_initialized:
            self.lazy_initialization(like_k, like_v)
        if num_tokens > self.buffer.capacity:
            self.buffer.move(like_k, like_v, round_up(num_tokens, self.chunk_tokens))

    def extend(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Add columns that the caller writes, for which there is room. Returns: views of their K and V."""
        added = self.buffer.extend(num_tokens)
        self._show()
        return added

    def parts(self) -> tuple[Tensor, Tensor]:
        """K and V of all columns, of which there are some: no copies."""
        return self.buffer.view()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns; a positive number is how many stay (transformers 5.10).

        O(1).
        """
        num_tokens = self.get_seq_length()
        kept = tokens_to_remove if tokens_to_remove > 0 else num_tokens + tokens_to_remove
        if self.is_initialized and kept < num_tokens:
            self.buffer.end -= num_tokens - max(0, kept)
            self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i what row `beam_idx[i]` held."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._map_batch(rows(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` rows in place of each."""
        self._map_batch(lambda part: part.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Drop everything."""
        self.buffer.clear()
        self.keys = self.values = None
        self.is_initialized = False

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.buffer.capacity:
            self.buffer.map_batch(change)
            self._show()

    def _show(self) -> None:
        self.keys, self.values = self.buffer.view()


class ChunkedSlidingLayer(ChunkedLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """One layer that sees `sliding_window` tokens: it keeps those that the next token sees, one less.

    The window slides through the buffer and moves to the front of a new one every `chunk_tokens` steps.
    """

    is_sliding = True
    cumulative_length: int

    def __init__(self, sliding_window: int, chunk_tokens: int, meter: ByteMeter) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window=sliding_window)
        self.chunk_tokens = chunk_tokens
        self.buffer = ChunkBuffer(meter)
        self.record_past = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add columns. Returns: K and V of them, and of those before that the first of them sees."""
        num_new = key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.buffer.end + num_new > self.buffer.capacity:
            self.buffer.move(key_states, value_states, self._capacity_for(self.buffer.num_live + num_new))
        first_seen = max(self.buffer.start, self.buffer.end - self._num_kept)
        self.buffer.append(key_states, value_states)
        self.cumulative_length += num_new
        seen = self.buffer.view(first_seen)
        if not self.record_past:
            self._slide()
        self._show()
        return seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, as `ChunkedLayer` does, then those that the window has left.

        Raises: UnsupportedModelError if columns are gone that the window would come back to; transformers calls
            `activate_past_recording` before it crops.
        """
        num_tokens = self.cumulative_length
        kept = max(0, tokens_to_remove if tokens_to_remove > 0 else num_tokens + tokens_to_remove)
        if not self.is_initialized or kept > num_tokens:
            return
        num_removed = num_tokens - kept
        if num_removed and self.buffer.num_live - num_removed < min(kept, self._num_kept):
            raise UnsupportedModelError(
                f"{num_removed} tokens cannot be taken back from a sliding window of {self.sliding_window}: what it "
                "saw before them is gone; call activate_past_recording() first"
            )
        self.buffer.end -= num_removed
        self.cumulative_length = kept
        self._slide()
        self._show()

    def reset(self) -> None:
        """Drop everything."""
        super().reset()
        self.cumulative_length = 0

    @property
    def _num_kept(self) -> int:
        return int(self.sliding_window) - 1

    def _slide(self) -> None:
        """Let go of what no later token sees, and of the room that a long prompt took."""
        self.buffer.start = max(self.buffer.start, self.buffer.end - self._num_kept)
        if self.buffer.capacity > self._capacity_for(self.sliding_window):
            self.buffer.move(*self.buffer.view(), self._capacity_for(self.buffer.num_live + 1))

    def _capacity_for(self, num_tokens: int) -> int:
        # a full window needs a chunk of room to slide in, or it would move at each step
        if num_tokens < self.sliding_window:
            return round_up(num_tokens, self.chunk_tokens)
        return num_tokens - 1 + self.chunk_tokens


class ChunkedCache(Cache):  # type: ignore[misc]
    """A cache for one sequence batch, in the place of transformers' `DynamicCache` and with the same outputs.

    `DynamicCache` concatenates K and V of every layer at each step; here a step writes its own columns and a layer is
    copied once every `chunk_tokens` steps. Costs at most one chunk of unused room per layer.

    >>> import torch
    >>> from transformers import LlamaConfig
    >>> cache = ChunkedCache(LlamaConfig(num_hidden_layers=1), chunk_tokens=4)
    >>> for _ in range(6):
    ...     keys, values = cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), layer_idx=0)
    >>> keys.shape[-2], cache.copies, cache.wasted_bytes == 2 * (2 * 1 * 2 * 8 * 4)
    (6, 1, True)
    """

    def __init__(self, config: PretrainedConfig, *, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> None:
        """Layers with a sliding window or chunked attention keep what their window still sees.

        Raises: ConfigError if `chunk_tokens` is not a positive integer; UnsupportedModelError if a layer keeps other
            things than keys and values, such as a recurrent state.
        """
        chunk_tokens = checked_int("chunk_tokens", chunk_tokens, 1)
        self._meter = ByteMeter()
        super().__init__(layers=[self._chunked(layer, chunk_tokens) for layer in kv_layers(config)])

    @property
    def num_bytes(self) -> int:
        """Bytes allocated now. O(1)."""
        return self._meter.held_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were allocated at one time, both buffers of a layer that was moving counted. O(1)."""
        return self._meter.peak_bytes

    @property
    def copies(self) -> int:
        """How often what a layer holds was copied to another buffer; `DynamicCache` does it at each step. O(1)."""
        return self._meter.copies

    @property
    def wasted_bytes(self) -> int:
        """Bytes allocated for columns that hold nothing now. O(layers)."""
        return sum(layer.buffer.wasted_bytes for layer in self.layers if isinstance(layer, ChunkedLayer))

    def _chunked(self, layer: Any, chunk_tokens: int) -> Any:
        if type(layer) is DynamicSlidingWindowLayer:
            return ChunkedSlidingLayer(layer.sliding_window, chunk_tokens, self._meter)
        return ChunkedLayer(chunk_tokens, self._meter) if type(layer) is DynamicLayer else layer


def kv_layers(config: PretrainedConfig) -> list[Any]:
    """The layers that `DynamicCache` has for this config: full, sliding, or placeholders that hold nothing.

    Raises: UnsupportedModelError if one keeps something else than keys and values.
    """
    if not isinstance(config, PretrainedConfig):
        raise ConfigError(f"a cache is made for a model's config (model.config), not {type(config).__name__}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"only decoders are supported; {config.model_type} is an encoder-decoder")
    layers: list[Any] = DynamicCache(config=config).layers
    for index, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and type(layer).__name__ != "DummyLayer":
            raise UnsupportedModelError(
                f"only layers that keep keys and values per token are supported; layer {index} of {config.model_type} "
                f"needs a {type(layer).__name__}"
            )
    return layers
