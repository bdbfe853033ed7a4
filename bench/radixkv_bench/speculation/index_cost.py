"""What drafting costs when very much is indexed."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np

from radixkv import PrefixCache
from radixkv.cache.namespace import SHARED
from radixkv.engine.drafts.cache_drafter import CacheDrafter
from radixkv.engine.drafts.drafter import Text

PAGE_SIZE = 16
SEQUENCE_TOKENS = 4096
VOCABULARY = 50_000
QUOTED_TOKENS = 64  # of each text, from somewhere in the index
PROMPT_TOKENS = 2048
OUTPUT_TOKENS = 256
MOST = 16


def measure(num_tokens: int, texts: int) -> dict[str, Any]:
    """Fill a cache with `num_tokens`, and draft for `texts` requests, each token of which is asked for.

    The tokens are words of a text whose ranks follow Zipf's law, so that common pairs have long chains. Each request
    quotes from all over the index, so that what is looked at lies in no cache of the processor.
    """
    rng = np.random.default_rng(0)
    cache = PrefixCache(num_tokens // PAGE_SIZE + 1, PAGE_SIZE)
    drafter = CacheDrafter(cache)
    drafter.draft([Text(-1, _words(rng, 64), 64, SHARED, MOST)])
    drafter.ended(-1)
    started_at = time.perf_counter()
    sequences = []
    for _ in range(num_tokens // SEQUENCE_TOKENS):
        ids = _words(rng, SEQUENCE_TOKENS)
        sequences.append(ids)
        with cache.acquire(ids) as lease:
            lease.commit(ids)
    filled_s = time.perf_counter() - started_at
    seconds, matches = [], []
    for number in range(texts):
        quotes = [_quote(rng, sequences) for _ in range((PROMPT_TOKENS + OUTPUT_TOKENS) // QUOTED_TOKENS)]
        ids = np.concatenate(quotes)
        started_at = time.perf_counter()
        for known in range(PROMPT_TOKENS, len(ids)):
            (draft,) = drafter.draft([Text(number, ids[:known], PROMPT_TOKENS, SHARED, MOST)])
            matches.append(draft.evidence)
        seconds.append((time.perf_counter() - started_at) / (len(ids) - PROMPT_TOKENS))
        drafter.ended(number)
    return {
        "indexed_tokens": drafter.num_cached,
        "bytes_a_token": drafter.num_bytes / drafter.num_cached,
        "drafting_us_a_token": median(seconds) * 1e6,
        "mean_match_tokens": float(np.mean(matches)),
        "storing_us_a_token": filled_s / max(1, drafter.num_cached) * 1e6,
    }


def _words(rng: np.random.Generator, num: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return (rng.zipf(1.3, num) % VOCABULARY).astype(np.int32)


def _quote(rng: np.random.Generator, sequences: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    start = int(rng.integers(SEQUENCE_TOKENS - QUOTED_TOKENS))
    return sequences[int(rng.integers(len(sequences)))][start : start + QUOTED_TOKENS]
