"""`radixkv size`: what a model's KV cache costs, and how many sequences fit in a memory. Loads no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Annotated, Any

import typer

from radixkv.cli.display import note
from radixkv.errors import ConfigError
from radixkv.memory.kv_shape import DTYPE_BITS, KVShape, LayerKV, dtype_bits, kv_budget_bytes

GIB = 2**30
FALLBACK_DTYPE = "bfloat16"

SIZE_EPILOG = """
**Examples**

What a token of the demo model costs: `radixkv size demo`

How many sequences of 8,192 tokens fit beside 16 GiB of weights on an 80 GiB GPU, 10 % kept free:
`radixkv size Qwen/Qwen3-8B --seq-len 8192 --memory-gb 80 --weights-gb 16 --reserve 0.1`

The same model with fp8 KV, for a script: `radixkv size ./config.json --seq-len 8192 --dtype fp8 --json`
"""


@dataclass(frozen=True, slots=True)
class SizeReport:
    """What `size` was asked, and what follows from it. A figure whose question was not asked is None."""

    model: str
    model_type: str | None
    shape: KVShape
    dtype: str
    seq_len: int | None
    batch: int | None
    memory_bytes: int | None
    weights_bytes: int
    reserve: float

    @property
    def bytes_per_token(self) -> int:
        return self.shape.bytes_per_token(self.dtype)

    @property
    def bytes_per_sequence(self) -> int | None:
        return None if self.seq_len is None else self.shape.bytes_per_sequence(self.seq_len, self.dtype)

    @property
    def bytes_per_batch(self) -> int | None:
        if self.seq_len is None or self.batch is None:
            return None
        return self.shape.bytes_per_batch(self.batch, self.seq_len, self.dtype)

    @property
    def budget_bytes(self) -> int | None:
        if self.memory_bytes is None:
            return None
        return kv_budget_bytes(self.memory_bytes, self.weights_bytes, self.reserve)

    @property
    def max_tokens(self) -> int | None:
        return None if self.budget_bytes is None else self.budget_bytes // self.bytes_per_token

    @property
    def max_batch(self) -> int | None:
        if self.memory_bytes is None or self.seq_len is None:
            return None
        return self.shape.max_batch(self.memory_bytes, self.seq_len, self.dtype, self.weights_bytes, self.reserve)

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, for `--json`."""
        return {
            "model": self.model,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "seq_len": self.seq_len,
            "batch": self.batch,
            "memory_bytes": self.memory_bytes,
            "weights_bytes": self.weights_bytes,
            "reserve": self.reserve,
            "bytes_per_token": self.bytes_per_token,
            "bytes_per_sequence": self.bytes_per_sequence,
            "bytes_per_batch": self.bytes_per_batch,
            "budget_bytes": self.budget_bytes,
            "max_tokens": self.max_tokens,
            "max_batch": self.max_batch,
            "num_layers": self.shape.num_layers,
            "num_kv_layers": self.shape.num_kv_layers,
            "layers": [asdict(layer) for layer in self.shape.layers],
        }


