"""Why a prompt was not cached further than it was."""

from __future__ import annotations

from typing import Literal, NamedTuple

from radixkv.cache.insight.history import Eviction

MissReason = Literal["hit", "window", "state", "evicted", "other namespace", "page", "never seen"]
CONTEXT_TOKENS = 16  # of a near miss that are shown on either side
_SHOWN_IDS = 4  # of these, in one line


class NearMiss(NamedTuple):
    """The cached sequence that agrees with the prompt the longest, and how both go on from there.

    The first `position` tokens are the same. `cached_ids` and `asked_ids` are up to 16 tokens that follow; empty where
    the cached sequence or the prompt ends.
    """

    position: int
    cached_ids: list[int]
    asked_ids: list[int]


class OtherNamespaces(NamedTuple):
    """How many other namespaces hold more of a prompt, and how many leading tokens the one with the most holds.

    No names: a namespace may be a tenant, and a `cache_salt` is a secret.
    """

    num_namespaces: int
    most_tokens: int

    def __str__(self) -> str:
        if self.num_namespaces == 1:
            return f"another namespace holds {self.most_tokens:,}"
        return f"{self.num_namespaces:,} other namespaces hold up to {self.most_tokens:,}"


class BelowPool(NamedTuple):
    """How many leading tokens of a prompt a tier below the pool holds, where it goes on from what the pool does.

    `reason`: "loaded" if a request would load it, "slower than computing" if it is measured to be, or "unavailable"
    while the tier has failed or hangs.
    """

    tier: str
    tokens: int
    reason: Literal["loaded", "slower than computing", "unavailable"]

    def __str__(self) -> str:
        where = {"disk": "on disk", "host": "in host memory", "shared": "in the shared cache"}.get(self.tier, self.tier)
        would = "to be loaded" if self.reason == "loaded" else f"not loaded: {self.reason}"
        return f"{self.tokens} are {where}, {would}"


class Explanation(NamedTuple):
    """How far a prompt is cached, and why not further; `str` says it in one line.

    `PrefixCache.explain` tells of the prompt's own namespace alone: whatever other namespaces hold, it is the same.
    `PrefixCache.explain_as_admin` counts the others, too.

    Attributes:
        num_tokens: tokens in the prompt.
        cached_tokens: leading tokens that `acquire` would find now.
        reason: why it ends there; the first that holds of

            "hit": it does not, all tokens are cached;
            "window": `given_up_tokens` more are cached, but no longer in the layers that see a window of tokens;
            "state": `given_up_tokens` more are cached, but recurrent layers can go on from no later state: none is
                kept there (any more);
            "evicted": the next page, or the end of a prompt in it, was cached and had to make room: see `eviction`;
            "other namespace": another namespace holds more of it: see `other_namespaces`; for administrators only;
            "page": whole pages alone are shared, and the next one is the same in part only, or the prompt ends in it;
            "never seen": no request in this namespace went on like this, or the cache has forgotten it.
        eviction: when and how the next tokens were evicted.
        evicted_ago_s: seconds since then.
        evicted_tokens: tokens after `cached_tokens` that were evicted, by this eviction or others.
        other_namespaces: how many others hold more of it; None if none does, or the caller is no administrator.
        near_miss: the cached sequence that agrees with it the longest; None if nothing agrees in the first token, or
            if all tokens are cached.
        given_up_tokens: tokens after `cached_tokens` whose KV the layers with a window have lost, and others have not;
            or whose KV is there, and no state of the recurrent layers.
        below: what the tiers below the pool hold beyond `cached_tokens`.
    """

    num_tokens: int
    cached_tokens: int
    reason: MissReason
    eviction: Eviction | None
    evicted_ago_s: float | None
    evicted_tokens: int
    other_namespaces: OtherNamespaces | None
    near_miss: NearMiss | None
    given_up_tokens: int
    below: tuple[BelowPool, ...] = ()

    def __str__(self) -> str:
        text = f"{self.cached_tokens} of {self.num_tokens} tokens are cached"
        if self.reason != "hit":
            text = f"{text}; {self._why()}"
        return "; ".join([text, *map(str, self.below)])

    def _why(self) -> str:
        if self.reason == "window":
            return (
                f"{self.given_up_tokens} more are, but not in the layers that see a window of tokens: "
                "their pages made room for others"
            )
        if self.reason == "state":
            return f"{self.given_up_tokens} more are, but no state of the recurrent layers is kept after any of them"
        if self.reason == "evicted":
            return self._why_evicted()
        if self.reason == "other namespace":
            return f"the rest was never seen in this namespace, but {self.other_namespaces}"
        if self.reason == "page":
            return self._why_rounded()
        if self.near_miss is None:
            return "nothing cached begins like this prompt"
        if not self.near_miss.cached_ids:
            return "it goes on where the cached sequence ends"
        asked, cached = map(_first_ids, (self.near_miss.asked_ids, self.near_miss.cached_ids))
        return f"never seen from there on: the prompt goes on with {asked}, the cache with {cached}"

    def _why_evicted(self) -> str:
        assert self.eviction is not None, self
        unused_ticks, unused_s = self.eviction.unused_ticks, self.eviction.unused_s
        uses = f"{unused_ticks} use{'' if unused_ticks == 1 else 's'} of the cache"
        return (
            f"the next {self.evicted_tokens} were evicted by {self.eviction.policy} {self.evicted_ago_s:.1f} s ago, "
            f"{uses if unused_s is None else f'{unused_s:.1f} s and {uses}'} after their last use"
        )

    def _why_rounded(self) -> str:
        same_tokens = 0 if self.near_miss is None else self.near_miss.position - self.cached_tokens
        if same_tokens > 0:
            return f"{same_tokens} more are the same, but only whole pages are shared"
        return f"the last {self.num_tokens - self.cached_tokens} fill no page, and only whole pages are shared"


def _first_ids(ids: list[int]) -> str:
    shown = " ".join(map(str, ids[:_SHOWN_IDS]))
    return f"{shown} …" if len(ids) > _SHOWN_IDS else shown
