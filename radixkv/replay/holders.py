"""Which of several simulated replicas hold which pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class PageHolders:
    """For each page the replicas that hold it, exactly, as sets of bits; and those that are about to.

    A page counts as held where it was stored and not removed since, and where it is expected.
    """

    def __init__(self, num_pages: int) -> None:
        self._stored = [0] * num_pages  # bit r: replica r said that it holds it
        self._held = [0] * num_pages  # … or is expected to
        self._expected: Counter[tuple[int, int]] = Counter()

    def store(self, replica: int, pages: Iterable[int]) -> None:
        """`replica` holds `pages`. O(pages)."""
        bit, stored, held = 1 << replica, self._stored, self._held
        for page in pages:
            stored[page] |= bit
            held[page] |= bit

    def remove(self, replica: int, pages: Iterable[int]) -> None:
        """`replica` does not hold `pages` any more. O(pages)."""
        bit, stored, held, expected = 1 << replica, self._stored, self._held, self._expected
        for page in pages:
            stored[page] &= ~bit
            if not expected or (replica, page) not in expected:
                held[page] &= ~bit

    def expect(self, replica: int, pages: Iterable[int]) -> None:
        """`replica` is about to store `pages`. O(pages)."""
        bit, held, expected = 1 << replica, self._held, self._expected
        for page in pages:
            held[page] |= bit
            expected[replica, page] += 1

    def expect_no_more(self, replica: int, pages: Iterable[int]) -> None:
        """Take one `expect` back. O(pages)."""
        bit, stored, held, expected = 1 << replica, self._stored, self._held, self._expected
        for page in pages:
            if expected[replica, page] > 1:
                expected[replica, page] -= 1
                continue
            del expected[replica, page]
            if not stored[page] & bit:
                held[page] &= ~bit

    def forget(self, replica: int) -> None:
        """`replica` has died. O(pages of the trace)."""
        bit = 1 << replica
        for masks in (self._stored, self._held):
            for page, mask in enumerate(masks):
                if mask & bit:
                    masks[page] = mask & ~bit
        for key in [key for key in self._expected if key[0] == replica]:
            del self._expected[key]

    def leading(self, pages: Sequence[int]) -> dict[int, int]:
        """How many leading `pages` each replica holds, of those that hold any. O(pages + replicas)."""
        found: dict[int, int] = {}
        if not pages:
            return found
        number, current = 0, self._held[pages[0]]
        for number, page in enumerate(pages):
            following = current & self._held[page]
            if following != current:
                _note(found, current & ~following, number)
                current = following
                if not current:
                    return found
        _note(found, current, number + 1)
        return found


def _note(found: dict[int, int], replicas: int, number: int) -> None:
    while replicas:
        lowest = replicas & -replicas
        found[lowest.bit_length() - 1] = number
        replicas ^= lowest
