"""Prompts from the command line, a file or stdin, and their run as one batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from radixkv.cache.token_ids import token_array
from radixkv.errors import InvalidRequestError, RadixKVError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine
    from radixkv.engine.outputs import RequestOutput
    from radixkv.engine.sampling import SamplingParams

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
FILE_HELP = (
    'Prompts, one a line; in a .jsonl file each line is a JSON object with a text "prompt" or a list "token_ids" '
    "(other fields are ignored). Blank lines are skipped."
)


class Prompt(NamedTuple):
    """Text or token ids, and where they came from (for errors)."""

    content: str | list[int]
    place: str


def from_arguments(texts: Sequence[str]) -> list[Prompt]:
    """Prompts given on the command line. Raises: InvalidRequestError if one is not valid Unicode."""
    return [Prompt(checked_text(text, f"prompt {i}"), f"prompt {i}") for i, text in enumerate(texts, start=1)]


def from_stdin() -> list[Prompt]:
    """All of stdin as one prompt, without its final line break.

    Raises: InvalidRequestError if nothing comes, or no text.
    """
    try:
        text = "" if sys.stdin.isatty() else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"stdin is not valid text: {error}") from error
    if not text:
        raise InvalidRequestError("there is no prompt; give one as an argument, with --file or on stdin")
    return [Prompt(checked_text(text.removesuffix("\n"), "stdin"), "stdin")]


def from_file(path: Path) -> list[Prompt]:
    """The prompts of a text file, one a line, or of a JSON Lines file.

    Raises: InvalidRequestError if the file cannot be read, holds no prompt, or has a malformed line, with its number.
    """
    read = _prompt_of_row if path.suffix.lower() in JSON_SUFFIXES else checked_text
    prompts = [Prompt(read(line, place), place) for line, place in _lines(path)]
    if not prompts:
        raise InvalidRequestError(f"{path} holds no prompts")
    return prompts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not blank, and its place."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield line.removesuffix("\n"), f"{path}, line {number}"
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} is not valid UTF-8 text: {error}") from error


def _prompt_of_row(line: str, place: str) -> str | list[int]:
    """The prompt in a line of JSON. Raises: InvalidRequestError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{place}: this is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise InvalidRequestError(f"{place}: a row must be an object, not {type(row).__name__}")
    if ("prompt" in row) == ("token_ids" in row):
        raise InvalidRequestError(f'{place}: a row needs either "prompt" or "token_ids"; this one has {_names(row)}')
    return _checked_ids(row["token_ids"], place) if "token_ids" in row else checked_text(row["prompt"], place)


def _names(row: dict[str, object]) -> str:
    return ", ".join(map(repr, row)) or "no fields"


def checked_text(text: object, place: str) -> str:
    """`text` if a tokenizer can take it. Raises: InvalidRequestError if it is empty, no text or no valid Unicode."""
    if not isinstance(text, str) or not text:
        raise InvalidRequestError(f"{place}: this must be a text that is not empty, not {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8; "\ud800" in JSON
        raise InvalidRequestError(
            f"{place}: this is not valid Unicode ({error.reason}, position {error.start})"
        ) from error
    return text


def _checked_ids(ids: object, place: str) -> list[int]:
    if not isinstance(ids, list) or not ids:
        raise InvalidRequestError(f'{place}: "token_ids" must be a list of ids that is not empty')
    try:
        checked: list[int] = token_array(ids).tolist()
    except RadixKVError as error:
        raise InvalidRequestError(f"{place}: {error}") from error
    return checked


# ---------------------------------------------------------------------------------------------------------------- runs


def run(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> list[RequestOutput]:
    """Run all prompts as one batch, with a progress bar if there are several and stderr is a terminal.

    A prompt that fails while it runs has an output with the reason "error"; `raise_first_error` tells of it.

    Raises: InvalidRequestError that names the place of a prompt which cannot be served.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = len(prompts) == 1 or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as progress:
        bar = progress.add_task("", total=len(prompts))
        try:
            return engine.generate([p.content for p in prompts], params, on_finish=lambda _: progress.advance(bar))
        except RadixKVError as error:
            raise _with_place(error, engine, prompts, params) from error


def raise_first_error(prompts: Sequence[Prompt], outputs: Sequence[RequestOutput]) -> None:
    """Raise RadixKVError if a request failed, with how many did and what the first one said."""
    failed = [(p.place, o.error) for p, o in zip(prompts, outputs, strict=True) if o.error is not None]
    if failed:
        place, error = failed[0]
        raise RadixKVError(f"{len(failed)} of {len(prompts)} prompts failed; {place}: {describe(error)}") from error


def describe(error: Exception) -> str:
    """An error in one line, with its kind if it is none of ours."""
    return str(error) if isinstance(error, RadixKVError) else f"{type(error).__name__}: {error}"


def _with_place(
    error: RadixKVError, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams
) -> InvalidRequestError:
    """The engine's complaint about a batch, with the place of the prompt that it is about."""
    for prompt in prompts:
        try:
            engine.stream(prompt.content, params)  # checked at once, computed only when it is iterated over
        except RadixKVError as its_own:
            return InvalidRequestError(f"{prompt.place}: {its_own}")
    return InvalidRequestError(str(error))
