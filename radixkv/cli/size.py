"""`radixkv size`: what a model's KV cache costs, and how many sequences fit in a memory. Loads no weights."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Annotated, Any

import typer

from radixkv.cli.display import note
from radixkv.cli.size_report import SizeReport, print_tables
from radixkv.errors import ConfigError
from radixkv.memory.config_fields import decoder_fields
from radixkv.memory.config_windows import unplaced_window
from radixkv.memory.kv_shape import DTYPE_BITS, dtype_bits

GIB = 2**30
FALLBACK_DTYPE = "bfloat16"

SIZE_EPILOG = """
**Examples**

What a token of the demo model costs: `radixkv size demo`

How many sequences of 8,192 tokens fit beside 16 GiB of weights on an 80 GiB GPU, 10 % kept free:
`radixkv size Qwen/Qwen3-8B --seq-len 8192 --memory-gb 80 --weights-gb 16 --reserve 0.1`

The same model with fp8 KV, for a script: `radixkv size ./config.json --seq-len 8192 --dtype fp8 --json`
"""


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
        typer.Option(
            help=f"What K and V are kept in: {', '.join(DTYPE_BITS)}; int8 and int4 with their scales.  "
            "[default: the config's own]"
        ),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Memory for weights and KV, in GiB: a GB is 2**30 bytes here.")
    ] = None,
    weights_gb: Annotated[
        float, typer.Option(help="What the weights take of it, in GiB; with --seq-len also the share that KV takes.")
    ] = 0.0,
    reserve: Annotated[
        float, typer.Option(help="Share of what the weights leave that is kept free for activations, in [0, 1).")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, all sizes in bytes.")] = False,
) -> None:
    """Tell what a model's KV cache costs, per token, sequence and batch, and the largest batch a memory holds.

    A token costs the sum over layers of KV heads × (K dim + V dim) × bytes of the dtype.
    Only the model's config is read, no weights are loaded.

    A second table tells what other dtypes, other numbers of KV heads, and windows that forget what no later token sees
    would cost. The engine forgets that, too.
    """
    from radixkv.cli.config_source import layers, read_config

    memory_bytes = None if memory_gb is None else _gib_to_bytes("--memory-gb", memory_gb, allow_zero=False)
    weights_bytes = _gib_to_bytes("--weights-gb", weights_gb, allow_zero=True)
    _check_positive("--seq-len", seq_len)
    _check_positive("--batch", batch)
    if not 0 <= reserve < 1:
        raise ConfigError(f"--reserve must lie in [0, 1), not {reserve}")
    if batch is not None and seq_len is None and not as_json:  # there null says it
        note("--batch says nothing without --seq-len: the size of a batch is that of its sequences")
    says_nothing = reserve or (weights_bytes and seq_len is None)
    if memory_bytes is None and says_nothing and not as_json:
        note("--weights-gb and --reserve say nothing without --memory-gb: they tell what of it is left for KV")
    if dtype is not None:
        dtype_bits(dtype)
    content = read_config(config_or_model)
    report = SizeReport(
        model=config_or_model,
        model_type=content.get("model_type"),
        layers=layers(content),
        dtype=dtype or _dtype_of(content),
        seq_len=seq_len,
        batch=batch,
        memory_bytes=memory_bytes,
        weights_bytes=weights_bytes,
        reserve=reserve,
        unplaced_window=unplaced_window(decoder_fields(content)),
    )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        print_tables(report)


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
    decoder = decoder_fields(content)
    stated = next(
        (part[name] for part in (decoder, content) for name in ("dtype", "torch_dtype") if part.get(name)), None
    )
    name = str(stated or FALLBACK_DTYPE).removeprefix("torch.")
    if name not in DTYPE_BITS:
        raise ConfigError(f"the config's dtype {name!r} is not known; choose one with --dtype: {', '.join(DTYPE_BITS)}")
    return name
