"""Speculative decoding: guesses of the next tokens, which one forward pass checks.

- `drafter`: the protocol of what guesses.
- `cache_drafter`: guesses from what requests and the cache hold, through `token_store`, an index of n-grams.
- `model_drafter`: guesses by a second model, in an engine of its own.
- `pacing`: how long a guess may be, and when to make none.
- `speculation`: what the engine asks for drafts, and tells what became of them.
"""
