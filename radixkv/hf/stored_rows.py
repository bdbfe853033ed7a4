"""What is stored of the rows of one call, and how it gets into the call's layers and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from radixkv.cache.residency.state_slots import LEAST_SLOTS
from radixkv.hf.call import Call
from radixkv.hf.disk_tier import DiskTier
from radixkv.hf.page_store import LayerStates, PageStore, Tokens
from radixkv.hf.recurrent_layers import kv_layers_of
from radixkv.hf.state_keeper import MIN_SHARED_TOKENS, StateKeeper


class RowPrefix(NamedTuple):
    """The `tokens` with which `row` begins."""

    row: int
    tokens: Tokens


class StoredRows:
    """Looks up, loads and saves the rows of calls, each padded on the left to the columns of its batch.

    All rows of a batch are computed from one column on, so what helps is what every row has stored. It computes
    nothing: `common_prefix` and `lagging` tell what is worth computing before the rows go on together.
    """

    def __init__(self, store: PageStore, *, sees_columns: bool) -> None:
        """Args: sees_columns: whether a token's KV depends on its column: rows of unlike padding share nothing then."""
        self._store = store
        self._sees_columns = sees_columns
        self.states = StateKeeper(store, self.namespace)

    @property
    def has_states(self) -> bool:
        """Whether layers keep states, and rows go on from a column after which a state was kept, alone."""
        return bool(self._store.states.shapes)

    def namespace(self, padding: int) -> str | None:
        """Where rows with so many columns of padding are stored."""
        return f"{padding} columns of padding" if padding and self._sees_columns else None

    def can_reuse(self, call: Call) -> bool:
        """Whether the call's columns are as any others with these tokens."""
        if call.exact_columns < call.num_columns:
            return False
        # a row of nothing but padding has a state of its own, which the columns leave that are computed at once
        return not self.has_states or max(call.padding) < call.num_columns

    # ------------------------------------------------------------------------------------- what is there

    def ends(self, call: Call, limit: int) -> list[int]:
        """The column before `limit` up to which each row is stored; where it begins, if nothing is."""
        return [
            padding + self._store.peek(row[: max(0, limit - padding)], self.namespace(padding))
            for row, padding in zip(call.row_tokens(), call.padding, strict=True)
        ]

    def stored_columns(self, call: Call, limit: int) -> int:
        """The most columns, up to `limit`, that all rows have stored. With states, there is one after all of them."""
        last = min(*self.ends(call, limit), limit)
        while self.has_states and last < limit:
            limit, last = last, min(*self.ends(call, last), last)
        return last

    def common_prefix(self, call: Call, limit: int) -> Tokens | None:
        """What all rows begin with before column `limit`; None unless computing it once, before them, saves enough."""
        num_useful = min(max(0, limit - max(call.padding)), self._store.max_tokens)
        common = call.common_prefix()[:num_useful]
        missing = len(common) - self._store.peek(common, None)
        num_passes = 1
        if self.has_states:  # rows of less padding need another one to get where the others can begin
            num_passes += sum(padding < max(call.padding) for padding in call.padding)
        saves_enough = (call.num_rows - 1) * missing >= num_passes * MIN_SHARED_TOKENS
        return None if not saves_enough or (self._sees_columns and any(call.padding)) else common

    def lagging(self, call: Call, limit: int) -> list[RowPrefix]:
        """What rows are to compute alone, to get to the column where the most is stored of one, if that saves enough.

        With states: the rows go on together from a column at which each has one. What the first of them compute may be
        all that others lack.
        """
        if not self.has_states or call.num_rows == 1 or self._sees_columns:
            return []
        rows = call.row_tokens()
        ends = self.ends(call, limit)
        last = max(end if end > padding else 0 for end, padding in zip(ends, call.padding, strict=True))
        lagging = [row for row, end in enumerate(ends) if end < last]
        fits = last - min(call.padding) <= self._store.max_tokens
        if not lagging or not fits or call.num_rows > self._store.states.num_slots - LEAST_SLOTS + 1:
            return []
        together = call.num_rows * (last - self.stored_columns(call, limit))
        alone = sum(last - ends[row] for row in lagging)
        if together - alone < len(lagging) * MIN_SHARED_TOKENS:
            return []
        return [RowPrefix(row, rows[row][: last - call.padding[row]]) for row in lagging]

    def is_stored(self, prefix: RowPrefix) -> bool:
        """Whether all of a lagging row's prefix is here by now."""
        return self._store.peek(prefix.tokens, None) == len(prefix.tokens)

    # ------------------------------------------------------------------------------------- there and back

    def bring_up(self, disk: DiskTier, call: Call, limit: int) -> list[range]:
        """Bring into the pages what `disk` has of the rows' tokens before column `limit`.

        Returns: which tokens of each row were loaded.
        """
        wanted = [
            (tokens[: min(max(0, limit - padding), self._store.max_tokens)], padding, self.namespace(padding))
            for tokens, padding in zip(call.row_tokens(), call.padding, strict=True)
        ]
        if call.num_rows > 1:  # no row begins later than the others can
            reach = min(padding + disk.reach(tokens, namespace) for tokens, padding, namespace in wanted)
            common = len(call.common_prefix())
            wanted = [
                (tokens[: max(reach - padding, common)], padding, namespace) for tokens, padding, namespace in wanted
            ]
        return [disk.load(tokens, namespace) for tokens, _, namespace in wanted]

    def load(self, call: Call, layers: Sequence[Any], first: int, last: int) -> None:
        """Append the stored KV of columns `[first, last)` to what `layers` hold; padding becomes zeros."""
        fresh: list[LayerStates] = []
        for layer, (k, v) in zip(kv_layers_of(layers), self._store.like(call.num_rows), strict=True):
            layer.reserve(k, v, call.num_columns)
            fresh.append(layer.extend(last - first))
        for row, (tokens, padding) in enumerate(zip(call.row_tokens(), call.padding, strict=True)):
            blank = max(0, min(padding, last) - first)
            for k, v in fresh:
                k[row, :, :blank] = v[row, :, :blank] = 0
            if last > padding:
                into = [(k[row, :, blank:], v[row, :, blank:]) for k, v in fresh]
                self._store.load(tokens[: last - padding], self.namespace(padding), max(0, first - padding), into)
        if self.has_states:
            self.states.load(call, layers, last)

    def save(self, call: Call, layers: Sequence[Any], disk: DiskTier | None) -> None:
        """Keep the KV of every row, up to where its output ended, and hand it down to `disk`; after `allocate`."""
        call.measure_padding()  # once more: a prompt that came in chunks may have ended in one column
        after_all = self.states.now(layers)
        for row, (tokens, padding) in enumerate(zip(call.row_tokens(), call.padding, strict=True)):
            num_tokens = min(len(tokens), call.exact_columns - padding)
            if num_tokens > 0 and call.has_prompt(padding):
                kept = tokens[: min(num_tokens, call.end_of_output(tokens, padding))]
                states = call.states_of(row)
                if self.has_states and len(kept) == len(tokens):
                    states[len(tokens)] = [tensor[row] for tensor in after_all]
                self._store.save(kept, self.namespace(padding), _kv(layers, row, padding), states)
                if disk is not None:
                    disk.hand_down(kept, self.namespace(padding))

    def allocate(self, layers: Sequence[Any]) -> None:
        """Let the store have its memory: `layers`, which hold columns, tell the shapes. Raises: ConfigError."""
        if not self._store.is_allocated:
            self._store.allocate(_kv(layers, 0, 0), [tensor[0] for tensor in self.states.now(layers)])


def _kv(layers: Sequence[Any], row: int, first: int) -> list[LayerStates]:
    """What the layers hold of one row, from column `first` on."""
    return [(k[row, :, first:], v[row, :, first:]) for k, v in (layer.parts() for layer in kv_layers_of(layers))]
