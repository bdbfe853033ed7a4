"""Reading a request trace for a command: the file, its tokenizer, its malformed lines, and a bar that shows how far."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from radixkv.cli.display import excerpt
from radixkv.errors import InvalidRequestError, MissingTokenizerError, ModelNotFoundError
from radixkv.replay.traces import Encode, Trace, raise_malformed, read_trace

if TYPE_CHECKING:
    from rich.progress import Progress

SHOWN_MALFORMED = 5
MESSAGE_CHARS = 240


def progress_on_stderr() -> Progress:
    """Bars on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def read_trace_file(
    path: Path, progress: Progress, *, strict: bool, block_tokens: int, encode: Encode | None, limit: int | None
) -> tuple[Trace, int]:
    """The trace in a file, and how many malformed lines were skipped, of which stderr tells; none if `strict`.

    Raises: InvalidRequestError if the file cannot be read, or as `read_trace` does.
    """
    skipped = _Skipped()
    try:
        trace = read_trace(
            path,
            block_tokens=block_tokens,
            encode=encode,
            limit=limit,
            on_malformed=raise_malformed if strict else skipped.tell,
            watch=lambda file: progress.wrap_file(file, total=path.stat().st_size, description="reading"),
        )
    except MissingTokenizerError as error:
        raise MissingTokenizerError(f"{error} (--tokenizer)") from error
    skipped.tell_how_many()
    return trace, skipped.count


class _Skipped:
    """Tells of malformed lines on stderr: of each of the first few, and then how many there were."""

    def __init__(self) -> None:
        self.count = 0

    def tell(self, error: InvalidRequestError) -> None:
        self.count += 1
        if self.count <= SHOWN_MALFORMED:
            typer.echo(f"radixkv: skipped: {excerpt(str(error), MESSAGE_CHARS)}", err=True)

    def tell_how_many(self) -> None:
        if self.count > SHOWN_MALFORMED:
            typer.echo(f"radixkv: skipped: {self.count:,} malformed lines; --strict stops at the first", err=True)


def load_tokenizer(name: str) -> Encode:
    """What makes token ids of a text, without special tokens; `name` is "demo", a directory or a hub id.

    Raises: as `pretrained_tokenizer`, and ModelNotFoundError if there is none.
    """
    tokenizer = pretrained_tokenizer(name)
    if tokenizer is None:
        raise ModelNotFoundError(f"no tokenizer can be loaded from {name!r}: the directory has none")

    def encode(text: str) -> Sequence[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return encode


def pretrained_tokenizer(name: str) -> Any | None:
    """The tokenizer of "demo", a directory or a hub id; None if `name` is a directory without one.

    Takes seconds: transformers is imported here.

    Raises: ModelNotFoundError.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as hf_logging

    from radixkv import demo_model

    hf_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if name != "demo" and Path(name).is_dir() and not _has_tokenizer(Path(name)):
        return None
    try:
        return AutoTokenizer.from_pretrained(demo_model.path() if name == "demo" else name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelNotFoundError(f"no tokenizer can be loaded from {name!r}: {reason}") from error


def _has_tokenizer(directory: Path) -> bool:
    from radixkv.models.loader import SIGNS_OF_A_TOKENIZER

    return any((directory / file).exists() for file in SIGNS_OF_A_TOKENIZER)
