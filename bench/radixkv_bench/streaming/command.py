"""StreamingLLM: perplexity far beyond a model's context, and generation without end, in constant memory.

python bench/streaming.py --help
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention.backend import AttentionNeeds, choose_backend
from radixkv.attention.metadata import SequenceSpan, build_metadata
from radixkv.engine.kv_memory import make_kv_memory
from radixkv.models.loader import load, max_context_tokens
from radixkv.models.paged_attention import PagedContext, flattened_forward
from radixkv.models.probe import plug_in_paged_attention
from radixkv.models.streaming import Streaming
from radixkv_bench.common import machine, pictures
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.files import HELD_OUT, read_text

PAGE_SIZE = 16
CHUNK_TOKENS = 256
PARTS = 10  # of a text, and of what is generated


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading a text with one kind of sight gave.

    Attributes:
        perplexities: of the parts of the text, one after another, each of the same number of tokens; the first one
            alone lies within the window.
        pool_bytes: of KV.
    """

    name: str
    num_tokens: int
    perplexity: float
    perplexities: list[float]
    pool_bytes: int


@dataclass(frozen=True, slots=True)
class Writing:
    """What generating without end took.

    Attributes:
        pool_bytes: of KV, allocated once.
        window_pages: those that lent a place to KV at most; of `pool_pages`.
        resident_bytes: of the process, after each part of the tokens.
        seconds: that each part took.
    """

    num_tokens: int
    pool_bytes: int
    pool_pages: int
    window_pages: int
    resident_bytes: list[int]
    seconds: list[float]


@command("streaming")
def main(
    text: Annotated[
        Path | None, typer.Argument(metavar="TEXT", help="What to read.", show_default="a held-out part of the plays")
    ] = None,
    model: Annotated[str, typer.Option(help='"demo", a directory (see scripts/teach_sinks.py) or a hub id.')] = "demo",
    window: Annotated[int, typer.Option(min=1, help="Tokens in sight, the sinks among them.")] = 256,
    sinks: Annotated[int, typer.Option(min=1, help="First tokens that stay in sight.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text that are read at most.")] = 16384,
    everything: Annotated[
        int, typer.Option(min=0, help="So many of them are also read with everything in sight; 0 leaves that out.")
    ] = 8192,
    last: Annotated[bool, typer.Option("--last", help="Read the end of the text, not its beginning.")] = False,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to generate; 0 leaves that out.")] = 2048,
) -> Outcome:
    """Read a text that is longer than the model's context with different sights, and generate on and on.

    Sights: everything before; a window of the last tokens; and the sinks with a window, at positions inside the cache.

    Exits with 2 if the command cannot be run.
    """
    if sinks >= window:
        raise BenchError(f"--sinks {sinks} leave nothing of --window {window}")
    loaded, tokenizer = load(model, dtype="auto", device="cpu")
    if tokenizer is None:
        raise BenchError(f"{model} has no tokenizer")
    ids = _ids(tokenizer, text or HELD_OUT, tokens, last=last)
    writing = None
    with Progress(console=error_console(), transient=True, disable=not sys.stderr.isatty()) as progress:
        readings = list(read_all(loaded, ids, window=window, sinks=sinks, everything=everything, progress=progress))
        if generate:
            writing = write(loaded, tokenizer, ids[:CHUNK_TOKENS], generate, window - sinks, sinks, progress)
    figures = {
        "machine": machine.describe(torch.device("cpu")),
        "model": model,
        "window": window,
        "sinks": sinks,
        "readings": [asdict(reading) for reading in readings],
        "writing": None if writing is None else asdict(writing),
    }
    return Outcome(figures, partial(_print, readings, writing), partial(_draw, readings, writing))


def read_all(
    model: PreTrainedModel, ids: Tensor, *, window: int, sinks: int, everything: int, progress: Progress
) -> Iterator[Reading]:
    """Read `ids` with each kind of sight."""
    if everything:
        yield read(model, ids[:everything], "everything", None, 0, progress)
    yield read(model, ids, f"window {window}", window, 0, progress)
    yield read(model, ids, f"{sinks} sinks + window {window - sinks}", window - sinks, sinks, progress)


@torch.inference_mode()
def read(model: PreTrainedModel, ids: Tensor, name: str, window: int | None, sinks: int, progress: Progress) -> Reading:
    """Read `ids`, int64 [tokens], in chunks; `window` None sees everything."""
    layers = plug_in_paged_attention(model.eval())
    streaming = None
    if window is not None:
        streaming = Streaming(model, layers, window=window, sinks=sinks, limit=max_context_tokens(model.config))
        layers = streaming.layers
    needs = AttentionNeeds(layers, PAGE_SIZE, model.dtype, model.device)
    # what is in sight, the chunk that is being computed, and a page on either side
    kept = len(ids) if window is None else window + sinks + CHUNK_TOKENS + 3 * PAGE_SIZE
    config = EngineConfig(page_size=PAGE_SIZE, kv_cache_tokens=kept, window=window, sinks=sinks)
    memory = make_kv_memory(choose_backend("auto", needs), needs, config, context_tokens=len(ids), scratch_pages=0)
    task = progress.add_task(name, total=len(ids))
    nats = []
    with memory.cache.acquire(ids) as lease:
        for first in range(0, len(ids), CHUNK_TOKENS):
            end = min(first + CHUNK_TOKENS, len(ids))
            lease.cover(first, end)
            metadata = build_metadata([SequenceSpan(first, end, lease.pages)], page_size=PAGE_SIZE)
            adjustment = None if streaming is None else streaming.step(metadata.positions)
            context = PagedContext(memory.backend.plan(metadata), memory.backend.num_layers, adjustment)
            rows = torch.arange(end - first)
            logits = flattened_forward(model, ids[first:end], metadata.positions, rows, context).float()
            following = ids[first + 1 : end + 1]
            nats.append(cross_entropy(logits[: len(following)], following, reduction="none").double())
            progress.update(task, advance=end - first)
    progress.remove_task(task)
    every = torch.cat(nats)
    parts = every.tensor_split(PARTS)
    return Reading(
        name, len(ids), math.exp(every.mean()), [math.exp(part.mean()) for part in parts], memory.pool.num_bytes
    )


