"""What a prefix cache remembers of its past, to explain misses and to say what another size would bring."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.events import Cleared, Event, Removed, Stored
from radixkv.cache.insight.eviction_ages import AgeCounter
from radixkv.cache.insight.explanation import (
    CONTEXT_TOKENS,
    Explanation,
    MissReason,
    NearMiss,
    OtherNamespaces,
)
from radixkv.cache.insight.history import Eviction, EvictionHistory, Timeline
from radixkv.cache.insight.miss_ratio import MissRatioCurve
from radixkv.cache.insight.prefix_hash import namespace_seed, prefix_hashes
from radixkv.cache.namespace import Namespace
from radixkv.cache.tree.radix_tree import RadixTree

MIN_HISTORY_PAGES, MAX_HISTORY_PAGES = 2**12, 2**18
LARGEST_SIZE = 4  # times the pool: how far the hit rates of other sizes are estimated


class Diagnostics:
    """The evictions and the traffic of one cache; listens to its tree.

    Memory: the history of evictions remembers as many pages as the pool has, but 2**12 at least and 2**18 at most, in
    8 bytes each and 340 for each evicted node: at most 0.2 MB for a small pool and 13 MB for a large one. The traffic
    is sampled into at most 1.4 MB for pools of up to 4 million tokens, and a byte for 3 tokens beyond.

    An evicted page is recognised as a whole, and what fills no page in its full length: a prompt that ends inside an
    evicted page, where none ended before, looks as if it had never been seen from that page on.
    """

    def __init__(self, tree: RadixTree, num_pages: int, *, whole_pages: bool = False) -> None:
        """`whole_pages`: whether the cache shares nothing less than a page."""
        self._tree = tree
        self._whole_pages = whole_pages
        self._history = EvictionHistory(min(max(num_pages, MIN_HISTORY_PAGES), MAX_HISTORY_PAGES))
        self._timeline = Timeline()
        self._noted_tick = 0
        self.ages = AgeCounter()
        self.curve = MissRatioCurve(LARGEST_SIZE * num_pages * tree.page_size)
        tree.add_observer(self)

    def requested(self, tokens: NDArray[np.int32], namespace: Namespace, found_tokens: int) -> None:
        """A request asks for `tokens`; the tree has just been searched for them, and the cache found so many."""
        self._note_time()
        self.curve.record(tokens, namespace_seed(*namespace), found_tokens)

    def timeline(self) -> Timeline:
        """When each tick of the tree was, by its clock, as far as that is known now."""
        return self._timeline.copy()

    def committed(self, tokens: NDArray[np.int32], namespace: Namespace) -> None:
        """More tokens are cached now than were asked for."""
        self._note_time()
        self.curve.insert(tokens, namespace_seed(*namespace))

    # -- what the tree tells -----------------------------------------------------------------------------------------

    def __call__(self, event: Event) -> None:
        """Note when something was stored, and remember what was evicted: what is cached can be looked up."""
        if event.medium != "pool":
            return
        if isinstance(event, Stored):
            self._note_time()
        elif isinstance(event, Cleared):
            self._history.clear()
            self.curve.clear()
        elif event.cause != "removed":  # then a longer copy has the tokens
            self._remember(event)

    def _remember(self, event: Removed) -> None:
        """Remember the pages of an eviction, or of a reset."""
        run = event.run
        seed, tokens = run.prefix.fast_hash, run.tokens
        now_s, used_s = self._tree.clock(), self._timeline.seconds_at(event.last_use_tick)
        if event.cause == "evicted" and used_s is not None:
            self.ages.add(len(run.pages) * run.page_size, unused_s=now_s - used_s)
        self._history.record(
            _tail_hash(tokens.tobytes(), seed)
            if run.is_tail
            else prefix_hashes(tokens, run.page_size, seed, run.start // run.page_size),
            run.namespace,
            policy=self._tree.policy.name if event.cause == "evicted" else event.cause,
            evicted_at_s=now_s,
            last_used_at_s=used_s,
            evicted_tick=self._tree.tick,
            last_use_tick=event.last_use_tick,
        )

    def _note_time(self) -> None:
        """Remember when this use of the cache was."""
        if self._tree.tick > self._noted_tick:
            self._noted_tick = self._tree.tick
            self._timeline.add(self._noted_tick, self._tree.clock())

    # -- explanations ------------------------------------------------------------------------------------------------

    def explain(
        self,
        tokens: NDArray[np.int32],
        namespace: Namespace,
        cached_tokens: int,
        held_tokens: int,
        shortfall: MissReason,
    ) -> Explanation:
        """Why no more than `cached_tokens` of `tokens` would be found now, of which the tree has `held_tokens`. Changes
        nothing, and looks at nothing that belongs to another namespace. `shortfall` is the reason where it has more.

        O(tokens), and O(page_size × pages remembered) for prompts that were made for it.
        """
        near_miss = self._near_miss(tokens, namespace)
        eviction, evicted_tokens = self._eviction(tokens, namespace, cached_tokens)
        reason: MissReason = "never seen"
        if cached_tokens == len(tokens):
            reason = "hit"
        elif held_tokens > cached_tokens:
            reason = shortfall
        elif eviction is not None:
            reason = "evicted"
        elif self._is_rounded(len(tokens), cached_tokens, near_miss):
            reason = "page"
        return Explanation(
            num_tokens=len(tokens),
            cached_tokens=cached_tokens,
            reason=reason,
            eviction=eviction,
            evicted_ago_s=None if eviction is None else self._tree.clock() - eviction.evicted_at_s,
            evicted_tokens=evicted_tokens,
            other_namespaces=None,
            near_miss=near_miss,
            given_up_tokens=held_tokens - cached_tokens,
        )

    def add_other_namespaces(
        self, explanation: Explanation, tokens: NDArray[np.int32], namespace: Namespace
    ) -> Explanation:
        """The same `explanation` of `tokens`, with what an administrator may know of other namespaces.

        O(tokens × namespaces).
        """
        held = [self._held(tokens, other) for other in self._tree.namespaces() if other != namespace]
        more = [num_tokens for num_tokens in held if num_tokens > explanation.cached_tokens]
        if not more:
            return explanation
        reason = "other namespace" if explanation.reason in ("page", "never seen") else explanation.reason
        return explanation._replace(reason=reason, other_namespaces=OtherNamespaces(len(more), max(more)))

    def _is_rounded(self, num_tokens: int, cached_tokens: int, near_miss: NearMiss | None) -> bool:
        """Whether it is for the page size alone that the next token is not found."""
        if near_miss is not None and near_miss.position > cached_tokens:
            return True
        return self._whole_pages and num_tokens - cached_tokens < self._tree.page_size

    def _eviction(
        self, tokens: NDArray[np.int32], namespace: Namespace, cached_tokens: int
    ) -> tuple[Eviction | None, int]:
        """What evicted the tokens after `cached_tokens`, and how many of them are gone."""
        page_size = self._tree.page_size
        hashes = prefix_hashes(tokens, page_size, namespace_seed(*namespace))
        num_pages = cached_tokens // page_size
        eviction = self._history.find(hashes[num_pages:], namespace)
        if eviction is not None:
            num_pages += eviction.num_pages
        end = num_pages * page_size
        seed = int(hashes[num_pages - 1]) if num_pages else namespace_seed(*namespace)
        for tail_end in range(min(len(tokens), end + page_size - 1), max(end, cached_tokens), -1):
            tail = self._history.find(_tail_hash(tokens[end:tail_end].tobytes(), seed), namespace)
            if tail is not None:
                return eviction or tail, tail_end - cached_tokens
        return eviction, 0 if eviction is None else end - cached_tokens

    def _held(self, tokens: NDArray[np.int32], namespace: Namespace) -> int:
        """How many leading tokens a namespace shares."""
        extra_key, cache_salt = namespace
        if self._whole_pages:
            return self._tree.peek(tokens, extra_key=extra_key, cache_salt=cache_salt)
        return self._tree.peek_path(tokens, extra_key=extra_key, cache_salt=cache_salt)[0]

    def _near_miss(self, tokens: NDArray[np.int32], namespace: Namespace) -> NearMiss | None:
        position, path = self._tree.peek_path(tokens, extra_key=namespace[0], cache_salt=namespace[1])
        if not path or position == len(tokens):
            return None
        last = path[-1]
        cached_ids = last.token_ids[last.num_tokens - (last.end - position) :][:CONTEXT_TOKENS].tolist()
        while len(cached_ids) < CONTEXT_TOKENS and last.children:
            last = max(last.children.values(), key=lambda child: child.last_access)
            cached_ids += last.token_ids[: CONTEXT_TOKENS - len(cached_ids)].tolist()
        return NearMiss(position, cached_ids, tokens[position : position + CONTEXT_TOKENS].tolist())


def _tail_hash(tail: bytes, seed: int) -> NDArray[np.uint64]:
    """As `prefix_hashes`, of the bytes of less than a page that follows pages of the hash `seed`: the same in every
    process, and unlike the hash of a whole page.

    Returns: uint64, shape (1,).

    >>> int(_tail_hash(b"1234", 5)[0])
    4163108074620118375
    """
    digest = blake2b(seed.to_bytes(8, "little") + tail, digest_size=8, person=b"radixkv tail").digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)
