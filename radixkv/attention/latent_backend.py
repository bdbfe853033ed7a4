"""Latent attention (MLA) by torch's matrix products, over latents that are gathered: any device, any dtype.

All query heads of a token read the same latents, so heads are rows: the queries [rows, dim] of one sequence, or of many
that share a prefix, are multiplied with its latents [tokens, dim] at once, and what was gathered serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.attention.backend import AttentionNeeds, AttentionParams, LayerAttention
from radixkv.attention.metadata import AttentionMetadata
from radixkv.attention.shared_prefix import BreakEven, CascadePlan, SharedPart, merge, plan_cascade
from radixkv.memory.kv_pool import KVLayout, KVPool

GATHERED_TOKENS = 1 << 14  # of decodes that are padded to one length
BLOCK_SCORES = 1 << 24  # of one product, all heads together: 64 MiB in float32
BREAK_EVEN = BreakEven(min_sequences=2, min_tokens=256)  # as measured with 16 heads and with 128, on the CPU


class _Extend(NamedTuple):
    """A sequence that computes several tokens: rows [first_row, last_row) of the batch, its last ones."""

    first_row: int
    last_row: int
    pages: Tensor  # int64 [pages]
    kv_len: int


class _Decodes(NamedTuple):
    """Sequences that compute one token each, padded to the longest."""

    places: Tensor  # int64 [sequences], among the decodes of the batch
    slots: Tensor  # int64 [sequences, longest]
    padding: Tensor  # bool [sequences, 1, longest], what is none of their tokens


class _Shared(NamedTuple):
    """Tokens that several decodes read."""

    places: Tensor  # int64 [sequences], among the decodes of the batch
    pages: Tensor  # int64 [pages], all full


class LatentBackend:
    """Gathers each sequence's latents and multiplies, in float32 if they are of 16 bit; decodes go in padded batches.

    Cost of a layer: one copy of all latents that the batch reads, of prefixes that decodes share only one, and dense
    attention over `latent_dim + rope_dim` values for the scores and `latent_dim` for the sums.

    Args:
        break_even: from where on a prefix that decodes share is read once.
    """

    name = "latent"

    def __init__(self, pool: KVPool, needs: AttentionNeeds, *, break_even: BreakEven = BREAK_EVEN) -> None:
        self.pool = pool
        self.num_layers = len(pool.layers)
        self._break_even = break_even
        self._num_heads = max(layer.num_q_heads for layer in needs.layers)

    @staticmethod
    def why_not(needs: AttentionNeeds) -> str | None:
        return why_not_latents(needs)

    @staticmethod
    def layout(needs: AttentionNeeds) -> KVLayout:
        return "latent"

    def plan(self, metadata: AttentionMetadata) -> LatentPlan:
        return LatentPlan(self.pool, metadata, plan_cascade(metadata, self._break_even), self._num_heads)


class LatentPlan:
    """The attention of one batch. See `AttentionPlan`.

    Attributes:
        extends: sequences that compute several tokens.
        decodes: those that compute one, from where they read alone.
        shared: what several of them read together.

    Args:
        num_heads: query heads of a layer at most.
    """

    def __init__(self, pool: KVPool, metadata: AttentionMetadata, cascade: CascadePlan, num_heads: int) -> None:
        self._pool, self._metadata = pool, metadata
        decodes = np.flatnonzero(metadata.qo_lens == 1)
        self._decode_rows = self._tensor(metadata.qo_indptr[decodes])
        self.extends = [self._plan_extend(int(i)) for i in np.flatnonzero(metadata.qo_lens > 1)]
        self.decodes = [
            self._plan_decodes(decodes, places, cascade.private_starts)
            for places in _alike(metadata.kv_lens[decodes] - cascade.private_starts[decodes])
        ]
        self.shared = [piece for part in cascade.parts for piece in self._plan_shared(decodes, part, num_heads)]

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._pool.write(layer, self._metadata.slots, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        pages = self._pool.k[layer].squeeze(2)  # [num_pages, page_size, k_head_dim]
        latent_dim = self._pool.v[layer].shape[-1]
        out = q.new_empty(q.shape[0], q.shape[1], latent_dim)
        wide_q = q.to(_compute_dtype(q.dtype)) * params.scale
        for extend in self.extends:
            rows = slice(extend.first_row, extend.last_row)
            latents = _gather(pages, extend.pages, wide_q.dtype)[: extend.kv_len]
            _extend(wide_q[rows], latents, latent_dim, out[rows])
        if self.decodes:
            out[self._decode_rows] = self._decode(wide_q[self._decode_rows], pages, latent_dim).to(q.dtype)
        return out

    def _decode(self, q: Tensor, pages: Tensor, latent_dim: int) -> Tensor:
        """q [decodes, num_q_heads, k_head_dim], scaled -> [decodes, num_q_heads, latent_dim]."""
        out, lse = q.new_empty(*q.shape[:2], latent_dim), q.new_empty(q.shape[:2])
        for batch in self.decodes:
            latents = pages.flatten(0, 1)[batch.slots].to(q.dtype)  # [sequences, longest, k_head_dim]
            scores = (q[batch.places] @ latents.mT).masked_fill_(batch.padding, float("-inf"))
            out[batch.places], lse[batch.places] = _weigh(scores, latents[..., :latent_dim])
        for places, shared_pages in self.shared:
            latents = _gather(pages, shared_pages, q.dtype)
            own_q = q[places]
            scores = own_q.flatten(0, 1) @ latents.T
            part = (x.unflatten(0, own_q.shape[:2]) for x in _weigh(scores, latents[:, :latent_dim]))
            out[places], lse[places] = merge(out[places], lse[places], *part)
        return out

    def _plan_extend(self, sequence: int) -> _Extend:
        metadata = self._metadata
        first, last = metadata.qo_indptr[sequence : sequence + 2].tolist()
        pages = metadata.kv_indices[slice(*metadata.kv_indptr[sequence : sequence + 2])]
        return _Extend(first, last, self._tensor(pages), int(metadata.kv_lens[sequence]))

    def _plan_decodes(self, decodes: NDArray[np.intp], places: NDArray[np.intp], starts: NDArray[np.int32]) -> _Decodes:
        """Where the tokens of some decodes lie, from `starts` (of the whole batch) on.

        Past a sequence's end stands its last token: its latent was written, so what is masked is never garbage.
        """
        metadata, sequences = self._metadata, decodes[places]
        first, last = starts[sequences][:, None], metadata.kv_lens[sequences][:, None]
        tokens = first + np.arange(int((last - first).max()))
        padding = tokens >= last
        tokens = np.minimum(tokens, last - 1)
        pages = metadata.kv_indices[metadata.kv_indptr[sequences][:, None] + tokens // metadata.page_size]
        slots = pages.astype(np.int64) * metadata.page_size + tokens % metadata.page_size
        hidden = torch.from_numpy(padding[:, None]).to(self._pool.device)
        return _Decodes(self._tensor(places), self._tensor(slots), hidden)

    def _plan_shared(self, decodes: NDArray[np.intp], part: SharedPart, num_heads: int) -> Iterator[_Shared]:
        """The part in pieces whose scores are not too many: a piece is merged as any part is."""
        places = self._tensor(np.searchsorted(decodes, part.sequences))
        page_scores = len(places) * num_heads * self._pool.page_size
        for pages in self._tensor(part.pages).split(max(1, BLOCK_SCORES // page_scores)):
            yield _Shared(places, pages)

    def _tensor(self, indices: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(indices.astype(np.int64)).to(self._pool.device)


def why_not_latents(needs: AttentionNeeds) -> str | None:
    """Why not all layers can be computed as plain causal attention over latents; None if they can."""
    if needs.kv_dtype != "auto":
        return f"keeps latents in the model's dtype, not as {needs.kv_dtype}"
    for number, layer in enumerate(needs.layers):
        if (reason := _why_not_layer(layer)) is not None:
            return f"{reason}, as layer {number} asks"
    return None


def _why_not_layer(layer: LayerAttention) -> str | None:
    params = layer.params
    if not layer.kv.is_latent:
        return "reads latents (MLA), not keys and values of their own"
    if params.sliding_window is not None or params.chunk_size is not None:
        return "has no limits of sight on latents"
    if params.softcap is not None or params.sinks is not None:
        return "has no soft cap and no sinks on latents"
    if params.key_bias is not None:
        return "has no biases of keys"
    return None


def _extend(q: Tensor, latents: Tensor, latent_dim: int, out: Tensor) -> None:
    """Causal attention of a sequence's last tokens over all of them, some rows at a time.

    Args:
        q: [qo_len, num_q_heads, k_head_dim], scaled
        latents: [kv_len, k_head_dim]
        out: [qo_len, num_q_heads, latent_dim], is written
    """
    num_cached = len(latents) - len(q)
    size = max(1, BLOCK_SCORES // (q.shape[1] * len(latents)))
    for first in range(0, len(q), size):
        block = q[first : first + size]
        seen = latents[: num_cached + first + len(block)]  # of which each row but the last sees not quite all
        scores = (block.flatten(0, 1) @ seen.T).unflatten(0, block.shape[:2])
        later = torch.ones(len(block), len(block), dtype=torch.bool, device=q.device).triu_(1)
        scores[..., num_cached + first :].masked_fill_(later[:, None], float("-inf"))
        own_out, _ = _weigh(scores.flatten(0, 1), seen[:, :latent_dim])
        out[first : first + size] = own_out.unflatten(0, block.shape[:2]).to(out.dtype)


def _weigh(scores: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of latents [..., tokens, latent_dim] by the softmax of scores [..., rows, tokens], which are overwritten.

    Returns: [..., rows, latent_dim], and the log-sum-exps [..., rows].
    """
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_() @ latents, lse


def _gather(pages: Tensor, page_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What lies in the pages, [tokens, k_head_dim]."""
    return pages.index_select(0, page_ids).flatten(0, 1).to(dtype)


def _alike(kv_lens: NDArray[np.int32]) -> Iterator[NDArray[np.intp]]:
    """Places of sequences of similar length, longest first, so that padding gathers few tokens more."""
    by_length = np.argsort(-kv_lens, kind="stable")
    first = 0
    while first < len(by_length):
        size = max(1, GATHERED_TOKENS // int(kv_lens[by_length[first]]))
        yield by_length[first : first + size]
        first += size


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
