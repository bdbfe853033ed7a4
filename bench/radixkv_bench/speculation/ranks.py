"""A byte-level BPE tokenizer from a file of ranks: each line a token in base64, and its rank."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.files import read_text


def load_encode(path: Path) -> Callable[[str], list[int]]:
    """The tokenizer whose ranks are in `path`, with GPT-2's rule of splitting into words.

    A rank says both which id a token has and in which order pairs are merged: the pairs that make a token, all of which
    are tokens before it, are its merges. Raises: BenchError.
    """
    ranks = _read(path)
    merges = [
        (rank, max(ranks[token[:cut]], ranks[token[cut:]]), token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    merges.sort()
    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(spelled(left), spelled(right)) for *_, left, right in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    return encode


def _read(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise BenchError(f"line {number} of {path} must be a token in base64 and its rank, not {line!r}") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise BenchError(f"{path} must have a token for each byte; byte {missing[0]} has none")
    return ranks
