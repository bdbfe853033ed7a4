"""Request traces: files of JSON lines, read as the keys that a cache looks up and stores."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.token_ids import token_array
from radixkv.config.checks import checked_int
from radixkv.errors import (
    InvalidRequestError,
    InvalidTokenIdsError,
    MissingTokenizerError,
    TokenIdsTypeError,
)
from radixkv.replay.trace_files import json_lines, texts_of_conversation
from radixkv.replay.trace_times import TraceClock

Keys: TypeAlias = NDArray[np.int32]
Encode: TypeAlias = Callable[[str], Sequence[int]]
"""A tokenizer: the token ids of a text, without special tokens."""

BLOCKS = "hash_ids"
TOKENS = ("token_ids", "input_tok_ids")
OUTPUT_TOKENS = ("output_token_ids", "output_tok_ids")
TEXTS = ("input", "prompt", "text")
CONVERSATIONS = ("conversations", "messages", "turns")
OUTPUT_TEXT = "output"

MOONCAKE_BLOCK_TOKENS = 512
VOCABULARY = 128_000  # of the tokens that stand for a block
SHOWN_FIELDS = 6


class Request(NamedTuple):
    """One request.

    Attributes:
        keys: what is looked up: int32 token ids, or block ids.
        stored: what is cached when the request ends; begins with `keys`.
        num_tokens: tokens of the prompt.
        time_s: when it arrived, in seconds, by the trace's own clock; 0 where the trace tells no times.
    """

    keys: Keys
    stored: Keys
    num_tokens: int
    time_s: float = 0.0

    @classmethod
    def of_tokens(cls, prompt: Any, output: Any = (), time_s: float = 0.0) -> Request:
        """A request of token ids. O(tokens).

        An engine stores a prompt with its output, but for the output's last token: nothing is computed after it.

        Raises: TokenIdsTypeError, InvalidTokenIdsError.

        >>> request = Request.of_tokens([1, 2, 3], output=[4, 5])
        >>> request.keys.tolist(), request.stored.tolist(), request.num_tokens
        ([1, 2, 3], [1, 2, 3, 4], 3)
        """
        keys, generated = token_array(prompt), token_array(output)[:-1]
        return cls(keys, np.concatenate((keys, generated)) if len(generated) else keys, len(keys), time_s)


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests of a trace.

    Attributes:
        kind: the field that told how to read it: "hash_ids", "token_ids", "input_tok_ids", "input",
            "prompt", "text" or "conversations".
        key_tokens: how many tokens a key stands for: 1, unless the keys are block ids.
    """

    requests: list[Request]
    kind: str
    key_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.num_tokens for request in self.requests)


# ------------------------------------------------------------------------------------------------------------- reading


def raise_malformed(error: InvalidRequestError) -> NoReturn:
    """What readers do with a malformed line unless they are told otherwise."""
    raise error


