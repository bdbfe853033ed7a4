"""Encodes the pieces of a prompt so that they can stand after each other."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.engine.interrupts import DeferredInterrupt
from radixkv.errors import InvalidRequestError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine

MARKUP = frozenset("<>[]|")  # an added token with one of these is a control token, whatever its flags say
MEMORY_BYTES = 4 << 20  # the texts and ids of about 400,000 tokens; a longer history is encoded in every turn
NEUTRAL = ("a", ".", "\n", "0", "\u3002")  # texts that few tokens reach across

_Key: TypeAlias = tuple[str, str, bool]


class _Memory:
    """The ids of the texts that were encoded last, in at most `max_bytes`; the least recently used go first.

    Threads may share it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._entries: OrderedDict[_Key, NDArray[np.int32]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: _Key) -> NDArray[np.int32] | None:
        """The ids of `key`, which count as used now; None if they are not here. O(key)."""
        with DeferredInterrupt(), self._lock:
            ids = self._entries.get(key)
            if ids is not None:
                self._entries.move_to_end(key)
            return ids

    def put(self, key: _Key, ids: NDArray[np.int32]) -> None:
        """Remember `ids`, unless they alone exceed `max_bytes`. O(1), and O(1) for each entry that goes."""
        size = _size(key, ids)
        with DeferredInterrupt(), self._lock:
            if size > self._max_bytes or key in self._entries:
                return
            self._entries[key] = ids
            self.num_bytes += size
            while self.num_bytes > self._max_bytes:
                self.num_bytes -= _size(*self._entries.popitem(last=False))


def _size(key: _Key, ids: NDArray[np.int32]) -> int:
    """Bytes of an entry, without the table that holds it."""
    before, text, _ = key
    return sys.getsizeof(before) + sys.getsizeof(text) + sys.getsizeof(ids)


class PromptEncoder:
    """Encodes text as it follows other text: without a tokenizer's dummy blank, and with or without control tokens.

    Remembers the ids of the last texts, so that the history of a conversation is not encoded in every turn.
    """

    def __init__(self, engine: Engine, *, memory_bytes: int = MEMORY_BYTES) -> None:
        """memory_bytes: the most that remembered texts and their ids may take."""
        self._engine = engine
        self._memory = _Memory(memory_bytes)

    @property
    def remembered_bytes(self) -> int:
        """Bytes that remembered texts and their ids take, at most `memory_bytes`. O(1)."""
        return self._memory.num_bytes

    def encode_after(self, before: str, text: str, *, plain: bool = False) -> NDArray[np.int32]:
        """Ids of `text` where it follows `before`, of which the last characters suffice.

        A token that would reach across the border is not used. `plain`: no control token stands for any of it.
        """
        key = (before, text, plain)
        ids = self._memory.get(key)
        if ids is None:
            ids = self._plain(before, text) if plain else self._encode_after(before, text)
            self._memory.put(key, ids)
        return ids

    def _encode_after(self, before: str, text: str) -> NDArray[np.int32]:
        if before:
            for context in (before, *NEUTRAL):
                alone, both = self._encode(context), self._encode(context + text)
                if np.array_equal(both[: len(alone)], alone):
                    return both[len(alone) :]
        return self._encode(text)

    def _plain(self, before: str, text: str) -> NDArray[np.int32]:
        """Every control token's text is cut after its first character, and the parts are encoded one by one.

        The tokenizer's own switch for this is state that other threads would see.
        """
        cuts = {0, len(text)}
        for control in self.controls_in(text):
            at = text.find(control)
            while at >= 0:
                cuts.add(at + 1)
                at = text.find(control, at + 1)
        bounds = sorted(cuts)
        parts = []
        for first, last in pairwise(bounds):
            parts.append(self._encode_after(before, text[first:last]))
            before = text[first:last][-16:]
        ids = np.concatenate([np.empty(0, np.int32), *parts])
        if self._control_ids.intersection(map(int, ids)):
            raise InvalidRequestError(f"the tokenizer can encode {self.controls_in(text)!r} as control tokens only")
        return ids

    def controls_in(self, text: str) -> list[str]:
        """The control tokens that `text` spells."""
        return [control for control in self._controls if control in text]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding drops."""
        flagged = {i for i, token in self._added.items() if getattr(token, "special", False)}
        return frozenset(flagged | set(getattr(self._tokenizer, "all_special_ids", ())))

    @cached_property
    def _controls(self) -> list[str]:
        added = {str(token) for i, token in self._added.items() if i in self._control_ids}
        named = set(getattr(self._tokenizer, "all_special_tokens", ()))
        return sorted(text for text in added | named if text.strip())

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        marked = {i for i, token in self._added.items() if MARKUP.intersection(str(token))}
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        return frozenset((marked | self.special_ids) - {unknown})

    @property
    def _added(self) -> dict[int, Any]:
        added: dict[int, Any] = getattr(self._tokenizer, "added_tokens_decoder", {})
        return added

    @property
    def _tokenizer(self) -> Any:
        return self._engine.require_tokenizer("a conversation")

    def text_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text of `ids` where they follow `before`, without special tokens."""
        return self.raw_text_after(before, [i for i in ids if i not in self.special_ids])

    def raw_text_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """As `text_after`, with the special tokens' text."""
        context = self._decode(list(before))
        both = self._decode([*before, *ids])
        return both[len(context) :] if both.startswith(context) else self._decode(list(ids))

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str) -> NDArray[np.int32]:
        return self._engine.encode(text, add_special_tokens=False)
