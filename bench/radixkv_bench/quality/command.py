"""What quantised KV costs in quality: perplexity, logits and greedy tokens, against KV in the model's own dtype.

python bench/kv_quality.py --help
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from radixkv.attention.backend import AttentionNeeds, LayerAttention, choose_backend
from radixkv.attention.metadata import SequenceSpan, build_metadata
from radixkv.attention.sharing_backend import make_sharing_backend, owning
from radixkv.memory.kv_codes import CODE_FORMS
from radixkv.memory.quantized_pool import kv_bytes_per_token, make_kv_pool
from radixkv.models.loader import load
from radixkv.models.paged_attention import PagedContext, flattened_forward
from radixkv.models.probe import plug_in_paged_attention
from radixkv_bench.common import machine, pictures
from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.files import HELD_OUT, read_text
from radixkv_bench.common.options import Device

PAGE_SIZE = 16
LIMIT_PERCENT = {"int8": 0.5, "fp8_e4m3": 0.5, "int4": 3.0, "fp4": 3.0}  # of perplexity


@dataclass(frozen=True, slots=True)
class Row:
    """What one form of KV costs.

    Attributes:
        perplexity_percent: how much more perplexity than with KV in the model's dtype.
        perplexity_percent_error: standard error of that, as tokens differ.
        logit_error: root mean square of what is added to the logits.
        greedy_agreement: share of places where the likeliest token is the same.
        bytes_per_token: of KV and scales, in all layers.
        tokens_of_16_bit: how many times the tokens of 16-bit KV fit the same memory.
    """

    kv_dtype: str
    backend: str
    perplexity: float
    perplexity_percent: float
    perplexity_percent_error: float
    logit_error: float
    greedy_agreement: float
    bytes_per_token: int
    tokens_of_16_bit: float

    @property
    def meets_target(self) -> bool | None:
        """Whether it costs no more than it may; None where nothing is set."""
        limit = LIMIT_PERCENT.get(self.kv_dtype)
        return None if limit is None else self.perplexity_percent <= limit


class Reader:
    """Runs windows of a text through the model, with KV as `kv_dtype` says, from an empty pool each."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[LayerAttention], kv_dtype: str, window: int) -> None:
        self._model, self._num_pages = model, -(-window // PAGE_SIZE)
        needs = AttentionNeeds(tuple(layers), PAGE_SIZE, model.dtype, model.device, kv_dtype)
        backend_class = choose_backend("numba" if model.device.type == "cpu" else "torch", needs)
        owners = owning(needs)
        pool = make_kv_pool(
            backend_class.layout(owners),
            [layer.kv for layer in owners.layers],
            kv_dtype=kv_dtype,
            num_pages=self._num_pages,
            page_size=PAGE_SIZE,
            dtype=model.dtype,
            device=model.device,
        )
        self.backend = make_sharing_backend(layers, backend_class(pool, owners))

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """After each token of a window, [tokens, vocab_size] in float32."""
        span = SequenceSpan(0, len(ids), np.arange(self._num_pages, dtype=np.int32))
        metadata = build_metadata([span], page_size=PAGE_SIZE, device=self._model.device)
        context = PagedContext(self.backend.plan(metadata), self.backend.num_layers)
        rows = torch.arange(len(ids), device=self._model.device)
        logits = flattened_forward(self._model, ids, metadata.positions, rows, context)
        context.check_complete()
        return logits.float()


@command("kv_quality")
def main(
    text: Annotated[
        Path | None, typer.Argument(metavar="TEXT", help="What to read.", show_default="a held-out part of the plays")
    ] = None,
    model: Annotated[str, typer.Option(help='"demo", a directory or a hub id.')] = "demo",
    kv_dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(CODE_FORMS), help="May be given again.", show_default="all"),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read at a time, each from nothing.")] = 1024,
    limit: Annotated[int, typer.Option(min=2, help="Tokens of the text that are read at most.")] = 16384,
    device: Device = "cpu",
) -> Outcome:
    """Read a text with KV in each quantised form and in the model's own dtype, and compare what the model makes of it.

    Every token's K and V are coded before anything reads them, its own included.

    Exits with 2 if the command cannot be run.
    """
    names = _known(kv_dtype or list(CODE_FORMS))
    where = machine.choose_device(device)
    loaded, tokenizer = load(model, dtype="auto", device=str(where))
    if tokenizer is None:
        raise BenchError(f"{model} has no tokenizer")
    windows = _windows(tokenizer, text or HELD_OUT, window, limit, where)
    rows = measure(loaded, windows, names)
    figures = {"machine": machine.describe(where), "model": model, "rows": [asdict(row) for row in rows]}
    return Outcome(figures, partial(_print, rows, sum(map(len, windows))), partial(_draw, rows))


