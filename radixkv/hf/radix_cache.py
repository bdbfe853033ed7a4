"""A cache for `model.generate` that remembers prefixes from one call to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from radixkv.cache.residency.state_slots import LEAST_SLOTS
from radixkv.config import EngineConfig
from radixkv.config.checks import checked_int, shown
from radixkv.config.setting import field_check, setting_field
from radixkv.errors import ClosedError, ConfigError, InvalidRequestError, UnsupportedModelError
from radixkv.hf.call import Call
from radixkv.hf.chunk_buffer import ByteMeter
from radixkv.hf.chunked_cache import DEFAULT_CHUNK_TOKENS, ChunkedLayer
from radixkv.hf.disk_tier import DiskTier
from radixkv.hf.forward_inputs import eos_token_ids, num_logits, only_columns, without_leading_columns
from radixkv.hf.page_store import LayerStates, PageStore, Tokens
from radixkv.hf.probe import ProbedPrefixes, probe_prefixes
from radixkv.hf.recurrent_layers import kv_layers_of, layers_of_call
from radixkv.hf.state_keeper import MIN_SHARED_TOKENS, StateKeeper
from radixkv.hf.state_store import StateStore, default_slots
from radixkv.hf.support import (
    check_inputs,
    check_model,
    check_positions,
    check_prompt,
    position_limit,
    sees_columns,
    weights_state,
)
from radixkv.tiers.tier import TierStats

_check_disk_cache_gb = field_check(setting_field(EngineConfig, "disk_cache_gb"))


class RadixCacheStats(NamedTuple):
    """What a `RadixCache` did so far and holds now.

    `hit_tokens` of `query_tokens` in the prompts of all calls were read, not computed. `stored_tokens` is what the
    pages in use have room for, of `capacity_tokens` in all, which take `pool_bytes` once the first call has ended;
    `evicted_tokens` made room for others. `tiers` tells of the disk, if there is one. Of a model with recurrent layers
    `stored_states` of at most `state_slots` states are kept, which take `state_bytes`.
    """

    query_tokens: int
    hit_tokens: int
    stored_tokens: int
    evicted_tokens: int
    capacity_tokens: int
    pool_bytes: int
    tiers: tuple[TierStats, ...] = ()
    stored_states: int = 0
    state_slots: int = 0
    state_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were not computed; 0 before the first call."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0


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
        capacity_gb: Any = _check_disk_cache_gb("disk_cache_gb", disk_cache_gb)
        if not isinstance(disk_cache, str | Path | None):
            raise ConfigError(f"disk_cache must be the path of a folder, or None, not {shown(disk_cache)}")
        check_model(model)
        super().__init__(layer_class_to_replicate=partial(ChunkedLayer, chunk_tokens, ByteMeter()))
        probed = probe_prefixes(model)
        self._chunk_tokens = chunk_tokens
        self.store = _page_store(probed, -(-max_tokens // page_size), page_size, policy, state_slots)
        self._states = StateKeeper(self.store, self._namespace)
        self._has_states = bool(probed.state_shapes)
        if self._has_states and disk_cache is not None:
            raise UnsupportedModelError(
                f"disk_cache keeps keys and values alone, and layers of {type(model).__name__} keep states, without "
                "which these are of no use; leave disk_cache out"
            )
        self._model = model
        self._position_limit = position_limit(model.config)
        self._sees_columns = probed.sees_columns or sees_columns(model.config)
        self._call: Call | None = None
        self._is_ahead = False  # whether a forward pass is our own, of columns of the call's that runs
        self._is_closed = False
        self._cached_tokens: tuple[int, ...] = ()
        self._disk_tokens: tuple[int, ...] = ()
        self._disk_cache, self._disk_cache_gb = disk_cache, float(capacity_gb)
        self._weights = weights_state(model)
        self._disk = self._open_disk(probed.states)
        self._query_tokens = self._hit_tokens = 0
        model.generate = MethodType(generate, model)

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """For each row of the last call, how many tokens of its prompt were read, not computed."""
        return self._cached_tokens

    @property
    def cached_by(self) -> tuple[dict[str, int], ...]:
        """Where the `cached_tokens` of each row were found: in the "pool", or on the "disk"."""
        if self._disk_cache is None:
            return tuple({"pool": cached} for cached in self._cached_tokens)
        rows = zip(self._cached_tokens, self._disk_tokens, strict=True)
        return tuple({"pool": cached - loaded, "disk": loaded} for cached, loaded in rows)

    def stats(self) -> RadixCacheStats:
        """Hits, evictions and room so far. O(1)."""
        stats = self.store.stats()
        return RadixCacheStats(
            query_tokens=self._query_tokens,
            hit_tokens=self._hit_tokens,
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
        if self._disk_cache is not None and self._disk is None:  # it was reset
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
        if self._has_states:
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
        if self._disk_cache is None:
            return None
        self.store.allocate(states)
        return DiskTier(self._disk_cache, self._disk_cache_gb, self._model, self.store.pool, self.store.prefixes)

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
            self._allocate()  # so that a lack of memory shows before there is an output to lose
        call.note(kwargs["input_ids"], kwargs.get("attention_mask"))
        if self._position_limit is None or call.longest_row < self._position_limit:
            call.exact_columns = call.num_columns
        limit = call.num_columns - num_logits(kwargs)
        if first and limit <= first:  # a step, or an assistant's proposal, after the prompt
            if self._has_states and call.num_rows > 1:
                self._states.keep_ends(call, self.layers, first, kwargs["input_ids"])
            return None
        check_positions(kwargs.get("position_ids"), first, call.padding)
        last = self._load_prefixes(call, first, limit, kwargs)
        if self._has_states and self._can_reuse(call):
            stops = self._states.stops(call, last, limit)
            for part in self._states.parts(call, last, stops):
                self._forward_ahead(only_columns(kwargs, part.start, part.stop, first))
                self._states.keep(call, self.layers, part.stop, stops)
                last = part.stop
        call.computing = (last, call.num_columns, time.perf_counter())
        return (args, without_leading_columns(kwargs, last - first)) if last > first else None

    def _load_prefixes(self, call: Call, first: int, limit: int, kwargs: dict[str, Any]) -> int:
        """Load columns from `first` on that every row has stored, up to column `limit`. Returns: where they end."""
        last, from_disk = first, [range(0)] * call.num_rows
        if self._can_reuse(call):
            from_disk = self._load_from_disk(call, limit)
            if first == 0:
                self._compute_common_prefix(call, limit, kwargs.get("position_ids"))
                if self._has_states and call.num_rows > 1 and not self._sees_columns:
                    self._align_rows(call, limit, kwargs.get("position_ids"))
            last = max(first, self._stored_columns(call, limit))
        loaded = [max(0, last - max(first, padding)) for padding in call.padding]
        used = [range(max(0, first - padding), max(0, last - padding)) for padding in call.padding]
        self._note_prompt(call, first, loaded, list(map(_num_common, used, from_disk)))
        if not any(loaded):
            return first
        self._load_columns(call, first, last)
        return last

    def _can_reuse(self, call: Call) -> bool:
        """Whether the call's columns are as any others with these tokens."""
        if call.exact_columns < call.num_columns:
            return False
        # a row of nothing but padding has a state of its own, which the columns leave that are computed at once
        return not self._has_states or max(call.padding) < call.num_columns

    def _ends(self, call: Call, limit: int) -> list[int]:
        """The column before `limit` up to which each row is stored; where it begins, if nothing is."""
        return [
            padding + self.store.peek(row[: max(0, limit - padding)], self._namespace(padding))
            for row, padding in zip(call.row_tokens(), call.padding, strict=True)
        ]

    def _stored_columns(self, call: Call, limit: int) -> int:
        """The most columns, up to `limit`, that all rows have stored. With states, there is one after all of them."""
        last = min(*self._ends(call, limit), limit)
        while self._has_states and last < limit:
            limit, last = last, min(*self._ends(call, last), last)
        return last

    def _load_from_disk(self, call: Call, limit: int) -> list[range]:
        """Bring into the pages what the disk has of the rows' tokens before column `limit`.

        Returns: which tokens of each row were loaded.
        """
        disk = self._disk
        if disk is None:
            return [range(0)] * call.num_rows
        wanted = [
            (tokens[: min(max(0, limit - padding), self.store.max_tokens)], padding, self._namespace(padding))
            for tokens, padding in zip(call.row_tokens(), call.padding, strict=True)
        ]
        if call.num_rows > 1:  # no row begins later than the others can
            reach = min(padding + disk.reach(tokens, namespace) for tokens, padding, namespace in wanted)
            common = len(call.common_prefix())
            wanted = [
                (tokens[: max(reach - padding, common)], padding, namespace) for tokens, padding, namespace in wanted
            ]
        return [disk.load(tokens, namespace) for tokens, _, namespace in wanted]

    def _note_speed(self, call: Call) -> None:
        """Tell the disk how long the last forward pass of a prompt took, with the step that it was for."""
        if self._disk is not None and call.computing is not None:
            first, last, started_at = call.computing
            self._disk.computed(first, last, (time.perf_counter() - started_at) / call.num_rows)
        call.computing = None

    def _compute_common_prefix(self, call: Call, limit: int, position_ids: Tensor | None) -> None:
        """Compute and store what all rows begin with, once for all of them, if that saves enough.

        It has the `position_ids` that `generate` passes: models that are not given any may count otherwise.
        """
        num_useful = min(max(0, limit - max(call.padding)), self.store.max_tokens)
        common = call.common_prefix()[:num_useful]
        missing = len(common) - self.store.peek(common, None)
        num_passes = 1
        if self._has_states:  # rows of less padding need another one to get where the others can begin
            num_passes += sum(padding < max(call.padding) for padding in call.padding)
        if (call.num_rows - 1) * missing < num_passes * MIN_SHARED_TOKENS or (self._sees_columns and any(call.padding)):
            return
        self._compute_alone(call, 0, common, position_ids)

    def _align_rows(self, call: Call, limit: int, position_ids: Tensor | None) -> None:
        """Compute rows alone, and store them, up to the column where the most is stored of one, if it saves enough.

        Rows are computed together from one column on, at which each needs a state.
        """
        rows = call.row_tokens()
        ends = self._ends(call, limit)
        last = max(end if end > padding else 0 for end, padding in zip(ends, call.padding, strict=True))
        lagging = [row for row, end in enumerate(ends) if end < last]
        fits = last - min(call.padding) <= self.store.max_tokens
        if not lagging or not fits or call.num_rows > self.store.states.num_slots - LEAST_SLOTS + 1:
            return
        together = call.num_rows * (last - self._stored_columns(call, limit))
        alone = sum(last - ends[row] for row in lagging)
        if together - alone < len(lagging) * MIN_SHARED_TOKENS:
            return
        for row in lagging:
            tokens = rows[row][: last - call.padding[row]]
            if self.store.peek(tokens, None) < len(tokens):  # other rows may have begun alike
                self._compute_alone(call, row, tokens, position_ids)

    def _compute_alone(self, call: Call, row: int, tokens: Tokens, position_ids: Tensor | None) -> None:
        """Compute and store `tokens`, with which a row begins."""
        assert call.ids is not None, "it has rows"
        input_ids = torch.from_numpy(tokens).to(call.ids)[None]
        positions = {}
        if position_ids is not None:
            num_rows, padding = position_ids.shape[-2], call.padding[row]
            assert num_rows in (1, call.num_rows), "generate passes the positions of each row, or of all alike"
            own = row if num_rows > 1 else 0
            positions["position_ids"] = position_ids[..., own : own + 1, padding : padding + len(tokens)]
        layers = list(self.layers)
        self.layers.clear()
        try:
            with self._recording(Call(frozenset(), is_prefix=True)):
                self._model(input_ids=input_ids, past_key_values=self, use_cache=True, logits_to_keep=1, **positions)
        finally:
            self.layers.extend(layers)

    def _forward_ahead(self, kwargs: dict[str, Any]) -> None:
        self._is_ahead = True
        try:
            self._model(**kwargs)
        finally:
            self._is_ahead = False

    def _load_columns(self, call: Call, first: int, last: int) -> None:
        """Append the stored KV of columns `[first, last)` to what the layers hold; padding becomes zeros."""
        fresh: list[LayerStates] = []
        like = self.store.like(call.num_rows)
        if not self.layers:
            self.layers.extend(self.layer_class_to_replicate() for _ in like)
        for layer, (k, v) in zip(kv_layers_of(self.layers), like, strict=True):
            layer.reserve(k, v, call.num_columns)
            fresh.append(layer.extend(last - first))
        for row, (tokens, padding) in enumerate(zip(call.row_tokens(), call.padding, strict=True)):
            blank = max(0, min(padding, last) - first)
            for k, v in fresh:
                k[row, :, :blank] = v[row, :, :blank] = 0
            if last > padding:
                states = [(k[row, :, blank:], v[row, :, blank:]) for k, v in fresh]
                self.store.load(tokens[: last - padding], self._namespace(padding), max(0, first - padding), states)
        if self._has_states:
            self._states.load(call, self.layers, last)

    def _note_prompt(self, call: Call, first: int, loaded: list[int], from_disk: list[int]) -> None:
        nothing = (0,) * len(loaded)
        before, disk_before = (self._cached_tokens, self._disk_tokens) if first else (nothing, nothing)
        self._cached_tokens = tuple(map(sum, zip(before, loaded, strict=True)))
        self._disk_tokens = tuple(map(sum, zip(disk_before, from_disk, strict=True)))
        self._hit_tokens += sum(loaded)
        self._query_tokens += sum(call.num_columns - max(first, padding) for padding in call.padding)

    def _store(self, call: Call) -> None:
        """Keep the KV of every row, up to where its output ended."""
        if not self._check_complete(call):
            return
        self._allocate()
        call.measure_padding()  # once more: a prompt that came in chunks may have ended in one column
        after_all = self._states.now(self.layers)
        for row, (tokens, padding) in enumerate(zip(call.row_tokens(), call.padding, strict=True)):
            num_tokens = min(len(tokens), call.exact_columns - padding)
            if num_tokens > 0 and call.has_prompt(padding):
                kept = tokens[: min(num_tokens, call.end_of_output(tokens, padding))]
                states = call.states_of(row)
                if self._has_states and len(kept) == len(tokens):
                    states[len(tokens)] = [tensor[row] for tensor in after_all]
                self.store.save(kept, self._namespace(padding), self._kv(row, padding), states)
                if self._disk is not None:
                    self._disk.hand_down(kept, self._namespace(padding))

    def _kv(self, row: int, first: int) -> list[LayerStates]:
        """What the layers hold of one row, from column `first` on."""
        return [
            (k[row, :, first:], v[row, :, first:]) for k, v in (layer.parts() for layer in kv_layers_of(self.layers))
        ]

    def _allocate(self) -> None:
        """Let the store have its memory: the layers hold what tells the shapes."""
        if not self.store.is_allocated:
            self.store.allocate(self._kv(0, 0), [tensor[0] for tensor in self._states.now(self.layers)])

    def _check_complete(self, call: Call) -> int:
        """How many columns the layers hold: all that were noted. Raises: UnsupportedModelError if they do not."""
        held = {layer.get_seq_length() for layer in kv_layers_of(self.layers)} or {0}
        if held != {call.num_columns}:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} was given {call.num_columns} columns and wrote {sorted(held)} to the "
                "layers of its cache; such a model cannot reuse prefixes"
            )
        return call.num_columns

    def _namespace(self, padding: int) -> str | None:
        return f"{padding} columns of padding" if padding and self._sees_columns else None


def _page_store(
    probed: ProbedPrefixes, num_pages: int, page_size: int, policy: str, state_slots: int | None
) -> PageStore:
    """Room for what was probed. Raises: ConfigError."""
    token_bytes = sum(part[:, 0].numel() * part.element_size() for pair in probed.states for part in pair)
    max_tokens = num_pages * page_size
    num_slots = state_slots or default_slots(probed.state_shapes, max_tokens * token_bytes, num_pages)
    return PageStore(num_pages, page_size, policy, StateStore(probed.state_shapes, num_slots, max_tokens))


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


def _num_common(a: range, b: range) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))
