"""Copies what a cache holds for the writers of the tiers below it, run of pages by run of pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.events import PageRun
from radixkv.cache.namespace import Namespace
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.cache.tree.node import TreeNode
from radixkv.tiers.page_chain import as_bytes
from radixkv.tiers.page_store import PageFacts
from radixkv.tiers.tier import Tier
from radixkv.tiers.writer import PageRecord


class ReadsPages(Protocol):
    """What gives the bytes of a pool's pages."""

    def read(self, pages: NDArray[np.int32], *, last_tokens: int | None = None) -> NDArray[np.uint8]:
        """A copy of the bytes of `pages`, [n, payload_bytes]; of the last one only so many tokens mean something."""
        ...


class Copied(NamedTuple):
    """What became of pages: so many were not stored yet, and so many of these the writers did not take."""

    missing: int
    refused: int


class RunCopies:
    """Hands pages that a cache holds down to tiers, in the thread to which the cache belongs: a memcpy.

    Pages that a tier has, or that wait for its writer, are not copied again.

    Attributes:
        busy_s: seconds of that thread's time that it took.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        page_bytes: ReadsPages,
        cache: PrefixCache,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._tiers, self._page_bytes, self._cache, self._wall_clock = tiers, page_bytes, cache, wall_clock
        self.busy_s = 0.0

    def prefix(self, ids: NDArray[np.int32], namespace: Namespace) -> Copied:
        """Hand down what the cache holds of `ids`, which is a use of it. O(tokens + depth)."""
        runs = self._cache.cached_runs_of(ids, extra_key=namespace.extra_key, cache_salt=namespace.cache_salt)
        return self._copy_all(runs, touches=True)

    def everything(self) -> Copied:
        """Hand down all that the cache holds, parents first. O(nodes + pages)."""
        return self._copy_all(self._cache.cached_runs(), touches=False)

    def leaves(self, run: PageRun, facts: PageFacts) -> None:
        """Hand down pages that the cache is about to lose; what is refused is lost, and counted as dropped."""
        for tier in self._tiers:
            tier.writer.dropped(self._copy(tier, run, facts, touches=False).refused)

    def facts(self, hits: int, priority: int, keep_until: float, namespace: Namespace) -> PageFacts:
        """What is known of tokens that are used now; `keep_until` is a time of the cache's clock."""
        now, left_s = self._wall_clock(), keep_until - self._cache.now_s
        return PageFacts(now, hits, priority, now + left_s if left_s > 0 else None, namespace)

    def _copy_all(self, runs: Iterable[tuple[TreeNode, PageRun]], *, touches: bool) -> Copied:
        missing = refused = 0
        for node, run in runs:
            facts = self.facts(node.hits, node.priority, node.keep_until, run.namespace)
            for tier in self._tiers:
                copied = self._copy(tier, run, facts, touches=touches)
                missing, refused = missing + copied.missing, refused + copied.refused
        return Copied(missing, refused)

    def _copy(self, tier: Tier, run: PageRun, facts: PageFacts, *, touches: bool) -> Copied:
        """Copy the pages that a tier lacks for its writer; if it `touches` the others, their facts become `facts`."""
        started_at = time.perf_counter()
        pages = [(page.page_keys[0], page.parent_key, as_bytes(page.tokens)) for page in run.each_page()]
        keys = [key for key, _, _ in pages]
        if run.is_tail:
            num_stored = int(tier.has_tail(run.parent_key, pages[0][2], keys[0]))
        else:
            num_stored = tier.num_stored(run.parent_key, as_bytes(run.tokens), keys)
        wanted = [page for page in range(num_stored, len(pages)) if not tier.writer.is_queued(keys[page])]
        accepted = wanted[: tier.writer.num_accepted()]
        if accepted:
            records = [PageRecord(*pages[page], facts) for page in accepted]
            last_tokens = len(records[-1].tokens) // TOKEN_BYTES
            payloads = self._page_bytes.read(run.pages[np.array(accepted)], last_tokens=last_tokens)
            tier.writer.hand_down(records, payloads)
        if touches:
            tier.writer.touch([(parent_key, tokens, facts) for _, parent_key, tokens in pages[:num_stored]])
        self.busy_s += time.perf_counter() - started_at
        return Copied(len(pages) - num_stored, len(wanted) - len(accepted))