def measure(model: PreTrainedModel, windows: Sequence[Tensor], kv_dtypes: Sequence[str]) -> list[Row]:
    """A row for KV in the model's own dtype, and one for each form."""
    layers = plug_in_paged_attention(model.eval())
    readers = [Reader(model, layers, name, max(map(len, windows))) for name in ("auto", *kv_dtypes)]
    found: list[list[_Reading]] = [[] for _ in readers]
    hidden = not sys.stderr.isatty()
    for ids in track(windows, "windows", console=error_console(), transient=True, disable=hidden):
        exact = readers[0].logits(ids)
        for reader, readings in zip(readers, found, strict=True):
            readings.append(_compare(exact, exact if reader is readers[0] else reader.logits(ids), ids))
    exact_nats = torch.cat([reading.nats for reading in found[0]])
    kept = [layer.kv for layer in layers if layer.reads is None]
    rows = []
    for name, reader, readings in zip(("auto", *kv_dtypes), readers, found, strict=True):
        nats = torch.cat([reading.nats for reading in readings])
        more = nats - exact_nats
        num_bytes = kv_bytes_per_token(kept, name, model.dtype)
        rows.append(
            Row(
                kv_dtype=name if name != "auto" else str(model.dtype).removeprefix("torch."),
                backend=reader.backend.name,
                perplexity=math.exp(nats.mean()),
                perplexity_percent=100 * math.expm1(more.mean()),
                perplexity_percent_error=100 * float(more.std() / math.sqrt(len(more))),
                logit_error=math.sqrt(torch.cat([reading.squares for reading in readings]).mean()),
                greedy_agreement=float(torch.cat([reading.agrees for reading in readings]).double().mean()),
                bytes_per_token=num_bytes,
                tokens_of_16_bit=kv_bytes_per_token(kept, "auto", torch.bfloat16) / num_bytes,
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class _Reading:
    """Of each place of a window."""

    nats: Tensor  # of the next token; one fewer
    squares: Tensor  # mean square of what was added to the logits
    agrees: Tensor


def _compare(exact: Tensor, logits: Tensor, ids: Tensor) -> _Reading:
    return _Reading(
        cross_entropy(logits[:-1], ids[1:], reduction="none").double().cpu(),
        (logits - exact).double().square().mean(1).cpu(),
        (logits.argmax(1) == exact.argmax(1)).cpu(),
    )


def _known(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in CODE_FORMS:
            raise BenchError(f"--kv-dtype must be one of {', '.join(CODE_FORMS)}, not {name!r}")
    return names


def _windows(tokenizer: Any, path: Path, window: int, limit: int, device: torch.device) -> list[Tensor]:
    text = read_text(path)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:limit], device=device)
    windows = [part for part in ids.split(window) if len(part) > 1]
    if not windows:
        raise BenchError(f"{path} has {len(ids)} tokens; give a longer text")
    return windows


def _print(rows: Sequence[Row], num_tokens: int, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("KV", no_wrap=True)
    for heading in (
        "perplexity",
        "more",
        "logits\noff by",
        "same greedy\ntoken",
        "bytes\na token",
        "tokens\nof 16 bit",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.kv_dtype,
            f"{row.perplexity:.3f}",
            f"{row.perplexity_percent:+.2f} ± {row.perplexity_percent_error:.2f} %" if row is not rows[0] else "",
            f"{row.logit_error:.3f}" if row is not rows[0] else "",
            f"{row.greedy_agreement:.1%}" if row is not rows[0] else "",
            f"{row.bytes_per_token:,}",
            f"{row.tokens_of_16_bit:.2f} x",
        )
    console.print(table)
    targets = [
        f"{row.kv_dtype} ≤ {LIMIT_PERCENT[row.kv_dtype]:g} %: {'met' if row.meets_target else 'missed'}"
        for row in rows
        if row.meets_target is not None
    ]
    console.print(f"{num_tokens:,} tokens. " + (f"Targets: {', '.join(targets)}." if targets else ""))


def _draw(rows: Sequence[Row], path: Path) -> None:
    figure = pictures.new_figure(9, 3)
    quality, memory = figure.subplots(1, 2)
    names = [row.kv_dtype for row in rows]
    quality.barh(
        names,
        [row.perplexity_percent for row in rows],
        xerr=[row.perplexity_percent_error for row in rows],
        color="#c8553d",
    )
    quality.set_title("more perplexity, % (less is better)", fontsize=10)
    memory.barh(names, [row.tokens_of_16_bit for row in rows], color="#588b8b")
    memory.set_title("tokens in the memory of one of 16 bit", fontsize=10)
    for axes in (quality, memory):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    pictures.save_figure(figure, path)
