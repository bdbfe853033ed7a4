"""What the tests of the cache share: words for token sequences, Hypothesis strategies, and dull oracles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from hypothesis import strategies as st

from radixkv import PrefixCache
from radixkv.cache.tree import radix_tree as radix_tree
from radixkv.cache.tree.evicting import LEAST_SHARE_KEPT
from radixkv.cache.tree.node import InsertResult, MatchResult, Namespace, PartialPage, TreeNode
from radixkv.cache.tree.radix_tree import RadixTree

Key = tuple[Namespace, tuple[int, ...]]
"""A node is known by its namespace and all tokens up to its end."""

NAMESPACES: list[Namespace] = [(None, None), ("a", None), (None, "a")]

namespaces: st.SearchStrategy[Namespace] = st.sampled_from(NAMESPACES)

words: st.SearchStrategy[str] = st.text("abc", max_size=6)
"""Sequences for `spell`; so few letters that prefixes collide all the time."""

rests: st.SearchStrategy[list[int]] = st.lists(st.integers(0, 1), max_size=3)
"""What follows the last whole page: how the pages of letters begin, mostly."""


def spell(word: str, page_size: int, tail_tokens: int = 0) -> list[int]:
    """One page of tokens for each letter, then `tail_tokens` tokens that fill no page.

    Pages of different letters may differ in their last token only, so sequences also part within a page.
    """
    pages = [(ord(letter) % 2,) * (page_size - 1) + (ord(letter),) for letter in word]
    return [token for page in pages for token in page] + [0] * min(tail_tokens, page_size - 1)


PAGE = 4  # tokens a page in the tests of leases and of the prefix cache


def ids(word: str, tail_tokens: int = 0) -> list[int]:
    """`spell` in pages of `PAGE` tokens."""
    return spell(word, PAGE, tail_tokens)


class FakeClock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class WordTree:
    """A `RadixTree` for examples: sequences are words, and a page is called by the word that ends with it.

    So after inserting "abc", matching "abd" finds ["a", "ab"]. Each change is followed by `check_invariants`.
    """

    def __init__(self, page_size: int, policy: Any = "lru", clock: Callable[[], float] | None = None) -> None:
        self.tree = RadixTree(page_size, policy, clock=clock or FakeClock())
        self.page_size = page_size
        self._names: list[str] = []

    def insert(self, word: str, extra_key: str | None = None) -> InsertResult:
        """Insert `word` with pages that were never used before."""
        first = len(self._names)
        self._names += [word[: end + 1] for end in range(len(word))]
        pages = range(first, len(self._names))
        result = self.tree.insert(spell(word, self.page_size), pages, extra_key=extra_key)
        self.tree.check_invariants()
        return result

    def match(self, word: str, extra_key: str | None = None) -> MatchResult:
        """Match `word`."""
        result = self.tree.match_prefix(spell(word, self.page_size), extra_key=extra_key)
        self.tree.check_invariants()
        return result

    def lock(self, word: str, extra_key: str | None = None) -> MatchResult:
        """Match `word` and pin what was found."""
        result = self.match(word, extra_key)
        self.tree.inc_lock_ref(result.node)
        self.tree.check_invariants()
        return result

    def unlock(self, found: MatchResult) -> None:
        """Undo `lock`."""
        self.tree.dec_lock_ref(found.node)
        self.tree.check_invariants()

    def evict(self, num_pages: int) -> list[str]:
        """Evict at least `num_pages` pages; returns the names of those that went, and proves the sizes."""
        before, protected = self.tree.total_size, self.tree.protected_size
        freed = self.tree.evict(num_pages * self.page_size)
        self.tree.check_invariants()
        assert self.tree.total_size == before - len(freed) * self.page_size
        assert self.tree.protected_size == protected
        return self.names(freed.tolist())

    def names(self, pages: list[int]) -> list[str]:
        """What pages are called."""
        return [self._names[page] for page in pages]

    def cached(self) -> set[str]:
        """The names of all pages in the tree."""
        return set(self.names([page for state in dump(self.tree).values() for page in state.pages]))

    def edges(self) -> list[str]:
        """The nodes as the words that end in them, parents first; an edge begins at the stroke: ["|a", "a|b"]."""
        ends = [
            (self._names[int(self.tree.path_pages(node)[-1])], len(node.pages) // 4)
            for _, node in self.tree.nodes()
            if not node.is_root
        ]
        return [f"{word[:-pages]}|{word[-pages:]}" for word, pages in ends]


@contextmanager
def leak_checked(cache: PrefixCache) -> Iterator[PrefixCache]:
    """Proves at the end that everything in `cache` can be given back, open leases included."""
    yield cache
    cache.check_invariants()
    for lease in cache.open_leases():
        lease.release()
    cache.reset()
    cache.check_invariants()
    assert cache.stats().free_pages == cache.num_pages


def share(cache: PrefixCache, word: str) -> list[int]:
    """Commit `word`; returns its pages."""
    with cache.acquire(spell(word, cache.page_size)) as lease:
        lease.commit(spell(word, cache.page_size))
        return list(lease.pages)


class NodeState(NamedTuple):
    """What can be told about a node and the edge that leads to it."""

    first: int  # the edge holds the tokens from here on
    pages: list[int]
    created: int
    last_access: int
    lock_ref: int
    fork: bool
    cut: bool
    priority: int
    keep_until: float


def dump(tree: RadixTree) -> dict[Key, NodeState]:
    """Every node of `tree` but the roots: trees with equal dumps are the same node by node. O(nodes * tokens)."""
    states: dict[Key, NodeState] = {}
    paths: dict[int, Key] = {}
    for _, node in tree.nodes():
        if node.parent is None:
            assert node.namespace is not None
            paths[id(node)] = (node.namespace, ())
            continue
        namespace, above = paths[id(node.parent)]
        paths[id(node)] = key = (namespace, (*above, *node.token_ids.tolist()))
        states[key] = NodeState(
            first=len(above),
            pages=node.page_ids.tolist(),
            created=node.created,
            last_access=node.last_access,
            lock_ref=node.lock_ref,
            fork=node.fork,
            cut=node.cut,
            priority=node.priority,
            keep_until=node.keep_until,
        )
    return states


def snapshot(tree: RadixTree) -> object:
    """All of `tree` that an operation could change, the identity of nodes and their places in the queue included."""
    nodes = [(depth, id(node), node.entry, node.state, list(node.children)) for depth, node in tree.nodes()]
    sizes = (tree.tick, tree.total_size, tree.evictable_size, tree.namespaces())
    return (dump(tree), nodes, sizes, id(tree._unclaimed))


class Record(NamedTuple):
    """What a policy may know of a node's past."""

    matches: int  # since it was inserted
    used_at_s: float  # when it was inserted or matched last
    inflation: float  # what the "cost" policy had evicted by then


