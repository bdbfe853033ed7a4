"""Which waiting prompts had better wait for one that is being computed."""

from __future__ import annotations

from typing import TypeAlias

from radixkv.cache.namespace import Namespace
from radixkv.cache.token_ids import common_tokens
from radixkv.engine.request import Request

WORTH_WAITING_TOKENS = 16  # a prompt waits for another one's prefix if that spares at least so many

_Head: TypeAlias = tuple[Namespace, bytes]


class PromptsInProgress:
    """The requests whose prompts are being computed in one step, and what they are about to share.

    They are looked up by namespace and first tokens: prompts that differ there spare each other nothing.
    """

    def __init__(self) -> None:
        self._by_head: dict[_Head, list[Request]] = {}

    def add(self, *requests: Request) -> None:
        """Their prompts are being computed, too. Those that share nothing are passed over."""
        for request in requests:
            if request.cache_options.prefix_cache:
                self._by_head.setdefault(_head(request), []).append(request)

    def will_compute(self, request: Request, cached_tokens: int) -> bool:
        """Whether one of them is about to share a good deal more with `request` than the `cached_tokens` of now.

        O(tokens) for each one that begins alike; O(1) while `request` awaits one. Notes which one it awaits.
        """
        least = 1 if len(request.choice_ids) > 1 else WORTH_WAITING_TOKENS
        if not self._by_head or len(request.findable_ids) < cached_tokens + least:
            return False
        if request.awaited is not None:  # what two prompts have in common stays so
            other, common = request.awaited
            worth_it = cached_tokens + _worth_waiting_tokens(request, other)
            if other.lease is not None and other.is_prefilling and common >= worth_it:
                return True
            request.awaited = None
        for other in self._by_head.get(_head(request), ()):
            if other.is_prefilling:
                common = common_tokens(other.token_ids, request.findable_ids)
                if common >= cached_tokens + _worth_waiting_tokens(request, other):
                    request.awaited = other, common
                    return True
        return False


def _worth_waiting_tokens(request: Request, other: Request) -> int:
    """How many tokens `other` must spare `request` for it to wait. The prompt of choices is computed once."""
    return 1 if other.id in request.choice_ids else WORTH_WAITING_TOKENS


def _head(request: Request) -> _Head:
    return request.cache_options.namespace, request.token_ids[:WORTH_WAITING_TOKENS].tobytes()
