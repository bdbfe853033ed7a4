"""The hit rate this traffic would have with a cache of another size, estimated while it runs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.insight.prefix_hash import prefix_hashes
from radixkv.config.checks import checked_int
from radixkv.errors import InvalidRequestError, InvariantError

_SPARE = 0.9  # of the sample covers `max_tokens`, so that chance leaves none of it uncovered


class MissRatioCurve:
    """Estimates the token hit rate of LRU prefix caches of all sizes up to `max_tokens`, in one pass over the traffic.

    An LRU cache of C tokens holds a block if no more than C tokens, itself included, were used since its own last use
    (Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage hierarchies", IBM Systems Journal 9(2), 1970:
    the stack distance), where of one request the ancestors count as used after their descendants: a radix tree evicts
    leaves first. The stack is kept for a sample alone: blocks of `block_tokens` tokens whose prefix hash falls below a
    threshold, so that a block is in the sample always or never, and distances scale by 1 / `sampling_rate`
    (Waldspurger, Park, Garthwaite, Ahmad, "Efficient MRC construction with SHARDS", FAST 2015).

    What differs from the paper, and why:

    - The sample is bounded by depth. The paper's fixed-size variant lowers the threshold with each
      distinct block that comes; prompts never stop bringing new blocks, and after a week nothing would be left
      to resolve the sizes of interest. Here the rate is such that `sample_blocks` blocks stand for `max_tokens`, and
      what lies deeper in the stack is forgotten: a miss in every cache of interest.
    - A prompt hits up to some point and misses from there on, so each sampled block speaks for the tokens up to the
      next sampled one, and the last of a prompt also for the 1 / rate - 1 blocks that lie, on average, between the
      first miss and the first sampled miss. That counts missed blocks without bias and with a standard deviation of
      at most 1 / rate blocks a prompt, where a weight of 1 / rate for each sampled block has the square root of
      missed blocks / rate.
    - Misses are estimated, and hits are what remains of the tokens asked for, which are known. That is the correction
      of the paper's SHARDS-adj, and why a prompt that everybody shares does no harm, sampled or not.

    Tokens at the end of a prompt that fill no block hit if its last block does; a hit that ends inside a block counts
    up to where the block begins, half a block too short on average. Where a cache runs and tells how much it found, the
    difference to that is added, for caches that hold the last block that hit. Not modelled: pins, pages taken for
    answers that are never inserted, and that a tree whose leaves leave whole holds half an evicted leaf less than it
    could.

    Everything since construction counts; for a window of time take the differences of two readings of `total_tokens`
    and `hit_tokens`, as with any counter.

    Memory: at most 350 bytes for each of the `sample_blocks`.

    >>> curve = MissRatioCurve(max_tokens=64, block_tokens=4)
    >>> first, second = np.arange(8, dtype=np.int32), np.arange(100, 132, dtype=np.int32)
    >>> for prompt in [first, second, first, first]:
    ...     curve.record(prompt, seed=0)
    >>> curve.curve([8, 32, 40])
    [0.14285714285714285, 0.14285714285714285, 0.2857142857142857]
    """

    def __init__(self, max_tokens: int, *, block_tokens: int = 16, sample_blocks: int | None = None) -> None:
        """`max_tokens`: the largest cache to estimate. `sample_blocks`: unless told 4096, or `max_tokens / 4096` if
        that is more, so that at least one block of 16 tokens in 285 is in the sample.

        Raises: ConfigError unless each size is an integer of at least 1.
        """
        self.max_tokens = max_tokens = checked_int("max_tokens", max_tokens, 1)
        self.block_tokens = block_tokens = checked_int("block_tokens", block_tokens, 1)
        if sample_blocks is None:
            sample_blocks = max(4096, max_tokens // 4096)
        self.sample_blocks = sample_blocks = checked_int("sample_blocks", sample_blocks, 1)
        self.sampling_rate = min(1.0, _SPARE * sample_blocks * block_tokens / max_tokens)
        self.total_tokens = 0
        self._last_hash = np.uint64(min(int(self.sampling_rate * 2**64), 2**64 - 1))
        self._unsampled_tokens = (1 / self.sampling_rate - 1) * block_tokens  # missed before the first sampled miss
        self._weighed_tokens = 0.0  # the tokens that samples spoke for: estimates `total_tokens`
        self._hit_tokens = [0.0] * (2 * sample_blocks + 1)  # of these, by stack distance in sampled blocks
        self._ends = array("d", bytes(8 * len(self._hit_tokens)))  # tokens that hits had beyond blocks, in the same way
        self._slot_of: dict[int, int] = {}  # the stack, last used block last: where the hash of a block stands in …
        self._in_use = np.zeros(2 * sample_blocks, np.bool_)  # … this row, which has a gap where a block was used again
        self._top = 0  # where the row ends

    def record(self, tokens: NDArray[np.int32], seed: int, found_tokens: int | None = None) -> None:
        """A request asks for `tokens`, in the namespace of `seed` (`namespace_seed`), and they are cached from now on.

        O(tokens + sample_blocks), both with small constants: mostly the hash.

        Args:
            found_tokens: how many of them a cache found that runs on this traffic, of whatever size.
        """
        num_blocks, rest = divmod(len(tokens), self.block_tokens)
        self.total_tokens += len(tokens)
        beyond = 0 if found_tokens is None else found_tokens % self.block_tokens
        if found_tokens is not None and found_tokens >= num_blocks * self.block_tokens > 0:
            beyond = found_tokens - len(tokens)  # its rest is taken to hit, too
        if num_blocks == 0:
            self._weighed_tokens += rest
            self._ends[0] += beyond
            return
        places, hashes = self._sample(tokens, seed)
        if not places:
            self._ends[0] += beyond
            return
        end = num_blocks * self.block_tokens + self._unsampled_tokens
        if places[-1] == num_blocks - 1:
            end += rest / self.sampling_rate
        starts = [place * self.block_tokens for place in places]
        self._weighed_tokens += end - starts[0]
        distances = self._use(hashes)
        for distance, start, stop in zip(distances, starts, [*starts[1:], end], strict=False):
            self._hit_tokens[distance] += stop - start
        self._ends[distances[-1] if distances else 0] += beyond

    def insert(self, tokens: NDArray[np.int32], seed: int) -> None:
        """`tokens` are cached from now on, though not all were asked for: a prompt and its answer. As `record`."""
        self._use(self._sample(tokens, seed)[1])

    @property
    def num_sampled_blocks(self) -> int:
        """Blocks in memory: 2 * `sample_blocks` at most."""
        return len(self._slot_of)

    def check_invariants(self) -> None:
        """Prove that each sampled block has a place in the row, and no place is another's. Raises: InvariantError."""
        in_use = self._in_use.nonzero()[0].tolist()
        if sorted(self._slot_of.values()) != in_use:
            raise InvariantError(f"blocks stand at {sorted(self._slot_of.values())}, and {in_use} are in use")

    def clear(self) -> None:
        """Every cache, of whatever size, was emptied. The counts stay. O(sample_blocks)."""
        self._slot_of.clear()
        self._in_use[:] = False
        self._top = 0

    def hit_tokens(self, capacity_tokens: int) -> float:
        """How many of the `total_tokens` an LRU cache of `capacity_tokens` tokens would have held. O(sample_blocks).

        Raises: InvalidRequestError for a capacity that is negative or above `max_tokens`.
        """
        if not 0 <= capacity_tokens <= self.max_tokens:
            raise InvalidRequestError(
                f"a capacity of {capacity_tokens} tokens lies outside [0, {self.max_tokens}]; "
                "make the curve's max_tokens larger"
            )
        depth = self._depth(capacity_tokens)
        missed = self._weighed_tokens - sum(self._hit_tokens[: depth + 1]) - sum(self._ends[: depth + 1])
        return min(max(self.total_tokens - missed, 0.0), float(self.total_tokens))

    def hit_rate(self, capacity_tokens: int) -> float:
        """`hit_tokens` as a share of `total_tokens`; 0 before the first request. Raises as above."""
        return self.hit_tokens(capacity_tokens) / max(self.total_tokens, 1)

    def curve(self, capacities_tokens: Iterable[int]) -> list[float]:
        """`hit_rate` for each of the capacities. Raises as above."""
        return [self.hit_rate(capacity) for capacity in capacities_tokens]

    def _sample(self, tokens: NDArray[np.int32], seed: int) -> tuple[list[int], list[int]]:
        """The places in the prompt, in order, of its blocks that are in the sample, and their prefix hashes."""
        hashes = prefix_hashes(tokens, self.block_tokens, seed)
        places = (hashes <= self._last_hash).nonzero()[0]
        return places.tolist(), hashes[places].tolist()

    def _use(self, hashes: list[int]) -> list[int]:
        """Put the blocks of a path on top of the stack, the path's first one topmost.

        Returns: how deep in the stack each of them was, itself included. Those that were not there, or no longer,
            come last in a path, and are left out.
        """
        slots = [slot for slot in map(self._slot_of.pop, hashes, repeat(None)) if slot is not None]
        distances: list[int] = []
        if slots:
            deepest = min(slots)
            blocks = self._in_use[deepest : self._top].nonzero()[0]
            distances = (len(blocks) - blocks.searchsorted(np.array(slots) - deepest)).tolist()
            self._in_use[slots] = False
        self._push(hashes[: self.sample_blocks])
        return distances

    def _push(self, hashes: list[int]) -> None:
        if self._top + len(hashes) > len(self._in_use):
            self._close_gaps()
        first, self._top = self._top, self._top + len(hashes)
        self._slot_of.update(zip(reversed(hashes), range(first, self._top), strict=True))
        self._in_use[first : self._top] = True

    def _close_gaps(self) -> None:
        """Move the blocks in the row together, and forget those deeper than `sample_blocks`."""
        hashes = list(self._slot_of)[-self.sample_blocks :]
        self._top = len(hashes)
        self._slot_of = dict(zip(hashes, range(self._top), strict=True))
        self._in_use[: self._top] = True
        self._in_use[self._top :] = False

    def _depth(self, capacity_tokens: int) -> int:
        """How many sampled blocks a cache of that size holds."""
        other_blocks = capacity_tokens // self.block_tokens - 1
        return 1 + int(other_blocks * self.sampling_rate) if other_blocks >= 0 else 0
