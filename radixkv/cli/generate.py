"""`radixkv generate`: continue prompts, as one batch that shares prefixes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from radixkv.cli.common import EngineOptions, SamplingOptions
from radixkv.cli.display import cut_off, excerpt, excerpt_ids, note, summary
from radixkv.cli.prompts import (
    FILE_HELP,
    Prompt,
    describe,
    from_arguments,
    from_file,
    from_stdin,
    raise_first_error,
    run,
)
from radixkv.cli.setting_options import setting_option, with_option_groups
from radixkv.config import SamplingParams
from radixkv.errors import ConfigError, InvalidRequestError, RadixKVError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine
    from radixkv.engine.outputs import Progress, RequestOutput

T = TypeVar("T")

GENERATE_EPILOG = """
**Examples**

One prompt, printed as it is written: `radixkv generate "ROMEO: " --stream`

Varied, but the same each time: `radixkv generate "ROMEO: " --temperature 0.8 --top-p 0.95 --seed 7`

Many prompts that share a beginning, for a script: `radixkv generate --file prompts.jsonl --json > outputs.jsonl`

From another program: `cat scene.txt | radixkv generate --max-tokens 50`
"""


@with_option_groups
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="Texts to continue. Without any, and without --file, stdin is the prompt.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help=FILE_HELP, show_default=False)] = None,
    max_tokens: Annotated[int, setting_option(SamplingParams, "max_tokens", "--max-tokens", "-n")] = 128,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt, each on a line.")] = False,
    *,
    engine_options: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Continue prompts with a model. Several run as one batch, and what they share is computed once.

    The text goes to stdout, in the order of the prompts; a line on what it cost goes to stderr.
    """
    if stream and as_json:
        raise ConfigError("--stream prints text as it comes and --json whole results; give one of them")
    batch = [*from_arguments(prompts or []), *(from_file(file) if file is not None else [])] or from_stdin()
    params = sampling.params(max_tokens)
    engine = engine_options.load()
    started_s = time.perf_counter()
    outputs = _print_streams(engine, batch, params) if stream else run(engine, batch, params)
    total_s = time.perf_counter() - started_s
    if as_json:
        _print_json(batch, outputs)
    elif not stream:
        _print_texts(batch, outputs)
    if not as_json:
        note(summary(outputs, total_s) + cut_off(outputs, max_tokens))
    raise_first_error(batch, outputs)


def _print_json(prompts: Sequence[Prompt], outputs: Sequence[RequestOutput]) -> None:
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        typer.echo(_as_json(index, prompt, output))


def _print_texts(prompts: Sequence[Prompt], outputs: Sequence[RequestOutput]) -> None:
    for index, output in enumerate(outputs):
        _print_heading(index, prompts)
        typer.echo(_text(output))


def _print_streams(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> list[RequestOutput]:
    """Print each continuation as it comes, one after the other; meanwhile all run as one batch."""
    streams = [_open_stream(engine, prompt, params) for prompt in prompts]
    firsts = [_of_prompt(prompt, partial(next, chunks)) for prompt, chunks in zip(prompts, streams, strict=True)]
    outputs = []
    for index, (first, rest) in enumerate(zip(firsts, streams, strict=True)):
        _print_heading(index, prompts)
        outputs.append(_of_prompt(prompts[index], partial(_print_stream, chain([first], rest))))
    return outputs


def _of_prompt(prompt: Prompt, work: Callable[[], T]) -> T:
    """The result of work for one prompt; whatever the model or the tokenizer raised is told with its place."""
    try:
        return work()
    except BrokenPipeError:  # of whoever reads the output, not of the prompt
        raise
    except Exception as error:
        raise RadixKVError(f"{prompt.place} failed: {describe(error)}") from error


def _open_stream(engine: Engine, prompt: Prompt, params: SamplingParams) -> Iterator[Progress]:
    try:
        return engine.stream(prompt.content, params)
    except RadixKVError as error:
        raise InvalidRequestError(f"{prompt.place}: {error}") from error


def _print_stream(chunks: Iterator[Progress]) -> RequestOutput:
    for chunk in chunks:
        typer.echo(chunk.text, nl=False)  # which flushes
        if chunk.output is not None:
            typer.echo("" if chunk.output.text is not None else _text(chunk.output))
            return chunk.output
    raise AssertionError("the last chunk carries the output")


def _print_heading(index: int, prompts: Sequence[Prompt]) -> None:
    """Tell several outputs apart."""
    if len(prompts) == 1:
        return
    if index > 0:
        typer.echo()
    content = prompts[index].content
    shown = excerpt(content) if isinstance(content, str) else excerpt_ids(content)
    typer.secho(f"==> {index + 1}: {shown} <==", dim=True)


def _text(output: RequestOutput) -> str:
    """An output, or its ids where there is no tokenizer."""
    return output.text if output.text is not None else " ".join(map(str, output.token_ids))


def _as_json(index: int, prompt: Prompt, output: RequestOutput) -> str:
    fields = {
        "index": index,
        "prompt": prompt.content if isinstance(prompt.content, str) else None,
        "text": output.text,
        "token_ids": output.token_ids,
        "prompt_tokens": output.prompt_tokens,
        "cached_tokens": output.cached_tokens,
        "finish_reason": output.finish_reason,
        "error": None if output.error is None else describe(output.error),
        **output.metrics._asdict(),
    }
    return json.dumps(fields, ensure_ascii=False)