def read_trace(
    path: str | Path,
    *,
    block_tokens: int = MOONCAKE_BLOCK_TOKENS,
    encode: Encode | None = None,
    limit: int | None = None,
    on_malformed: Callable[[InvalidRequestError], object] = raise_malformed,
    watch: Callable[[BinaryIO], BinaryIO] = lambda file: file,
) -> Trace:
    """Read the trace at `path`, in any format of `trace_files.json_lines`; see `parse_trace`.

    `watch` may wrap the open file, to show how far it was read.

    Raises: as there, and InvalidRequestError if it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return parse_trace(
                json_lines(watch(file), str(path)),
                str(path),
                block_tokens=block_tokens,
                encode=encode,
                limit=limit,
                on_malformed=on_malformed,
            )
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error


def parse_trace(
    lines: Iterable[bytes],
    name: str,
    *,
    block_tokens: int = MOONCAKE_BLOCK_TOKENS,
    encode: Encode | None = None,
    limit: int | None = None,
    on_malformed: Callable[[InvalidRequestError], object] = raise_malformed,
) -> Trace:
    """Read a trace from lines of JSON, one object a request. O(bytes); all requests are kept.

    The first well-formed line decides what kind of trace it is:

    - `hash_ids`, with `input_length`: ids (numbers or texts) of the blocks of `block_tokens` tokens that make up the
      prompt, each id standing for its block and all before it (Mooncake's format: Qin et al., Mooncake: A
      KVCache-centric Disaggregated Architecture for LLM Serving, FAST 2025). The last block may be partial, or left
      out. Blocks are numbered anew, in order of appearance. Outputs are unknown, so prompts alone are stored.
    - `token_ids` or `input_tok_ids`: the prompt's token ids. With `output_token_ids` or `output_tok_ids` the output
      is stored too.
    - `input`, `prompt` or `text`: the prompt's text, made into tokens by `encode`; with the text `output` that is
      stored too.
    - `conversations` (ShareGPT), `messages` (OpenAI) or `turns` (aiperf): one request a turn; see
      `trace_files.texts_of_conversation`.

    Times are read from `arrival_time_ns`, or else `timestamp`, whose unit is found out: see `trace_times.TraceClock`.

    Args:
        name: of the trace, for errors.
        limit: requests to read at most.
        on_malformed: is given what is wrong with a line, its number included; the line is skipped if it returns.
            Raises by default.
    Raises: InvalidRequestError if there is no request; MissingTokenizerError for texts without `encode`; ConfigError.
    """
    block_tokens = checked_int("block_tokens", block_tokens, 1)
    limit = None if limit is None else checked_int("limit", limit, 1)
    clock = TraceClock()
    formats: list[_Format] = [_Blocks(block_tokens, clock), *(_Tokens(field, clock) for field in TOKENS)]
    formats += [*(_Text(field, encode, clock) for field in TEXTS), _Conversation(encode, clock)]
    requests: list[Request] = []
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            row = _object(line)
            form = _format_of(row, formats)
            found = form.requests(row)
        except MissingTokenizerError as error:
            raise MissingTokenizerError(f"{name}, line {number}: {error}") from None
        except (InvalidRequestError, InvalidTokenIdsError, TokenIdsTypeError) as error:
            on_malformed(InvalidRequestError(f"{name}, line {number}: {error}"))
            continue
        formats = [form]
        requests += found
        if limit is not None and len(requests) >= limit:
            del requests[limit:]
            break
    if not requests:
        raise InvalidRequestError(f"{name} holds no requests")
    return Trace(_scaled(requests, clock.scale), formats[0].field, formats[0].key_tokens)


def _scaled(requests: list[Request], scale: float) -> list[Request]:
    """`requests`, with all times multiplied by `scale`."""
    return requests if scale == 1 else [request._replace(time_s=request.time_s * scale) for request in requests]


def _object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"this is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise InvalidRequestError(f"a request must be an object, not {type(row).__name__}")
    return row


def _format_of(row: dict[str, Any], formats: Sequence[_Format]) -> _Format:
    for form in formats:
        if any(field in row for field in form.fields):
            return form
    needed = " or ".join(f'"{field}"' for form in formats for field in form.fields)
    fields = [short_repr(field) for field in row]
    shown = ", ".join(fields[:SHOWN_FIELDS]) + ", …" * (len(fields) > SHOWN_FIELDS)
    raise InvalidRequestError(f"a request needs {needed}; this one has {shown or 'no fields'}")


class _Format:
    """A way to write requests: the field that tells it, and how a row that has this field is read."""

    field: str
    key_tokens = 1

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of which one tells this format."""
        return (self.field,)

    def request(self, row: dict[str, Any]) -> Request:
        """Raises: InvalidRequestError, InvalidTokenIdsError or TokenIdsTypeError if the row is malformed."""
        raise NotImplementedError

    def requests(self, row: dict[str, Any]) -> list[Request]:
        """The requests of a row: one, unless it is a conversation. Raises: as `request`."""
        return [self.request(row)]


class _Blocks(_Format):
    field = BLOCKS

    def __init__(self, block_tokens: int, clock: TraceClock) -> None:
        self.key_tokens = block_tokens
        self._clock = clock
        self._numbers: dict[Hashable, int] = {}

    def request(self, row: dict[str, Any]) -> Request:
        blocks, num_tokens = row[BLOCKS], row.get("input_length")
        if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or num_tokens < 1:
            raise InvalidRequestError(f'"input_length" must be a positive whole number, not {short_repr(num_tokens)}')
        if not isinstance(blocks, list) or not {type(block) for block in blocks} <= {int, str}:
            raise InvalidRequestError(f'"{BLOCKS}" must be a list of block ids')
        fewest, most = num_tokens // self.key_tokens, -(-num_tokens // self.key_tokens)
        if not fewest <= len(blocks) <= most:
            raise InvalidRequestError(
                f"{num_tokens} tokens are {most} blocks of {self.key_tokens}, not {len(blocks)}; "
                "check the number of tokens a block"
            )
        time_s, numbers = self._clock.time_s(row), self._numbers
        keys = np.array([numbers.setdefault(block, len(numbers)) for block in blocks], np.int32)
        return Request(keys, keys, num_tokens, time_s)


