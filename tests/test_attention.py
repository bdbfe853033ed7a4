"""Every backend computes what the reference does, wherever the pages lie and whatever lies in the others."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from radixkv.attention.backend import AttentionParams, backend_names, make_backend
from radixkv.attention.metadata import AttentionMetadata, SequenceSpan, build_metadata
from radixkv.attention.shared_prefix import find_shared_prefixes
from radixkv.kernels.torch_reference import paged_attention
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.kv_shape import LayerKV

SPANS = [(0, 1), (0, 13), (20, 21), (37, 38), (15, 33), (16, 17), (31, 32), (3, 40)]  # [first, last) of each sequence
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 7},
    "chunk": {"chunk_size": 8},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "window, softcap and sinks": {"sliding_window": 11, "softcap": 3.0, "sinks": True},
}


class Case:
    """A pool whose pages lie at random and whose unused slots are NaN, and a batch over it."""

    def __init__(
        self,
        *,
        page_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        spans: list[tuple[int, int]],
        shared_tokens: int = 0,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(page_size * 1000 + num_q_heads * 100 + head_dim)
        rng = np.random.default_rng(page_size)
        counts = [-(-last // page_size) for _, last in spans]
        free = rng.permutation(sum(counts) + 5).astype(np.int32)
        tables = np.split(free[: sum(counts)], np.cumsum(counts)[:-1])
        for table in tables:
            table[: shared_tokens // page_size] = tables[0][: shared_tokens // page_size]
        layer = LayerKV(num_kv_heads, head_dim, v_head_dim or head_dim)
        self.pool = KVPool([layer], num_pages=len(free), page_size=page_size, dtype=dtype)
        self.pool.k[0].fill_(math.nan)
        self.pool.v[0].fill_(math.nan)
        self.metadata = build_metadata(
            [SequenceSpan(first, last, table) for (first, last), table in zip(spans, tables, strict=True)],
            page_size=page_size,
        )
        everything = build_metadata(
            [SequenceSpan(0, last, table) for (_, last), table in zip(spans, tables, strict=True)], page_size=page_size
        )
        for pages, dim in ((self.pool.k[0], head_dim), (self.pool.v[0], layer.v_head_dim)):
            values = torch.randn(everything.num_tokens, num_kv_heads, dim, generator=generator).to(dtype)
            pages.flatten(0, 1)[everything.slots] = values
        self.q = torch.randn(self.metadata.num_tokens, num_q_heads, head_dim, generator=generator).to(dtype)
        self.sinks = torch.randn(num_q_heads, generator=generator)

    def params(self, **options: object) -> AttentionParams:
        sinks = self.sinks if options.pop("sinks", False) else None
        return AttentionParams(scale=self.q.shape[-1] ** -0.5, sinks=sinks, **options)

    def expected(self, params: AttentionParams) -> Tensor:
        """The reference, in float64."""
        metadata: AttentionMetadata = self.metadata
        return paged_attention(
            self.q.double(),
            self.pool.k[0].double(),
            self.pool.v[0].double(),
            qo_indptr=metadata.qo_indptr.tolist(),
            kv_indptr=metadata.kv_indptr.tolist(),
            kv_indices=torch.from_numpy(metadata.kv_indices),
            kv_lens=metadata.kv_lens.tolist(),
            scale=params.scale,
            sliding_window=params.sliding_window,
            chunk_size=params.chunk_size,
            softcap=params.softcap,
            sinks=params.sinks,
        )

    def check(self, backend_name: str, params: AttentionParams, tolerance: float = 2e-6) -> None:
        backend = make_backend(backend_name, self.pool)
        backend.plan(self.metadata)
        found = backend.run(0, self.q, params)
        torch.testing.assert_close(found.double(), self.expected(params), rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("page_size", [1, 16])
def test_options(backend: str, option: str, page_size: int) -> None:
    case = Case(page_size=page_size, num_q_heads=4, num_kv_heads=2, head_dim=16, spans=SPANS)
    case.check(backend, case.params(**OPTIONS[option]))


@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize(("group", "head_dim"), [*itertools.product(range(1, 9), [64]), (7, 80), (2, 96), (1, 256)])
def test_groups_and_head_sizes(backend: str, group: int, head_dim: int) -> None:
    case = Case(page_size=16, num_q_heads=2 * group, num_kv_heads=2, head_dim=head_dim, spans=SPANS[2:6])
    case.check(backend, case.params())


@pytest.mark.parametrize("backend", backend_names())
def test_values_of_another_size_than_keys(backend: str) -> None:
    case = Case(page_size=4, num_q_heads=4, num_kv_heads=4, head_dim=24, v_head_dim=16, spans=SPANS)
    case.check(backend, case.params())


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_types(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    case = Case(page_size=16, num_q_heads=4, num_kv_heads=2, head_dim=64, spans=SPANS, dtype=dtype)
    case.check(backend, case.params(), tolerance)


@pytest.mark.parametrize("last", range(14, 35))
def test_extends_over_prefixes_of_every_length_around_page_borders(last: int) -> None:
    spans = [(first, last) for first in range(max(0, last - 18), last)]
    case = Case(page_size=16, num_q_heads=2, num_kv_heads=1, head_dim=8, spans=spans)
    case.check("torch", case.params())
    case.check("numba", case.params())


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("page_size", "shared_tokens"), [(16, 160), (1, 130)])
def test_a_shared_prefix_is_read_once_and_counts_the_same(option: str, page_size: int, shared_tokens: int) -> None:
    spans = [(last - 1, last) for last in (161, 170, 162, 201, 176)] + [(150, 190)]
    case = Case(
        page_size=page_size, num_q_heads=6, num_kv_heads=2, head_dim=32, spans=spans, shared_tokens=shared_tokens
    )
    backend = make_backend("numba", case.pool)
    backend.plan(case.metadata)
    assert [len(group.sequences) for group in backend._shared] == [5]  # type: ignore[attr-defined]
    case.check("numba", case.params(**OPTIONS[option]))


def tables(*rows: list[int]) -> list[np.ndarray]:
    return [np.array(row, np.int32) for row in rows]


def test_shared_prefixes_are_found_by_their_pages() -> None:
    head = list(range(100, 110))
    found = find_shared_prefixes(
        tables(*[[*head, i] for i in range(4)], [5, 6], *[[50, *head[1:], 20 + i] for i in range(4)]),
        np.array([170] * 4 + [20] + [165] * 4, np.int32),
        page_size=16,
    )
    assert [(group.sequences.tolist(), group.pages.tolist()) for group in found] == [
        ([0, 1, 2, 3], head),
        ([5, 6, 7, 8], [50, *head[1:]]),
    ]


@pytest.mark.parametrize(
    ("num_sequences", "num_tokens", "why"), [(3, 200, "too few"), (4, 127, "too short"), (4, 128, "nothing of its own")]
)
def test_what_does_not_pay_runs_flat(num_sequences: int, num_tokens: int, why: str) -> None:
    rows = tables(*[list(range(-(-num_tokens // 16)))] * num_sequences)
    assert find_shared_prefixes(rows, np.full(num_sequences, num_tokens, np.int32), page_size=16) == [], why
