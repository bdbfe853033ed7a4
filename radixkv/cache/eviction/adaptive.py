"""An eviction policy that learns from the cache's own history which leaves will be used again, and how soon."""

from __future__ import annotations

from collections import OrderedDict
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.eviction.policy import EvictionPolicy
from radixkv.cache.eviction.reuse_table import BIN_OF_AGE, MAX_AGE, ReuseTable, Wait, bin_of, worth_of
from radixkv.cache.token_ids import TOKEN_BYTES

if TYPE_CHECKING:
    from radixkv.cache.namespace import Namespace
    from radixkv.cache.tree.node import TreeNode
    from radixkv.cache.tree.radix_tree import RadixTree

# Only GHOST_SHARE and the kinds were compared with others on traces (docs/cache.md). The other numbers are choices.

# Kinds of leaves: few, so that each is seen often enough to be told from the others.
MAX_TURN, MAX_USES = 2, 2  # higher numbers are of the same kind as these
LEFT_BEHIND = (MAX_TURN + 1) * (MAX_USES + 1)
NUM_KINDS = LEFT_BEHIND + 1

# When it learns. The first lesson comes early and the next at twice as many requests, until they are 128 apart: a
# lesson costs some 0.5 ms, as much as it may take without being noticed.
FIRST_LESSON, LESSON_EVERY = 8, 128  # requests
MIN_REUSES = 32  # before that many were seen it is LRU: a hazard counted from fewer is noise
HALF_LIFE = 2000  # requests after which an observation counts half, so that it follows traffic that changes

# The price of room: the mean density of what was evicted in the last 1 / PRICE_RATE evictions, times PRICE_SHARE. A
# share of 1 would be right for a load that never changes.
PRICE_SHARE, PRICE_RATE = 0.5, 0.02

# What is remembered of evicted nodes. It bounds the memory, and how long reuse may take to be seen at all: of the gain
# over LRU on the Mooncake trace a third is left with a share of 1 (docs/cache.md).
GHOST_SHARE = 4  # tokens of evicted nodes that are remembered, for each token that the tree held at most, of late
MAX_GHOSTS = 1 << 16
PROBE_TOKENS = 16  # at most so many tokens of an edge tell it from others, see `Ghosts`

# The duel with LRU. Two limits, so that it does not change sides at each request: it gives up when LRU is ahead by
# more than DUEL_LOST, and comes back when LRU is ahead by less than DUEL_OPEN.
DUEL_HALF_LIFE = 500  # requests
DUEL_FADE = 0.5 ** (1 / DUEL_HALF_LIFE)
DUEL_LOST, DUEL_OPEN = 0.002, 0.001  # of the tokens asked for


class Record(Wait):
    """What the policy knows of a node while it is in the tree, and after that as long as it is a ghost.

    Attributes:
        namespace: of its root.
        num_tokens: on its edge.
        turn: how many requests built the path that ends here, each going on from what another one had left.
        uses: matches that came through, evicted in between or not.
        is_rest: whether the last match left its edge midway, and this is the part behind that.
    """

    __slots__ = ("is_rest", "namespace", "num_tokens", "turn", "uses")

    def __init__(self, namespace: Namespace | None, num_tokens: int, turn: int, uses: int, *, is_rest: bool) -> None:
        super().__init__(kind=0)
        self.namespace = namespace
        self.num_tokens = num_tokens
        self.describe(turn, uses, is_rest=is_rest)

    def describe(self, turn: int, uses: int, *, is_rest: bool) -> None:
        """Set these attributes, and the kind that follows from them."""
        self.turn, self.uses, self.is_rest = turn, uses, is_rest
        self.kind = LEFT_BEHIND if is_rest else min(turn, MAX_TURN) * (MAX_USES + 1) + min(uses, MAX_USES)


class Ghosts:
    """Records of the nodes that were evicted last, found again by where their edges began, and how.

    Edges are told apart by namespace, depth and their first tokens: 16 of them, or at most half of a shorter edge, in
    whole pages. To take one edge for another costs a wrong observation, no more.
    """

    def __init__(self, page_size: int) -> None:
        self.num_tokens = 0
        self._records: OrderedDict[tuple[Namespace | None, int, bytes], Record] = OrderedDict()
        tokens = [page_size]
        while 4 * tokens[0] <= PROBE_TOKENS:
            tokens.insert(0, 4 * tokens[0])
        self._probe_bytes = [TOKEN_BYTES * num_tokens for num_tokens in tokens]

    def __len__(self) -> int:
        return len(self._records)

    def add(self, start: int, key: bytes, record: Record) -> Record | None:
        """Remember a node whose edge `key` began `start` tokens below its root.

        Returns: the record of an older one that cannot be told from it, and is forgotten.
        """
        size = next((size for size in self._probe_bytes if 2 * size <= len(key)), self._probe_bytes[-1])
        place = record.namespace, start, key[:size]
        older = self._records.pop(place, None)
        self._records[place] = record
        self.num_tokens += record.num_tokens - (older.num_tokens if older is not None else 0)
        return older

    def pop(self, namespace: Namespace | None, start: int, tokens: bytes, at: int) -> Record | None:
        """The node whose edge began at `start` like `tokens[at:]`; it is no ghost any more."""
        for size in self._probe_bytes:
            record = self._records.pop((namespace, start, tokens[at : at + size]), None)
            if record is not None:
                self.num_tokens -= record.num_tokens
                return record
        return None

    def pop_oldest(self) -> Record:
        """The node that was evicted first."""
        record = self._records.popitem(last=False)[1]
        self.num_tokens -= record.num_tokens
        return record


