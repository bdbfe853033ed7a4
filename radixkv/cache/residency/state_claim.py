"""The states that one lease reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from radixkv.errors import InvalidRequestError

if TYPE_CHECKING:
    from radixkv.cache.residency.residency import HeldTokens, Pages
    from radixkv.cache.residency.state_slots import StateSlots


class StateClaim:
    """Two slots of a lease: that of the state after its first `position` tokens, and one for the next state.

    A prefill stops where hits are expected to end, so that a state is kept there: where the tree's tokens end and this
    request's go on otherwise, at what `checkpoint_at` named, and at each `interval_tokens`.
    """

    def __init__(self, slots: StateSlots, slot: int | None, position: int, held_tokens: int) -> None:
        self._slots = slots
        self._slot, self._position = slot, position  # no slot at the start of a sequence
        self._next: int | None = None
        self._next_position = position
        self._stops = {held_tokens}
        self._is_end = True  # whether a request began or ended at the state that is held

    def held_slots(self) -> list[int]:
        """The slots that it holds."""
        return [slot for slot in (self._slot, self._next) if slot is not None]

    def seen_pages(self, pages: Pages) -> Pages:
        """None: every page is there for all layers that read pages."""
        return pages[:0]

    def coverable_tokens(self, capacity_tokens: int) -> int:
        """The next place where a state should be kept; where it is now, if there is no slot to go on. O(stops)."""
        if self._next is None and not self._slots.num_available:
            return self._position
        interval = self._slots.interval_tokens
        stops = [stop for stop in self._stops if stop > self._position]
        return min([capacity_tokens, (self._position // interval + 1) * interval, *stops])

    def checkpoint_at(self, num_tokens: int) -> None:
        """Keep a state after so many tokens, if they are still to be computed."""
        self._stops.add(num_tokens)

    def cover(self, pages: Pages, first: int, last: int) -> None:
        """Get ready to compute the tokens `[first, last)`: take a slot for the state after them. O(1).

        Raises: OutOfPagesError if there is none; InvalidRequestError unless `first` is where the state is, or the lease
            has no pages for the tokens.
        """
        if first == last:
            return
        capacity_tokens = len(pages) * self._slots.page_size
        if first != self._position or last > capacity_tokens:
            raise InvalidRequestError(
                f"tokens {first} to {last} cannot be computed: the recurrent layers' state is that after "
                f"{self._position} tokens, and the lease has pages for {capacity_tokens}"
            )
        if self._next is None:
            self._next = self._slots.take()
        self._next_position = last

    def prepare_load(self, pages: Pages, first: int, last: int) -> None:
        """As `cover`: a state is loaded into the slot that one would be computed into."""
        self.cover(pages, first, last)

    def uncover(self, pages: Pages, kept: int) -> None:
        """Nothing to do: states lie in no pages."""

    def advance(self, num_tokens: int) -> None:
        """The state after `num_tokens` tokens is written; the one before is given back. O(1)."""
        assert self._next is not None, "a state was computed that nothing was covered for"
        assert num_tokens == self._next_position, "a state was computed after other tokens than were covered"
        if self._slot is not None:
            self._slots.let_go(self._slot, ended=self._is_end)
        self._slot, self._position, self._next = self._next, num_tokens, None
        self._is_end = num_tokens in self._stops

    def share(self, held: HeldTokens, first_page: int) -> None:
        """Let the cache keep the state, if it is the one after `held`. O(new pages), O(page_size) where states are."""
        if self._slot is not None and len(held.tokens) == self._position:
            self._slots.keep(self._slot, held)
        self._slots.moved(held, first_page)

    def state_slots(self) -> tuple[int, ...]:
        """The slot to read, and the one to write. At the start of a sequence nothing is read, and both are the same."""
        assert self._next is not None, "nothing was covered"
        return (self._next if self._slot is None else self._slot, self._next)

    def release(self, pages: Pages) -> None:
        """Give both slots back. Cannot fail."""
        if self._slot is not None:
            self._slots.let_go(self._slot, ended=True)
        if self._next is not None:
            self._slots.let_go(self._next, ended=False)
        self._slot = self._next = None
