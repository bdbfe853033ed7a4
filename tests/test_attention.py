"""Every backend computes what the reference does, wherever the pages lie and whatever lies in the others."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from attention_cases import Case, Spans
from child_process import child_environment
from radixkv.attention.backend import (
    AttentionParams,
    backend_names,
    choose_backend,
    register_backend,
    register_backend_path,
    unregister_backend,
    why_not,
)
from radixkv.attention.numba_backend import break_even
from radixkv.attention.shared_prefix import BreakEven, plan_cascade
from radixkv.attention.torch_backend import TorchBackend
from radixkv.errors import UnsupportedBackendError

SPANS = [(0, 1), (0, 13), (20, 21), (37, 38), (15, 33), (16, 17), (31, 32), (3, 40)]  # [first, last) of each sequence
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 7},
    "chunk": {"chunk_size": 8},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "window, softcap and sinks": {"sliding_window": 11, "softcap": 3.0, "sinks": True},
    "key bias": {"key_bias": True},
    "key bias, window, softcap and sinks": {"key_bias": True, "sliding_window": 11, "softcap": 3.0, "sinks": True},
    "streaming": {"sliding_window": 7, "sink_tokens": 4},
    "streaming, softcap and sinks": {"sliding_window": 9, "sink_tokens": 5, "softcap": 3.0, "sinks": True},
}
# (backend, device); Triton's and FlashInfer's own tests run them without a GPU
TARGETS = [(name, "cpu") for name in ("numba", "torch")]
if torch.cuda.is_available():
    TARGETS += [(name, "cuda") for name in ("flashinfer", "triton", "torch")]
ON_TARGETS = pytest.mark.parametrize(
    "target",
    [pytest.param(target, marks=[pytest.mark.gpu] * (target[1] == "cuda"), id="-".join(target)) for target in TARGETS],
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (query heads of a KV head, head_dim). Every pair of a dtype and a number of rows is a kernel to compile, for seconds.
# Rows count through the tile alone: 1 and 2, 3 to 5, 6, and 7 and 8 have the same. So one dtype covers all tiles, the
# others 2 and 8 rows, which their other tests need anyway; every pair is covered under `stress`.
GROUPS = [*itertools.product(range(1, 9), [64]), (7, 80), (2, 96), (1, 256)]
GROUPS_OF = {
    torch.float32: [(1, 64), (2, 64), (3, 64), (6, 64), (8, 64), (3, 80), (2, 96), (1, 256)],
    torch.bfloat16: [(2, 64), (8, 64), (2, 256)],
    torch.float16: [(2, 64), (8, 64)],
}


def check(target: tuple[str, str], spans: Spans, option: str = "plain", **shape: Any) -> None:
    """The backend agrees with the reference, or says why it cannot serve the case."""
    backend, device = target
    case = Case(spans, device=device, **shape)
    params = case.params(**OPTIONS[option])
    reason = why_not(backend, case.needs(params))
    if reason is None:
        case.check(backend, params)
    else:
        assert backend == "flashinfer", reason  # the others take everything here


@ON_TARGETS
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(target: tuple[str, str], option: str, page_size: int, dtype: torch.dtype) -> None:
    check(target, SPANS, option, page_size=page_size, dtype=dtype)


@ON_TARGETS
@pytest.mark.parametrize(
    ("dtype", "group", "head_dim"), [(dtype, *size) for dtype, sizes in GROUPS_OF.items() for size in sizes]
)
def test_groups_and_head_sizes(target: tuple[str, str], dtype: torch.dtype, group: int, head_dim: int) -> None:
    check(target, SPANS[2:6], num_q_heads=2 * group, head_dim=head_dim, dtype=dtype)


@pytest.mark.stress
@ON_TARGETS
@pytest.mark.parametrize(("group", "head_dim"), GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_group_in_every_dtype(target: tuple[str, str], dtype: torch.dtype, group: int, head_dim: int) -> None:
    check(target, SPANS[2:6], num_q_heads=2 * group, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_backend_hands_on_what_the_reference_computes(dtype: torch.dtype) -> None:
    check(("reference", "cpu"), SPANS, "window, softcap and sinks", dtype=dtype)


@ON_TARGETS
def test_values_of_another_size_than_keys(target: tuple[str, str]) -> None:
    check(target, SPANS, page_size=4, num_q_heads=4, num_kv_heads=4, head_dim=24, v_head_dim=16)


@ON_TARGETS
def test_extends_over_prefixes_of_every_length_around_page_borders(target: tuple[str, str]) -> None:
    spans = [(first, last) for last in range(14, 35) for first in range(max(0, last - 18), last)]
    check(target, spans, num_q_heads=2, num_kv_heads=1, head_dim=16)


SHARED_DTYPES_OF = {"plain": DTYPES, "streaming, softcap and sinks": DTYPES[1:]}  # the others in one dtype
NESTED = {(0, 1, 2, 3, 4, 5, 6, 7, 8): 1536, (0, 1, 2, 3, 4, 5, 6, 7): 2304, (1, 2): 2320}


@ON_TARGETS
@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        pytest.param(
            option, dtype, marks=[] if dtype in SHARED_DTYPES_OF.get(option, DTYPES[:1]) else [pytest.mark.stress]
        )
        for option in OPTIONS
        for dtype in DTYPES
    ],
)
def test_shared_prefixes_count_the_same(target: tuple[str, str], option: str, dtype: torch.dtype) -> None:
    lasts = [2305, 2340, 2333, 2400, 2306, 2499, 2310, 2370, 1700, 30]
    spans = [*((last - 1, last) for last in lasts), (20, 45)]
    num_q_heads = 4 if dtype == torch.float32 else 8
    check(target, spans, option, num_q_heads=num_q_heads, num_kv_heads=4, dtype=dtype, shared=NESTED)


def test_what_is_shared_by_many_is_read_once_on_every_level() -> None:
    spans = [(last - 1, last) for last in (2305, 2340, 2333, 2400, 2306, 2499, 2310, 2370, 1700)]
    metadata = Case(spans, shared=NESTED).metadata
    plan = plan_cascade(metadata, break_even(group=1))
    assert [(part.sequences.tolist(), part.first, part.last) for part in plan.parts] == [
        (list(range(9)), 0, 1536),
        (list(range(8)), 1536, 2304),
    ]
    assert plan.private_starts.tolist() == [2304] * 8 + [1536]


@pytest.mark.parametrize(
    ("shared_tokens", "last", "min_tokens", "parts"),
    [(128, 129, 128, [(0, 128)]), (128, 128, 112, [(0, 112)]), (128, 128, 128, []), (112, 200, 128, [])],
    ids=["all but the last token", "a sequence keeps its last page", "too short then", "too short"],
)
def test_what_pays(shared_tokens: int, last: int, min_tokens: int, parts: list[tuple[int, int]]) -> None:
    metadata = Case([(last - 1, last)] * 3, shared={(0, 1, 2): shared_tokens}).metadata
    plan = plan_cascade(metadata, BreakEven(min_sequences=3, min_tokens=min_tokens))
    assert [(part.first, part.last) for part in plan.parts] == parts
    assert plan_cascade(metadata, BreakEven(min_sequences=4, min_tokens=1)).parts == []
    assert plan_cascade(metadata, BreakEven(2, 1, min_saved_tokens=2 * last)).parts == []


def test_tokens_of_a_node_that_does_not_pay_are_left_to_its_children() -> None:
    spans = [(299, 300)] * 4
    metadata = Case(spans, shared={(0, 1, 2, 3): 32, (0, 1): 256}).metadata
    (part,) = plan_cascade(metadata, BreakEven(min_sequences=2, min_tokens=64)).parts
    assert (part.sequences.tolist(), part.first, part.last) == ([0, 1], 0, 256)
    assert part.pages.tolist() == metadata.kv_indices[:16].tolist()


def test_a_backend_that_cannot_serve_says_what_can() -> None:
    needs = replace(Case(SPANS).needs(AttentionParams(1.0)), dtype=torch.float64)
    with pytest.raises(UnsupportedBackendError, match=r"'numba' reads float32, .*float64; torch.* can serve"):
        choose_backend("numba", needs)
    with pytest.raises(UnsupportedBackendError, match="unknown attention backend 'best'; there are auto, "):
        choose_backend("best", needs)
    assert choose_backend("auto", needs).name == "torch"


@pytest.mark.parametrize(
    ("options", "modes", "reason"),
    [
        ({"kv_dtype": "int3"}, None, "cannot read int3 KV"),
        ({"device": "meta"}, None, "runs on the CPU, and the model is on meta"),
        (
            {"dtype": torch.bfloat16, "head_dim": 7},
            None,
            "takes 16-bit KV in pairs, and the model's heads have 7 compo",
        ),
        ({"dtype": torch.float16}, {"float16"}, "cannot read float16 KV on this processor"),
        ({"kv_dtype": "int8", "page_size": 16}, {"int8"}, "cannot read int8 KV on this processor"),
        ({"dtype": torch.bfloat16}, {"float16", "int8"}, None),
    ],
)
def test_what_the_compiled_kernel_cannot_serve(
    options: dict[str, Any], modes: set[str] | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of it because the processor lacks the `modes`."""
    if modes is not None:
        monkeypatch.setattr(
            "radixkv.attention.numba_backend.mode_for", lambda dtype: None if dtype in modes else "float32"
        )
    case = Case(SPANS[:1], **{key: options[key] for key in options if key == "head_dim"})
    fields: dict[str, Any] = {key: value for key, value in options.items() if key != "head_dim"}
    if "device" in fields:
        fields["device"] = torch.device(fields["device"])
    found = why_not("numba", replace(case.needs(case.params()), **fields))
    assert (found is None) == (reason is None)
    assert reason is None or str(found).startswith(reason)


