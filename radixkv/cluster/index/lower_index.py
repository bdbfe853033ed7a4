"""Which replicas hold which pages below their pools, as their events say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from radixkv.cache.page_keys import page_key
from radixkv.cache.token_ids import TOKEN_BYTES, TokenIds, token_bytes
from radixkv.cluster.index.replica_index import MAX_PAGES
from radixkv.config.checks import checked_int

NAME_BYTES = 8


class LowerIndex:
    """For a prompt: how many of its leading tokens each replica has in its pool or can load from one of its tiers.

    A tier may lack pages of a prompt that the pool holds, and a request is served by its pool and by one tier from
    there on; so this begins where the pool ends (`ReplicaIndex.lookup`). Whole pages alone count. Whether loading them
    is faster than computing them, a replica finds out by itself.

    Memory is bounded: of each medium, at most `max_pages` pages are remembered, each counted once however many replicas
    hold it; what was told first is forgotten first. About 100 bytes a page. Not thread-safe.

    >>> from radixkv.cache.page_keys import prompt_keys, root_key
    >>> names = [int.from_bytes(key[:8], "big", signed=True) for key in prompt_keys([1, 2, 3, 4, 5], page_size=2)]
    >>> index = LowerIndex(page_size=2)
    >>> index.store("a", "STORAGE", names[:2])
    >>> index.store("b", "STORAGE", names[1:2])
    >>> index.lookup([1, 2, 3, 4, 5], root_key(None, None), {"b": 2, "c": 1})
    {'b': 4, 'c': 1, 'a': 4}
    """

    def __init__(self, page_size: int, *, max_pages: int = MAX_PAGES) -> None:
        """An empty index. Raises: ConfigError."""
        self.page_size = checked_int("page_size", page_size, 1)
        self.max_pages = checked_int("max_pages", max_pages, 1)
        self._holders: dict[str, dict[int, int]] = {}  # by medium and name of a page; a bit for each replica
        self._bits: dict[str, int] = {}

    def lookup(self, tokens: bytes | TokenIds, namespace_key: bytes, held: Mapping[str, int]) -> dict[str, int]:
        """For each replica that has something: the leading tokens that it need not compute.

        O(tokens), a digest for each page that some replica has.

        Args:
            tokens, namespace_key: as `ReplicaIndex.lookup`.
            held: what that said.

        Raises: TokenIdsTypeError, InvalidTokenIdsError.
        """
        data = tokens if type(tokens) is bytes else token_bytes(tokens)
        pools = sorted((num_tokens, self._bits[name]) for name, num_tokens in held.items() if name in self._bits)
        pooled = sum(bit for _, bit in pools)  # the bits of those whose pools hold all so far
        going_on = dict.fromkeys(self._holders, sum(self._bits.values()))  # of those that have all, with that tier
        reached, found = sum(self._bits.values()), dict(held)
        position = 0
        for name in _names(data, namespace_key, self.page_size):
            while pools and pools[0][0] < position + self.page_size:
                pooled &= ~pools.pop(0)[1]
            before, reached = reached, 0
            for medium, holders in self._holders.items():
                going_on[medium] &= pooled | holders.get(name, 0)
                reached |= going_on[medium]
            if reached != before:
                self._note(found, before & ~reached, position)
            if not reached:
                return found
            position += self.page_size
        self._note(found, reached, position)
        return found

    def _note(self, found: dict[str, int], bits: int, num_tokens: int) -> None:
        """Note that the replicas of `bits` have so many tokens, if that is more than they had."""
        for replica, bit in self._bits.items():
            if bits & bit and num_tokens > found.get(replica, 0):
                found[replica] = num_tokens

    def pages_of(self, replica: str, medium: str) -> set[int]:
        """The names of the whole pages that `replica` holds in a medium. O(pages of all replicas)."""
        bit = self._bits.get(replica, 0)
        return {name for name, bits in self._holders.get(medium, {}).items() if bits & bit}

    def store(self, replica: str, medium: str, page_keys: Sequence[int]) -> None:
        """`replica` holds pages of these names in a medium. O(pages)."""
        bit, holders = self._bit_of(replica), self._holders.setdefault(medium, {})
        for name in page_keys:
            holders[name] = holders.get(name, 0) | bit
            if len(holders) > self.max_pages:
                del holders[next(iter(holders))]

    def remove(self, replica: str, medium: str, page_keys: Sequence[int]) -> None:
        """`replica` holds these pages no more in a medium. Unknown ones mean nothing. O(pages)."""
        bit, holders = self._bit_of(replica), self._holders.get(medium, {})
        for name in page_keys:
            bits = holders.get(name, 0) & ~bit
            if bits:
                holders[name] = bits
            else:
                holders.pop(name, None)

    def clear(self, replica: str) -> None:
        """`replica` holds nothing any more in any medium. O(pages of all replicas)."""
        bit = self._bits.get(replica, 0)
        if not bit:
            return
        for medium, holders in self._holders.items():
            if any(bits & bit for bits in holders.values()):
                self._holders[medium] = {name: bits & ~bit for name, bits in holders.items() if bits & ~bit}

    def drop_replica(self, replica: str) -> None:
        """Forget a replica. O(pages). One that was never heard of means nothing."""
        self.clear(replica)
        self._bits.pop(replica, None)

    def _bit_of(self, replica: str) -> int:
        bit = self._bits.get(replica)
        if bit is None:
            bit, taken = 1, set(self._bits.values())
            while bit in taken:
                bit <<= 1
            self._bits[replica] = bit
        return bit


def _names(tokens: bytes, namespace_key: bytes, page_size: int) -> Iterator[int]:
    """What the whole pages of a prompt are called in events, digested one by one."""
    key, page_bytes = namespace_key, page_size * TOKEN_BYTES
    for start in range(0, len(tokens) - page_bytes + 1, page_bytes):
        key = page_key(key, tokens[start : start + page_bytes])
        yield int.from_bytes(key[:NAME_BYTES], "big", signed=True)
