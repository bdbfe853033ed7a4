"""Hugging Face models, unchanged, with paged attention plugged in."""
