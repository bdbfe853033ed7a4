"""The bytes that each token adds to a text, for tokenizers whose texts are their tokens' bytes in a row."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Self

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class TokenBytes(dict[int, bytes]):
    """Bytes by token id, filled as ids come; special tokens and unknown ids have none.

    Of byte-level tokenizers (GPT-2's kind: also Llama 3, Qwen and many others) a text is the bytes of its tokens, in
    UTF-8, and nothing that comes later changes what a token adds. So a stream of text needs no decoding of ids in
    their context, and the tokenizer, which threads must not share, is hardly used.

    >>> from transformers import AutoTokenizer
    >>> from radixkv import demo_model
    >>> tokenizer = AutoTokenizer.from_pretrained(demo_model.path())
    >>> token_bytes = TokenBytes.of(tokenizer)
    >>> b"".join(token_bytes[i] for i in tokenizer("O Romeo \\u2014 ", add_special_tokens=False).input_ids).decode()
    'O Romeo \\u2014 '
    """

    def __init__(self, backend: Any) -> None:
        """Args: backend: a byte-level `tokenizers.Tokenizer`."""
        super().__init__()
        self._backend = backend
        self._special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}

    @classmethod
    def of(cls, tokenizer: Any) -> Self | None:
        """The bytes of a tokenizer's tokens; None if it is not byte-level, or decodes in a way of its own."""
        if not decodes_as_usual(tokenizer):
            return None
        backend = tokenizer.backend_tokenizer
        decoder = json.loads(backend.to_str()).get("decoder") if backend.decoder is not None else None
        return cls(backend) if decoder is not None and _is_byte_level(decoder) else None

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        found = b"" if token is None or token in self._special else _bytes_of(token)
        self[token_id] = found
        return found


def decodes_as_usual(tokenizer: Any) -> bool:
    """Whether texts are what the tokenizer's `backend_tokenizer` makes of ids, and nothing is done to them after it."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or vars(tokenizer).keys() & {"decode", "_decode"}:
        return False
    kind: Any = type(tokenizer)
    usual: Any = PreTrainedTokenizerFast
    return bool(kind.decode is PreTrainedTokenizerBase.decode and kind._decode is usual._decode)


def _is_byte_level(decoder: dict[str, Any]) -> bool:
    if decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and _is_byte_level(decoder["decoders"][0])
    return bool(decoder["type"] == "ByteLevel")


def _bytes_of(token: str) -> bytes:
    """The bytes that the letters of a token mean; a token with other characters, which somebody added, is text."""
    letters = _byte_of_letter()
    try:
        return bytes([letters[letter] for letter in token])
    except KeyError:
        return token.encode()


@cache
def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter means: printable ones of Latin-1 their own, others from 256 on in order (GPT-2)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}
