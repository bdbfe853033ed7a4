"""`usage`, as OpenAI writes it."""

from __future__ import annotations

from typing import Any

from radixkv.engine.outputs import Usage


def usage_object(usage: Usage) -> dict[str, Any]:
    """What a call used; every number is there, and 0 is 0."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "cached_by": usage.cached_by,
        },
    }
