"""Prompts of the user's own: a JSON Lines file, plain or .gz, as a workload.

A row is an object with one of `prompt` (text), `input` (text), `question` (text), `turns` (list of user turns: a
conversation), `token_ids` or `input_tok_ids` (ids). Other fields are ignored.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from radixkv_bench.common.corpus import Encode
from radixkv_bench.common.errors import BenchError
from radixkv_bench.shared_prompt.workloads import Request, Shape, Workload

TEXT_FIELDS = ("prompt", "input")
ID_FIELDS = ("token_ids", "input_tok_ids")
FIELDS = (*ID_FIELDS, "turns", *TEXT_FIELDS, "question")

Turns = list[list[int]]


def read(path: Path, encode: Encode, *, rows: int, output_tokens: int) -> Workload:
    """The first `rows` rows of `path` as a workload: conversations turn by turn, everything else in the first wave.

    Raises: BenchError that names the line, for a row that is not an object with one of `FIELDS`.
    """
    Shape(requests=rows, output_tokens=output_tokens)  # refuses what is below 1
    conversations = list(islice(_conversations(path, encode), rows))
    if not conversations:
        raise BenchError(f"{path} holds no prompts")
    return Workload(path.name, tuple(_requests(conversations)), output_tokens)


def _requests(conversations: list[Turns]) -> Iterator[Request]:
    """Requests wave by wave; a conversation that is over drops out of the later waves."""
    last: dict[int, int] = {}
    count = 0
    for turn in range(max(map(len, conversations))):
        for index, turns in enumerate(conversations):
            if turn < len(turns):
                yield Request(last.get(index), tuple(turns[turn]))
                last[index] = count
                count += 1


def _conversations(path: Path, encode: Encode) -> Iterator[Turns]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BenchError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        try:
            yield _turns(row, encode)
        except BenchError as error:
            raise BenchError(f"{path}, line {number}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is not blank."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from None


def _turns(row: object, encode: Encode) -> Turns:
    """The tokens of each turn of one row."""
    if not isinstance(row, dict):
        raise BenchError(f"a row must be an object, not {type(row).__name__}")
    field = next((name for name in FIELDS if name in row), None)
    if field is None:
        raise BenchError(f"a row needs one of the fields {', '.join(FIELDS)}; this one has {', '.join(row) or 'none'}")
    value = row[field]
    if field in ID_FIELDS:
        return [_checked_ids(field, value)]
    texts = value if field == "turns" else [value]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise BenchError(f"{field!r} must be {'a list of texts' if field == 'turns' else 'a text'} that is not empty")
    return [encode(_framed(field, text)) for text in texts]


def _framed(field: str, text: str) -> str:
    """Questions and turns get the words that ask for an answer; whole prompts stay as they are."""
    if field == "turns":
        return f"\n\nUser: {text}\n\nAssistant:"
    return f"Q: {text}\nA:" if field == "question" else text


def _checked_ids(field: str, value: object) -> list[int]:
    if not isinstance(value, list) or not value:
        raise BenchError(f"{field!r} must be a list of token ids that is not empty")
    for position, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise BenchError(f"{field!r} holds {token!r} at position {position}, which is no token id")
    return value
