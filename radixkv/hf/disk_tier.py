"""The disk below the pages of a `RadixCache`: what a call loads from it, and what goes down to it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from radixkv.cache.namespace import Namespace
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.config import GB, EngineConfig
from radixkv.config.checks import shown
from radixkv.config.setting import field_check, setting_field
from radixkv.errors import ConfigError
from radixkv.hf.page_store import Tokens
from radixkv.memory.kv_identity import kv_identity, weight_tensors
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.page_bytes import PageBytes
from radixkv.tiers.arrivals import Arrivals
from radixkv.tiers.disk_store import DiskStore
from radixkv.tiers.ending import CLOSE_TIMEOUT_S, Ending
from radixkv.tiers.fingerprint import Fingerprint, hash_tensors
from radixkv.tiers.page_chain import PageChain
from radixkv.tiers.prefix_load import LoadChooser, PrefixLoad
from radixkv.tiers.run_copies import RunCopies
from radixkv.tiers.tier import Tier, TierStats

logger = logging.getLogger(__name__)

_check_capacity_gb = field_check(setting_field(EngineConfig, "disk_cache_gb"))


class DiskFolder(NamedTuple):
    """Where a disk tier keeps its pages, and how many GB of them at most."""

    path: str | Path
    capacity_gb: float


def disk_folder(path: str | Path | None, capacity_gb: float) -> DiskFolder | None:
    """What the settings `disk_cache` and `disk_cache_gb` name. Raises: ConfigError; also for a size without folder."""
    checked_gb: Any = _check_capacity_gb("disk_cache_gb", capacity_gb)
    if not isinstance(path, str | Path | None):
        raise ConfigError(f"disk_cache must be the path of a folder, or None, not {shown(path)}")
    return None if path is None else DiskFolder(path, float(checked_gb))


class DiskTier:
    """A store on disk with its threads, of one pool and one state of the model's weights.

    Loads are waited for, as `generate` is; writes are not. All that fails costs hits, and no call. In a forked child
    it does nothing: the store and its threads are the parent's.
    """

    def __init__(
        self, path: str | Path, capacity_gb: float, model: PreTrainedModel, pool: KVPool, cache: PrefixCache
    ) -> None:
        """Open the store of this model in the folder `path`. O(bytes of the weights), which are hashed.

        Raises: ConfigError for a model whose KV cannot be told from others', TierError if the folder cannot be used or
            belongs to another process or cache.
        """
        identity = kv_identity(model, pool)
        fingerprint = Fingerprint(weights=hash_tensors(weight_tensors(model)), **identity._asdict())
        self._page_bytes = PageBytes(pool)
        store = DiskStore(path, fingerprint, self._page_bytes.payload_bytes, int(capacity_gb * GB))
        self._cache = cache
        self._arrivals = Arrivals()
        self._tier = Tier(store, self._arrivals)
        self._ending = Ending(self, [self._tier])
        self._chooser = LoadChooser(cache.page_size)
        self._runs = RunCopies([self._tier], self._page_bytes, cache)
        self._has_refused = False  # pages of the pool: the writer's queue is bounded
        self._pid = os.getpid()

    def reach(self, tokens: Tokens, namespace: str | None) -> int:
        """How many leading tokens lie in the pool or here. O(tokens)."""
        num_cached = self._cache.peek(tokens, extra_key=namespace)
        if not self._is_ours:
            return num_cached
        pages = self._chooser.found(self._tier, tokens, num_cached, self._chain(namespace))
        return max([num_cached, *self._chooser.ends(pages, num_cached)])

    def load(self, tokens: Tokens, namespace: str | None) -> range:
        """Bring what lies here of `tokens` into the pool, if that is faster than computing it, and wait for it.

        Returns: the tokens that were loaded, which is a part of what the pool lacked; what comes after it is to be
            computed. O(tokens).
        """
        num_cached = self._cache.peek(tokens, extra_key=namespace)
        if num_cached == len(tokens) or not self._is_ours:
            return range(0)
        self._tier.poll()
        chain = self._chain(namespace)
        pages = self._chooser.found(self._tier, tokens, num_cached, chain)
        load = self._chooser.begin(self._tier, pages, num_cached)
        if load is None:
            return range(0)
        try:
            with self._cache.resume(tokens[: load.last_token], extra_key=namespace) as lease:

                def fill(first_page: int, payloads: Sequence[bytes]) -> None:
                    self._page_bytes.write(lease.pages[first_page : first_page + len(payloads)], payloads)

                while not load.receive(fill):
                    self._wait(load)
                if load.num_taken:
                    lease.commit(tokens[: load.num_loaded])
        finally:
            chain.grow(tokens)
            load.end(chain.keys)
        return range(num_cached, load.num_loaded)

    def _wait(self, load: PrefixLoad) -> None:
        seen = self._arrivals.count
        if not load.has_news:
            self._arrivals.wait(seen, max(0.0, load.deadline() - time.monotonic()))

    def hand_down(self, tokens: Tokens, namespace: str | None) -> None:
        """Queue what the pool holds of `tokens` and the disk lacks. O(tokens), and a copy of these pages."""
        if not self._is_ours:
            return
        try:
            refused = self._runs.prefix(tokens, Namespace.of(namespace, None)).refused
            self._has_refused |= refused > 0
            self._tier.writer.dropped(refused)
        except Exception:  # whatever it is: it is lost below, and the call has its output
            logger.exception("what a call of generate computed cannot be handed down")

    def computed(self, first: int, last: int, seconds: float) -> None:
        """The tokens `[first, last)` of a prompt took so long to compute."""
        self._chooser.prefill.record(first, last, seconds)

    def stats(self) -> TierStats:
        """What it holds and did. O(1)."""
        return self._tier.stats()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was handed down is written. Returns False if that took too long."""
        return self._tier.writer.flush(timeout_s) if self._is_ours else True

    def close(self) -> None:
        """Write what is left, and let go of the folder. Idempotent."""
        if self._is_ours:
            if self._has_refused:
                self._hand_down_again(time.monotonic() + CLOSE_TIMEOUT_S)
            self._tier.close(CLOSE_TIMEOUT_S)
        self._ending.is_done()

    def _hand_down_again(self, until: float) -> None:
        """Write what the pool still holds and the disk lacks, in portions that the queue can take."""
        self._has_refused = False
        num_before: int | None = None
        while self.flush(max(0.0, until - time.monotonic())):
            missing, refused = self._runs.everything()
            if not refused or (num_before is not None and missing >= num_before):
                return
            num_before = missing

    @property
    def _is_ours(self) -> bool:
        return os.getpid() == self._pid

    def _chain(self, namespace: str | None) -> PageChain:
        return PageChain(Namespace.of(namespace, None), self._cache.page_size)
