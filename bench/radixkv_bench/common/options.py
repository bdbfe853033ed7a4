"""Options that several benches take, each declared once."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.models import RandomModel, parse_random_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""By what --dtype takes."""

SIZES = "Sizes of the workload"
RUN = "How it is run"

Rounds = Annotated[
    int,
    typer.Option(min=1, rich_help_panel=RUN, help="Times everything is run, interleaved; the medians count."),
]
Device = Annotated[str, typer.Option(rich_help_panel=RUN, help="cpu, cuda, or auto: CUDA if there is one.")]
ModelName = Annotated[
    str | None, typer.Option(help="A local directory or a hub id.", show_default="demo: it ships with radixkv")
]
RandomModelSizes = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES",
        help="A Llama with random weights instead, as in hidden=512,layers=8,heads=8,kv_heads=2; "
        "also intermediate=, vocab=, head_dim=.",
    ),
]


def size(help_text: str, *, least: int | None = None) -> Any:
    """An option that says how large the workload is; `least` is the smallest value allowed."""
    return typer.Option(min=least, rich_help_panel=SIZES, help=help_text)


def choose_model(model: str | None, random_model: str | None) -> str | RandomModel:
    """The model that --model or --random-model names; "demo" without either. Raises: BenchError if both are given."""
    if model is not None and random_model is not None:
        raise BenchError("--model and --random-model both say which model to run; give one of them")
    return model or "demo" if random_model is None else parse_random_model(random_model)


def choose_dtype(name: str) -> torch.dtype:
    """The dtype that --dtype names. Raises: BenchError for an unknown one."""
    if name not in DTYPES:
        raise BenchError(f"--dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES[name]
