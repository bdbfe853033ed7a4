"""Whether a prefix is loaded from a tier, and how a load ends: what engines and `RadixCache` decide alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from radixkv.tiers.load_choice import PrefillRate
from radixkv.tiers.page_chain import PageChain, as_bytes
from radixkv.tiers.page_store import FoundPage, is_state_part
from radixkv.tiers.reader import Load
from radixkv.tiers.state_parts import part_keys
from radixkv.tiers.tier import Tier

LEAST_PATIENCE_S = 0.25  # a load is waited for as long as computing would take, but not less
MOST_SILENCE_S = 2.0  # and given up when nothing came for so long
MEASURED_TOKENS = 128  # of a long load are computed where it is not known how long that takes


class PrefixLoad:
    """Pages of a tier on their way into the pages of one sequence, from its page number `first_page` on.

    Attributes:
        first_token: how many tokens were there before.
        num_taken: pages that were filled so far.
        num_parts: how many of them, the last ones, are parts of what a hit needs besides pages.
        held_parts: of these, those that wait for others which are of use together with them.
        is_of_all: whether all that the tier has is asked for; else some is left to be computed, to measure that.
    """

    def __init__(
        self,
        tier: Tier,
        load: Load,
        first_page: int,
        first_token: int,
        ends: Sequence[int],
        patience_s: float | None,
        clock: Callable[[], float],
        *,
        is_of_all: bool,
    ) -> None:
        """`ends[i]` is where the tokens end of which the KV is there once i + 1 pages are."""
        self.tier, self.load = tier, load
        self.first_page, self.first_token = first_page, first_token
        self.num_taken = 0
        self.num_parts = sum(is_state_part(page.tokens) for page in load.pages)
        self.held_parts: list[bytes] = []
        self.is_of_all = is_of_all
        self.copy_s = 0.0
        self._ends, self._patience_s, self._clock = ends, patience_s, clock

    @property
    def num_loaded(self) -> int:
        """Leading tokens of the sequence whose KV is there."""
        return max(self.first_token, self._ends[self.num_taken - 1]) if self.num_taken else self.first_token

    @property
    def last_token(self) -> int:
        """Leading tokens whose KV is there if all pages come."""
        return self._ends[-1]

    def deadline(self) -> float:
        """When it is given up, if nothing comes before."""
        by_silence = self.load.last_arrival_at + MOST_SILENCE_S
        return by_silence if self._patience_s is None else min(by_silence, self.load.started_at + self._patience_s)

    @property
    def has_news(self) -> bool:
        """Whether `receive` would do something. O(1)."""
        return self.load.num_waiting > 0 or self.load.is_over or self._clock() >= self.deadline()

    def receive(self, fill: Callable[[int, Sequence[bytes]], object]) -> bool:
        """Hand what has arrived to `fill`, with the number of the first of these pages.

        Returns: whether nothing more is waited for; call `end` then.
        """
        is_over = self.load.is_over  # before what has arrived is taken: then nothing is left
        payloads = self.tier.reader.take(self.load)
        if payloads:
            started_at = time.perf_counter()
            fill(self.first_page + self.num_taken, payloads)
            self.num_taken += len(payloads)
            self.copy_s += time.perf_counter() - started_at
        if not is_over and self._clock() < self.deadline():
            return False
        if not is_over:
            self.tier.given_up += 1
            waited_s = self._clock() - self.load.started_at  # for at least half of it, as far as is known
            share = max(0.5, self.load.num_arrived / len(self.load.pages))
            self.tier.rate.record(self.tier.num_bytes(len(self.load.pages)), waited_s / share)
        return True

    def end(self, keys: Sequence[bytes]) -> None:
        """Wait no more; what was filled counts. To be called once.

        Args:
            keys: those of the sequence's whole pages.
        """
        tier, load = self.tier, self.load
        tier.reader.give_up(load)
        if load.missed is not None:
            tier.missed += 1
            tier.known.discard([*keys[self.first_page + self.num_taken :], *part_keys(load.pages[self.num_taken :])])
        if self.num_taken and (load.is_whole or load.missed is not None):
            tier.rate.record(tier.num_bytes(self.num_taken), load.read_s + self.copy_s)
        tier.loaded_tokens += self.num_loaded - self.first_token
        tier.loaded_pages += self.num_taken
        tier.loaded_states += load.is_whole and is_state_part(load.pages[-1].tokens)


class LoadChooser:
    """Finds what tiers hold of sequences, and decides whether that is loaded or computed.

    Attributes:
        prefill: how long computing takes.
    """

    def __init__(self, page_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.prefill = PrefillRate()
        self._page_size, self._clock = page_size, clock

    def begin(self, tier: Tier, pages: Sequence[FoundPage], num_cached: int) -> PrefixLoad | None:
        """Begin to load `pages`, in the first of which `num_cached` tokens end; None if that is not worth it."""
        ends = self.ends(pages, num_cached)
        if not ends:
            return None
        if not tier.reader.is_available:
            tier.unavailable += 1
            return None
        compute_s = self.prefill.seconds(num_cached, ends[-1])
        num_bytes, num_found = tier.num_bytes(len(pages)), len(pages)
        if not tier.rate.is_faster(num_bytes, compute_s, self._clock()):
            tier.slower += 1
            tier.probe(pages)
            return None
        if compute_s is None and tier.rate.seconds(num_bytes) is not None:
            num_measured = -(-MEASURED_TOKENS // self._page_size)
            if len(pages) > 4 * num_measured:
                pages = self._but_last(pages, num_measured)
                ends = self.ends(pages, num_cached)
        tier.loads += 1
        patience_s = None if compute_s is None else max(LEAST_PATIENCE_S, compute_s)
        load = tier.reader.start(pages)
        return PrefixLoad(
            tier,
            load,
            num_cached // self._page_size,
            num_cached,
            ends,
            patience_s,
            self._clock,
            is_of_all=len(pages) == num_found,
        )

    def verdict(
        self, tier: Tier, pages: Sequence[FoundPage], num_cached: int
    ) -> Literal["loaded", "slower than computing", "unavailable"]:
        """What `begin` would do with `pages` that go beyond `num_cached` tokens. Changes nothing."""
        compute_s = self.prefill.seconds(num_cached, self.ends(pages, num_cached)[-1])
        load_s = tier.rate.seconds(tier.num_bytes(len(pages)))
        if not tier.reader.is_available:
            return "unavailable"
        if load_s is not None and compute_s is not None and load_s >= compute_s:
            return "slower than computing"
        return "loaded"

    def found(self, tier: Tier, ids: NDArray[np.int32], num_cached: int, chain: PageChain) -> list[FoundPage]:
        """What a tier has of `ids` from the page on in which the first `num_cached` tokens end. O(tokens)."""
        if num_cached >= len(ids):
            return []
        first_page = num_cached // self._page_size
        first = first_page * self._page_size
        chain.grow(ids[:first])
        return self.useful(tier, tier.find(chain.parent_key(first_page), as_bytes(ids[first:])), first_page)

    def useful(self, tier: Tier, pages: list[FoundPage], first_page: int) -> list[FoundPage]:
        """What is to be loaded of `pages`, which a tier has from number `first_page` of a sequence on: all of them.

        May ask the tier for more.
        """
        return pages

    def ends(self, pages: Sequence[FoundPage], num_cached: int) -> list[int]:
        """Where the tokens of each of these pages end; nothing if they bring no more than is there already."""
        first = num_cached // self._page_size * self._page_size
        ends = [first + number * self._page_size + page.num_tokens for number, page in enumerate(pages)]
        return ends if ends and ends[-1] > num_cached else []

    def _but_last(self, pages: Sequence[FoundPage], num_pages: int) -> Sequence[FoundPage]:
        """`pages` but for the last ones, to be computed for once."""
        return pages[:-num_pages]
