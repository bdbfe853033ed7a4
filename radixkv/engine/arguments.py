"""What callers may hand to the engine, brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from radixkv.cache.keeping import checked_keep_for_s, checked_priority
from radixkv.cache.namespace import Namespace
from radixkv.cache.token_ids import TokenIds
from radixkv.engine.sampling import SamplingParams
from radixkv.errors import InvalidRequestError

Prompt: TypeAlias = "str | TokenIds"


def as_list_of_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list: a list of numbers is one prompt. Raises: InvalidRequestError for none."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        return [prompts]
    if len(prompts) == 0:
        raise InvalidRequestError("no prompts were given; give text, token ids or a list of them")
    return list(prompts) if all(isinstance(p, str) or hasattr(p, "__len__") for p in prompts) else [prompts]


def as_list_of_params(params: SamplingParams | Sequence[SamplingParams] | None, num: int) -> list[SamplingParams]:
    """One `SamplingParams` for each of `num` prompts. Raises: InvalidRequestError."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num
    if not isinstance(params, list | tuple) or not all(isinstance(p, SamplingParams) for p in params):
        raise InvalidRequestError(f"params must be SamplingParams, or a list of them, not {params!r}")
    if len(params) != num:
        raise InvalidRequestError(
            f"{len(params)} SamplingParams were given for {num} prompts; give one, or one for each"
        )
    return list(params)


class CacheOptions(NamedTuple):
    """How a request uses the cache: in which namespace, how long what it leaves there should outlive others; or not."""

    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    keep_for_s: float | None = None
    prefix_cache: bool = True

    @property
    def namespace(self) -> Namespace:
        """(`extra_key`, `cache_salt`)."""
        return Namespace(self.extra_key, self.cache_salt)


def checked_cache_options(
    extra_key: object,
    cache_salt: object,
    priority: object = 0,
    keep_for_s: object = None,
    prefix_cache: object = True,
) -> CacheOptions:
    """Raises: InvalidRequestError unless keys are text or None, `priority` is an integer, `keep_for_s` a time, and
    `prefix_cache` a truth value.
    """
    namespace = Namespace.of(extra_key, cache_salt)
    if not isinstance(prefix_cache, bool):
        raise InvalidRequestError(f"prefix_cache must be True or False, not {prefix_cache!r}")
    return CacheOptions(*namespace, checked_priority(priority), checked_keep_for_s(keep_for_s), prefix_cache)
