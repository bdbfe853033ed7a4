"""Perplexity and generation beyond a model's context."""