class LRUShadow:
    """What a cache of the same size would hold under LRU: records of nodes and ghosts, in the order of their use."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._records: OrderedDict[Record, None] = OrderedDict()

    def use(self, record: Record) -> bool:
        """It is used, and cached if it was not. O(1). Returns: whether it was cached before."""
        if record in self._records:
            self._records.move_to_end(record)
            return True
        self._records[record] = None
        self.num_tokens += record.num_tokens
        return False

    def discard(self, record: Record) -> bool:
        """It is of no interest any more. O(1). Returns: whether it was cached."""
        if record not in self._records:
            return False
        del self._records[record]
        self.num_tokens -= record.num_tokens
        return True

    def shrink(self, num_tokens: int) -> None:
        """Evict until no more than so many tokens are left. O(1) for each record evicted."""
        while self.num_tokens > num_tokens:
            self.num_tokens -= self._records.popitem(last=False)[0].num_tokens


class AdaptivePolicy(EvictionPolicy):
    """Evicts the leaf whose room is worth least, by what became of leaves like it; LRU's choice where that does better.

    A leaf's *kind* is known when it comes to be one: which turn of a conversation it ends (first, second, later), how
    often its tokens were matched (never, once, more), or that a match turned off midway in its edge and left it
    behind. For each kind and age, which is the time since its last use, a `ReuseTable` estimates the hazard of reuse.
    It goes on watching what was evicted ("ghosts": Megiddo, Modha, ARC, FAST 2003), so it learns of reuse that this
    cache is too small to see. Classes and ages, learned online, are those of Beckmann, Chen, Cidon, LHD: Improving
    Cache Hit Rate by Maximizing Hit Density, NSDI 2018.

    The hazards give for each kind and age the hits that a token in the cache can be expected to bring from now on,
    less what its room costs until then: `worth_of`. The price of room is half of the mean density of what was evicted
    of late (all of it would hold for a cache whose load never changes). For each kind, it looks at the oldest and the
    youngest leaf, and evicts the one with the smallest surplus. That may well be the youngest: where most reuse comes
    later than the cache can wait, keeping some leaves long beats keeping all of them for too short a time.

    Shadow and real cache duel: the policy knows what an LRU cache of the same size would hold, so it can count the
    tokens that only one of them had. As long as LRU is ahead by more than 0.2 % of the tokens asked for of late, LRU's
    choice is evicted; so is it before 32 reuses were seen.

    Cost: O(kinds) for each eviction, O(1) for each node a match comes through, and some 0.5 ms for every 128 requests.
    Memory: about 0.2 kB a node, and 0.5 kB for each evicted node, of which it remembers as many as have four times the
    tokens that were in the tree at most of late, and 65,536 at most.

    Attributes:
        table: what was learned of reuse, for each kind and age.
        shadow: what an LRU cache of the same size would hold.
        ghosts: evicted nodes that are still watched.
    """

    name = "adaptive"
    both_ends = True
    whole_leaves = True  # what it learns is of leaves; parts of them made it lose up to a point on the Mooncake trace
    rank = staticmethod(attrgetter("last_access"))  # type: ignore[assignment]

    def __init__(self) -> None:
        self.follows_lru = True
        self._has_learned = False
        self.table = ReuseTable(NUM_KINDS)
        self.shadow = LRUShadow()
        self._price = 0.0
        self._num_requests = self._last_lesson = 0
        self._next_lesson = FIRST_LESSON
        self._asked = self._ahead = 0.0  # tokens, of late
        self._room = 0.0  # the most tokens in the tree, of late
        self._matched_tokens = 0
        self._learn(0)

    def bind(self, tree: RadixTree) -> None:
        super().bind(tree)
        self.ghosts = Ghosts(tree.page_size)

    @property
    def lead(self) -> float:
        """By how much the hit rate was above that of LRU in the last requests, some 700 of them."""
        return self._ahead / self._asked if self._asked else 0.0

    # -- which leaf goes ---------------------------------------------------------------------------------------------

    def group(self, node: TreeNode) -> int:
        record: Record = node.state
        if record.is_watched and record.last_use != node.last_access:  # the request that matched it inserted, too
            self.table.end(record, self.tree.tick, reused=False)
            record.describe(record.turn, record.uses, is_rest=False)
        if not record.is_watched:
            self.table.watch(record, node.last_access, self.tree.tick)
        return record.kind

    def urgency(self, node: TreeNode) -> float:
        if self.follows_lru:
            return node.last_access
        age = self.tree.tick - node.last_access
        kind: int = node.state.kind
        return self._surplus[kind][BIN_OF_AGE[age] if age < MAX_AGE else -1]

    # -- what is to be learned ---------------------------------------------------------------------------------------

    def requested(self, tokens: NDArray[np.int32], matched_tokens: int, namespace: Namespace) -> None:
        self._matched_tokens = matched_tokens
        self._ahead *= DUEL_FADE
        self._asked = self._asked * DUEL_FADE + len(tokens)
        limit = DUEL_OPEN if self.follows_lru else DUEL_LOST
        self.follows_lru = not self._has_learned or self._ahead < -limit * self._asked
        self._room = max(self.tree.total_size, self._room * DUEL_FADE)
        self._num_requests += 1
        if self._num_requests == self._next_lesson:
            self.table.discount(0.5 ** ((self._num_requests - self._last_lesson) / HALF_LIFE))
            self._last_lesson = self._num_requests
            self._next_lesson += min(LESSON_EVERY, self._num_requests)
            if self._has_learned or self.table.num_reuses >= MIN_REUSES:
                self._has_learned = True
                self._learn(self.tree.tick)

    def matched(self, node: TreeNode) -> None:
        record: Record = node.state
        if not self.shadow.use(record):
            self._ahead += min(node.end, self._matched_tokens) - (node.end - node.num_tokens)
        if record.is_watched:
            self.table.end(record, self.tree.tick, reused=True)
        record.describe(record.turn, record.uses + 1, is_rest=False)

    def added(self, node: TreeNode) -> None:
        assert node.parent is not None, node
        parent: Record | None = node.parent.state
        if parent is None:
            record = Record(node.parent.namespace, node.num_tokens, 1, 0, is_rest=False)
        else:
            if parent.is_watched:  # it is no leaf any more
                self.table.end(parent, self.tree.tick, reused=False)
            turn = parent.turn + (parent.uses > 0)  # else the same request goes on
            record = Record(parent.namespace, node.num_tokens, turn, 0, is_rest=False)
        self._revive(node, record)
        node.state = record
        self.shadow.use(record)
        self.shadow.shrink(self.tree.total_size)

    def evicted(self, node: TreeNode) -> None:
        record: Record = node.state
        if node.is_tail(self.tree.page_size):  # replaced by a longer one more often than not
            self._forget(record)
            return
        age = self.tree.tick - node.last_access
        self._price += PRICE_RATE * (self._density[record.kind][bin_of(age)] - self._price)
        older = self.ghosts.add(node.end - node.num_tokens, node.key, record)
        if older is not None:
            self._forget(older)
        most_tokens = GHOST_SHARE * max(self._room, self.tree.total_size)
        while self.ghosts.num_tokens > most_tokens or len(self.ghosts) > MAX_GHOSTS:
            self._forget(self.ghosts.pop_oldest())

    def split(self, upper: TreeNode, lower: TreeNode) -> None:
        record: Record = upper.state
        is_rest = not lower.children
        lower.state = rest = Record(record.namespace, lower.num_tokens, record.turn, record.uses, is_rest=is_rest)
        was_cached = self.shadow.discard(record)
        record.num_tokens = upper.num_tokens
        if record.is_watched:  # by an insert: it is no leaf any more
            self.table.end(record, self.tree.tick, reused=True)
        if was_cached:
            self.shadow.use(rest)
            self.shadow.use(record)

    def merged(self, upper: TreeNode, lower: TreeNode) -> None:
        record: Record = upper.state
        rest: Record = lower.state
        self._forget(rest)
        if not rest.is_rest:  # what evicts first is the end of the path, so its kind holds
            record.describe(rest.turn, rest.uses, is_rest=False)
        was_cached = self.shadow.discard(record)
        record.num_tokens += rest.num_tokens
        if was_cached:
            self.shadow.use(record)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _learn(self, tick: int) -> None:
        worth = worth_of(self.table.hazards(tick), PRICE_SHARE * self._price)
        self._density: list[list[float]] = worth.density.tolist()  # lists, since they are read one by one
        self._surplus: list[list[float]] = worth.surplus.tolist()

    def _revive(self, node: TreeNode, record: Record) -> None:
        """Find the ghosts whose tokens came back with a new leaf, top first; it goes on where the last one ended."""
        start, end = node.end - node.num_tokens, node.end
        position = start
        while position < end:
            ghost = self.ghosts.pop(record.namespace, position, node.key, (position - start) * TOKEN_BYTES)
            if ghost is None:
                return
            position += ghost.num_tokens
            if self.shadow.discard(ghost):
                self._ahead -= ghost.num_tokens - max(0, position - end)
            record.describe(max(record.turn, ghost.turn + (position < end)), ghost.uses + 1, is_rest=False)
            if ghost.is_watched:
                self.table.end(ghost, self.tree.tick, reused=True)

    def _forget(self, record: Record) -> None:
        if record.is_watched:
            self.table.end(record, self.tree.tick, reused=False)
        self.shadow.discard(record)
