"""Drafts from text that is there already: the request's own, and what the cache holds of its namespace.

Generated text quotes: files, commands, earlier answers, itself. So the last tokens are looked up in all text that is at
hand, and what followed them there is the draft (prompt lookup decoding: Saxena 2023; REST: He et al. 2023, which looks
in a datastore; SuffixDecoding: Oliaro et al. 2024, and SAM decoding: Hu et al. 2024, which look in earlier outputs,
too). Those that search for the longest match keep suffix arrays, suffix trees or suffix automata. A suffix array is
built at once and not changed; a tree or an automaton takes ten times the memory of the tokens, and forgets nothing. A
cache adds and evicts all the time, so this is a hash of n-grams with chains, as compressors have for the same task: it
adds and forgets in O(1) a token, its size is fixed, and it finds the longest match among the newest 12 places where the
last four tokens stood; failing these, the newest where the last two did.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from radixkv.cache.events import Cleared, Event, Stored
from radixkv.cache.namespace import Namespace
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.engine.drafts.drafter import NO_DRAFT, Draft, Text
from radixkv.engine.drafts.token_store import MAX_MATCH, GrowingText, PagedTokens
from radixkv.kernels.compiling import log_if_slow
from radixkv.kernels.ngram_chains import NONE

OWN = "own"
CACHED = "cached"
SIBLING = "sibling"


class CacheDrafter:
    """Drafts from the request's own prompt and output, then from the cache of its namespace.

    The longest match wins, and the request's own text among equally long ones. A match of the whole prefix is called a
    sibling: another request went on from the same place.

    What enters the tree of `cache` is found from then on, and what leaves it is not any more. Memory: 36 bytes for each
    token that the cache has room for, and 48 for each token of the requests that were asked about and have not ended.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self._cached = PagedTokens(cache.num_pages, cache.page_size)
        self._spaces: dict[Namespace, _Space] = {}
        self._free_spaces: list[int] = []
        self._own: dict[int, GrowingText] = {}
        with log_if_slow("the index of drafts"):
            self._load_kernels()
        for _, run in cache.cached_runs():
            self.observe(Stored(run, "pool"))
        cache.add_pool_observer(self.observe)

    @property
    def num_cached(self) -> int:
        """Tokens of the cache that are indexed. O(pages)."""
        return self._cached.num_tokens

    @property
    def num_namespaces(self) -> int:
        """Namespaces of which the cache holds something."""
        return len(self._spaces)

    @property
    def num_bytes(self) -> int:
        """Size of the index of the cache."""
        return self._cached.num_bytes

    def draft(self, texts: Sequence[Text]) -> list[Draft]:
        """As `Drafter.draft`. Some microseconds a text, however much is indexed; O(tokens) for a new prompt."""
        return [self._draft(text) for text in texts]

    def ended(self, request_id: int) -> None:
        """As `Drafter.ended`."""
        self._own.pop(request_id, None)

    def _load_kernels(self) -> None:
        """Compile what is not compiled yet now, and not when the first draft is wanted."""
        ids = np.arange(2, dtype=np.int32)
        tokens = PagedTokens(num_pages=1, page_size=2)
        tokens.store(ids, ids[:1])
        tokens.find(ids, 1)
        tokens.forget(2, ids[:1])
        GrowingText().find(ids, 1)

    def _draft(self, text: Text) -> Draft:
        own = self._own.get(text.request_id)
        if own is None:
            own = self._own[text.request_id] = GrowingText()
        found, source = own.find(text.token_ids, text.most), OWN
        space = self._spaces.get(text.namespace)
        if space is not None and found.match_tokens < MAX_MATCH:
            cached = self._cached.find(text.token_ids, text.most, space.number)
            if cached.match_tokens > found.match_tokens and len(cached.token_ids):
                num_tokens = len(text.token_ids)
                whole = cached.position == num_tokens and cached.match_tokens == min(num_tokens, MAX_MATCH)
                found, source = cached, SIBLING if whole else CACHED
        if not len(found.token_ids):
            return NO_DRAFT
        return Draft(found.token_ids, source, found.match_tokens)

    def observe(self, event: Event) -> None:
        """Take note of what came into the cache, or left it. O(tokens)."""
        if event.medium != "pool":
            return
        if isinstance(event, Cleared):
            self._cached.clear()
            self._spaces.clear()
            self._free_spaces.clear()
            return
        run = event.run
        if isinstance(event, Stored):
            space = self._spaces.get(run.namespace)
            if space is None:
                number = self._free_spaces.pop() if self._free_spaces else len(self._spaces)
                space = self._spaces[run.namespace] = _Space(number)
            space.num_runs_pages += len(run.pages)
            page_before = NONE if run.page_before is None else run.page_before
            self._cached.store(run.tokens, run.pages, page_before=page_before, space=space.number, start=run.start)
            return
        self._cached.forget(len(run.tokens), run.pages)
        space = self._spaces[run.namespace]
        space.num_runs_pages -= len(run.pages)
        if not space.num_runs_pages:
            del self._spaces[run.namespace]
            self._free_spaces.append(space.number)


class _Space:
    """The number of a namespace in the index, as long as the tree holds pages of it."""

    __slots__ = ("num_runs_pages", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.num_runs_pages = 0  # stored and not removed since
