"""What a radix tree tells its observers: values that say what is cached now, and what is not any more.

A tree has one channel. The diagnostics of a cache listen to it, and so do tiers, routers and publishers alike.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.insight.prefix_hash import namespace_seed, prefix_hashes
from radixkv.cache.page_keys import page_keys, root_key
from radixkv.cache.token_ids import TOKEN_BYTES

if TYPE_CHECKING:
    from radixkv.cache.namespace import Namespace
    from radixkv.cache.tree.node import TreeNode

logger = logging.getLogger(__name__)

Medium = Literal["pool", "window"]
"""Where the KV is: in the pages of the pool that the engine computes with (on whatever device that pool is), or in the
window pages of layers that see a window. Each medium stands alone: a page that leaves one is reported for that one."""

RemovalCause = Literal["evicted", "reset", "removed", "taken back"]
"""Why pages left a medium: the eviction policy chose them; `clear` removed them while others were pinned; `remove` was
called, as leases do when a longer copy has their tokens; or their window pages went to other pages."""


class Prefix:
    """The tokens of one sequence from its start to the end of a page. Its values are computed when they are asked for.

    Chained to the prefix before it, so that each token is digested once, however many prefixes go on from there.
    """

    __slots__ = (
        "_above",
        "_hash",
        "_key",
        "_page_hashes",
        "_page_keys",
        "_tokens",
        "_whole",
        "namespace",
        "num_tokens",
        "page_size",
    )

    def __init__(self, namespace: Namespace, page_size: int, above: Prefix | None = None, tokens: bytes = b"") -> None:
        """`tokens`: the whole pages after `above`, little-endian int32; without `above` it is a namespace's start."""
        self.namespace, self.page_size = namespace, page_size
        self.num_tokens: int = len(tokens) // TOKEN_BYTES + (0 if above is None else above.num_tokens)
        self._above, self._tokens = above, tokens
        self._key: bytes | None = None
        self._hash: int | None = None
        self._whole: Prefix | None = None  # what this is the first part of, see `first`
        self._page_keys: tuple[bytes, ...] | None = None  # kept only in what has such a part
        self._page_hashes: NDArray[np.uint64] | None = None

    def first(self, num_tokens: int) -> Prefix:
        """Its first `num_tokens` tokens, to the end of a page. O(depth).

        However many such prefixes are made of it, its tokens are digested once for all.
        """
        longer = self
        while longer._above is not None and longer._above.num_tokens >= num_tokens:
            longer = longer._above
        if longer.num_tokens == num_tokens:
            return longer
        prefix = Prefix(self.namespace, self.page_size, longer._above)
        prefix.num_tokens = num_tokens
        prefix._whole = longer._whole or longer
        return prefix

    @property
    def key(self) -> bytes:
        """The key of the last page, or the root key of the namespace if there is none. O(tokens), then O(1)."""
        if self._key is None:
            for prefix in self._chain():
                if prefix._key is None and prefix._above is None:
                    prefix._key = root_key(*self.namespace)
                elif prefix._key is None:
                    assert prefix._above is not None
                    assert prefix._above._key is not None
                    prefix._key = prefix._last_key(prefix._above._key)
        assert self._key is not None
        return self._key

    @property
    def fast_hash(self) -> int:
        """The last of its `prefix_hashes`, or the seed of the namespace, for statistics. O(tokens), then O(1)."""
        if self._hash is None:
            for prefix in self._chain():
                if prefix._hash is None and prefix._above is None:
                    prefix._hash = namespace_seed(*self.namespace)
                elif prefix._hash is None:
                    above = prefix._above
                    assert above is not None
                    assert above._hash is not None
                    prefix._hash = prefix._last_hash(above._hash, above.num_tokens // self.page_size)
        assert self._hash is not None
        return self._hash

    def _last_key(self, parent_key: bytes) -> bytes:
        whole = self._whole
        if whole is None:
            return page_keys(parent_key, self._tokens, self.page_size)[-1]
        if whole._page_keys is None:
            whole._page_keys = page_keys(parent_key, whole._tokens, self.page_size)
        return whole._page_keys[self._num_pages - 1]

    def _last_hash(self, parent_hash: int, first_page: int) -> int:
        whole = self._whole or self
        hashes = whole._page_hashes
        if hashes is None:
            hashes = prefix_hashes(np.frombuffer(whole._tokens, np.int32), self.page_size, parent_hash, first_page)
            if whole is not self:
                whole._page_hashes = hashes
        return int(hashes[self._num_pages - 1])

    @property
    def _num_pages(self) -> int:
        """Pages in its own last part."""
        assert self._above is not None
        return (self.num_tokens - self._above.num_tokens) // self.page_size

    def _chain(self) -> list[Prefix]:
        """The prefixes from the start of the namespace to this one."""
        chain: list[Prefix] = []
        prefix: Prefix | None = self
        while prefix is not None:
            chain.append(prefix)
            prefix = prefix._above
        chain.reverse()
        return chain


class PageRun:
    """Consecutive pages of one sequence, as a value that stays as it is whatever becomes of the tree.

    Page keys are digests, computed when somebody first asks for them: an observer that does not want them pays nothing.

    Attributes:
        prefix: the tokens before them.
        page_before: the page that holds the last tokens of `prefix`; None if there are none.
        page_size: tokens a page; the last page may hold fewer, if the run is a tail.
    """

    __slots__ = ("_page_keys", "_pages", "_tokens", "page_before", "page_size", "prefix")

    def __init__(
        self, prefix: Prefix, tokens: bytes, pages: bytes | memoryview, page_before: int | None = None
    ) -> None:
        """`tokens` and `pages`: int32 bytes of the tokens and of the page ids."""
        self.prefix = prefix
        self.page_before = page_before
        self.page_size = prefix.page_size
        self._tokens, self._pages = tokens, pages
        self._page_keys: tuple[bytes, ...] | None = None

    @property
    def namespace(self) -> Namespace:
        """(`extra_key`, `cache_salt`)"""
        return self.prefix.namespace

    @property
    def parent_key(self) -> bytes:
        """The key of the page before the first; the root key of the namespace where a sequence starts."""
        return self.prefix.key

    @property
    def page_keys(self) -> tuple[bytes, ...]:
        """The key of each page (see `page_keys`). O(tokens) the first time."""
        if self._page_keys is None:
            self._page_keys = page_keys(self.parent_key, self._tokens, self.page_size)
        return self._page_keys

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The tokens in the pages, read-only."""
        return np.frombuffer(self._tokens, np.int32)

    @property
    def pages(self) -> NDArray[np.int32]:
        """The page ids, read-only. What is in a page may change once its removal was reported."""
        return np.frombuffer(self._pages, np.int32)

    @property
    def start(self) -> int:
        """Tokens of the sequence before the first page."""
        return self.prefix.num_tokens

    @property
    def is_tail(self) -> bool:
        """Whether it is one page that its tokens fill in part."""
        return len(self._tokens) < self.page_size * TOKEN_BYTES

    def each_page(self) -> list[PageRun]:
        """One run for each of its pages. O(tokens)."""
        runs, prefix, page_bytes = [], self.prefix, self.page_size * TOKEN_BYTES
        page_before = self.page_before
        for number, page_key in enumerate(self.page_keys):
            tokens = self._tokens[number * page_bytes : (number + 1) * page_bytes]
            page_id = self._pages[number * TOKEN_BYTES : (number + 1) * TOKEN_BYTES]
            page = PageRun(prefix, tokens, page_id, page_before)
            page._page_keys = (page_key,)
            page_before = int.from_bytes(page_id, "little")
            runs.append(page)
            prefix = Prefix(self.namespace, self.page_size, prefix, tokens)
            prefix._key = page_key
        return runs

    def __repr__(self) -> str:
        end = self.start + len(self._tokens) // TOKEN_BYTES
        return f"PageRun(tokens [{self.start}, {end}), pages {self.pages.tolist()})"


class Stored(NamedTuple):
    """The pages of `run` can be found in `medium` from now on."""

    run: PageRun
    medium: Medium


class Removed(NamedTuple):
    """The pages of `run` cannot be found in `medium` any more.

    `last_use_tick` counts uses of the tree (`RadixTree.tick`); `hits`, `priority` and `keep_until` are those of the
    node that held them in the pool.
    """

    run: PageRun
    medium: Medium
    cause: RemovalCause
    last_use_tick: int
    hits: int = 0
    priority: int = 0
    keep_until: float = 0.0


class Cleared(NamedTuple):
    """Nothing can be found in `medium` any more; no `Removed` was sent for what was in it."""

    medium: Medium


Event: TypeAlias = Stored | Removed | Cleared
Observer: TypeAlias = Callable[[Event], object]
"""Is called with each event, in order, when the tree's own books are right again. It must not change the tree.

Cuts and merges of nodes are not reported, since what is cached stays the same. An observer that raises an exception is
logged and hears nothing more, because it missed something: the tree and the other observers go on.
"""


class EventChannel:
    """Sends each event to all observers; an event sent by an observer waits until all have heard the one before."""

    def __init__(self) -> None:
        self.observers: tuple[Observer, ...] = ()
        self._waiting: deque[Event] = deque()
        self._is_sending = False

    def add(self, observer: Observer) -> None:
        """Send `observer` every event from now on."""
        self.observers += (observer,)

    def remove(self, observer: Observer) -> None:
        """Send `observer` nothing more."""
        self.observers = tuple(other for other in self.observers if other != observer)

    def send(self, event: Event) -> None:
        """Tell all observers. Raises nothing that they raise (see `Observer`)."""
        self._waiting.append(event)
        if self._is_sending:
            return
        self._is_sending = True
        try:
            while self._waiting:
                event = self._waiting.popleft()
                for observer in self.observers:
                    self._tell(observer, event)
        finally:
            self._is_sending = False

    def _tell(self, observer: Observer, event: Event) -> None:
        try:
            observer(event)
        except Exception:
            self.remove(observer)
            logger.exception("an observer of the cache failed on %r and hears nothing more: %r", event, observer)


def prefix_of(node: TreeNode, page_size: int) -> Prefix:
    """The tokens from the root to the end of `node`, no tail. O(depth) the first time, then O(1)."""
    missing = []
    while node.prefix is None and node.parent is not None:
        missing.append(node)
        node = node.parent
    if node.prefix is None:
        assert node.namespace is not None, node
        node.prefix = Prefix(node.namespace, page_size)
    prefix = node.prefix
    for below in reversed(missing):
        prefix = below.prefix = Prefix(prefix.namespace, page_size, prefix, below.edge)
    return prefix


def run_of(node: TreeNode, page_size: int) -> PageRun:
    """The pages of `node`, which is in the tree and no root."""
    above = node.parent
    assert above is not None, node
    page_before = int.from_bytes(above.pages[-TOKEN_BYTES:], "little") if above.pages else None
    return PageRun(prefix_of(above, page_size), node.edge, node.pages, page_before)
