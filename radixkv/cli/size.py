"""`radixkv size`: what a model's KV cache costs, and how many sequences fit in a memory. Loads no weights."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Annotated, Any

import typer

from radixkv.cli.display import note
from radixkv.cli.setting_options import count_option
from radixkv.cli.size_report import SizeReport, print_tables
from radixkv.config import EngineConfig
from radixkv.config.checks import Bounds, checked_number
from radixkv.errors import ConfigError, UnsupportedModelError
from radixkv.memory.config_fields import decoder_fields
from radixkv.memory.config_windows import unplaced_window
from radixkv.memory.kv_shape import DTYPE_BITS, dtype_bits

GIB = 2**30
FALLBACK_DTYPE = "bfloat16"
MODEL_DTYPES = ("float32", "bfloat16", "float16")  # others are of KV alone

SIZE_EPILOG = """
**Examples**

What a token of the demo model costs: `radixkv size demo`

How many sequences of 8,192 tokens fit beside 16 GiB of weights on an 80 GiB GPU, 10 % kept free:
`radixkv size Qwen/Qwen3-8B --seq-len 8192 --memory-gb 80 --weights-gb 16 --reserve 0.1`

The same model with fp8 KV, for a script: `radixkv size ./config.json --seq-len 8192 --dtype fp8 --json`
"""


def _checked_dtype(name: str | None) -> str | None:
    if name is not None:
        dtype_bits(name)
    return name


def _checked_reserve(share: float) -> float:
    if not 0 <= share < 1:
        raise ConfigError(f"--reserve must be a number in [0, 1), not {share}")
    return share


def size(
    config_or_model: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_OR_MODEL",
            help='A config.json, a model directory, a hub id such as "Qwen/Qwen3-8B", or "demo".',
            show_default=False,
        ),
    ],
    seq_len: Annotated[int | None, count_option("Tokens of one sequence, prompt and output together.")] = None,
    batch: Annotated[int | None, count_option("Sequences held at one time; needs --seq-len.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"What K and V are kept in: {', '.join(DTYPE_BITS)}; int8, int4 and fp4 with their scales.  "
            "[default: the config's own]",
            callback=_checked_dtype,
        ),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Memory for weights, KV and states, in GiB: a GB is 2**30 bytes here.")
    ] = None,
    weights_gb: Annotated[
        float, typer.Option(help="What the weights take of it, in GiB; with --seq-len also the share that KV takes.")
    ] = 0.0,
    reserve: Annotated[
        float, typer.Option(help="Share of the rest kept free for activations, in [0, 1).", callback=_checked_reserve)
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, all sizes in bytes.")] = False,
) -> None:
    """Tell what a model's KV cache costs, per token, sequence and batch, and the largest batch a memory holds.

    A token costs the sum over layers of KV heads × (K dim + V dim) × bytes of the dtype.
    Recurrent layers keep a state of one size per sequence in place of KV, which is counted beside it.
    Only the model's config is read, no weights are loaded.

    A second table tells what other dtypes, other numbers of KV heads, and windows that forget what no later token sees
    would cost. The engine forgets that, too.
    """
    from radixkv.cli.config_source import layers, read_config, states

    memory_bytes = None if memory_gb is None else _gib_to_bytes("--memory-gb", memory_gb, Bounds(above=0))
    weights_bytes = _gib_to_bytes("--weights-gb", weights_gb, Bounds(minimum=0))
    if not as_json:  # there null says it
        _note_unused(seq_len, batch, memory_bytes, says_what_is_left=bool(reserve or (weights_bytes and not seq_len)))
    content = read_config(config_or_model)
    known_layers = layers(content)
    try:
        known_states, uncounted_states = states(content), None
    except UnsupportedModelError as error:  # what is known of KV is of use without them
        known_states, uncounted_states = (), str(error)
    kv_dtype = dtype or _dtype_of(content)
    report = SizeReport(
        model=config_or_model,
        model_type=content.get("model_type"),
        layers=known_layers,
        states=known_states,
        uncounted_states=uncounted_states,
        dtype=kv_dtype,
        model_dtype=kv_dtype if kv_dtype in MODEL_DTYPES else _model_dtype_of(content),
        running_limit=EngineConfig().running_limit,
        seq_len=seq_len,
        batch=batch,
        memory_bytes=memory_bytes,
        weights_bytes=weights_bytes,
        reserve=reserve,
        unplaced_window=unplaced_window(decoder_fields(content)),
    )
    _print(report, as_json=as_json)


def _print(report: SizeReport, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        print_tables(report)


def _note_unused(seq_len: int | None, batch: int | None, memory_bytes: int | None, *, says_what_is_left: bool) -> None:
    """Name the options that change nothing because another one is missing."""
    if batch is not None and seq_len is None:
        note("--batch says nothing without --seq-len: the size of a batch is that of its sequences")
    if memory_bytes is None and says_what_is_left:
        note("--weights-gb and --reserve say nothing without --memory-gb: they tell what of it is left for KV")


def _gib_to_bytes(option: str, gib: float, bounds: Bounds) -> int:
    return int(Fraction(str(checked_number(option, gib, bounds, what="a finite number of GiB"))) * GIB)


def _dtype_of(content: dict[str, Any]) -> str:
    """The dtype that a config states for its weights, which KV takes too."""
    name = _stated_dtype(content)
    if name not in DTYPE_BITS:
        raise ConfigError(f"the config's dtype {name!r} is not known; choose one with --dtype: {', '.join(DTYPE_BITS)}")
    return name


def _model_dtype_of(content: dict[str, Any]) -> str:
    """That in which the model computes, whatever KV is kept in."""
    name = _stated_dtype(content)
    return name if name in MODEL_DTYPES else FALLBACK_DTYPE


def _stated_dtype(content: dict[str, Any]) -> str:
    decoder = decoder_fields(content)
    stated = next(
        (part[name] for part in (decoder, content) for name in ("dtype", "torch_dtype") if part.get(name)), None
    )
    return str(stated or FALLBACK_DTYPE).removeprefix("torch.")
