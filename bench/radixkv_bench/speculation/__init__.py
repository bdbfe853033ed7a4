"""bench/speculation.py: what drafts from the cache bring."""
