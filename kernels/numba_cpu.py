"""Paged decode attention on the CPU, compiled by Numba: reads the pages in place, float32."""

from __future__ import annotations

import math

import numba as nb
import numpy as np

FASTMATH = {"reassoc", "contract", "nsz", "arcp"}  # not nnan and ninf: NaN must come through, not become anything
NO_SINK = np.float32(-1e30)
BLOCK_TOKENS = 64  # scores of one block stay in the first-level cache between the two products


@nb.njit(fastmath=FASTMATH, inline="always")
def _exp(x):
    """e**x for x <= 0 to 2e-7, in operations that vectorise: 2**i exactly, times the Taylor series of what is left."""
    t = max(x * np.float32(1.4426950408889634), np.float32(-126.0))
    i = np.floor(t + np.float32(0.5))
    f = (t - i) * np.float32(0.6931471805599453)
    p = np.float32(1 / 5040)
    p = p * f + np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1.0)
    p = p * f + np.float32(1.0)
    return p * np.int32((np.int32(i) + np.int32(127)) << np.int32(23)).view(np.float32)


@nb.njit(fastmath=FASTMATH, inline="always")
def _scores_4(q, h0, k_row, scores, t, scale):
    s0 = s1 = s2 = s3 = np.float32(0.0)
    for d in range(k_row.shape[0]):
        x = k_row[d]
        s0 += q[h0, d] * x
        s1 += q[h0 + 1, d] * x
        s2 += q[h0 + 2, d] * x
        s3 += q[h0 + 3, d] * x
    scores[h0, t] = s0 * scale
    scores[h0 + 1, t] = s1 * scale
    scores[h0 + 2, t] = s2 * scale
    scores[h0 + 3, t] = s3 * scale


@nb.njit(fastmath=FASTMATH, inline="always")
def _scores_1(q, h0, k_row, scores, t, scale):
    s0 = np.float32(0.0)
    for d in range(k_row.shape[0]):
        s0 += q[h0, d] * k_row[d]
    scores[h0, t] = s0 * scale