class _Tokens(_Format):
    def __init__(self, field: str, clock: TraceClock) -> None:
        self.field = field
        self._clock = clock

    def request(self, row: dict[str, Any]) -> Request:
        ids = _id_list(row, self.field)
        if not ids:
            raise InvalidRequestError(f'"{self.field}" is empty')
        output_field = next((field for field in OUTPUT_TOKENS if row.get(field) is not None), None)
        return Request.of_tokens(ids, _id_list(row, output_field) if output_field else (), self._clock.time_s(row))


class _Text(_Format):
    def __init__(self, field: str, encode: Encode | None, clock: TraceClock) -> None:
        self.field = field
        self._encode, self._clock = encode, clock

    def request(self, row: dict[str, Any]) -> Request:
        return _encoded(
            _text(row, self.field), _text(row, OUTPUT_TEXT), self.field, self._encode, self._clock.time_s(row)
        )


class _Conversation(_Format):
    field = CONVERSATIONS[0]

    def __init__(self, encode: Encode | None, clock: TraceClock) -> None:
        self._encode, self._clock = encode, clock

    @property
    def fields(self) -> tuple[str, ...]:
        return CONVERSATIONS

    def requests(self, row: dict[str, Any]) -> list[Request]:
        turns, time_s = texts_of_conversation(row), self._clock.time_s(row)
        return [
            _encoded(_valid(prompt, "a message"), _valid(answer, "a message"), "a message", self._encode, time_s)
            for prompt, answer in turns
        ]


def _encoded(prompt: str, output: str, field: str, encode: Encode | None, time_s: float) -> Request:
    if not prompt:
        raise InvalidRequestError(f'"{field}" is empty')
    if encode is None:
        raise MissingTokenizerError("this is a trace of texts; give the tokenizer of the model they are meant for")
    ids = encode(prompt)
    if not ids:
        raise InvalidRequestError(f'"{field}" has no tokens')
    return Request.of_tokens(ids, encode(output) if output else (), time_s)


def _id_list(row: dict[str, Any], field: str) -> list[Any]:
    ids = row[field]
    if not isinstance(ids, list):
        raise InvalidRequestError(f'"{field}" must be a list of token ids, not {type(ids).__name__}')
    return ids


def _text(row: dict[str, Any], field: str) -> str:
    """The text in a field, empty if there is none."""
    text = row.get(field)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InvalidRequestError(f'"{field}" must be a text, not {type(text).__name__}')
    return _valid(text, field)


def _valid(text: str, field: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" in JSON
        raise InvalidRequestError(f'"{field}" is not valid Unicode ({error.reason}, position {error.start})') from None
    return text


# ------------------------------------------------------------------------------------------------------------ expanding


class ExpandedBlocks:
    """Requests of block ids as requests of token ids, made one by one while they are iterated over, each time anew.

    A block becomes the `block_tokens` pseudo-random tokens of `numpy.random.default_rng(block)`, so that equal blocks
    have equal tokens, and a prompt is cut off at its `num_tokens`. Keeps 4 bytes for each token of the distinct
    blocks, once they have come up.

    >>> blocks = np.array([7, 8], np.int32)
    >>> (request,) = ExpandedBlocks([Request(blocks, blocks, num_tokens=5)], block_tokens=4)
    >>> len(request.keys), (request.keys[:4] == np.random.default_rng(7).integers(0, 128_000, 4)).all()
    (5, np.True_)
    """

    def __init__(self, requests: Sequence[Request], block_tokens: int) -> None:
        self._requests = requests
        num_blocks = 1 + max((int(request.keys.max()) for request in requests if len(request.keys)), default=-1)
        self._tokens = np.empty((num_blocks, block_tokens), np.int32)
        self._known = np.zeros(num_blocks, bool)

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        for request in self._requests:
            for block in request.keys[~self._known[request.keys]].tolist():
                self._tokens[block] = np.random.default_rng(block).integers(0, VOCABULARY, self._tokens.shape[1])
                self._known[block] = True
            tokens = self._tokens[request.keys].reshape(-1)[: request.num_tokens]
            yield Request(tokens, tokens, request.num_tokens, request.time_s)
