"""Encodes the pieces of a prompt so that they can stand after each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from radixkv.errors import InvalidRequestError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine

MARKUP = frozenset("<>[]|")  # an added token with one of these is a control token, whatever its flags say
NEUTRAL = ("a", ".", "\n", "0", "\u3002")  # texts that few tokens reach across


class PromptEncoder:
    """Encodes text as it follows other text: without a tokenizer's dummy blank, and with or without control tokens.

    Remembers what it encoded, so that a long history costs little.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._memory: dict[tuple[str, str, bool], NDArray[np.int32]] = {}

    def encode_after(self, before: str, text: str, *, plain: bool = False) -> NDArray[np.int32]:
        """Ids of `text` where it follows `before`, of which the last characters suffice.

        A token that would reach across the border is not used. `plain`: no control token stands for any of it.
        """
        key = (before, text, plain)
        if key not in self._memory:
            self._memory[key] = self._plain(before, text) if plain else self._encode_after(before, text)
        return self._memory[key]

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
            raise InvalidRequestError(f"this tokenizer has no ordinary tokens for {self.controls_in(text)!r}")
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
