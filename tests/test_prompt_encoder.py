"""What a conversation remembers of the texts that it encoded, and in how much memory."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interrupting import interrupt_each_line
from radixkv.engine.prompt_encoder import MEMORY_BYTES, PromptEncoder


class LetterEngine:
    """The part of an engine that an encoder uses, with a token a letter. Notes what it was asked to encode."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool) -> NDArray[np.int32]:
        self.asked.append(text)
        return np.array([ord(letter) for letter in text], np.int32)

    def require_tokenizer(self, what: Any) -> object:
        return object()


def encoder(memory_bytes: int = MEMORY_BYTES) -> tuple[PromptEncoder, LetterEngine]:
    engine = LetterEngine()
    return PromptEncoder(engine, memory_bytes=memory_bytes), engine  # type: ignore[arg-type]


def test_a_text_is_encoded_once() -> None:
    encode, engine = encoder()
    for _ in range(3):
        assert encode.encode_after("", "abc").tolist() == [97, 98, 99]
        assert encode.encode_after("", "abc", plain=True).tolist() == [97, 98, 99]
    assert engine.asked == ["abc", "abc"]


def test_what_it_remembers_stays_below_the_bound_however_long_a_conversation_lasts() -> None:
    encode, _ = encoder(memory_bytes=20_000)
    for turn in range(300):
        assert len(encode.encode_after("before", f"{turn:0200}")) == 200
        assert 0 < encode.remembered_bytes <= 20_000
    assert encode.remembered_bytes > 20_000 - 1_500


def test_the_least_recently_used_text_is_forgotten_first() -> None:
    encode, engine = encoder(memory_bytes=8_000)
    encode.encode_after("", "first" * 100)
    encode.encode_after("", "second" * 100)
    encode.encode_after("", "first" * 100)
    encode.encode_after("", "third" * 100)
    engine.asked.clear()
    encode.encode_after("", "first" * 100)
    assert engine.asked == []
    encode.encode_after("", "second" * 100)
    assert engine.asked == ["second" * 100]


def test_a_text_larger_than_the_bound_is_not_remembered_and_displaces_nothing() -> None:
    encode, engine = encoder(memory_bytes=1_000)
    encode.encode_after("", "small")
    before = encode.remembered_bytes
    for _ in range(2):
        assert len(encode.encode_after("", "x" * 2_000)) == 2_000
    assert encode.remembered_bytes == before
    encode.encode_after("", "small")
    assert engine.asked == ["small", "x" * 2_000, "x" * 2_000]


def test_an_interrupt_at_each_line_leaves_the_memory_as_it_should_be() -> None:
    encode, _ = encoder(memory_bytes=2000)
    texts = count()
    interrupt_each_line(lambda: encode.encode_after("", f"text {next(texts)}"), "engine/prompt_encoder")
    for _ in range(40):  # what is forgotten is counted as it was
        encode.encode_after("", f"text {next(texts)}")
    assert 1500 < encode.remembered_bytes <= 2000