@dataclass(eq=False)
class Edge:
    """A node in `TreeOracle`, compared by identity: what was evicted and inserted anew is another one."""

    namespace: Namespace
    tokens: tuple[int, ...]  # from the root to its end
    first: int
    pages: list[int]
    created: int
    last_use: int
    record: Record
    priority: int = 0
    keep_until: float = 0.0
    fork: bool = False
    cut: bool = False
    locks: int = 0  # taken on exactly this prefix
    heir: Edge | None = None


COST_D0 = 12 * 4096

RANKS: dict[str, Callable[[TreeOracle, Edge], Any]] = {
    "lru": lambda _, edge: edge.last_use,
    "fifo": lambda _, edge: edge.created,
    "lfu": lambda _, edge: (edge.record.matches, edge.last_use),
    "slru": lambda tree, edge: ((edge.record.matches > 0) != tree.protects_too_much(), edge.last_use),
    "priority": lambda _, edge: (edge.priority, edge.last_use),
    "ttl": lambda _, edge: (max(edge.keep_until, edge.record.used_at_s + 300), edge.last_use),
    "cost": lambda _, edge: (
        edge.record.inflation + (edge.record.matches + 1) * (1 + (edge.first + len(edge.tokens)) / 2 / COST_D0),
        edge.last_use,
    ),
    "adaptive": lambda *_: 0,  # it learns, and may let go any leaf; `test_adaptive.py` proves what it learns
}
"""Of the unpinned leaves that of the smallest rank goes first."""


