"""bench/tiers_store.py."""
