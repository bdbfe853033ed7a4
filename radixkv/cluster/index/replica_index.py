"""Which replicas hold which prefix, as their events say."""

from __future__ import annotations

from collections.abc import Sequence

from radixkv.cache.token_ids import TOKEN_BYTES, TokenIds, token_bytes
from radixkv.cluster.index.holder_trie import HolderNode, HolderTrie, common_bytes
from radixkv.config.checks import Bounds, checked_int, checked_number
from radixkv.errors import InvalidRequestError

MAX_PAGES = 1 << 20
EXPECT_S = 10.0
KEPT_SHARE = 0.9  # of `max_pages`, after some were forgotten
MAX_KNOWN_SETS = 4096


class ReplicaIndex:
    """For a prompt: how many of its leading tokens each replica holds, exact to the token.

    It is what `PrefixCache.peek` of each replica would say, as far as its events tell: whole pages, the part of one
    more page that follows, and tails. (Of a model whose layers see a window, `peek` may say less.)

    `store`, `remove` and `clear` are what events say; `expect` is what a router knows before: a prompt that was sent to
    a replica will be held there soon. Such an entry counts until events confirm it, or `expect_s` have passed.

    Memory is bounded: beyond `max_pages` pages of tokens, each counted once however many replicas hold it, the prefixes
    that were neither stored nor looked up for the longest time are forgotten. About 200 bytes a page of 16 tokens.

    Not thread-safe. It has no clock: time is passed in.

    >>> index = ReplicaIndex(page_size=2)
    >>> index.store("a", None, b"", [101, 102], [1, 2, 3, 4])
    True
    >>> index.store("b", None, b"", [101], [1, 2])
    True
    >>> index.lookup([1, 2, 3, 9], b"")
    {'b': 2, 'a': 3}
    >>> index.remove("a", [102])
    >>> sorted(index.lookup([1, 2, 3, 9], b"").items())
    [('a', 2), ('b', 2)]

    Attributes:
        page_size: tokens a page, the same in all replicas.
        max_tokens: tokens that are remembered at most.
        forgotten_tokens: tokens that were forgotten to make room; while it is 0, the index equals the trees.
    """

    def __init__(self, page_size: int, *, max_pages: int = MAX_PAGES, expect_s: float = EXPECT_S) -> None:
        """expect_s: how long an expectation counts that no event confirms. Raises: ConfigError."""
        self.page_size = checked_int("page_size", page_size, 1)
        self.max_tokens = checked_int("max_pages", max_pages, 1) * self.page_size
        self.expect_s = checked_number("expect_s", expect_s, Bounds(above=0))
        self.forgotten_tokens = 0
        self._trie = HolderTrie(self.page_size)
        self._bits: dict[str, int] = {}  # the bit of what a replica holds; the next one is of what it will
        self._names: dict[int, str] = {}  # by either bit
        self._known_sets: dict[int, tuple[str, ...]] = {}
        self._expected: dict[tuple[int, HolderNode], float] = {}  # by bit and end; until when; the oldest first
        self._calls = 0

    # -- looking -----------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> list[str]:
        """The replicas of which it heard."""
        return list(self._bits)

    @property
    def num_tokens(self) -> int:
        """Tokens that are remembered, each counted once however many replicas hold it. O(1)."""
        return self._trie.num_bytes // TOKEN_BYTES

    def lookup(self, tokens: bytes | TokenIds, namespace_key: bytes, now: float | None = None) -> dict[str, int]:
        """For each replica that holds something of a prompt: its leading tokens that are held there.

        O(tokens + nodes), a comparison of memory for the most part; nothing is hashed but one token for each node.

        Args:
            tokens: ids, or their little-endian int32 bytes, which spares the conversion.
            namespace_key: `radixkv.cache.page_keys.root_key(extra_key, cache_salt)`.
            now: seconds, by the clock of `expect`; expectations that are too old are forgotten first.

        Raises: TokenIdsTypeError, InvalidTokenIdsError.
        """
        data = tokens if type(tokens) is bytes else token_bytes(tokens)
        if now is not None and self._expected:
            self.forget_expected(now)
        node = self._trie.roots.get(namespace_key)
        if node is None:
            return {}
        held: dict[str, int] = {}
        names, position, holders = self._names, 0, 0
        while (child := node.children.get(data[position : position + TOKEN_BYTES])) is not None:
            if child.mask != holders:
                if lost := holders & ~child.mask:
                    if lost in names:  # most often one alone
                        held[names[lost]] = position // TOKEN_BYTES
                    else:
                        held |= dict.fromkeys(self._names_of(lost), position // TOKEN_BYTES)
                holders = child.mask
            node = child
            if not data.startswith(child.key, position):
                position += common_bytes(child.key, 0, data, position)
                break
            position += len(child.key)
        if holders:
            held |= dict.fromkeys(self._names_of(holders), position // TOKEN_BYTES)
            self._calls += 1
            node.used = self._calls
        return held

    def pages_of(self, replica: str) -> set[int]:
        """The names of all pages and tails that `replica` holds. O(pages of all replicas)."""
        bit = self._bits.get(replica, 0)
        pages: set[int] = set()
        for node in self._trie.nodes():
            if node.mask & bit:
                pages.update(name for name in node.page_keys if name is not None)
            if node.ends & bit and node.tail_key is not None:
                pages.add(node.tail_key)
        return pages

    # -- what events say ---------------------------------------------------------------------------------------------

    def store(
        self,
        replica: str,
        parent_key: int | None,
        namespace_key: bytes,
        page_keys: Sequence[int],
        tokens: bytes | TokenIds,
    ) -> bool:
        """`replica` holds some whole pages that follow another one, or start a namespace. O(tokens).

        Args:
            parent_key: the name of the page before, None where a sequence starts.
            namespace_key: of the namespace; looked at only where a sequence starts.
            page_keys: the names of the pages: any integers, the same for the same page in all replicas.
            tokens: those of the pages, ids or little-endian int32 bytes.

        Returns: False if the page before is not known to be held there: something was missed, or forgotten.
        Raises: InvalidRequestError if the tokens do not fill the pages; TokenIdsTypeError, InvalidTokenIdsError.
        """
        data = tokens if type(tokens) is bytes else token_bytes(tokens)
        if len(data) != len(page_keys) * self.page_size * TOKEN_BYTES:
            raise InvalidRequestError(
                f"{len(page_keys)} pages must hold {len(page_keys) * self.page_size} tokens, not "
                f"{len(data) // TOKEN_BYTES}"
            )
        return self._store(replica, parent_key, namespace_key, data, page_keys)

    def store_tail(
        self,
        replica: str,
        parent_key: int | None,
        namespace_key: bytes,
        tail_key: int,
        tokens: bytes | TokenIds,
    ) -> bool:
        """`replica` holds a last page that `tokens` fill in part. As `store`."""
        data = tokens if type(tokens) is bytes else token_bytes(tokens)
        if not 0 < len(data) < self.page_size * TOKEN_BYTES:
            raise InvalidRequestError(
                f"a tail must hold 1 to {self.page_size - 1} tokens, not {len(data) // TOKEN_BYTES}"
            )
        return self._store(replica, parent_key, namespace_key, data, (), tail_key)

    def remove(self, replica: str, page_keys: Sequence[int]) -> None:
        """`replica` holds these pages or tails no more, and nothing that followed them. Unknown ones mean nothing.

        O(pages) for pages that follow one another, in order.
        """
        bit, trie = self._bit_of(replica), self._trie
        num_left = len(page_keys)
        while num_left:
            key = page_keys[num_left - 1]
            if (tail := trie.node_of_tail.get(key)) is not None and tail.ends & bit:
                self._remove_tail(tail, bit)
            node = trie.node_of_page.get(key)
            if node is None or not node.mask & bit:
                num_left -= 1
                continue
            index, count = node.page_keys.index(key), 1
            while count < num_left and count <= index:
                if page_keys[num_left - 1 - count] != node.page_keys[index - count]:
                    break
                count += 1
            last_page = node.start // self.page_size + index + 1
            self._remove_pages(node, bit, (last_page - count) * self.page_size, last_page * self.page_size)
            num_left -= count

    def clear(self, replica: str) -> None:
        """`replica` holds nothing any more. What is expected of it stays so. O(nodes)."""
        bit = self._bit_of(replica)
        self._forget_tails(self._trie.uncover_all(bit))

    def drop_replica(self, replica: str) -> None:
        """Forget a replica, and what was expected of it. O(nodes). One that was never heard of means nothing."""
        bit = self._bits.pop(replica, 0)
        if not bit:
            return
        self._expected = {key: until for key, until in self._expected.items() if key[0] != bit << 1}
        self._forget_tails(self._trie.uncover_all(bit | bit << 1))
        del self._names[bit], self._names[bit << 1]
        self._known_sets.clear()

    # -- what a router knows -----------------------------------------------------------------------------------------

    def expect(self, replica: str, tokens: bytes | TokenIds, namespace_key: bytes, now: float) -> None:
        """`replica` is about to compute a prompt, and will hold it then. O(tokens).

        It counts as held until events say so, or `expect_s` after `now` (seconds, by any clock) have passed.
        """
        self.forget_expected(now)
        data = tokens if type(tokens) is bytes else token_bytes(tokens)
        if not data:
            return
        expected = self._bit_of(replica) << 1
        root = self._trie.root(namespace_key)
        node = self._trie.cover(root, 0, data, expected)[-1]
        if node.end > len(data) // TOKEN_BYTES:
            node = self._trie.split(node, len(data) // TOKEN_BYTES)
        node.ends |= expected
        self._note_use(node)
        key = (expected, node)
        self._expected.pop(key, None)
        self._expected[key] = now + self.expect_s
        if node.mask & expected >> 1:  # it is held already
            self._forget_expectation(key)
        self._make_room()

    def forget_expected(self, now: float) -> None:
        """Forget what was expected and has not come in time. O(those forgotten)."""
        while self._expected:
            key, until = next(iter(self._expected.items()))
            if until > now:
                return
            self._forget_expectation(key)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _store(
        self,
        replica: str,
        parent_key: int | None,
        namespace_key: bytes,
        tokens: bytes,
        page_keys: Sequence[int],
        tail_key: int | None = None,
    ) -> bool:
        bit = self._bit_of(replica)
        if parent_key is None:
            node, depth = self._trie.root(namespace_key), 0
        else:
            found = self._trie.node_of_page.get(parent_key)
            if found is None or not found.mask & bit:
                return False
            node = found
            depth = (node.start // self.page_size + node.page_keys.index(parent_key) + 1) * self.page_size
        visited = self._trie.cover(node, depth, tokens, bit, page_keys)
        if not visited:
            self._trie.drop_empty_root(namespace_key)
            return True
        last, end = visited[-1], depth + len(tokens) // TOKEN_BYTES
        if tail_key is not None:
            if last.end > end:
                last = self._trie.split(last, end)
            last.ends |= bit
            self._trie.name_tail(last, tail_key)
        self._note_use(last)
        for node in visited:
            if node.ends & bit << 1:
                self._forget_expectation((bit << 1, node))
        self._make_room()
        return True

    def _remove_pages(self, node: HolderNode, bit: int, first: int, last: int) -> None:
        """Remove the pages that fill `[first, last)`, which ends on the edge of `node`."""
        if last < node.end:  # more that is held follows, and cannot be found any more
            node = self._trie.split(node, last)
        self._forget_tails(self._trie.cut_off(node, bit, first))

    def _remove_tail(self, node: HolderNode, bit: int) -> None:
        node.ends &= ~bit
        self._forget_tails([node])
        floor = (node.end - 1) // self.page_size * self.page_size
        self._trie.uncover(node, bit, floor)

    def _forget_tails(self, nodes: Sequence[HolderNode]) -> None:
        """Forget the names of tails that no replica holds any more."""
        for node in nodes:
            if not node.ends & self._held_bits:
                self._trie.forget_tail(node)

    @property
    def _held_bits(self) -> int:
        """The bits of all replicas that say what is held, not what is expected."""
        return sum(self._bits.values())

    def _forget_expectation(self, key: tuple[int, HolderNode]) -> None:
        expected, node = key
        del self._expected[key]
        node.ends &= ~expected
        self._trie.uncover(node, expected, 0)

    def _note_use(self, node: HolderNode) -> None:
        self._calls += 1
        node.used = self._calls

    def _make_room(self) -> None:
        """Forget the leaves that were not used for the longest time, if there are too many tokens."""
        if self.num_tokens <= self.max_tokens:
            return
        while self.num_tokens > self.max_tokens * KEPT_SHARE:
            for leaf in sorted(self._trie.leaves(), key=lambda node: node.used):
                if self.num_tokens <= self.max_tokens * KEPT_SHARE:
                    return
                if leaf.in_trie and not leaf.children:
                    self._forget_leaf(leaf)

    def _forget_leaf(self, leaf: HolderNode) -> None:
        for bit in self._bits.values():
            self._expected.pop((bit << 1, leaf), None)
        before = self.num_tokens
        self._trie.remove_leaf(leaf)
        self.forgotten_tokens += before - self.num_tokens

    def _bit_of(self, replica: str) -> int:
        bit = self._bits.get(replica)
        if bit is None:
            bit = 1
            while bit in self._names:
                bit <<= 2
            self._bits[replica] = bit
            self._names[bit] = self._names[bit << 1] = replica
        return bit

    def _names_of(self, mask: int) -> tuple[str, ...]:
        """The replicas with a bit in `mask`, which is remembered: the same sets come again and again."""
        names = self._known_sets.get(mask)
        if names is None:
            if len(self._known_sets) >= MAX_KNOWN_SETS:
                self._known_sets.clear()
            names = self._known_sets[mask] = tuple([self._names[bit] for bit in _bits(mask)])
        return names

    def check_invariants(self) -> None:
        """Prove the invariants of the trie, and that each expectation has its place. O(tokens)."""
        self._trie.check_invariants()
        assert self.num_tokens <= self.max_tokens
        held = self._held_bits
        ends = {(bit, node) for node in self._trie.nodes() for bit in _bits(node.ends & ~held)}
        assert ends == set(self._expected)
        assert all(node.ends & held for node in self._trie.node_of_tail.values())


def _bits(mask: int) -> list[int]:
    """The single bits of `mask`, lowest first. O(bits)."""
    bits = []
    while mask:
        bits.append(mask & -mask)
        mask &= mask - 1
    return bits
