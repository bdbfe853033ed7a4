"""What becomes of the bytes of a layout while it serves, step by step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from radixkv import PrefixCache
from radixkv.attention.backend import (
    AttentionBackend,
    AttentionNeeds,
    AttentionPlan,
    backend_names,
    choose_backend,
    register_backend,
    why_not,
)
from radixkv.attention.metadata import AttentionMetadata
from radixkv.memory.kv_pool import KVLayout, KVPool
from radixkv_bench.layouts.arena import Arena
from radixkv_bench.layouts.kinds import Tensors
from radixkv_bench.layouts.traffic import Request


class Snapshot(NamedTuple):
    """The bytes of a layout after a step, each counted in one place.

    Attributes:
        needed: KV of the running requests, the system prompt that they share once.
        repeated: KV of tokens that is there already: of the system prompt for each further request, and of what was
            copied from a page that is shared in part.
        internal: allocated for a request, but nothing was written there.
        external: in holes between allocations that are too small for the largest tensor that is held. Pages have none:
            all are of one size, and any serves.
        kept: of no running request, kept so that another one may find it, and given up as soon as room is needed.
    """

    needed: int
    repeated: int
    internal: int
    external: int
    kept: int


class Memory(NamedTuple):
    """What a layout's bytes were used for.

    Attributes:
        steps: a snapshot after each step.
        peak_bytes: the most that running requests held at one time, old and new memory of what moves.
        footprint_bytes: the most that the memory had to have, holes of all sizes counted.
        copied_bytes: KV that was there already and was written again elsewhere.
    """

    steps: list[Snapshot]
    peak_bytes: int
    footprint_bytes: int
    copied_bytes: int

    def mean(self) -> dict[str, float]:
        """Bytes of each kind, on average over the steps."""
        return {name: sum(getattr(s, name) for s in self.steps) / len(self.steps) for name in Snapshot._fields}


class TensorWatch:
    """Watches the caches of running requests, whose tensors it follows into an arena."""

    def __init__(self, system_tokens: int, moved_at_once: int) -> None:
        self._system_tokens, self._moved_at_once = system_tokens, moved_at_once
        self._arena = Arena()
        self._tensors: dict[Request, Tensors] = {}
        self._sizes: dict[Request, list[int]] = {}
        self._live: dict[Request, int] = {}  # bytes of KV
        self._token_bytes = 0
        self._steps: list[Snapshot] = []
        self._copied_bytes = 0

    def forwarded(self, request: Request, cache: Any, tokens: int) -> None:
        """A forward pass of a request is done, whose cache holds so many tokens now."""
        parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        sizes = [part.untyped_storage().nbytes() for part in parts]
        columns = [part.shape[0] * part.shape[1] * part.shape[3] * part.element_size() for part in parts]
        before, live = self._sizes.get(request, [0] * len(sizes)), self._live.get(request, 0)
        moved = sum(size for size, old, new in zip(columns, before, sizes, strict=True) if old != new)
        self._copied_bytes += live * moved // sum(columns)
        self._tensors.setdefault(request, Tensors(self._arena, self._moved_at_once)).resize(sizes)
        self._sizes[request], self._live[request] = sizes, tokens * sum(columns)
        self._token_bytes = sum(columns)

    def stepped(self) -> None:
        """All running requests have gone one step further."""
        live, repeats = sum(self._live.values()), len(self._live) - 1
        repeated = repeats * self._system_tokens * self._token_bytes
        internal = self._arena.held_bytes - live
        largest = max(size for sizes in self._sizes.values() for size in sizes)
        external = self._arena.hole_bytes_smaller_than(largest)
        self._steps.append(Snapshot(live - repeated, repeated, internal, external, kept=0))

    def finished(self, request: Request) -> None:
        """A request's cache is dropped."""
        self._tensors.pop(request).free()
        del self._live[request], self._sizes[request]

    def memory(self) -> Memory:
        """What was seen."""
        return Memory(self._steps, self._arena.peak_held_bytes, self._arena.peak_end, self._copied_bytes)


class PageWatch:
    """Watches the pages that an engine reads, through an attention backend that passes everything on.

    An engine made with `attention_backend=PageWatch.BACKEND` reports to the watch that was made last.
    """

    BACKEND = name = "layouts-watch"

    def __init__(self, system_tokens: int, token_bytes: int) -> None:
        self._system_tokens, self._token_bytes = system_tokens, token_bytes
        self._cache: PrefixCache | None = None
        self._copied_before = self._peak_tokens = 0
        self._steps: list[Snapshot] = []
        register_backend(self)

    def watch(self, cache: PrefixCache) -> None:
        """Report on this cache from now on."""
        self._cache, self._copied_before = cache, cache.stats().copied_tokens

    def planned(self, metadata: AttentionMetadata) -> None:
        """A batch is about to be computed, in which every running request takes part."""
        if self._cache is None:
            return
        stats = self._cache.stats()
        filled = filled_slots(metadata)
        needed = int(metadata.kv_lens.sum()) - (metadata.num_sequences - 1) * self._system_tokens
        needed = min(needed, filled)  # sessions may happen to go on alike after the system prompt, and share that too
        held = stats.leased_pages * stats.page_size + stats.protected_tokens
        self._peak_tokens = max(self._peak_tokens, held)
        tokens = Snapshot(needed, filled - needed, held - filled, 0, stats.evictable_tokens)
        self._steps.append(Snapshot(*(count * self._token_bytes for count in tokens)))

    def memory(self) -> Memory:
        """What was seen."""
        assert self._cache is not None, "watch first"
        peak_bytes = self._peak_tokens * self._token_bytes
        copied = self._cache.stats().copied_tokens - self._copied_before
        return Memory(self._steps, peak_bytes, peak_bytes, copied * self._token_bytes)

    def why_not(self, needs: AttentionNeeds) -> str | None:
        """It is another backend, and can what one of these can."""
        others = [name for name in backend_names() if name != self.BACKEND]
        return None if any(why_not(name, needs) is None for name in others) else "only watches others"

    def layout(self, needs: AttentionNeeds) -> KVLayout:
        """That of the backend which does the work."""
        return choose_backend("auto", needs).layout(needs)

    def __call__(self, pool: KVPool, needs: AttentionNeeds) -> AttentionBackend:
        return _Watched(choose_backend("auto", needs)(pool, needs), self)


class _Watched:
    """A backend that tells of each batch, and leaves the work to another one."""

    def __init__(self, backend: AttentionBackend, watch: PageWatch) -> None:
        self.name, self.num_layers = backend.name, backend.num_layers
        self._backend, self._watch = backend, watch

    def plan(self, metadata: AttentionMetadata) -> AttentionPlan:
        self._watch.planned(metadata)
        return self._backend.plan(metadata)


def filled_slots(metadata: AttentionMetadata) -> int:
    """Slots that hold KV of the batch once it is computed, a page that several requests read counted once.

    O(pages of the batch).
    """
    pages, place = np.unique(metadata.kv_indices, return_inverse=True)
    in_page = np.full(len(metadata.kv_indices), metadata.page_size)
    in_page[metadata.kv_indptr[1:] - 1] = metadata.kv_last_page_len
    filled = np.zeros(len(pages), np.int64)
    np.maximum.at(filled, place, in_page)
    return int(filled.sum())
