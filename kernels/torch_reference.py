"""Attention over paged KV, written to be obviously right: the slow specification that other kernels are tested against.

For a query at position p of its sequence, with keys at positions [0, kv_len):

    score(j)  = scale * <q, k_j> + b(j) - b(p),  then softcap * tanh(score / softcap) if there is a soft cap;
                b is 0 where there is no bias of keys, and the query head's own otherwise
    visible   = j <= p, and j > p - sliding_window, and j // chunk_size == p // chunk_size, where those are set;
                the first `sink_tokens` keys besides, which are multiplied with queries of their own, if there are any
    out       = sum_j softmax(score)_j v_j over the visible j; a sink logit joins the softmax's denominator alone

Grouped queries: query head h reads KV head h // (num_q_heads // num_kv_heads).
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible_mask(
    q_positions: Tensor,
    kv_len: int,
    *,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    sink_tokens: int = 0,
) -> Tensor:
    """Which keys each query sees, bool [q_len, kv_len]."""
    q = q_positions[:, None]
    j = torch.arange(kv_len, dtype=torch.int64, device=q_positions.device)[None, :]
    visible = j <= q
    if sliding_window is not None:
        visible &= j > q - sliding_window
    if chunk_size is not None:
        visible &= j // chunk_size == q // chunk_size
    return visible | ((j < sink_tokens) & (j <= q))


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sink_tokens: int = 0,
    sink_queries: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of one sequence over contiguous KV.

    Args:
        q: [q_len, num_q_heads, k_head_dim]
        k, v: [kv_len, num_kv_heads, k_head_dim] and [kv_len, num_kv_heads, v_head_dim]
        visible: bool [q_len, kv_len]
        sinks: logits, [num_q_heads]
        sink_tokens, sink_queries: what the first keys are multiplied with in place of q, of the same shape
        bias: what is added to the scaled scores, [num_q_heads, q_len, kv_len]

    Returns: [q_len, num_q_heads, v_head_dim], in q's dtype. Half types are computed in float32.
    """
    num_groups = q.shape[1] // k.shape[1]
    compute_dtype = torch.float32 if q.dtype in (torch.float16, torch.bfloat16) else q.dtype
    q_t = q.to(compute_dtype).transpose(0, 1)  # [num_q_heads, q_len, k_head_dim]
    k_t = k.to(compute_dtype).repeat_interleave(num_groups, dim=1).permute(1, 2, 0)  # [num_q_heads, k_head_dim, kv_len]
    v_t = v.to(compute_dtype).repeat_interleave(num_groups, dim=1).transpose(0, 1)  # [num_q_heads, kv_len, v_head_dim]
    scores = q_t @ k_t * scale  # [num_q_heads, q_len, kv_len]
    if sink_queries is not None:
        sink_q_t = sink_queries.to(compute_dtype).transpose(0, 1)
        scores[..., :sink_tokens] = sink_q_t @ k_t[..., :sink_tokens] * scale
    if bias is not None:
        scores = scores + bias.to(compute_dtype)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(compute_dtype)[:, None, None].expand(-1, q.shape[0], 1)
        probabilities = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        probabilities = torch.softmax(scores, dim=-1)
    return (probabilities @ v_t).transpose(0, 1).to(q.dtype)


def gather_kv(pages: Tensor, page_ids: Tensor, kv_len: int) -> Tensor:
    """Contiguous [kv_len, heads, dim] from [num_pages, page_size, heads, dim]; slots past `kv_len` are never read."""
    return pages[page_ids].flatten(0, 1)[:kv_len]


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    qo_indptr: list[int],
    kv_indptr: list[int],
    kv_indices: Tensor,
    kv_lens: list[int],
    scale: float,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sink_tokens: int = 0,
    sink_queries: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Causal attention of a batch over paged KV; the queries of a sequence are its last tokens.

    Args:
        q: [num_q_tokens, num_q_heads, k_head_dim], the sequences one after another
        k_pages, v_pages: [num_pages, page_size, num_kv_heads, head_dim]
        qo_indptr: sequence i has queries [qo_indptr[i], qo_indptr[i + 1])
        kv_indptr, kv_indices: and its KV lies in pages kv_indices[kv_indptr[i] : kv_indptr[i + 1]]
        kv_lens: of which the first kv_lens[i] slots are its tokens
        key_bias: b of each query head and position, [num_q_heads, at least the longest of kv_lens]

    Returns: [num_q_tokens, num_q_heads, v_head_dim]
    """
    outputs = []
    for i, kv_len in enumerate(kv_lens):
        own_q = q[qo_indptr[i] : qo_indptr[i + 1]]
        page_ids = kv_indices[kv_indptr[i] : kv_indptr[i + 1]].long()
        positions = torch.arange(kv_len - own_q.shape[0], kv_len, dtype=torch.int64, device=q.device)
        visible = visible_mask(
            positions, kv_len, sliding_window=sliding_window, chunk_size=chunk_size, sink_tokens=sink_tokens
        )
        own_sink_q = None if sink_queries is None else sink_queries[qo_indptr[i] : qo_indptr[i + 1]]
        bias = None
        if key_bias is not None:
            bias = key_bias[:, None, :kv_len] - key_bias[:, positions, None]
        k = gather_kv(k_pages, page_ids, kv_len)
        v = gather_kv(v_pages, page_ids, kv_len)
        outputs.append(
            dense_attention(
                own_q,
                k,
                v,
                visible,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                sink_tokens=sink_tokens,
                sink_queries=own_sink_q,
                bias=bias,
            )
        )
    return torch.cat(outputs)
