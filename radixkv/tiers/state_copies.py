"""Copies what hits need besides pages for the writers of the tiers below: states of recurrent layers, or window pages.

A window page goes as if it were a state after the last of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.page_keys import page_keys
from radixkv.cache.residency.residency import KeptState
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.tiers.page_chain import PageChain, as_bytes
from radixkv.tiers.page_store import PageFacts
from radixkv.tiers.run_copies import Copied
from radixkv.tiers.state_parts import StateParts
from radixkv.tiers.tier import Tier
from radixkv.tiers.writer import PageRecord, PageWriter

BATCH_BYTES = 16 << 20  # of states that are copied together, or one state if that is more


class ReadsStates(Protocol):
    """What gives the bytes of a pool's states."""

    @property
    def num_parts(self) -> int:
        """Of each state."""
        ...

    @property
    def part_bytes(self) -> int:
        """Of each part."""
        ...

    def read(self, slots: Sequence[int], num_tokens: Sequence[int]) -> NDArray[np.uint8]:
        """A copy of states, each after that number of tokens of its page, [n, num_parts, part_bytes]."""
        ...


class StateCopies:
    """Hands states down to tiers, in the thread to which the cache belongs: a copy of each.

    States that a tier has, or that wait for its writer, are not copied again. A state goes down whole or not at all.
    """

    def __init__(self, states: ReadsStates, page_size: int) -> None:
        self._states, self._page_size = states, page_size
        self._parts = StateParts(page_size, states.num_parts)

    def copy(
        self,
        tier: Tier,
        kept: Sequence[KeptState],
        ids: NDArray[np.int32],
        chain: PageChain,
        facts_of: Callable[[int], PageFacts],
        *,
        touches: bool,
    ) -> Copied:
        """Copy those of the states `kept` after tokens of `ids` that a tier lacks for its writer.

        Args:
            chain: of `ids`.
            facts_of: those of the page of that number; if it `touches` the states that are stored, these become theirs.

        Returns: how many of the pages that hold the states in a store are missing there, and were refused.
        """
        chain.grow(ids)
        missing = refused = 0
        batch = _Batch(self._states, tier.writer, self._page_size)
        for state in kept:
            first_page = state.num_tokens // self._page_size
            rest = as_bytes(ids[first_page * self._page_size : state.num_tokens])
            facts = facts_of((state.num_tokens - 1) // self._page_size)
            records = self._records(chain.parent_key(first_page), rest, facts)
            copied = self._copy(tier, state, records, batch)
            if touches and not copied.missing:
                tier.writer.touch([(record.parent_key, record.tokens, facts) for record in records])
            missing, refused = missing + copied.missing, refused + copied.refused
        batch.hand_down()
        return Copied(missing, refused)

    def _records(self, parent_key: bytes, rest: bytes, facts: PageFacts) -> list[PageRecord]:
        """Those of the parts of the state after `rest`."""
        page_bytes = self._page_size * TOKEN_BYTES
        tokens = self._parts.tokens(rest)
        keys = page_keys(parent_key, tokens, self._page_size)
        return [
            PageRecord(key, before, tokens[number * page_bytes :][:page_bytes], facts)
            for number, (before, key) in enumerate(zip([parent_key, *keys], keys, strict=False))
        ]

    def _copy(self, tier: Tier, state: KeptState, records: Sequence[PageRecord], batch: _Batch) -> Copied:
        keys = [record.key for record in records]
        tokens = b"".join(record.tokens for record in records)
        num_stored = tier.num_stored(records[0].parent_key, tokens, keys)
        missing = len(records) - num_stored
        if not missing or tier.writer.is_queued(keys[-1]):
            return Copied(missing, 0)
        if not batch.takes(missing):
            return Copied(missing, missing)
        batch.add(state, records, num_stored)
        return Copied(missing, 0)


class _Batch:
    """States that are copied together, which on a GPU costs far less than one by one."""

    def __init__(self, states: ReadsStates, writer: PageWriter, page_size: int) -> None:
        self._states, self._writer, self._page_size = states, writer, page_size
        self._chosen: list[tuple[KeptState, Sequence[PageRecord], int]] = []
        self._num_parts = 0

    def takes(self, num_parts: int) -> bool:
        """Whether the writer would take a state of which so many parts are missing. O(1)."""
        if not self._chosen:
            return self._writer.num_accepted_together(num_parts) > 0
        return self._writer.num_accepted() >= self._num_parts + num_parts

    def add(self, state: KeptState, records: Sequence[PageRecord], num_stored: int) -> None:
        """Copy the parts of a state after the first `num_stored`, now or with the next ones."""
        self._chosen.append((state, records, num_stored))
        self._num_parts += len(records) - num_stored
        if len(self._chosen) * len(records) * self._states.part_bytes >= BATCH_BYTES:
            self.hand_down()

    def hand_down(self) -> None:
        """Copy what was chosen."""
        if self._chosen:
            slots = [state.slot for state, _, _ in self._chosen]
            in_page = [(state.num_tokens - 1) % self._page_size + 1 for state, _, _ in self._chosen]
            contents = self._states.read(slots, in_page)
            for (_, records, num_stored), content in zip(self._chosen, contents, strict=True):
                self._writer.hand_down(records[num_stored:], content[num_stored:])
        self._chosen, self._num_parts = [], 0
