"""What the cache remembers of its past: explanations of misses, and hit rates of other sizes."""
