"""The eviction policies that come with radixkv, by name."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from radixkv.cache.eviction.adaptive import AdaptivePolicy
from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.errors import ConfigError

if TYPE_CHECKING:
    from radixkv.cache.tree.node import TreeNode


class LRUPolicy(EvictionPolicy):
    """Least recently used first."""

    name = "lru"
    ranks_by_last_access = True
    rank = staticmethod(attrgetter("last_access"))  # type: ignore[assignment]  # asked for at every use: this costs half of a method


class FIFOPolicy(EvictionPolicy):
    """First in, first out: in the order of insertion, however often they were used since."""

    name = "fifo"

    def rank(self, node: TreeNode) -> int:
        return node.created


class PriorityPolicy(EvictionPolicy):
    """Lowest priority first, and the least recently used of those that are equal.

    A node has the highest priority of the requests that were inserted through it.
    """

    name = "priority"

    def rank(self, node: TreeNode) -> tuple[int, int]:
        return node.priority, node.last_access


class _CountsMatches(EvictionPolicy):
    """Keeps in `state` how many matches came through a node since it was inserted."""

    def added(self, node: TreeNode) -> None:
        node.state = 0

    def matched(self, node: TreeNode) -> None:
        node.state += 1


class LFUPolicy(_CountsMatches):
    """Least frequently matched first, and the least recently used of those that are equal."""

    name = "lfu"

    def rank(self, node: TreeNode) -> tuple[int, int]:
        return node.state, node.last_access


class SLRUPolicy(EvictionPolicy):
    """Segmented LRU: what no match came back to is on probation and goes first, the rest is protected.

    Once the protected segment has more than `protected_share` of the tree's tokens, it gives way instead, so that old
    merits do not crowd out what is new. In both segments the least recently used goes first.

    Source: Karedla, Love, Wherry, Caching Strategies to Improve Disk System Performance, IEEE Computer 27(3), 1994;
    there, what leaves the protected segment goes back on probation, where a whole leaf is evicted here.
    """

    name = "slru"

    def __init__(self, protected_share: float = 0.5) -> None:
        if not 0 <= protected_share <= 1:
            raise ConfigError(f"protected_share must lie in [0, 1], not {protected_share!r}")
        self.protected_share = protected_share
        self._protected_tokens = 0

    def added(self, node: TreeNode) -> None:
        node.state = False

    def matched(self, node: TreeNode) -> None:
        if not node.state:
            node.state = True
            self._protected_tokens += node.num_tokens

    def evicted(self, node: TreeNode) -> None:
        if node.state:
            self._protected_tokens -= node.num_tokens

    def merged(self, upper: TreeNode, lower: TreeNode) -> None:
        if upper.state and not lower.state:
            self._protected_tokens += lower.num_tokens

    def rank(self, node: TreeNode) -> int:
        return node.last_access

    def group(self, node: TreeNode) -> bool:
        return node.state is True

    def urgency(self, node: TreeNode) -> float:
        is_full = self._protected_tokens > self.protected_share * self.tree.total_size
        return 1.0 if node.state is not is_full else 0.0


class TTLPolicy(EvictionPolicy):
    """In the order in which they expire: `ttl_s` after the last use, or at the end of `keep_for_s` if that is later.

    Without `keep_for_s` this is LRU. With it, what was kept competes after its time is over like a leaf that was
    used `ttl_s` before that, where other policies let it go at once.
    """

    name = "ttl"

    def __init__(self, ttl_s: float = 300.0) -> None:
        if not ttl_s >= 0:
            raise ConfigError(f"ttl_s must be a number of seconds of at least 0, not {ttl_s!r}")
        self.ttl_s = ttl_s

    def added(self, node: TreeNode) -> None:
        node.state = self.tree.clock()

    def matched(self, node: TreeNode) -> None:
        node.state = self.tree.clock()

    def rank(self, node: TreeNode) -> tuple[float, int]:
        return max(node.keep_until, node.state + self.ttl_s), node.last_access


class CostAwarePolicy(EvictionPolicy):
    """Keeps what is dear to compute again: GreedyDual-Size-Frequency with the cost of a forward pass.

    A token at depth d costs 2 N + 2 L D d floating-point operations for N weights, L layers and an attention width of
    D: its own products, and attention over the d tokens before it (Kaplan et al., Scaling Laws for Neural Language
    Models, 2020, section 2.1). In units of the first term that is 1 + d / d0 with d0 = N / (L D), so an edge from
    token a to token b costs (b - a) (1 + (a + b) / (2 d0)): quadratic in the length of the whole prefix, though a
    memory of b - a tokens is all it takes. The rank is

        inflation + uses * cost / size        = inflation + uses * (1 + (a + b) / (2 d0))

    where `inflation` is the rank of what was evicted last, taken at the node's last use: that is how old merits fade
    (Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy, HP Labs, 1998).

    Args:
        d0: depth in tokens at which attention costs as much as the weights. With N = 12 L D² (Kaplan et al., table 1)
            it is 12 D: the default is that of a model of width 4,096.
    """

    name = "cost"

    def __init__(self, d0: float = 12 * 4096) -> None:
        if not d0 > 0:
            raise ConfigError(f"d0 must be a positive number of tokens, not {d0!r}")
        self.d0 = d0
        self._inflation = 0.0

    def added(self, node: TreeNode) -> None:
        node.state = (1, self._inflation)

    def matched(self, node: TreeNode) -> None:
        node.state = (node.state[0] + 1, self._inflation)

    def evicted(self, node: TreeNode) -> None:
        self._inflate(node, node.num_tokens)

    def trimmed(self, kept: TreeNode, gone: TreeNode) -> None:
        self._inflate(gone, kept.num_tokens + gone.num_tokens)

    def rank(self, node: TreeNode) -> tuple[float, int]:
        return self._merit(node, node.num_tokens), node.last_access

    def _inflate(self, node: TreeNode, num_tokens: int) -> None:
        self._inflation = max(self._inflation, self._merit(node, num_tokens))

    def _merit(self, node: TreeNode, num_tokens: int) -> float:
        """Of the last `num_tokens` tokens on the path to `node`."""
        uses, inflation = node.state
        mean_depth = node.end - num_tokens / 2
        return float(inflation + uses * (1 + mean_depth / self.d0))


POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy
    for policy in (
        LRUPolicy,
        LFUPolicy,
        SLRUPolicy,
        FIFOPolicy,
        PriorityPolicy,
        TTLPolicy,
        CostAwarePolicy,
        AdaptivePolicy,
    )
}


def resolve_policy(policy: str | EvictionPolicy) -> EvictionPolicy:
    """A policy of that name, or `policy` itself if it is one already.

    Raises: ConfigError for an unknown name, or an object that is no policy.
    """
    if isinstance(policy, EvictionPolicy):
        return policy
    if not isinstance(policy, str):
        raise ConfigError(f"policy must be a name or an EvictionPolicy, not {policy!r}")
    if policy not in POLICIES:
        raise ConfigError(f"unknown eviction policy {policy!r}; the policies are {', '.join(POLICIES)}")
    return POLICIES[policy]()
