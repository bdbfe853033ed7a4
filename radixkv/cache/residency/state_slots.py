"""Which recurrent states are kept, and after which tokens: layers that keep a state can go on from there alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.events import EventChannel, PageRun
from radixkv.cache.namespace import Namespace
from radixkv.cache.residency.residency import (
    NO_SIDE_PAGES,
    HeldTokens,
    KeptState,
    Pages,
    RefCounts,
    Shortfall,
    SidePages,
)
from radixkv.cache.residency.state_claim import StateClaim
from radixkv.errors import ConfigError, InvariantError, OutOfPagesError

LEAST_SLOTS = 3  # a request reads one and writes one, and the state after its prompt stays beside them

Before: TypeAlias = "int | Namespace"
"""What comes before a page: the page before it, or the namespace if it is the first."""


class Place(NamedTuple):
    """After which tokens a state is: those down to the end of `before`, and `tokens` (int32 bytes) of the next page.

    `page` is one of the tree's that holds these: the state goes when the page does.
    """

    before: Before
    tokens: bytes
    page: int


class StateSlots:
    """Lends slots of a pool of states to requests, and keeps those of the cache until they are needed.

    A recurrent layer carries a state from token to token in place of keys and values, so a hit must end at a token
    whose state was kept. Slots are written once: a step reads a request's state in one slot and writes the next to
    another, so the cache and any number of requests can share one, and nothing is ever copied. Slots are counted by
    the claims that hold them; the cache keeps what it has a *place* for.

    A state belongs to the tokens before it: it is found by the page of the tree before its own, and by its tokens in
    that, whichever sibling page holds them. It goes when that page leaves the tree, or when its slot is needed. Slots
    that nobody claims are taken back in this order: first states that a request only passed and nobody has come back
    to, then those where requests began or ended, the least recently used first. The pages stay, and a hit that ends
    earlier makes use of them.

    Invariants, proved by `check_invariants`:

    - a slot is free, or has a place, or is claimed;
    - no two slots have the same place, and the page of each place is in the tree;
    - the slots with a place that nobody claims are those queued.
    """

    def __init__(self, num_slots: int, *, interval_tokens: int) -> None:
        """Args: interval_tokens: prefills stop at multiples of it, so that states are kept there.

        Raises: ConfigError if a single request could not get on.
        """
        if num_slots < LEAST_SLOTS:
            raise ConfigError(f"{num_slots} states are too few: one request needs {LEAST_SLOTS}")
        self.num_slots = num_slots
        self.interval_tokens = interval_tokens
        self.page_size = 1
        self.num_changes = 0  # times that a place got or lost its state
        self.num_taken_back = 0  # states that the cache lost for others' sake
        self._free = list(range(num_slots - 1, -1, -1))
        self._claims = np.zeros(num_slots, np.int32)
        self._slot_at: dict[Before, dict[bytes, int]] = {}
        self._place_of: dict[int, Place] = {}  # by slot
        self._of_page: dict[int, set[int]] = {}  # slots whose place is in a page of the tree
        self._passed: dict[int, None] = {}  # slots, the least recently used first
        self._ended: dict[int, None] = {}

    @property
    def shortfall(self) -> Shortfall:
        """No state is kept there."""
        return "state"

    @property
    def sight_tokens(self) -> int:
        """The last one: a state stands after it."""
        return 1

    @property
    def can_go_back(self) -> bool:
        """Never: a state does not tell what it was a token ago."""
        return False

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Slots that the cache alone keeps."""
        return len(self._passed) + len(self._ended)

    @property
    def num_available(self) -> int:
        """Slots that are free or can be taken back."""
        return self.num_free + self.num_evictable

    # -- what PrefixCache asks ---------------------------------------------------------------------------------------

    def attach(self, num_pages: int, page_size: int, ref_counts: RefCounts) -> None:
        """Serve a cache with pages of that size."""
        self.page_size = page_size

    def usable_tokens(self, held: HeldTokens) -> int:
        """The most leading tokens of `held` after which a state is kept. O(pages), O(page_size) where some are near."""
        if not self._place_of:
            return 0
        found = self._deepest(held)
        return 0 if found is None else found[0]

    def holds(self, page: int) -> bool:
        """Always: KV lies in the pages."""
        return True

    def has_room(self, cached_tokens: int, next_tokens: int, spare_pages: int) -> bool:
        """Whether there is a slot to read and one to write, and one for each of the others to write."""
        return 2 + spare_pages <= self.num_available

    def claim(self, pages: Pages, found: HeldTokens, held_tokens: int, source: int | None) -> StateClaim:
        """Hold the state after the tokens that were found. O(pages)."""
        slot = None
        if len(found.tokens):
            deepest = self._deepest(found)
            assert deepest is not None, "a hit ends where no state is"
            position, slot = deepest
            assert position == len(found.tokens), "a hit ends where no state is"
            self.hold(slot)
        return StateClaim(self, slot, len(found.tokens), held_tokens)

    def touch(self, held: HeldTokens) -> int:
        """The slot of the state after all of `held`, which is kept, and counts as used now. O(pages)."""
        found = self._deepest(held)
        assert found is not None, "no state is kept"
        num_tokens, slot = found
        assert num_tokens == len(held.tokens), "no state is kept there"
        self.hold(slot)
        self.let_go(slot, ended=True)
        return slot

    def hand_over(self, own: Pages, theirs: Pages) -> None:
        """Nothing to do: whoever shared `theirs` moved the states of their tokens along."""

    def drop(self, pages: Pages) -> None:
        """`pages` are free now, and the states in them go. O(pages)."""
        if not self._of_page:
            return
        for page in pages.tolist():
            for slot in list(self._of_page.get(page, ())):
                self._forget(slot)

    def report_to(self, channel: EventChannel, cached: Callable[[], Iterable[PageRun]]) -> None:
        """Nothing to tell: events are of pages."""

    def side_pages(self) -> SidePages:
        """None."""
        return NO_SIDE_PAGES

    def states(self) -> SidePages:
        """Slots in all, free, kept by the cache alone, and taken back so far. O(1)."""
        return SidePages(self.num_slots, self.num_free, self.num_evictable, self.num_taken_back)

    def kept_states(self, held: HeldTokens, first_token: int) -> list[KeptState]:
        """As `Residency.kept_states`."""
        if not self._place_of:
            return []
        size = self.page_size
        befores: list[Before] = [held.namespace, *held.pages.tolist()]
        found = []
        for page in range(first_token // size, -(-len(held.tokens) // size)):
            slots = self._slot_at.get(befores[page])
            if not slots:
                continue
            tokens = held.tokens[page * size : (page + 1) * size]
            for count in range(max(1, first_token + 1 - page * size), len(tokens) + 1):
                slot = slots.get(tokens[:count].tobytes())
                if slot is not None:
                    found.append(KeptState(page * size + count, slot))
        return found

    # -- what claims ask ---------------------------------------------------------------------------------------------

    def kept_beside(self, held: HeldTokens, first_token: int) -> list[KeptState]:
        """The states."""
        return self.kept_states(held, first_token)

    def take(self) -> int:
        """A slot to write, which the caller holds; what the cache kept there is forgotten. O(1).

        Raises: OutOfPagesError.
        """
        if not self._free:
            queue = self._passed or self._ended
            if not queue:
                raise OutOfPagesError(
                    needed=1, free=0, evictable=0, total=self.num_slots, what="states of the recurrent layers"
                )
            self._forget(next(iter(queue)))
            self.num_taken_back += 1
        slot = self._free.pop()
        self._claims[slot] = 1
        return slot

    def hold(self, slot: int) -> None:
        """Claim a slot that the cache keeps, or that is claimed already. O(1)."""
        self._claims[slot] += 1
        self._passed.pop(slot, None)
        self._ended.pop(slot, None)

    def let_go(self, slot: int, *, ended: bool) -> None:
        """Give back one claim of a slot. O(1).

        Args:
            ended: whether a request began or ended there, so that others may, too.
        """
        self._claims[slot] -= 1
        assert self._claims[slot] >= 0, "a state was given back that was not claimed"
        if self._claims[slot]:
            return
        if slot not in self._place_of:
            self._free.append(slot)
        else:
            (self._ended if ended else self._passed)[slot] = None

    def keep(self, slot: int, held: HeldTokens) -> None:
        """Let the cache keep a claimed slot as the state after `held`, unless it has one. O(page_size)."""
        if slot in self._place_of:
            return
        place = self._place(held)
        slots = self._slot_at.setdefault(place.before, {})
        if place.tokens in slots:
            return
        slots[place.tokens] = slot
        self._place_of[slot] = place
        self._of_page.setdefault(place.page, set()).add(slot)
        self.num_changes += 1

    def moved(self, held: HeldTokens, first_page: int) -> None:
        """States after tokens of the pages of `held`, from `first_page` on, are in these pages now.

        They may have been in a page that held fewer of these tokens, and leaves the tree. O(pages).
        """
        if not self._place_of:
            return
        pages = held.pages.tolist()
        for state in self.kept_states(held, first_page * self.page_size):
            self._move(state.slot, pages[(state.num_tokens - 1) // self.page_size])

    # -- places ------------------------------------------------------------------------------------------------------

    def _place(self, held: HeldTokens) -> Place:
        """That of the state after all of `held`."""
        last = (len(held.tokens) - 1) // self.page_size
        pages = held.pages
        before: Before = held.namespace if last == 0 else int(pages[last - 1])
        return Place(before, held.tokens[last * self.page_size :].tobytes(), int(pages[last]))

    def _deepest(self, held: HeldTokens) -> tuple[int, int] | None:
        """The most leading tokens of `held` after which a state is kept, and its slot; None if there is none."""
        size = self.page_size
        befores: list[Before] = [held.namespace, *held.pages.tolist()]
        for page in range((len(held.tokens) - 1) // size, -1, -1):
            slots = self._slot_at.get(befores[page])
            if not slots:
                continue
            tokens = held.tokens[page * size : (page + 1) * size]
            for count in range(len(tokens), 0, -1):
                slot = slots.get(tokens[:count].tobytes())
                if slot is not None:
                    return page * size + count, slot
        return None

    def _forget(self, slot: int) -> None:
        """Let the cache keep a slot no more; it is free unless somebody claims it."""
        place = self._place_of.pop(slot)
        slots = self._slot_at[place.before]
        del slots[place.tokens]
        if not slots:
            del self._slot_at[place.before]
        self._leave_page(slot, place.page)
        self._passed.pop(slot, None)
        self._ended.pop(slot, None)
        if not self._claims[slot]:
            self._free.append(slot)
        self.num_changes += 1

    def _move(self, slot: int, page: int) -> None:
        """Let the place of a slot be in another page that holds its tokens."""
        place = self._place_of[slot]
        if place.page != page:
            self._leave_page(slot, place.page)
            self._place_of[slot] = place._replace(page=page)
            self._of_page.setdefault(page, set()).add(slot)

    def _leave_page(self, slot: int, page: int) -> None:
        in_page = self._of_page[page]
        in_page.remove(slot)
        if not in_page:
            del self._of_page[page]

    def check_invariants(self, pins: NDArray[np.integer], in_tree: NDArray[np.bool_], claims: Sequence[object]) -> None:
        """Prove the invariants of the class docstring. O(num_pages + slots). Raises: InvariantError."""
        expected = np.zeros(self.num_slots, np.int32)
        for claim in claims:
            assert isinstance(claim, StateClaim), claim
            for slot in claim.held_slots():
                expected[slot] += 1
        if not np.array_equal(expected, self._claims):
            wrong = np.flatnonzero(expected != self._claims)
            raise InvariantError(
                f"states {wrong.tolist()} are claimed {self._claims[wrong]} times, not {expected[wrong]}"
            )
        used = set(self._place_of) | set(np.flatnonzero(expected).tolist())
        if sorted([*self._free, *used]) != list(range(self.num_slots)):
            raise InvariantError(f"states are lost or lent twice: {self._free} are free, {sorted(used)} are used")
        idle = {slot for slot in self._place_of if not expected[slot]}
        queued = [*self._passed, *self._ended]
        if set(queued) != idle or len(queued) != len(idle):
            raise InvariantError(f"states {sorted(queued)} are queued, and {sorted(idle)} are kept by the cache alone")
        for slot, place in self._place_of.items():
            found = self._slot_at.get(place.before, {}).get(place.tokens)
            if found != slot or slot not in self._of_page.get(place.page, ()):
                raise InvariantError(f"state {slot} is not found in its place {place}")
            if not in_tree[place.page]:
                raise InvariantError(f"state {slot} is kept in page {place.page}, which is not in the tree")
        places = sum(map(len, self._slot_at.values())) if all(self._slot_at.values()) else None
        if not places == len(self._place_of) == sum(map(len, self._of_page.values())):
            raise InvariantError(f"{places} places are known for {len(self._place_of)} states")
