"""The token ids of conversations as they were generated, for when their text comes back."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from radixkv.serving.generation import Ids

MAX_ENTRIES = 4096
MAX_BYTES = 64 << 20
CONTEXT_TOKENS = 32
"""Tokens that are decoded before those whose text is wanted: to some tokenizers the beginning of a text is special."""
UNDECODABLE = "\ufffd"  # what decoders write for bytes that are no character; the text does not tell which they were

Owner: TypeAlias = tuple[str, str | None]
"""The name of a tenant, and the salt of its request."""
_Key: TypeAlias = tuple[Owner, bytes]


class Kept(NamedTuple):
    """The first `characters` of a text, and their ids."""

    characters: int
    ids: Ids


class KeptAnswers:
    """Ids of conversations up to the end of an answer, by their owner and the digest of their text.

    At most `max_entries` and `max_bytes` in all; the least recently used make room. Texts are not held.
    Invariant: decoded in full, the ids of an answer are its text. Not thread-safe.
    """

    def __init__(self, tokenizer: Any, *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self._tokenizer = tokenizer
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._entries: OrderedDict[_Key, Kept] = OrderedDict()
        self._lengths: dict[Owner, Counter[int]] = {}  # in characters
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, owner: Owner, prompt: str, prompt_ids: Ids, answer: str, answer_ids: Sequence[int]) -> bool:
        """Keep `answer_ids`, without the special tokens at their end, as the ids of `answer`, which followed `prompt`.

        Returns: whether they were kept; they are not if they say something else, as where the answer was cut at a stop
        text. O(prompt + answer).
        """
        special = set(getattr(self._tokenizer, "all_special_ids", ()))
        ids = list(answer_ids)
        while ids and ids[-1] in special:
            ids.pop()
        if not ids or UNDECODABLE in answer or text_after(self._tokenizer, prompt_ids, ids) != answer:
            return False
        text = prompt + answer
        key = (owner, _digests(text, [len(text)])[0])
        if key in self._entries:
            self._remove(key)
        kept = Kept(len(text), np.concatenate([prompt_ids, np.array(ids, np.int32)]))
        self._entries[key] = kept
        self._lengths.setdefault(owner, Counter())[len(text)] += 1
        self.num_bytes += kept.ids.nbytes
        while len(self._entries) > self._max_entries or self.num_bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))
        return True

    def find(self, owner: Owner, text: str) -> Kept | None:
        """The longest conversation of `owner` with which `text` begins. O(text + conversations of the owner)."""
        lengths = sorted(length for length in self._lengths.get(owner, ()) if length <= len(text))
        for digest in reversed(_digests(text, lengths)):
            kept = self._entries.get((owner, digest))
            if kept is not None:
                self._entries.move_to_end((owner, digest))
                return kept
        return None

    def _remove(self, key: _Key) -> None:
        kept = self._entries.pop(key)
        self.num_bytes -= kept.ids.nbytes
        lengths = self._lengths[key[0]]
        lengths[kept.characters] -= 1
        if not lengths[kept.characters]:
            del lengths[kept.characters]
        if not lengths:
            del self._lengths[key[0]]


def text_after(tokenizer: Any, before: Ids, ids: Sequence[int]) -> str | None:
    """The text of `ids` where they follow `before`, with special tokens; None if it is not told apart from theirs."""

    def decoded(token_ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    context = before[-CONTEXT_TOKENS:].tolist()
    alone, both = decoded(context), decoded([*context, *ids])
    return both[len(alone) :] if both.startswith(alone) else None


def _digests(text: str, lengths: Sequence[int]) -> list[bytes]:
    """Of the beginnings of `text` that have `lengths`, which ascend. O(text)."""
    digests, running, at = [], sha256(), 0
    for length in lengths:
        running.update(text[at:length].encode("utf-8", "surrogatepass"))
        digests.append(running.copy().digest())
        at = length
    return digests
