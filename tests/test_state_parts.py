"""States in stores of pages: their bytes, where their parts lie, and in which order they give way."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from page_stores import Hanging, MemoryStore
from radixkv.cache.page_keys import page_key, page_keys, root_key
from radixkv.cli.cache_report import namespace_rows, store_summary
from radixkv.memory.state_bytes import StateBytes
from radixkv.memory.state_pool import StatePool, StateShape
from radixkv.tiers.arrivals import Arrivals
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_index import StoredPage
from radixkv.tiers.page_store import NewPage, PageStore, is_state_part
from radixkv.tiers.state_parts import ASKED_PAGES, StateParts
from radixkv.tiers.tier import Tier
from radixkv.tiers.writer import PageRecord, PageWriter
from store_cases import PAGE_SIZE, PAYLOAD_BYTES, chain, facts, holding, ids

ROOT = root_key(None, None)
SHAPES = [
    StateShape(0, "conv", 0, (3, 5), torch.float32),
    StateShape(2, "recurrent", 0, (2, 3), torch.bfloat16),
    StateShape(2, "recurrent", 1, (7,), torch.int8),
]  # 60 + 12 + 7 bytes


def state_of(
    tokens: Sequence[int], parts: StateParts, payload_bytes: int = PAYLOAD_BYTES, **known: float
) -> list[NewPage]:
    """The parts of the state after `tokens`, as they are stored."""
    page_bytes = 4 * parts.page_size
    num_whole = len(tokens) // parts.page_size
    keys = [ROOT, *page_keys(ROOT, ids(*tokens[: num_whole * parts.page_size]), parts.page_size)]
    content = parts.tokens(ids(*tokens[num_whole * parts.page_size :]))
    pages, key = [], keys[-1]
    for start in range(0, len(content), page_bytes):
        part = content[start : start + page_bytes]
        pages.append(NewPage(key, part, bytes(payload_bytes), facts(**known)))
        key = page_key(key, part)
    assert len(pages) == parts.num_parts
    return pages


@pytest.mark.parametrize("part_bytes", [1, 7, 16, 60, 79, 100])
def test_states_come_back_from_their_parts_as_they_were(part_bytes: int) -> None:
    one, other = StatePool(SHAPES, 4, "cpu"), StatePool(SHAPES, 4, "cpu")
    for tensor in one.tensors:
        tensor.copy_(torch.randint(-90, 90, tensor.shape))
    read, written = StateBytes(one, part_bytes), StateBytes(other, part_bytes)
    (content,) = read.read([2], [1])
    assert content.shape == (read.num_parts, part_bytes)
    assert read.num_parts == -(-79 // part_bytes)
    assert not content.reshape(-1)[79:].any()
    payloads = [part.tobytes() for part in content]
    cut = len(payloads) // 2
    written.write(1, cut, payloads[cut:])  # as they arrive, in any number
    written.write(1, 0, payloads[:cut])
    for there, here in zip(one.tensors, other.tensors, strict=True):
        assert torch.equal(there[2], here[1])
        assert not here[[0, 2, 3]].any(), "other slots are as they were"


@pytest.fixture
def tier() -> Iterator[Tier]:
    made = Tier(HostStore(2, 8, 1 << 16), Arrivals())
    yield made
    made.close(10)


@pytest.mark.parametrize(("page_size", "num_parts"), [(1, 1), (1, 3), (2, 1), (3, 2), (4, 1)])
def test_the_deepest_state_is_that_of_a_search_through_all_positions(page_size: int, num_parts: int) -> None:
    rng = random.Random(page_size)
    parts = StateParts(page_size, num_parts)
    for _ in range(60):
        store = HostStore(page_size, 8, 1 << 16)
        states = set()
        for _ in range(rng.randrange(4)):
            tokens = tuple(rng.choices(range(2), k=rng.randrange(1, 9)))
            key = ROOT
            for start, own in zip(
                range(0, len(tokens), page_size), page_keys(ROOT, ids(*tokens), page_size), strict=True
            ):
                store.write([NewPage(key, ids(*tokens[start : start + page_size]), bytes(8), facts())])
                key = own
            for _ in range(rng.randrange(3)):
                states.add(tokens[: rng.randrange(1, len(tokens) + 1)])
        for state in states:
            stored = state_of(state, parts, 8)
            if rng.random() < 0.2:
                states = states - {state}
                stored = stored[:-1]  # which is no state
            store.write(stored)
        tier = Tier(store, Arrivals())
        wanted = tuple(rng.choices(range(2), k=8))
        pages = tier.find(ROOT, ids(*wanted))
        num_found = sum(page.num_tokens for page in pages)
        expected = max((n for n in range(1, num_found + 1) if wanted[:n] in states), default=0)
        found = parts.deepest(tier, pages)
        tier.close(10)
        kv = [page for page in found if not is_state_part(page.tokens)]
        assert sum(page.num_tokens for page in kv) == expected
        assert len(found) - len(kv) == (num_parts if expected else 0)
        assert [page.tokens for page in kv] == [page.tokens for page in pages[: len(kv)]]


def test_another_machine_is_not_asked_for_states_after_all_pages_of_a_long_prompt(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = StateParts(2, 1)
    tokens = list(range(2 * ASKED_PAGES + 2))
    tier.store.write(pages_of(tokens))
    tier.store.write(state_of(tokens[:2], parts, 8))
    pages = tier.find(ROOT, ids(*tokens))
    assert len(parts.deepest(tier, pages)) == 2
    monkeypatch.setattr(HostStore, "finds_at_once", False)
    assert parts.deepest(tier, pages) == []
    tier.store.write(state_of(tokens[:4], parts, 8))
    assert len(parts.deepest(tier, pages)) == 3


def pages_of(tokens: list[int]) -> list[NewPage]:
    """Whole pages of 2 tokens."""
    keys = [ROOT, *page_keys(ROOT, ids(*tokens), 2)]
    return [
        NewPage(key, ids(*tokens[start : start + 2]), bytes(8), facts())
        for key, start in zip(keys, range(0, len(tokens), 2), strict=False)
    ]


def found_states(store: PageStore, parts: StateParts, tokens: list[int]) -> bool:
    """Whether the whole state after `tokens` is found."""
    stored = state_of(tokens, parts)
    return len(store.find(stored[0].parent_key, b"".join(page.tokens for page in stored))) == parts.num_parts


def test_a_state_gives_way_before_the_page_that_it_follows(tmp_path: Path) -> None:
    parts = StateParts(PAGE_SIZE, 2)
    tokens = list(range(2 * PAGE_SIZE))
    store = holding(tmp_path / "kv", 5)
    store.write(chain(tokens, facts(used_s=1)))
    store.write(state_of(tokens, parts, used_s=9))  # used later, and yet
    assert found_states(store, parts, tokens)
    for number, (num_pages, is_found) in enumerate([(2, True), (2, False), (2, False), (1, False), (0, False)]):
        store.write(chain([100 + number], facts(used_s=20)))  # each takes a page
        pages = store.find(ROOT, ids(*tokens))
        assert (len(pages), found_states(store, parts, tokens)) == (num_pages, is_found)
        store.check_invariants()
    store.close()


def test_states_are_removed_with_the_pages_that_they_follow(tmp_path: Path) -> None:
    parts = StateParts(PAGE_SIZE, 2)
    tokens = list(range(2 * PAGE_SIZE + 1))
    store = holding(tmp_path / "kv", 9)
    store.write([*chain(tokens), *state_of(tokens[:-1], parts), *state_of(tokens, parts)])
    assert store.stats().pages == 3 + 2 * parts.num_parts
    (rows,), summary = namespace_rows(store), store_summary(store)
    assert rows["tokens"] == summary["tokens"] == len(tokens), "parts of states hold none"
    first, second = page_keys(ROOT, ids(*tokens), PAGE_SIZE)[:2]
    assert store.remove(second) == 1 + 2 * parts.num_parts
    assert store.remove(first) == 1
    store.check_invariants()
    store.close()


def test_a_state_is_taken_whole_or_not_at_all_by_a_queue() -> None:
    hanging, page_bytes = Hanging(), 8
    store = MemoryStore(2, page_bytes)
    store.before_write = hanging
    writer = PageWriter(store, max_queued_bytes=4 * page_bytes)
    assert [writer.num_accepted_together(count) for count in (1, 4, 5, 99)] == [1, 4, 5, 99]
    for number, taken in ((1, [1, 3, 0, 5, 99]), (2, [1, 0, 0, 5, 99]), (4, [0, 0, 0, 0, 0]), (7, [0, 0, 0, 0, 0])):
        records = [PageRecord(bytes([count]), ROOT, ids(count), facts()) for count in range(number)]
        writer.hand_down(records, np.zeros((number, page_bytes), np.uint8))
        assert writer.queued_bytes == number * page_bytes
        assert [writer.num_accepted_together(count) for count in (1, 3, 4, 5, 99)] == taken
        assert writer.num_accepted() == max(0, 4 - number)
    hanging.go_on.set()
    assert writer.close(10)


def test_who_follows_a_store_is_told_of_pages_alone() -> None:
    class Told(list[str]):
        def stored(self, page: StoredPage) -> None:
            self.append(f"+{len(page.tokens)}")

        def removed(self, page: StoredPage) -> None:
            self.append(f"-{len(page.tokens)}")

        def cleared(self) -> None:
            self.append("cleared")

    parts, told = StateParts(PAGE_SIZE, 2), Told()
    store = HostStore(PAGE_SIZE, PAYLOAD_BYTES, 1 << 16)
    store.watch.start(told)
    tokens = list(range(PAGE_SIZE + 1))
    store.write([*chain(tokens), *state_of(tokens, parts)])
    assert [len(page.tokens) for page in store.watch.pages(list, 1) or []] in ([16, 4], [4, 16])
    store.remove(ROOT)
    assert sorted(told) == ["+16", "+4", "-16", "-4"]
    store.close()
