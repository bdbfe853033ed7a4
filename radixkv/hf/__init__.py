"""Drop-in caches for Hugging Face's own `model.generate`, for people who do not use the engine.

    cache = RadixCache(model, max_tokens=100_000)
    model.generate(**inputs, past_key_values=cache)     # prefixes that an earlier call computed are not computed again

`RadixCache` keeps prefixes across calls. `ChunkedCache` serves one call, as transformers' `DynamicCache` does, and
grows in chunks instead of being copied at each step.
"""

from radixkv.hf.chunked_cache import ChunkedCache
from radixkv.hf.prompt_hits import RadixCacheStats
from radixkv.hf.radix_cache import RadixCache

__all__ = ["ChunkedCache", "RadixCache", "RadixCacheStats"]