def write(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Tensor,
    num_tokens: int,
    window: int,
    sinks: int,
    progress: Progress,
) -> Writing:
    """Generate `num_tokens` after `prompt` in one request, in a pool that holds little more than what is in sight."""
    kept = window + sinks + len(prompt) + 3 * PAGE_SIZE
    config = EngineConfig(page_size=PAGE_SIZE, kv_cache_tokens=kept, window=window, sinks=sinks)
    engine = Engine(model, tokenizer, config)
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.8, top_p=0.95, seed=0)
    task = progress.add_task("generating", total=num_tokens)
    process, part_tokens = psutil.Process(), -(-num_tokens // PARTS)
    done = most_pages = 0
    seconds: list[float] = []
    resident: list[int] = []
    started_s = time.perf_counter()
    for chunk in engine.stream(prompt, params):
        done += len(chunk.token_ids)
        progress.update(task, completed=done)
        held = engine.cache.stats()
        most_pages = max(most_pages, held.window_pages - held.free_window_pages - held.evictable_window_pages)
        if done >= part_tokens * (len(seconds) + 1) or done == num_tokens > part_tokens * len(seconds):
            now_s = time.perf_counter()
            seconds.append(now_s - started_s)
            resident.append(process.memory_info().rss)
            started_s = now_s
    progress.remove_task(task)
    assert done == num_tokens, "the request ended early"
    return Writing(
        num_tokens, engine.stats().pool_bytes, engine.stats().cache.window_pages, most_pages, resident, seconds
    )


def _ids(tokenizer: Any, path: Path, limit: int, *, last: bool) -> Tensor:
    """The token that begins a sequence, if there is one, and tokens of the text."""
    text = read_text(path)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    taken = ids[-limit:] if last else ids[:limit]
    if len(taken) < 2 * PARTS:
        raise BenchError(f"{path} has {len(ids)} tokens; give a longer text")
    return torch.tensor([*begin, *taken])


def _print(readings: Sequence[Reading], writing: Writing | None, console: Console) -> None:
    _print_readings(readings, console)
    if writing is not None:
        _print_writing(writing, console)


def _print_readings(readings: Sequence[Reading], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="perplexity, tenth by tenth of the text")
    table.add_column("in sight", no_wrap=True)
    for heading in ("tokens", "all", "1st", "2nd", "3rd", "6th", "10th", "KV"):
        table.add_column(heading, justify="right", no_wrap=True)
    for reading in readings:
        shown = [reading.perplexities[i] for i in (0, 1, 2, 5, 9)]
        table.add_row(
            reading.name,
            f"{reading.num_tokens:,}",
            *(f"{value:.1f}" for value in (reading.perplexity, *shown)),
            f"{reading.pool_bytes / 1e6:.2f} MB",
        )
    console.print(table)


def _print_writing(writing: Writing, console: Console) -> None:
    first, last = writing.seconds[0], writing.seconds[-1]
    grown = writing.resident_bytes[-1] - writing.resident_bytes[0]
    console.print(
        f"{writing.num_tokens:,} tokens generated in one request. KV: {writing.pool_bytes / 1e6:.2f} MB from the first "
        f"to the last, {writing.window_pages} of {writing.pool_pages} pages in use at most. The process grew by "
        f"{grown / 1e6:.1f} MB from the end of the first tenth on (ids, pages and text). The last tenth took "
        f"{last / first:.2f} times as long as the first; {writing.num_tokens / sum(writing.seconds):,.0f} tokens/s.",
        highlight=False,
    )


def _draw(readings: Sequence[Reading], writing: Writing | None, path: Path) -> None:
    figure = pictures.new_figure(10, 3.4)
    axes = figure.subplots(1, 2 if writing else 1, squeeze=False)[0]
    for reading, color in zip(readings, ("#9dbebb", "#e3a592", "#c8553d")[-len(readings) :], strict=True):
        step = reading.num_tokens / PARTS
        places = [step * (i + 0.5) for i in range(PARTS)]
        axes[0].plot(places, reading.perplexities, marker="o", markersize=3, label=reading.name, color=color)
    axes[0].set(title="perplexity by position", xlabel="tokens read", yscale="log")
    axes[0].legend(fontsize=8, frameon=False)
    if writing is not None:
        step = writing.num_tokens / PARTS
        ends = [step * (i + 1) for i in range(len(writing.seconds))]
        axes[1].plot(ends, [size / 1e6 for size in writing.resident_bytes], color="#588b8b", label="process")
        axes[1].plot(ends, [writing.pool_bytes / 1e6] * len(ends), color="#c8553d", label="KV")
        axes[1].set(title="memory while generating, MB", xlabel="tokens generated", ylim=(0, None))
        axes[1].legend(fontsize=8, frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    pictures.save_figure(figure, path)
