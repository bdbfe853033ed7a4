"""Any sequence of calls: a disk store, opened again now and then, answers as a store in memory does."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from radixkv.cache.page_keys import root_key
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.memory_store import HostStore
from radixkv.tiers.page_store import PageFacts
from store_cases import FINGERPRINT, PAGE_SIZE, PAYLOAD_BYTES, Clock, chain, facts, holding, ids, payload_of

namespaces = st.sampled_from([(None, None), ("tenant", None), ("tenant", "salt")])
sequences = st.lists(st.integers(0, 1), min_size=1, max_size=13)
known = st.builds(
    facts,
    used_s=st.integers(0, 900).map(float),
    hits=st.integers(0, 3),
    priority=st.integers(-1, 1),
    kept_until_s=st.none() | st.integers(900, 1200).map(float),
    namespace=namespaces,
)


class DiskBesideMemory(RuleBasedStateMachine):
    """The same calls to both."""

    @initialize(num_pages=st.integers(1, 9), policy=st.sampled_from(["lru", "lfu"]))
    def begin(self, num_pages: int, policy: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.patches = [patch.object(os, name, lambda file: None) for name in ("fsync", "fdatasync")]
        for each in self.patches:
            each.start()
        self.disk = holding(Path(self.folder.name) / "kv", num_pages, policy=policy, clock=self.clock)
        self.policy = policy
        self.host = HostStore(PAGE_SIZE, PAYLOAD_BYTES, num_pages * PAYLOAD_BYTES, policy=policy, clock=self.clock)

    @rule(tokens=sequences, known=known, first=st.integers(0, 2))
    def write(self, tokens: list[int], known: PageFacts, first: int) -> None:
        pages = chain(tokens, known)[first:]
        self.disk.write(pages)
        self.host.write(pages)

    @rule(tokens=sequences, known=known)
    def touch(self, tokens: list[int], known: PageFacts) -> None:
        pages = [(page.parent_key, page.tokens, known) for page in chain(tokens, facts(namespace=known.namespace))]
        self.disk.touch(pages)
        self.host.touch(pages)

    @rule(namespace=namespaces, tokens=sequences)
    def find(self, namespace: tuple[str | None, str | None], tokens: list[int]) -> None:
        found = self.disk.find(root_key(*namespace), ids(*tokens))
        assert found == self.host.find(root_key(*namespace), ids(*tokens))
        payloads = self.disk.read(found)
        assert payloads == self.host.read(found)
        assert payloads == [payload_of(page.parent_key, page.tokens) for page in found]

    @rule(tokens=sequences, namespace=namespaces, number=st.integers(0, 3))
    def remove(self, tokens: list[int], namespace: tuple[str | None, str | None], number: int) -> None:
        pages = chain(tokens, facts(namespace=namespace))
        key = pages[min(number, len(pages) - 1)].parent_key
        assert self.disk.remove(key) == self.host.remove(key)

    @rule(passed_s=st.integers(1, 100))
    def wait(self, passed_s: int) -> None:
        self.clock.now_s += passed_s

    @rule()
    def open_again(self) -> None:
        path, capacity = self.disk.path.parent, self.disk.capacity_bytes
        self.disk.close()
        self.disk = DiskStore(path, FINGERPRINT, PAYLOAD_BYTES, capacity, policy=self.policy, clock=self.clock)
        assert self.disk.notes == []

    @invariant()
    def they_are_alike(self) -> None:
        if hasattr(self, "disk"):
            self.disk.check_invariants()
            self.host.check_invariants()
            assert self.disk.hottest(99) == self.host.hottest(99)
            assert self.disk.stats().pages == self.host.stats().pages

    def teardown(self) -> None:
        if hasattr(self, "disk"):
            self.disk.close()
            self.folder.cleanup()
            for each in self.patches:
                each.stop()


DiskBesideMemory.TestCase.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
TestDiskBesideMemory = DiskBesideMemory.TestCase
