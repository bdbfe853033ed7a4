"""What earlier requests asked, so that a later one can go on from there, and be told why it missed the cache."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from radixkv.cache.token_ids import common_tokens
from radixkv.serving.chat_prompts import Chat
from radixkv.serving.generation import Ids

T = TypeVar("T")

MAX_ENTRIES = 4096
MAX_BYTES = 64 << 20
MAX_AGE_S = 24 * 3600.0

Difference = Literal["none", "tools", "system", "messages", "evicted"]


class BoundedStore(Generic[T]):
    """Values by id, at most `max_entries`, `max_bytes` in all, none older than `max_age_s`; the oldest make room.

    >>> store = BoundedStore(max_entries=2)
    >>> store.put("a", 1, 10), store.put("b", 2, 10), store.put("c", 3, 10)
    (None, None, None)
    >>> store.get("a"), store.get("c"), len(store)
    (None, 3, 2)
    """

    def __init__(
        self,
        *,
        max_entries: int = MAX_ENTRIES,
        max_bytes: int = MAX_BYTES,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: tells seconds."""
        self._max_entries, self._max_bytes, self._max_age_s = max_entries, max_bytes, max_age_s
        self._clock = clock
        self._entries: OrderedDict[str, tuple[T, int, float]] = OrderedDict()  # value, bytes, time
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: str, value: T, num_bytes: int) -> None:
        """Store a value under an id that is new. O(1), and O(1) for each that goes."""
        self._entries[key] = (value, num_bytes, self._clock())
        self.num_bytes += num_bytes
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            self.remove(next(iter(self._entries)))
        self._forget_old()

    def get(self, key: str) -> T | None:
        """The value under an id; None if it is not there any more."""
        self._forget_old()
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def remove(self, key: str) -> None:
        """Forget a value that is there."""
        _, num_bytes, _ = self._entries.pop(key)
        self.num_bytes -= num_bytes

    def _forget_old(self) -> None:
        latest = self._clock() - self._max_age_s
        while self._entries and next(iter(self._entries.values()))[2] < latest:
            self.remove(next(iter(self._entries)))


class Asked(NamedTuple):
    """What a request asked: the prompt as ids, and hashes of its parts."""

    tenant: str
    tools: bytes
    system: bytes
    prompt: Ids

    @classmethod
    def of(cls, tenant: str, chat: Chat, prompt: Ids) -> Asked:
        """What `tenant` asks with `chat`, whose prompt is `prompt`."""
        system = [message for message in chat.messages if message["role"] == "system"]
        return cls(tenant, _hash(chat.tools), _hash(system), prompt)


class Comparison(NamedTuple):
    """How a prompt differs from an earlier one.

    The first `reusable_tokens` are the same, and `missed_tokens` of the earlier prompt were not found in the cache,
    because of the `difference`: "evicted" if the cache had forgotten them.
    """

    difference: Difference
    reusable_tokens: int
    missed_tokens: int


def compare(before: Asked, now: Asked, cached_tokens: int) -> Comparison:
    """How `now`, of which `cached_tokens` were found, differs from an earlier request."""
    reusable = common_tokens(before.prompt, now.prompt)
    missed = max(0, len(before.prompt) - min(reusable, cached_tokens))
    if reusable < len(before.prompt):
        changed: Difference = "messages"
        if before.tools != now.tools:
            changed = "tools"
        elif before.system != now.system:
            changed = "system"
        return Comparison(changed, reusable, missed)
    needed = min(reusable, len(now.prompt) - 1)  # the last token of a prompt is always computed
    return Comparison("none" if cached_tokens >= needed else "evicted", reusable, missed)


def _hash(value: Sequence[Mapping[str, Any]]) -> bytes:
    return sha256(repr(list(value)).encode("utf-8", "surrogatepass")).digest()
