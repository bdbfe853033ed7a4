"""Who takes part in a case of bench/attention.py: our backends, and the plain ways in torch."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from radixkv.attention.backend import backend_names, choose_backend, why_not
from radixkv_bench.attention.setup import Setup
from radixkv_bench.common.device_timing import fastest

PLAIN, CONTIGUOUS, INT8 = "gather + SDPA", "contiguous SDPA", "triton int8"
FLAT = " flat"  # what is added to a backend's name where it does not know what requests share
REFERENCE = "reference"  # registered to check others against; takes part only where it is asked for
READ_ALONE = ("torch", REFERENCE)  # backends that read each sequence alone, whatever is shared

RunLayer = Callable[[int], Tensor]
KV = tuple[Tensor, Tensor]
"""Keys and values, each [batch, heads, context, head_dim]."""


class Contender(NamedTuple):
    """Computes the next layer with each call; `kv_bytes` is the KV that a layer has to read."""

    name: str
    call: Callable[[], Tensor]
    kv_bytes: int
    tolerance: float | None = None


def make_coded_contenders(setup: Setup, only: Sequence[str] = ()) -> list[Contender]:
    """Our backends that read the setup's codes in place, of those of `only` if it names any. Each has been checked."""
    able = [name for name in only or backend_names() if name not in READ_ALONE and why_not(name, setup.needs) is None]
    contenders = [
        Contender(f"{name} {setup.kv_dtype}", _in_turns(_backend(setup, name, with_path=True), setup), setup.kv_bytes)
        for name in able
    ]
    for contender in contenders:
        setup.check(contender.name, contender.call())
    return contenders


def make_contenders(setup: Setup, only: Sequence[str] = ()) -> list[Contender]:
    """All that can serve the case, ours first; `only` names the backends that are wanted. Each has been checked."""
    contenders = list(_make(setup, only))
    for contender in contenders:
        setup.check(contender.name, contender.call(), contender.tolerance)
    return contenders


def _make(setup: Setup, only: Sequence[str]) -> Iterator[Contender]:
    kv_bytes = setup.kv_bytes
    for name in only or [name for name in backend_names() if name != REFERENCE]:
        if why_not(name, setup.needs) is None:
            yield Contender(name, _in_turns(_backend(setup, name, with_path=True), setup), kv_bytes)
            if setup.case.shared and name not in READ_ALONE:
                yield Contender(name + FLAT, _in_turns(_backend(setup, name, with_path=False), setup), kv_bytes)
    if _int8_fits(setup, only):
        from radixkv_bench.attention import int8 as attention_int8

        run, int8_bytes = attention_int8.make(setup)
        yield Contender(INT8, _in_turns(run, setup), int8_bytes, attention_int8.TOLERANCE)
    yield Contender(PLAIN, _in_turns(_fastest(_gathering(setup), setup), setup), kv_bytes)
    if setup.case.new > 1:
        yield Contender(CONTIGUOUS, _in_turns(_fastest(_contiguous(setup), setup), setup), kv_bytes)


def _in_turns(run: RunLayer, setup: Setup) -> Callable[[], Tensor]:
    layers = itertools.cycle(range(setup.num_layers))
    return lambda: run(next(layers))


def _int8_fits(setup: Setup, only: Sequence[str]) -> bool:
    wanted = not only or "triton" in only
    able = setup.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return wanted and able and setup.case.new == 1 and not setup.case.shared


def _backend(setup: Setup, name: str, *, with_path: bool) -> RunLayer:
    backend_class = choose_backend(name, setup.needs)
    backend = backend_class(setup.pool(backend_class.layout(setup.needs)), setup.needs)
    plan = backend.plan(setup.metadata(with_path=with_path))
    return lambda layer: plan.attend(layer, setup.q, setup.params)


# -- the plain ways --------------------------------------------------------------------------------------------------


def _fastest(variants: dict[str, RunLayer], setup: Setup) -> RunLayer:
    calls = {name: _in_turns(run, setup) for name, run in variants.items()}
    return variants[fastest(calls, setup.device)]


def _gathering(setup: Setup) -> dict[str, RunLayer]:
    """Copy each request's pages into one piece, then dense attention."""
    case, pool = setup.case, setup.pool("nhd")
    pages = torch.from_numpy(setup.page_table).flatten().to(setup.device, torch.int64)

    def gather(layer: int) -> KV:
        k, v = (x.unflatten(0, (case.batch, -1)) for x in pool.gather(layer, pages))
        return k[:, : case.context].transpose(1, 2), v[:, : case.context].transpose(1, 2)

    bias = _bias(setup) if case.new > 1 else None
    return {
        "group": lambda layer: _attend(setup, gather(layer), bias),
        "repeat": lambda layer: _attend(setup, _repeat(gather(layer), setup), bias),
    }


def _contiguous(setup: Setup) -> dict[str, RunLayer]:
    """Dense attention over KV that lies in one piece to begin with, and under a mask that is there."""
    case, pool = setup.case, setup.pool("nhd")
    pages = torch.from_numpy(setup.page_table).flatten().to(setup.device, torch.int64)

    def lay_out(layer: int) -> KV:
        k, v = (x.unflatten(0, (case.batch, -1))[:, : case.context] for x in pool.gather(layer, pages))
        return k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()

    kv = [lay_out(layer) for layer in range(setup.num_layers)]
    visible, bias, flag = _visible(setup), _bias(setup), causal_lower_right(case.new, case.context)
    return {
        "bias": lambda layer: _attend(setup, kv[layer], bias),
        "mask": lambda layer: _attend(setup, kv[layer], visible),
        "flag": lambda layer: _attend(setup, kv[layer], flag),
        "bias, repeat": lambda layer: _attend(setup, _repeat(kv[layer], setup), bias),
        "flag, repeat": lambda layer: _attend(setup, _repeat(kv[layer], setup), flag),
    }


def _attend(setup: Setup, kv: KV, mask: Tensor | None) -> Tensor:
    """Returns [num_tokens, q_heads, head_dim]."""
    k, v = kv
    q = setup.q.unflatten(0, (setup.case.batch, -1)).transpose(1, 2)  # [batch, q_heads, new, head_dim]
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=setup.params.scale, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


def _repeat(kv: KV, setup: Setup) -> KV:
    """Each KV head as often as query heads read it."""
    group = setup.case.q_heads // setup.case.kv_heads
    k, v = kv
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def _visible(setup: Setup) -> Tensor:
    """Which tokens each new one sees, [new, context]."""
    case = setup.case
    return torch.ones(case.new, case.context, dtype=torch.bool, device=setup.device).tril(case.context - case.new)


def _bias(setup: Setup) -> Tensor:
    visible = _visible(setup)
    return torch.zeros_like(visible, dtype=setup.dtype).masked_fill_(~visible, float("-inf"))
