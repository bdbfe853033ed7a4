"""The cache alone, for an engine of your own: no torch, no model, only which tokens lie in which pages.

python examples/own_engine.py
"""

import numpy as np

from radixkv import PrefixCache

PAGE_SIZE = 16
cache = PrefixCache(num_pages=256, page_size=PAGE_SIZE)
kv = np.zeros((256, PAGE_SIZE), np.int64)  # your KV pool: here it stores what token a slot belongs to

system_prompt = list(range(1000, 1064))
for user in range(4):
    ids = system_prompt + list(range(user * 100, user * 100 + 20))
    with cache.acquire(ids, max_cached_tokens=len(ids) - 1) as lease:
        for position in range(lease.cached_tokens, len(ids)):  # compute only what is missing ...
            kv[lease.pages[position // PAGE_SIZE], position % PAGE_SIZE] = ids[position]
        read = [int(kv[lease.pages[p // PAGE_SIZE], p % PAGE_SIZE]) for p in range(len(ids))]
        assert read == ids  # ... and read everything in place
        lease.commit(ids)
        print(f"user {user}: {lease.cached_tokens} of {len(ids)} tokens were cached")
print(cache)
