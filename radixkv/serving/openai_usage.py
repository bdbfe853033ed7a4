"""`usage`, as OpenAI writes it, and the end of a stream, which may tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from radixkv.engine.outputs import RequestOutput, Usage
from radixkv.serving.bodies import GenerationBody
from radixkv.serving.generation import Generation
from radixkv.serving.streaming import DONE, event


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


class StreamEnd:
    """The last events of a completion or chat completion: what it used, if that was asked for, and the end.

    Attributes:
        outputs: of the choices that have ended, by index.
    """

    def __init__(self, generation: Generation, body: GenerationBody, head: Mapping[str, Any]) -> None:
        """`head`: what all chunks of the stream begin with."""
        self.outputs: dict[int, RequestOutput] = {}
        self._generation = generation
        self._tells_usage = body.stream_options is not None and body.stream_options.include_usage
        self._head = head

    def events(self) -> Sequence[bytes]:
        """The events, when all choices have ended."""
        if not self._tells_usage:
            return (DONE,)
        usage = usage_object(self._generation.usage([self.outputs[index] for index in sorted(self.outputs)]))
        return event({**self._head, "choices": [], "usage": usage}), DONE
