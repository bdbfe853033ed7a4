"""Which tokens are cached where: the radix tree, the page allocator and the cache that owns the pages. No torch."""
