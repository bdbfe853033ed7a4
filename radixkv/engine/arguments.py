"""What callers may hand to the engine, brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from radixkv.cache.token_ids import TokenIds
from radixkv.cache.tree.node import Namespace
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
    """How a request uses the cache: in which namespace, and how long what it leaves there should outlive others."""

    extra_key: str | None = None
    cache_salt: str | None = None
    priority: int = 0
    keep_for_s: float | None = None

    @property
    def namespace(self) -> Namespace:
        """(`extra_key`, `cache_salt`)."""
        return self.extra_key, self.cache_salt


def checked_cache_options(
    extra_key: object, cache_salt: object, priority: object = 0, keep_for_s: object = None
) -> CacheOptions:
    """Raises: InvalidRequestError unless keys are text or None, `priority` is an integer and `keep_for_s` a time."""
    for name, value in (("extra_key", extra_key), ("cache_salt", cache_salt)):
        if value is not None and not isinstance(value, str):
            raise InvalidRequestError(f"{name} must be text or None, not {value!r}")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise InvalidRequestError(f"priority must be an integer, not {priority!r}")
    if keep_for_s is not None and (not isinstance(keep_for_s, int | float) or not keep_for_s >= 0):
        raise InvalidRequestError(f"keep_for_s must be a number of seconds of at least 0, not {keep_for_s!r}")
    return CacheOptions(extra_key, cache_salt, priority, keep_for_s)  # type: ignore[arg-type]
