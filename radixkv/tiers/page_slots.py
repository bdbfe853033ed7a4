"""Which page of a store lies in which slot, and what gives way when new ones come: the bookkeeping, without the bytes.

A write happens in three steps, so that the bytes can be written between them without a lock: `plan` chooses slots and
takes out what gives way, then `commit` makes the new pages findable, or `undo` puts back what was there.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from radixkv.cache.page_keys import KEY_BYTES
from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.errors import InvalidPagesError, InvariantError
from radixkv.tiers.page_index import PageIndex, StoredPage
from radixkv.tiers.page_lines import Line
from radixkv.tiers.page_store import NewPage, PageFacts


class WritePlan:
    """What a write is about to do."""

    def __init__(self) -> None:
        self.new: list[tuple[StoredPage, bytes]] = []  # with their payloads; their slots are theirs already
        self.updated: list[StoredPage] = []  # were there before, and have their new facts
        self.giving_way: dict[int, StoredPage] = {}  # by slot, out of the index
        self.left_out = 0  # for want of room
        self.held: list[bytes] = []
        self.planned: dict[Line, int] = {}  # how many of the new pages come to each line
        self.gone: set[int] = set()  # slots whose old page, if any, is lost, should the write fail


class PageSlots:
    """The pages of a store, each in a slot of its own below `limit`. Not thread-safe.

    Invariant: a slot below `used` is that of one page in the index, or on the free list, or in a plan that is neither
    committed nor undone.
    """

    def __init__(self, index: PageIndex, limit: int) -> None:
        self.index = index
        self.limit = limit
        self.used = 0
        self._free: list[int] = []  # a heap: low slots first, so that chains lie in one piece where they can

    @property
    def num_free(self) -> int:
        """Slots that were used before and are free."""
        return len(self._free)

    def start(self, used: int) -> None:
        """Take over pages that were added to the index, in slots below `used`."""
        taken = {page.slot for page in self.index}
        self.used = used
        self._free = [slot for slot in range(used) if slot not in taken]  # in order: a heap

    def plan(self, pages: Iterable[tuple[NewPage, bytes]], now_s: float) -> WritePlan:
        """Choose a slot for each new page, given with its checksum, and what gives way for it. O(pages × log all)."""
        plan = WritePlan()
        for page, checksum in {new.parent_key + new.tokens: (new, checksum) for new, checksum in pages}.values():
            known = self.index.get(page.parent_key, page.tokens)
            if known is not None:
                self.index.update(known, page.facts)
                plan.updated.append(known)
                continue
            self.index.hold(page.parent_key)  # what comes before it must not give way for it
            plan.held.append(page.parent_key)
            line = self.index.line_of(page.facts)
            slot = self._take(page.facts, line, now_s, plan)
            if slot is None:
                plan.left_out += 1
            else:
                plan.planned[line] = plan.planned.get(line, 0) + 1
                stored = StoredPage(page.parent_key, page.tokens, page.facts, slot=slot, checksum=checksum)
                plan.new.append((stored, page.payload))
        plan.updated = [page for page in plan.updated if page.slot not in plan.giving_way]
        return plan

    def _take(self, newcomer: PageFacts, line: Line, now_s: float, plan: WritePlan) -> int | None:
        if self._free:
            return heappop(self._free)
        if self.used < self.limit:
            self.used += 1
            return self.used - 1
        num_planned = plan.planned.get(line, 0)
        page = self.index.first_to_go(now_s, newcomer, {**plan.planned, line: num_planned + 1})
        if page is None or not self.index.gives_way_to(page, newcomer, now_s, num_planned + 1):
            return None
        self.index.discard(page)
        plan.giving_way[page.slot] = page
        return page.slot

    def commit(self, plan: WritePlan) -> None:
        """Make the new pages findable."""
        for page, _ in plan.new:
            self.index.add(page)
        self._let_go(plan)

    def undo(self, plan: WritePlan) -> None:
        """Put back what gave way, but for what is `gone`, and free the slots of the new pages."""
        for page, _ in plan.new:
            if page.slot not in plan.giving_way or page.slot in plan.gone:
                heappush(self._free, page.slot)
        for slot, page in plan.giving_way.items():
            if slot not in plan.gone:
                self.index.add(page)
        self._let_go(plan)

    def _let_go(self, plan: WritePlan) -> None:
        for key in plan.held:
            self.index.let_go(key)

    def drop(self, page: StoredPage) -> None:
        """Take a page out and free its slot."""
        self.index.discard(page)
        heappush(self._free, page.slot)

    def move_below_limit(self, page: StoredPage) -> tuple[int, int]:
        """Give a page the lowest free slot; returns the old slot and the new one. There must be a free one below."""
        old, page.slot = page.slot, heappop(self._free)
        return old, page.slot

    def cut(self) -> None:
        """Forget all slots from `limit` on; no page may lie there."""
        self.used = min(self.used, self.limit)
        self._free = [slot for slot in self._free if slot < self.limit]
        heapify(self._free)

    def check_invariants(self) -> None:
        """Prove the invariants, while no plan is open. O(pages × log pages). Raises: InvariantError."""
        self.index.check_invariants()
        slots = [page.slot for page in self.index] + self._free
        if sorted(slots) != list(range(self.used)) or self.used > self.limit:
            raise InvariantError(f"{len(set(slots))} of {self.used} slots are accounted for, below {self.limit}")


def check_page(page: NewPage, page_size: int, payload_bytes: int) -> None:
    """Make sure that a page fits a store. Raises: InvalidPagesError."""
    if len(page.payload) != payload_bytes:
        raise InvalidPagesError(f"a payload must have {payload_bytes} bytes, not {len(page.payload)}")
    num_tokens, rest = divmod(len(page.tokens), TOKEN_BYTES)
    if rest or not 1 <= num_tokens <= page_size or len(page.parent_key) != KEY_BYTES:
        raise InvalidPagesError(
            f"a page must have a key of {KEY_BYTES} bytes and 1 to {page_size} tokens of {TOKEN_BYTES} bytes, "
            f"not {len(page.parent_key)} and {len(page.tokens)} bytes"
        )