@nb.njit(fastmath=FASTMATH, cache=True, nogil=True)
def paged_decode(
    first_task,
    last_task,
    q,
    k_pages,
    v_pages,
    kv_indptr,
    kv_indices,
    kv_starts,
    kv_lens,
    scale,
    softcap,
    sinks,
    out,
    lse,
):
    """Attention of one query token a sequence over its pages, with an online softmax (Milakov and Gimelshein, 2018).

    Computes the tasks `[first_task, last_task)`; task t is KV head t % num_kv_heads of sequence t // num_kv_heads.
    Tasks are independent, and this runs without the GIL, so the caller may share them out among threads. (Numba's own
    parallel loops bring a second pool of spinning threads, which slows torch's down by an order of magnitude.)

    Args:
        q: float32 [num_sequences, num_q_heads, k_head_dim]
        k_pages, v_pages: float32 [num_pages, page_size, num_kv_heads, head_dim]
        kv_indptr, kv_indices: int32, the pages of sequence i are kv_indices[kv_indptr[i] : kv_indptr[i + 1]]
        kv_starts, kv_lens: int32; sequence i sees its tokens [kv_starts[i], kv_lens[i])
        softcap: 0 for none
        sinks: float32 [num_q_heads] logits that join the denominator alone; NO_SINK for none
        out: float32 [num_sequences, num_q_heads, v_head_dim], written
        lse: float32 [num_sequences, num_q_heads], written: the log of the denominators, to merge parts by
    """
    num_q_heads = q.shape[1]
    page_size, num_kv_heads, v_dim = v_pages.shape[1], v_pages.shape[2], v_pages.shape[3]
    group = num_q_heads // num_kv_heads
    scores = np.empty((group, BLOCK_TOKENS), np.float32)
    acc = np.empty((group, v_dim), np.float32)
    denominator = np.empty(group, np.float32)
    maximum = np.empty(group, np.float32)
    for task in range(first_task, last_task):
        i = task // num_kv_heads
        kv_head = task - i * num_kv_heads
        first_page = kv_indptr[i]
        own_q = q[i, kv_head * group : (kv_head + 1) * group]  # [group, k_head_dim]
        acc[:] = 0
        for g in range(group):
            sink = sinks[kv_head * group + g]
            maximum[g] = sink
            denominator[g] = np.float32(1.0) if sink > NO_SINK else np.float32(0.0)
        for start in range(kv_starts[i], kv_lens[i], BLOCK_TOKENS):
            size = min(BLOCK_TOKENS, kv_lens[i] - start)
            for t in range(size):
                position = start + t
                page_index = position // page_size
                k_row = k_pages[kv_indices[first_page + page_index], position - page_index * page_size, kv_head]
                g = 0
                while g + 4 <= group:
                    _scores_4(own_q, g, k_row, scores, t, scale)
                    g += 4
                while g < group:
                    _scores_1(own_q, g, k_row, scores, t, scale)
                    g += 1
            for g in range(group):
                row = scores[g]
                if softcap > 0:
                    for t in range(size):
                        row[t] = softcap * math.tanh(row[t] / softcap)
                block_max = maximum[g]
                for t in range(size):
                    block_max = max(block_max, row[t])
                rescale = _exp(maximum[g] - block_max)
                total = np.float32(0.0)
                for t in range(size):
                    p = _exp(row[t] - block_max)
                    row[t] = p
                    total += p
                denominator[g] = denominator[g] * rescale + total
                maximum[g] = block_max
                for d in range(v_dim):
                    acc[g, d] *= rescale
            t = 0
            while t + 4 <= size:
                v0 = _row(v_pages, kv_indices, first_page, start + t, page_size, kv_head)
                v1 = _row(v_pages, kv_indices, first_page, start + t + 1, page_size, kv_head)
                v2 = _row(v_pages, kv_indices, first_page, start + t + 2, page_size, kv_head)
                v3 = _row(v_pages, kv_indices, first_page, start + t + 3, page_size, kv_head)
                for g in range(group):
                    p0, p1, p2, p3 = scores[g, t], scores[g, t + 1], scores[g, t + 2], scores[g, t + 3]
                    for d in range(v_dim):
                        acc[g, d] += p0 * v0[d] + p1 * v1[d] + p2 * v2[d] + p3 * v3[d]
                t += 4
            while t < size:
                v0 = _row(v_pages, kv_indices, first_page, start + t, page_size, kv_head)
                for g in range(group):
                    p0 = scores[g, t]
                    for d in range(v_dim):
                        acc[g, d] += p0 * v0[d]
                t += 1
        for g in range(group):
            inverse = np.float32(1.0) / denominator[g]
            lse[i, kv_head * group + g] = maximum[g] + np.float32(math.log(denominator[g]))
            for d in range(v_dim):
                out[i, kv_head * group + g, d] = acc[g, d] * inverse


@nb.njit(fastmath=FASTMATH, inline="always")
def _row(pages, kv_indices, first_page, position, page_size, kv_head):
    page_index = position // page_size
    return pages[kv_indices[first_page + page_index], position - page_index * page_size, kv_head]


def warm_up() -> None:
    """Compile the kernel, or load it from Numba's cache on disk, so that no request waits for it. Seconds, once."""
    pages = np.zeros((1, 1, 1, 1), np.float32)
    zero, one, indptr = np.zeros(1, np.int32), np.ones(1, np.int32), np.array([0, 1], np.int32)
    q, out, lse = np.zeros((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    bounds, sinks = np.array([0, 1]), np.full(1, NO_SINK)
    scale, softcap = np.float32(1), np.float32(0)
    paged_decode(bounds[0], bounds[1], q, pages, pages, indptr, zero, zero, one, scale, softcap, sinks, out, lse)