def size(
    config_or_model: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_OR_MODEL",
            help='A config.json, a model directory, a hub id such as "Qwen/Qwen3-8B", or "demo".',
            show_default=False,
        ),
    ],
    seq_len: Annotated[int | None, typer.Option(help="Tokens of one sequence, prompt and output together.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences held at one time; needs --seq-len.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"What K and V are kept in: {', '.join(DTYPE_BITS)}.  [default: the config's own]"),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Memory for weights and KV, in GiB: a GB is 2**30 bytes here.")
    ] = None,
    weights_gb: Annotated[float, typer.Option(help="What the weights take of it, in GiB.")] = 0.0,
    reserve: Annotated[
        float, typer.Option(help="Share of what the weights leave that is kept free for activations, in [0, 1).")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, all sizes in bytes.")] = False,
) -> None:
    """Tell what a model's KV cache costs, per token, sequence and batch, and the largest batch a memory holds.

    A token costs the sum over layers of KV heads × (K dim + V dim) × bytes of the dtype.
    Only the model's config is read, no weights are loaded.
    """
    from radixkv.cli.config_source import kv_shape, read_config

    memory_bytes = None if memory_gb is None else _gib_to_bytes("--memory-gb", memory_gb, allow_zero=False)
    weights_bytes = _gib_to_bytes("--weights-gb", weights_gb, allow_zero=True)
    _check_positive("--seq-len", seq_len)
    _check_positive("--batch", batch)
    if not 0 <= reserve < 1:
        raise ConfigError(f"--reserve must lie in [0, 1), not {reserve}")
    if batch is not None and seq_len is None and not as_json:  # there null says it
        note("--batch says nothing without --seq-len: the size of a batch is that of its sequences")
    if memory_bytes is None and (weights_bytes or reserve) and not as_json:
        note("--weights-gb and --reserve say nothing without --memory-gb: they tell what of it is left for KV")
    if dtype is not None:
        dtype_bits(dtype)
    content = read_config(config_or_model)
    report = SizeReport(
        model=config_or_model,
        model_type=content.get("model_type"),
        shape=kv_shape(content),
        dtype=dtype or _dtype_of(content),
        seq_len=seq_len,
        batch=batch,
        memory_bytes=memory_bytes,
        weights_bytes=weights_bytes,
        reserve=reserve,
    )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _print_table(report)


def _gib_to_bytes(option: str, gib: float, *, allow_zero: bool) -> int:
    if not math.isfinite(gib) or gib < 0 or (gib == 0 and not allow_zero):
        raise ConfigError(
            f"{option} must be a finite number of GiB {'of at least' if allow_zero else 'above'} 0, not {gib}"
        )
    return int(Fraction(str(gib)) * GIB)


def _check_positive(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{option} must be at least 1, not {value}")


def _dtype_of(content: dict[str, Any]) -> str:
    """The dtype that a config states for its weights, which KV takes too."""
    from radixkv.memory.config_fields import decoder_fields

    decoder = decoder_fields(content)
    stated = next(
        (part[name] for part in (decoder, content) for name in ("dtype", "torch_dtype") if part.get(name)), None
    )
    name = str(stated or FALLBACK_DTYPE).removeprefix("torch.")
    if name not in DTYPE_BITS:
        raise ConfigError(f"the config's dtype {name!r} is not known; choose one with --dtype: {', '.join(DTYPE_BITS)}")
    return name


def _print_table(report: SizeReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"KV cache of {escape(report.model)}, {report.dtype}", box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right", style="bold")
    table.add_column(justify="right", style="dim")
    for row in _rows(report):
        table.add_row(*row)
    Console().print(table)


def _rows(report: SizeReport) -> Iterator[tuple[str, str, str]]:
    """Label, readable figure and exact figure of each line of the table."""
    for layer, count in report.shape.groups():
        yield (f"{count} of {report.shape.num_layers} layers", *_describe(layer, report.dtype))
    yield ("one token", *_bytes(report.bytes_per_token))
    if report.bytes_per_sequence is not None:
        yield (f"one sequence of {report.seq_len:,} tokens", *_bytes(report.bytes_per_sequence))
    if report.bytes_per_batch is not None:
        yield (f"a batch of {report.batch:,} sequences", *_bytes(report.bytes_per_batch))
    if report.budget_bytes is not None:
        yield ("memory left for KV", *_bytes(report.budget_bytes))
        yield ("tokens that fit", f"{report.max_tokens:,}", "")
    if report.max_batch is not None:
        yield ("largest batch", f"{report.max_batch:,}", f"sequences of {report.seq_len:,} tokens")


def _describe(layer: LayerKV, dtype: str) -> tuple[str, str]:
    """What a layer keeps, and what that costs per token."""
    if not layer.holds_kv:
        return "no KV", ""
    per_token = f"{layer.bytes_per_token(dtype):,} bytes a token"
    if layer.is_latent:
        return f"a latent of {layer.k_head_dim}", per_token
    dims = str(layer.k_head_dim) if layer.k_head_dim == layer.v_head_dim else f"{layer.k_head_dim}/{layer.v_head_dim}"
    return f"{layer.num_kv_heads} KV heads of {dims}", per_token


def _bytes(num_bytes: int) -> tuple[str, str]:
    return readable_bytes(num_bytes), f"{num_bytes:,} bytes"


def readable_bytes(num_bytes: int) -> str:
    """`num_bytes` in the largest unit that leaves at least 1.

    >>> readable_bytes(12288), readable_bytes(70272), readable_bytes(512)
    ('12 KiB', '68.6 KiB', '512 bytes')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:,.1f}".removesuffix(".0") + f" {unit}"
    return f"{num_bytes} bytes"
