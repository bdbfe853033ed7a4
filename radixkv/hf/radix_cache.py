"""A cache for `model.generate` that remembers prefixes from one call to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from radixkv.cache.residency.state_slots import LEAST_SLOTS
from radixkv.config.checks import checked_int
from radixkv.errors import ClosedError, InvalidRequestError, UnsupportedModelError
from radixkv.hf.call import Call
from radixkv.hf.chunk_buffer import ByteMeter
from radixkv.hf.chunked_cache import DEFAULT_CHUNK_TOKENS, ChunkedLayer
from radixkv.hf.disk_tier import DiskTier, disk_folder
from radixkv.hf.forward_inputs import eos_token_ids, num_logits, only_columns, positions_of_row, without_leading_columns
from radixkv.hf.page_store import LayerStates, Tokens, page_store
from radixkv.hf.probe import probe_prefixes
from radixkv.hf.prompt_hits import PromptHits, RadixCacheStats
from radixkv.hf.recurrent_layers import kv_layers_of, layers_of_call
from radixkv.hf.stored_rows import StoredRows
from radixkv.hf.support import (
    check_inputs,
    check_model,
    check_positions,
    check_prompt,
    position_limit,
    sees_columns,
    weights_state,
)


class RadixCache(Cache):  # type: ignore[misc]
    """Lets `model.generate` skip what an earlier call has computed: the longest stored prefix of each prompt.

        cache = RadixCache(model, max_tokens=100_000)
        model.generate(**inputs, past_key_values=cache)

    Pass the same object to every call. After a call the KV of prompt and output is in the pages of this cache, shared
    with what begins alike, and the least recently used goes first when room is needed. Tokens are those of a call
    without it; prompts are reused to the token. Sampling, streamers, beams, several sequences a prompt, prompt lookup
    and assistants work as they do without it. A call that raises stores nothing.

    In a batch, padded on the left, all rows are computed from one column on: the first that some row lacks. So a
    batch skips `min over rows of (padding + stored prefix)` columns, and hidden states and attentions of the prompt,
    where asked for, begin there. A common prefix of all rows that is not stored yet is computed once, before the rows.

    Layers that keep a state in place of keys and values can go on from a state that was kept, alone. One is kept before
    the last token of a prompt, after the last token that a call computed, and where a prompt parts from what is stored:
    the next prompt that begins alike is reused up to there. Rows of a batch begin in the same column, so those that
    lack a state there are computed alone up to it, where that saves enough.

    Between calls the object looks empty to transformers: to continue an output, pass all its tokens from the first on,
    not the last one alone, which would begin a new sequence. Weights that were replaced, moved or written to between
    calls are noticed, and all is forgotten; call `reset` after a change through `parameter.data`, and when adapters are
    switched. Not thread-safe: a second call at the same time is refused. It cannot be copied or pickled.

    With `disk_cache` prefixes survive the process: what a call stores is written there in the background, and what the
    pages lack is loaded from there where that is faster than computing it. The folder is of the same kind as that of
    an engine. Use the cache as a context manager or call `close` to have all written by then; a process that ends
    writes what is left, too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_tokens: int,
        page_size: int = 16,
        policy: str = "lru",
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        state_slots: int | None = None,
        disk_cache: str | Path | None = None,
        disk_cache_gb: float = 16.0,
    ) -> None:
        """Wrap `generate` on this model instance so that it uses a RadixCache when given one.

        With other caches `generate` behaves as before.

        Args:
            max_tokens: tokens to keep between calls, rounded up to whole pages. Their memory is taken in the first
                call. A running call holds its own on top, in layers with sliding windows too.
            page_size: tokens a page: the unit of eviction.
            policy: name of the eviction policy.
            chunk_tokens: by how many columns the buffers of a running call grow.
            state_slots: states of recurrent layers to keep between calls, at least 3. None: as many as the memory of
                `max_tokens` has room for, at most one a page, and at least 16. Of no use for other models.
            disk_cache: folder in which prefixes outlive the pages and the process; one cache or engine at a time owns
                it. The model's weights are hashed, and the memory of the pages is taken at once.
            disk_cache_gb: size of that folder at most.

        Raises: ConfigError; UnsupportedModelError if the KV of the model's tokens cannot be kept, or depends on more
            than the tokens before them, or for a `disk_cache` of a model with recurrent layers; TierError if
            `disk_cache` cannot be used, or has another owner.
        """
        max_tokens, page_size = checked_int("max_tokens", max_tokens, 1), checked_int("page_size", page_size, 1)
        chunk_tokens = checked_int("chunk_tokens", chunk_tokens, 1)
        if state_slots is not None:
            state_slots = checked_int("state_slots", state_slots, LEAST_SLOTS)
        self._disk_folder = disk_folder(disk_cache, disk_cache_gb)
        check_model(model)
        super().__init__(layer_class_to_replicate=partial(ChunkedLayer, chunk_tokens, ByteMeter()))
        probed = probe_prefixes(model)
        self._chunk_tokens = chunk_tokens
        self.store = page_store(probed, -(-max_tokens // page_size), page_size, policy, state_slots)
        self._rows = StoredRows(self.store, sees_columns=probed.sees_columns or sees_columns(model.config))
        if self._rows.has_states and disk_cache is not None:
            raise UnsupportedModelError(
                f"disk_cache keeps keys and values alone, and layers of {type(model).__name__} keep states, without "
                "which these are of no use; leave disk_cache out"
            )
        self._model = model
        self._position_limit = position_limit(model.config)
        self._call: Call | None = None
        self._is_ahead = False  # whether a forward pass is our own, of columns of the call's that runs
        self._is_closed = False
        self._hits = PromptHits()
        self._weights = weights_state(model)
        self._disk = self._open_disk(probed.states)
        model.generate = MethodType(generate, model)

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """For each row of the last call, how many tokens of its prompt were read, not computed."""
        return self._hits.cached_tokens

    @property
    def cached_by(self) -> tuple[dict[str, int], ...]:
        """Where the `cached_tokens` of each row were found: in the "pool", or on the "disk"."""
        if self._disk_folder is None:
            return tuple({"pool": cached} for cached in self._hits.cached_tokens)
        rows = zip(self._hits.cached_tokens, self._hits.disk_tokens, strict=True)
        return tuple({"pool": cached - loaded, "disk": loaded} for cached, loaded in rows)

    def stats(self) -> RadixCacheStats:
        """Hits, evictions and room so far. O(1)."""
        stats = self.store.stats()
        return RadixCacheStats(
            query_tokens=self._hits.query_tokens,
            hit_tokens=self._hits.hit_tokens,
            stored_tokens=stats.total_tokens,
            evicted_tokens=stats.evicted_tokens,
            capacity_tokens=self.store.max_tokens,
            pool_bytes=self.store.num_bytes,
            tiers=() if self._disk is None else (self._disk.stats(),),
            stored_states=stats.states - stats.free_states,
            state_slots=stats.states,
            state_bytes=self.store.states.num_bytes,
        )

    def reset(self) -> None:
        """Forget every prefix and free the pages' memory. Raises: InvalidRequestError in a call.

        What is on disk stays there, and the next call opens it anew: for other weights it is another store.
        """
        if self._call is not None:
            raise InvalidRequestError("a RadixCache cannot be reset while generate uses it")
        self._let_go_of_disk()
        self.store.reset()

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until what calls stored is written to `disk_cache`. Returns False if that took too long."""
        return self._disk is None or self._disk.flush(timeout_s)

    def close(self) -> None:
        """Write what is left, let go of `disk_cache`, and free the pages' memory. Idempotent.

        Raises: InvalidRequestError in a call.
        """
        if self._is_closed:
            return
        self.reset()
        self._is_closed = True

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refused: pages, threads and the lock on `disk_cache` belong to one object. Raises: TypeError."""
        raise TypeError("a RadixCache cannot be copied or pickled; make another one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_invariants(self) -> None:
        """Prove the bookkeeping of the pages, and that no call left any of them pinned. Raises: InvariantError."""
        self.store.prefixes.check_invariants()
        assert self.store.stats().num_leases == 0, "leases live within a method of the store"

    @contextmanager
    def serving(self, model: PreTrainedModel, eos_token_ids: frozenset[int]) -> Iterator[None]:
        """One call of `model.generate`: sees every forward pass in it, and stores its KV unless it raises."""
        if model is not self._model:
            raise InvalidRequestError("a RadixCache serves the model it was made with; make one for each model")
        if self._call is not None:
            raise InvalidRequestError("this RadixCache serves another call of generate; make one for each thread")
        if self._is_closed:
            raise ClosedError("the RadixCache was closed; make a new one")
        if (weights := weights_state(model)) != self._weights:
            self.reset()
            self._weights = weights
        if self._disk_folder is not None and self._disk is None:  # it was reset
            self._disk = self._open_disk(probe_prefixes(model).states)
        hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        try:
            with self._recording(Call(eos_token_ids)):
                yield
        finally:
            hook.remove()

    @contextmanager
    def _recording(self, call: Call) -> Iterator[None]:
        """Let the layers, which are empty, hold what `call` notes; store it in the end, unless something raises."""
        outer, self._call = self._call, call
        if self._rows.has_states:
            self.layers.extend(layers_of_call(self._model.config, self._chunk_tokens, ByteMeter()))
        try:
            yield
            self._note_speed(call)
            self._store(call)
        finally:
            self._call = outer
            self.layers.clear()

    def _open_disk(self, states: Sequence[LayerStates]) -> DiskTier | None:
        """Open `disk_cache`, with pages in memory for KV like `states`."""
        if self._disk_folder is None:
            return None
        self.store.allocate(states)
        return DiskTier(*self._disk_folder, self._model, self.store.pool, self.store.prefixes)

    def _let_go_of_disk(self) -> None:
        if self._disk is not None:
            self._disk.close()
        self._disk = None

    # ------------------------------------------------------------------------- what transformers calls

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the columns of one layer. Raises: InvalidRequestError outside `generate` of the cache's model."""
        if self._call is None:
            raise InvalidRequestError(
                "a RadixCache serves generate of the model it was made with, where it learns which tokens it holds; "
                "make it before the call (cache = RadixCache(model, …), then past_key_values=cache)"
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, as `ChunkedLayer.crop` does: assistants take back what was not accepted."""
        super().crop(tokens_to_remove)
        if self._call is not None:
            self._call.crop(self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i what row `beam_idx[i]` held."""
        super().reorder_cache(beam_idx)
        if self._call is not None:
            self._call.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: no way to decode in transformers itself drops rows."""
        raise InvalidRequestError("rows of a RadixCache cannot be dropped; generate without it")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: no way to decode in transformers itself repeats rows after the first forward pass."""
        raise InvalidRequestError("rows of a RadixCache cannot be repeated; generate without it")

    # --------------------------------------------------------------------------- before a forward pass

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note the tokens of a forward pass, load what is stored of them, and leave the rest to the model."""
        call = self._call
        if call is None or self._is_ahead or kwargs.get("past_key_values") is not self:
            return None  # another cache's forward pass inside the same call: guidance, an assistant
        check_inputs(kwargs)
        self._note_speed(call)
        first = self._check_complete(call)
        if first and not self.store.is_allocated:
            self._rows.allocate(self.layers)  # so that a lack of memory shows before there is an output to lose
        call.note(kwargs["input_ids"], kwargs.get("attention_mask"))
        if self._position_limit is None or call.longest_row < self._position_limit:
            call.exact_columns = call.num_columns
        limit = call.num_columns - num_logits(kwargs)
        if first and limit <= first:  # a step, or an assistant's proposal, after the prompt
            if self._rows.has_states and call.num_rows > 1:
                self._rows.states.keep_ends(call, self.layers, first, kwargs["input_ids"])
            return None
        check_positions(kwargs.get("position_ids"), first, call.padding)
        last = self._load_prefixes(call, first, limit, kwargs)
        if self._rows.has_states and self._rows.can_reuse(call):
            states = self._rows.states
            stops = states.stops(call, last, limit)
            for part in states.parts(call, last, stops):
                self._forward_ahead(only_columns(kwargs, part.start, part.stop, first))
                states.keep(call, self.layers, part.stop, stops)
                last = part.stop
        call.computing = (last, call.num_columns, time.perf_counter())
        return (args, without_leading_columns(kwargs, last - first)) if last > first else None

    def _load_prefixes(self, call: Call, first: int, limit: int, kwargs: dict[str, Any]) -> int:
        """Load columns from `first` on that every row has stored, up to column `limit`. Returns: where they end."""
        last, from_disk = first, [range(0)] * call.num_rows
        if self._rows.can_reuse(call):
            if self._disk is not None:
                from_disk = self._rows.bring_up(self._disk, call, limit)
            if first == 0:
                self._compute_prefixes(call, limit, kwargs.get("position_ids"))
            last = max(first, self._rows.stored_columns(call, limit))
        self._hits.note(call, first, last, from_disk)
        if last <= max(first, min(call.padding)):
            return first
        if not self.layers:
            self.layers.extend(self.layer_class_to_replicate() for _ in self.store.pool.k)
        self._rows.load(call, self.layers, first, last)
        return last

    def _note_speed(self, call: Call) -> None:
        """Tell the disk how long the last forward pass of a prompt took, with the step that it was for."""
        if self._disk is not None and call.computing is not None:
            first, last, started_at = call.computing
            self._disk.computed(first, last, (time.perf_counter() - started_at) / call.num_rows)
        call.computing = None

    def _compute_prefixes(self, call: Call, limit: int, position_ids: Tensor | None) -> None:
        """Compute and store what rows share, and what single ones lag behind, where that saves enough.

        It has the `position_ids` that `generate` passes: models that are not given any may count otherwise.
        """
        common = self._rows.common_prefix(call, limit)
        if common is not None:
            self._compute_alone(call, 0, common, position_ids)
        for prefix in self._rows.lagging(call, limit):
            if not self._rows.is_stored(prefix):  # other rows may have begun alike
                self._compute_alone(call, prefix.row, prefix.tokens, position_ids)

    def _compute_alone(self, call: Call, row: int, tokens: Tokens, position_ids: Tensor | None) -> None:
        """Compute and store `tokens`, with which a row begins."""
        assert call.ids is not None, "it has rows"
        kwargs: dict[str, Any] = {"input_ids": torch.from_numpy(tokens).to(call.ids)[None]}
        if position_ids is not None:
            columns = range(call.padding[row], call.padding[row] + len(tokens))
            kwargs["position_ids"] = positions_of_row(position_ids, row, call.num_rows, columns)
        layers = list(self.layers)
        self.layers.clear()
        try:
            with self._recording(Call(frozenset(), is_prefix=True)):
                self._model(past_key_values=self, use_cache=True, logits_to_keep=1, **kwargs)
        finally:
            self.layers.extend(layers)

    def _forward_ahead(self, kwargs: dict[str, Any]) -> None:
        self._is_ahead = True
        try:
            self._model(**kwargs)
        finally:
            self._is_ahead = False

    def _store(self, call: Call) -> None:
        """Keep the KV of every row, up to where its output ended."""
        if self._check_complete(call):
            self._rows.allocate(self.layers)
            self._rows.save(call, self.layers, self._disk)

    def _check_complete(self, call: Call) -> int:
        """How many columns the layers hold: all that were noted. Raises: UnsupportedModelError if they do not."""
        held = {layer.get_seq_length() for layer in kv_layers_of(self.layers)} or {0}
        if held != {call.num_columns}:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} was given {call.num_columns} columns and wrote {sorted(held)} to the "
                "layers of its cache; such a model cannot reuse prefixes"
            )
        return call.num_columns


def generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Call `generate` of the model's class, and let a `RadixCache` among the keywords see its forward passes.

    It takes the place of the method on one model, as a method, so that copies of the model have their own.
    """
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, RadixCache):
        return type(model).generate(model, *args, **kwargs)
    inputs = args[0] if args else kwargs.get("inputs")
    check_prompt(kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("attention_mask"))
    with cache.serving(model, eos_token_ids(model, kwargs)):
        return type(model).generate(model, *args, **kwargs)
