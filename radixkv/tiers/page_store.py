"""What a store of pages below the pool does: the protocol, and the records that go in and come out.

A store knows pages by what they hold. The pages of a sequence form a chain: each is found by the key of the page
before it (`cache.page_keys`; the first one by `root_key` of its namespace) and by its own tokens. A page of a store
may hold fewer tokens than `page_size`: the end of a sequence. Its payload is then the whole page all the same, of
which only the first tokens mean something.

A page whose tokens begin with `STATE_MARK` is a part of a recurrent layers' state, or of what a page has in layers that
see a window (`state_parts`), and holds no tokens.

The bytes of a payload are opaque here: those that a page has in the pool, layer by layer (`memory.page_bytes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from radixkv.cache.token_ids import TOKEN_BYTES
from radixkv.tiers.page_lines import ShareUse

STATE_MARK = (-1).to_bytes(TOKEN_BYTES, "little", signed=True)
"""In place of a token id, none of which is negative."""


def is_state_part(tokens: bytes) -> bool:
    """Whether a page of these tokens is a part of a state.

    >>> is_state_part(STATE_MARK + bytes(4)), is_state_part(bytes(8))
    (True, False)
    """
    return tokens.startswith(STATE_MARK)


class PageFacts(NamedTuple):
    """What the cache knows of a page besides its tokens, so that order and promises outlive the process.

    Times are seconds of the wall clock since 1970, as a process that starts later knows no other.
    """

    used_s: float
    hits: int
    priority: int
    kept_until_s: float | None
    namespace: tuple[str | None, str | None]  # extra_key, cache_salt


class NewPage(NamedTuple):
    """A page to be stored."""

    parent_key: bytes
    tokens: bytes  # little-endian int32, 1 to page_size of them
    payload: bytes
    facts: PageFacts


class FoundPage(NamedTuple):
    """A page in a store, of whose tokens the first `num_tokens` are those that were asked for.

    All of its tokens, unless it is the last of a chain.
    """

    parent_key: bytes
    tokens: bytes  # all that it holds
    num_tokens: int


class PageStore(Protocol):
    """A bounded store of pages of one shape. Thread-safe; every method but `find` and `stats` may block on its medium.

    `find` of a store on another machine waits for an answer, too: `finds_at_once` tells.

    A store loses pages when it must (its bound, a fault of its medium) and never gives wrong ones: what is damaged is
    a miss with a reason.
    """

    @property
    def name(self) -> str:
        """What outputs, stats and metrics call it: host, disk or shared."""
        ...

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        ...

    @property
    def payload_bytes(self) -> int:
        """Bytes of each payload."""
        ...

    @property
    def finds_at_once(self) -> bool:
        """Whether `find` reads memory alone. If not, call it away from the thread that steps."""
        ...

    def find(self, parent_key: bytes, tokens: bytes) -> list[FoundPage]:
        """The longest chain of pages that holds the first of `tokens` (little-endian int32), after `parent_key`.

        Every page but the last shares all of its tokens and is whole; the last one may share only a part. Reads the
        index alone. O(pages found).
        """
        ...

    def read(self, pages: Sequence[FoundPage]) -> list[bytes | None]:
        """The payloads of `pages`; None for what is gone or damaged since, which is counted by reason in `stats`."""
        ...

    def write(self, pages: Sequence[NewPage]) -> None:
        """Store `pages`, all or none. One that is there already has its facts brought up to date.

        Raises: TierError if the medium fails or is full; the store is as before then.
        """
        ...

    def touch(self, pages: Iterable[tuple[bytes, bytes, PageFacts]]) -> None:
        """Bring the facts of stored pages (parent key, tokens, facts) up to date; those that are gone are left out."""
        ...

    def remove(self, parent_key: bytes) -> int:
        """Forget all pages below `parent_key`. Returns how many."""
        ...

    def hottest(self, max_pages: int) -> list[tuple[FoundPage, PageFacts]]:
        """Whole chains from their first page on, the most worth keeping first, parents before children."""
        ...

    def stats(self) -> StoreStats:
        """What it holds and has done since it was opened. O(1)."""
        ...

    def close(self) -> None:
        """Write what is left, and let go of the medium. Idempotent."""
        ...


class StoreStats(NamedTuple):
    """What a store holds, and what it has done since it was opened.

    `namespaces` are those with a share of it, and last all others; empty without shares.
    """

    pages: int
    bytes: int
    capacity_bytes: int
    pages_read: int
    pages_written: int
    pages_evicted: int
    misses: dict[str, int]  # reason -> pages that were found and could not be given
    errors: int
    last_error: str | None
    namespaces: tuple[ShareUse, ...] = ()