# -- the registry ----------------------------------------------------------------------------------------------------


@pytest.mark.stress
def test_a_backend_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, torch\n"
        "from attention_cases import Case\n"
        "from radixkv.attention.backend import backend_names, choose_backend\n"
        "case = Case([(0, 3)])\n"
        "assert 'triton' in backend_names()\n"
        "assert choose_backend('torch', case.needs(case.params())).name == 'torch'\n"
        "loaded = [name for name in sys.modules if name.endswith('_backend') and name.startswith('radixkv.')]\n"
        "assert loaded == ['radixkv.attention.torch_backend'], loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=child_environment())


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Names of backends to forget after the test."""
    names: list[str] = []
    yield names
    for name in names:
        unregister_backend(name)


def test_a_backend_of_ones_own_is_registered_as_a_class(registered: list[str]) -> None:
    class Mine(TorchBackend):
        name = "a_backend_of_ones_own"

    registered.append(Mine.name)
    register_backend(Mine)
    case = Case(SPANS[:3])
    assert backend_names()[-1] == Mine.name
    assert choose_backend(Mine.name, case.needs(case.params())) is Mine
    case.check(Mine.name, case.params())


@pytest.mark.parametrize(
    "path", ["no_such_package.backend:Mine", "radixkv.attention.torch_backend:Mine", "torch_backend", ":Mine"]
)
def test_a_path_that_leads_to_no_class_is_named_when_it_is_asked_for(registered: list[str], path: str) -> None:
    registered.append("astray")
    register_backend_path("astray", path)
    case = Case(SPANS[:3])
    needs = case.needs(case.params())
    assert choose_backend("auto", needs).name == "numba", "nobody asked for the other"
    with pytest.raises(UnsupportedBackendError, match=f"'astray' cannot be imported from '{path}' "):
        choose_backend("astray", needs)


def test_a_backend_whose_package_is_not_installed_is_not_imported(registered: list[str]) -> None:
    registered.append("elsewhere")
    register_backend_path("elsewhere", "no_such_package.backend:Mine", requires="no_such_package")
    case = Case(SPANS[:3])
    assert why_not("elsewhere", case.needs(case.params())) == "needs no_such_package, which is not installed"


# -- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["numba", "torch", "reference"])
def test_a_plan_stores_the_kv_of_its_tokens_and_attends_over_it(name: str) -> None:
    case = Case([(0, 5), (20, 21), (15, 33)])
    params = case.params()
    backend_class = choose_backend(name, case.needs(params))
    pool = case.pool(backend_class.layout(case.needs(params)))
    slots = case.metadata.slots
    plan = backend_class(pool, case.needs(params)).plan(case.metadata)
    pool.write(0, slots, *(torch.full_like(x[slots], torch.nan) for x in (case.k, case.v)))
    assert plan.attend(0, case.q, params).isnan().any()
    plan.store_kv(0, case.k[slots], case.v[slots])
    torch.testing.assert_close(plan.attend(0, case.q, params).double(), case.expected(params), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["numba", "torch"])
def test_layers_of_one_plan_may_attend_in_different_ways(name: str) -> None:
    case = Case([(0, 5), (20, 21), (15, 33)])
    layers = [case.params(**options) for options in OPTIONS.values()]
    layers += [replace(params, scale=2 * params.scale) for params in layers]
    plan = case.plan(name, case.params())
    for params in [*layers, *reversed(layers)]:  # what layers share in a plan is made for the first of them
        torch.testing.assert_close(plan.attend(0, case.q, params).double(), case.expected(params), rtol=0, atol=4e-6)