class TreeOracle:
    """What a `RadixTree` must hold: a list of edges in no order, in which everything is looked up.

    It does not choose what to evict, since leaves can be equal in rank: it follows, and proves each choice.
    """

    def __init__(self, page_size: int, policy: str = "lru", clock: Callable[[], float] | None = None) -> None:
        self.page_size = page_size
        self.clock = clock or FakeClock()
        self.deep = radix_tree.SHORTEN_PATHS_LONGER_THAN  # as the machines set it: no test would grow a tree that deep
        self.tick = 0
        self.edges: list[Edge] = []
        self._rank = RANKS[policy]
        self.whole_leaves = policy == "adaptive"
        self._inflation = 0.0
        self._unclaimed: Edge | None = None

    # -- reading -----------------------------------------------------------------------------------------------------

    def cached_tokens(self, namespace: Namespace, tokens: Sequence[int]) -> int:
        """Leading tokens of `tokens` that are cached, to the token."""
        return max((common(edge.tokens, tokens) for edge in self.edges if edge.namespace == namespace), default=0)

    def path(self, namespace: Namespace, tokens: Sequence[int]) -> list[Edge]:
        """The edges that hold the cached whole pages of `tokens`, top first."""
        page_size = self.page_size
        held = [
            edge
            for edge in self.edges
            if edge.namespace == namespace and common(edge.tokens, tokens) // page_size * page_size > edge.first
        ]
        return sorted(held, key=lambda edge: edge.first)

    def pages(self, namespace: Namespace, tokens: Sequence[int]) -> list[int]:
        """The pages of the cached whole pages of `tokens`."""
        num_pages = self.whole_tokens(namespace, tokens) // self.page_size
        return [page for edge in self.path(namespace, tokens) for page in edge.pages][:num_pages]

    def whole_tokens(self, namespace: Namespace, tokens: Sequence[int]) -> int:
        """Leading tokens of `tokens` that are cached in whole pages."""
        found = [common(edge.tokens, tokens) for edge in self.path(namespace, tokens)]
        return max(found, default=0) // self.page_size * self.page_size

    def path_to(self, edge: Edge) -> list[Edge]:
        """The edges from the root to `edge`, top first."""
        return sorted((above for above in self.edges if self.continues(edge, above)), key=lambda above: above.first)

    def children(self, edge: Edge | None, namespace: Namespace) -> list[Edge]:
        """The edges right below `edge`, or below the root of `namespace`."""
        tokens = () if edge is None else edge.tokens
        return [
            below
            for below in self.edges
            if below.namespace == namespace and below.first == len(tokens) and below.tokens[: below.first] == tokens
        ]

    def partials(self, edge: Edge | None, namespace: Namespace, rest: Sequence[int]) -> dict[int, tuple[int, Edge]]:
        """How many leading tokens of `rest` each page right below `edge` holds, and where; by page."""
        below = self.children(edge, namespace)
        shared = [common(child.tokens[child.first :], rest[: self.page_size]) for child in below]
        return {child.pages[0]: (num, child) for num, child in zip(shared, below, strict=True) if num}

    def lock_ref(self, edge: Edge) -> int:
        """Locks on this prefix and on all that continue it."""
        return sum(other.locks for other in self.edges if self.continues(other, edge))

    def is_tail(self, edge: Edge) -> bool:
        """Whether it holds less than a page."""
        return len(edge.tokens) - edge.first < self.page_size

    def continues(self, edge: Edge, other: Edge) -> bool:
        """Whether `other` lies on the path to `edge`; it does itself."""
        end = len(other.tokens)
        is_prefix = edge.namespace == other.namespace and edge.tokens[:end] == other.tokens
        return edge is other or (is_prefix and edge.first >= end and not self.is_tail(other))

    def unpinned_leaves(self) -> list[Edge]:
        """What can be evicted."""
        return [
            edge
            for edge in self.edges
            if edge.locks == 0 and not any(self.continues(other, edge) for other in self.edges if other is not edge)
        ]

    @property
    def num_pages(self) -> int:
        """Pages in the tree."""
        return sum(len(edge.pages) for edge in self.edges)

    @property
    def num_evictable_pages(self) -> int:
        """Pages in unpinned nodes."""
        return sum(len(edge.pages) for edge in self.edges if self.lock_ref(edge) == 0)

    def protects_too_much(self) -> bool:
        """Whether more than half of the tree's tokens are in nodes that a match came back to."""
        protected = sum(len(edge.tokens) - edge.first for edge in self.edges if edge.record.matches)
        return protected > self.num_pages * self.page_size / 2

    def states(self) -> dict[Key, NodeState]:
        """The same as `dump` of the tree must give."""
        return {
            (edge.namespace, edge.tokens): NodeState(
                first=edge.first,
                pages=edge.pages,
                created=edge.created,
                last_access=edge.last_use,
                lock_ref=self.lock_ref(edge),
                fork=edge.fork,
                cut=edge.cut,
                priority=edge.priority,
                keep_until=edge.keep_until,
            )
            for edge in self.edges
        }

    # -- writing -----------------------------------------------------------------------------------------------------

    def match(self, namespace: Namespace, tokens: Sequence[int]) -> Edge | None:
        """Use what is cached of `tokens`; returns where it ends, None for a root."""
        path = self._use(namespace, tokens)
        for edge in path:
            edge.record = Record(edge.record.matches + 1, self.clock(), self._inflation)
        node = self._end_at(path, self.whole_tokens(namespace, tokens))
        if node is not None:
            path = self.path_to(node)
            if len(path) > self.deep and self.tick % self.deep == 0:
                self._shorten(path)
        return node

    def insert(self, namespace: Namespace, tokens: Sequence[int], pages: Sequence[int]) -> Edge | None:
        """Add what is missing of the whole pages of `tokens`; returns where they end."""
        known = self.whole_tokens(namespace, tokens)
        node = self._end_at(self._use(namespace, tokens), known)
        whole = len(tokens) // self.page_size * self.page_size
        if known == whole:
            return node
        return self._add(node, namespace, tuple(tokens[:whole]), list(pages)[known // self.page_size :])

    def leading(self, edge: Edge, num_tokens: int) -> Edge | None:
        """What ends after `num_tokens` on the path to `edge`, cut if need be; that counts as no use."""
        if num_tokens == len(edge.tokens):
            return edge
        self._merge_unclaimed()
        path = [above for above in self.path_to(self.standing(edge)) if above.first < num_tokens]
        return self._end_at(path, num_tokens)

    def insert_tail(self, node: Edge | None, namespace: Namespace, rest: Sequence[int], page: int) -> Edge:
        """Add less than a page below `node`, and use the path to it along with what was matched or inserted last."""
        for above in [] if node is None else self.path_to(node):
            above.last_use = self.tick
        return self._add(node, namespace, (*(() if node is None else node.tokens), *rest), [page])

    def touch(self, edge: Edge) -> None:
        """Use the path to `edge`, which follows what was matched last."""
        if edge.last_use < self.tick:
            edge.record = Record(edge.record.matches + 1, self.clock(), self._inflation)
        for above in self.path_to(edge):
            above.last_use = self.tick

    def retain(self, edge: Edge, priority: int, keep_for_s: float | None) -> None:
        """Let the path to `edge` outlive others."""
        for above in self.path_to(self.standing(edge)):
            above.priority = max(above.priority, priority)
            above.keep_until = max(above.keep_until, 0 if keep_for_s is None else self.clock() + keep_for_s)

    def lock(self, edge: Edge) -> None:
        """Pin the path to `edge`."""
        self.standing(edge).locks += 1

    def unlock(self, edge: Edge) -> None:
        """Undo one `lock`."""
        edge = self.standing(edge)
        edge.locks -= 1
        if edge.cut:
            self._merge(edge)

    def evict(self, num_tokens: int, freed: Sequence[int]) -> None:
        """Remove what was evicted to make room for `num_tokens`: `freed` are the pages that went, in this order.

        Of a leaf that has more pages than are still missing the last ones go, unless next to nothing would stay.
        """
        left = list(freed)
        missing = -(-num_tokens // self.page_size)
        while missing > 0 and (leaves := self.unpinned_leaves()):
            missing -= self.evict_first(leaves, missing, left)
        assert left == [], "more went than was asked for"

    def evict_first(
        self,
        leaves: Sequence[Edge],
        missing: int,
        left: list[int],
        allowed: Callable[[Edge], int] = lambda leaf: len(leaf.pages),
    ) -> int:
        """Remove the one of `leaves` that is first in order, or its end, and its pages from the front of `left`.

        Of no leaf more pages go than are `allowed`. Returns: how many went.
        """
        first = min(map(self._order, leaves))
        equals = {
            tuple(self._going(leaf, missing, allowed(leaf))): leaf for leaf in leaves if self._order(leaf) == first
        }
        chosen = next((pages for pages in equals if left[: len(pages)] == list(pages)), None)
        assert chosen is not None, f"{list(equals)} were to go first, and {left} went"
        del left[: len(chosen)]
        self._inflate(equals[chosen])
        self.edges.remove(self._end_of(equals[chosen], len(chosen)))
        return len(chosen)

    def _going(self, leaf: Edge, missing: int, allowed: int) -> list[int]:
        """The pages of a leaf that go first where so many are missing, if so many of them are allowed to go."""
        rest = len(leaf.pages) - missing
        goes_whole = self.whole_leaves or rest <= 0 or rest * LEAST_SHARE_KEPT < self.num_pages
        if goes_whole and len(leaf.pages) <= allowed:
            return leaf.pages
        return leaf.pages[-min(missing, allowed, len(leaf.pages)) :]

    def _end_of(self, leaf: Edge, num_pages: int) -> Edge:
        """The last pages of a leaf; what comes before them is an edge of its own from now on, another one."""
        if num_pages == len(leaf.pages):
            return leaf
        kept_tokens = leaf.first + (len(leaf.pages) - num_pages) * self.page_size
        kept = Edge(
            leaf.namespace, leaf.tokens[:kept_tokens], leaf.first, leaf.pages[:-num_pages], leaf.created, leaf.last_use,
            leaf.record, leaf.priority, leaf.keep_until, fork=leaf.fork,
        )  # fmt: skip
        leaf.first, leaf.pages = kept_tokens, leaf.pages[-num_pages:]
        self.edges.append(kept)
        return leaf

    def remove(self, leaf: Edge) -> None:
        """Forget an unpinned leaf."""
        self._inflate(leaf)
        self.edges.remove(leaf)

    def _inflate(self, leaf: Edge) -> None:
        rank = self._rank(self, leaf)
        if isinstance(rank, tuple):
            self._inflation = max(self._inflation, rank[0])

    def standing(self, edge: Edge) -> Edge:
        """`edge`, or what it was merged into."""
        while edge.heir is not None:
            edge = edge.heir
        return edge

    def _order(self, leaf: Edge) -> tuple[bool, Any]:
        is_kept = leaf.keep_until > self.clock()
        return (is_kept, leaf.keep_until if is_kept else self._rank(self, leaf))

    def _use(self, namespace: Namespace, tokens: Sequence[int]) -> list[Edge]:
        self._merge_unclaimed()
        self.tick += 1
        path = self.path(namespace, tokens)
        for edge in path:
            edge.last_use = self.tick
        return path

    def _merge_unclaimed(self) -> None:
        unclaimed, self._unclaimed = self._unclaimed, None
        if unclaimed in self.edges and unclaimed.cut:
            self._merge(unclaimed)

    def _end_at(self, path: list[Edge], length: int) -> Edge | None:
        """The edge that ends after `length` tokens; the last one of `path` is cut for it if need be."""
        if not path or len(path[-1].tokens) == length:
            return path[-1] if path else None
        lower = path[-1]
        num_pages = (length - lower.first) // self.page_size
        upper = Edge(
            lower.namespace, lower.tokens[:length], lower.first, lower.pages[:num_pages], lower.created, lower.last_use,
            lower.record, lower.priority, lower.keep_until, fork=True, cut=True,
        )  # fmt: skip
        lower.first, lower.pages = length, lower.pages[num_pages:]
        self.edges.append(upper)
        self._unclaimed = upper
        return upper

    def _merge(self, upper: Edge) -> None:
        below = self.children(upper, upper.namespace)
        if not below:
            upper.cut = False
            return
        (lower,) = below
        if self._may_merge(upper, lower):
            self._absorb(upper, lower)

    def _may_merge(self, upper: Edge, lower: Edge) -> bool:
        is_kept_apart = upper.keep_until > lower.keep_until and upper.keep_until > self.clock()
        return self.lock_ref(lower) == self.lock_ref(upper) and not is_kept_apart

    def _shorten(self, path: list[Edge]) -> None:
        for upper, lower in pairwise(path):
            is_alone = self.children(upper, upper.namespace) == [lower]
            if upper.fork and is_alone and self._may_merge(upper, lower):
                self._absorb(upper, lower)

    def _absorb(self, upper: Edge, lower: Edge) -> None:
        lower.first, lower.pages = upper.first, upper.pages + lower.pages
        lower.last_use, lower.record = upper.last_use, upper.record
        lower.priority = max(lower.priority, upper.priority)
        lower.keep_until = max(lower.keep_until, upper.keep_until)
        upper.heir = lower
        self.edges.remove(upper)

    def _add(self, parent: Edge | None, namespace: Namespace, tokens: tuple[int, ...], pages: list[int]) -> Edge:
        first = 0 if parent is None else len(parent.tokens)
        record = Record(0, self.clock(), self._inflation)
        leaf = Edge(namespace, tokens, first, pages, self.tick, self.tick, record)
        if parent is not None:
            parent.cut = False
        self.edges.append(leaf)
        return leaf


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Leading tokens that `a` and `b` have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def check_partial(found: PartialPage | None, expected: dict[int, tuple[int, Edge]]) -> None:
    """Prove that `found` is one of the best of `TreeOracle.partials`."""
    if found is None:
        assert not expected
        return
    num_tokens, edge = expected[found.page]
    assert found.num_tokens == num_tokens == max(num for num, _ in expected.values())
    assert found.node.page_ids.tolist() == edge.pages


def nodes_by_page(tree: RadixTree) -> dict[int, TreeNode]:
    """Which node owns which page."""
    return {page: node for _, node in tree.nodes() for page in node.page_ids.tolist()}
