"""Files that hold traces, in the formats that people have, as lines of JSON: one object a request."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO

from radixkv.errors import InvalidRequestError
from radixkv.replay.trace_times import TIMES

GZIP = b"\x1f\x8b"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
UTF_8_BOM = b"\xef\xbb\xbf"
PROMPT_COLUMNS = ("input", "prompt", "text")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")  # such a file is never plain text, whatever its first line holds
SEPARATOR = "\n\n"  # between the messages of a conversation


def json_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """The requests of a trace as lines of JSON, whatever the file is. A file of JSON lines passes through, in O(line).

    - gzip is unpacked; UTF-16 (with its byte order mark) is read as text.
    - A JSON array is taken apart: one line an item.
    - CSV with a column "input", "prompt" or "text" becomes one request a row; "output" and "timestamp" are read too.
    - Other text is one prompt a line.

    Raises: InvalidRequestError if the file is damaged, or is CSV that only counts tokens (Azure's LLM inference traces
    and BurstGPT): which prompts share a prefix cannot be known from counts.
    """
    try:
        yield from _requests(_text_lines(file), name)
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{name} is damaged: {error}") from error


def _text_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of UTF-8, unpacked and decoded."""
    lines: Iterator[bytes] = iter(file)
    first = next(lines, b"")
    if first.startswith(GZIP):
        file.seek(0)
        lines = iter(gzip.GzipFile(fileobj=file))
        first = next(lines, b"")
    if first.startswith(UTF_16):
        text = b"".join([first, *lines]).decode("utf-16")
        yield from text.encode().splitlines(keepends=True)
        return
    yield first.removeprefix(UTF_8_BOM)
    yield from lines


def _requests(lines: Iterator[bytes], name: str) -> Iterator[bytes]:
    blank: list[bytes] = []  # kept, so that errors number lines as the file does
    for line in lines:
        if line.strip():
            break
        blank.append(line)
    else:
        return
    rest = chain([line], lines)
    start = line.lstrip()
    if start.startswith(b"["):
        yield from _items(b"".join(rest), name)
    elif start.startswith(b"{") or name.removesuffix(".gz").endswith(JSON_SUFFIXES):
        yield from chain(blank, rest)
    elif columns := _columns(line):
        yield from _rows(rest, columns, name)
    else:
        for number, prompt in enumerate(chain(blank, rest), start=1):
            try:
                yield _line({"input": prompt.decode().rstrip("\r\n")}) if prompt.strip() else prompt
            except UnicodeDecodeError as error:
                raise InvalidRequestError(f"{name}, line {number}: this is not valid UTF-8: {error.reason}") from error


def _items(content: bytes, name: str) -> Iterator[bytes]:
    try:
        items = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} is not a valid JSON array: {error}") from None
    for item in items:
        yield _line(item)


def _columns(header: bytes) -> list[str]:
    """The columns that a CSV file names; empty if this is not a known header."""
    try:
        columns = [column.strip() for column in next(csv.reader([header.decode()]), [])]
    except (UnicodeDecodeError, csv.Error):
        return []
    names = {column.lower() for column in columns}
    counts = any("tokens" in column for column in names) and "timestamp" in names
    return columns if counts or (len(columns) > 1 and names & set(PROMPT_COLUMNS)) else []


def _rows(lines: Iterable[bytes], columns: list[str], name: str) -> Iterator[bytes]:
    prompt = next((column for column in columns if column.lower() in PROMPT_COLUMNS), None)
    time = next((column for column in columns if column.lower() in TIMES), None)
    if prompt is None:
        raise InvalidRequestError(
            f"{name} counts tokens but holds no prompts, so shared prefixes cannot be known from it; "
            f"it needs a column {' or '.join(PROMPT_COLUMNS)}; its columns are {', '.join(columns)}"
        )
    rows = csv.reader(io.TextIOWrapper(io.BytesIO(b"".join(lines)), encoding="utf-8", newline=""))
    next(rows)
    for row in rows:
        fields = dict(zip(columns, row, strict=False))
        if fields:
            request: dict[str, object] = {"input": fields.get(prompt, "")}
            if output := fields.get("output"):
                request["output"] = output
            if time is not None and (value := fields.get(time)):
                request[time.lower()] = _number(value)
            yield _line(request)


def _number(text: str) -> int | float | str:
    """`text` as a number, if it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def texts_of_conversation(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(prompt, answer) of each turn of the conversation in `row`.

    Known are ShareGPT's "conversations" ("from", "value"), OpenAI's "messages" ("role", "content") and aiperf's "turns"
    ("text"), whose answers are not known. A turn's prompt is all messages before its answer, joined by empty lines: no
    chat template is applied, so its tokens between messages are not counted.
    """
    layouts = (("conversations", "from", "value"), ("messages", "role", "content"), ("turns", "", "text"))
    field, role, content = next((layout for layout in layouts if isinstance(row.get(layout[0]), list)), ("", "", ""))
    if not field:
        raise InvalidRequestError("a conversation must be a list of messages")
    messages = row[field]
    turns: list[tuple[str, str]] = []
    history: list[str] = []
    for message in messages:
        text = message.get(content) if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise InvalidRequestError(f'"{field}" must hold objects with a text "{content}"')
        is_answer = bool(role) and message.get(role) in ("gpt", "assistant", "chatgpt", "bing", "bard")
        if is_answer and history:
            turns.append((SEPARATOR.join(history) + SEPARATOR, text))
        history.append(text)
        if not role:
            turns.append((SEPARATOR.join(history), ""))
    if not turns and history:
        turns.append((SEPARATOR.join(history), ""))
    return turns
