"""Attention that each token of an encoder receives: column means of a self-attention whose map is never stored.

Three launches. *Rows*: flash-style, a program takes a block of query rows and keeps their running maximum and sum over
the segment's keys, which gives `lse` (skipped when the caller has it). *Columns*: a program takes a block of keys of
one key head, recomputes the scores of all the segment's rows and heads and adds up `exp(score - lse)`, blocks in order.
*Mean*: adds the key heads in order, sums each `pool` tokens and divides by the prior. Costs, for segments of n tokens:
2·n²·H·d multiply-adds, the products of one attention forward, and 2·n²·H exponentials, half of both when `lse` is
given; memory H·T floats for `lse` and Hkv·T partial scores, never n².

Spans of `cu_seqlens` are found on the device; the grid comes from T and the number of segments alone. Blocks start at
their segment's start, so its bits do not depend on its neighbours. fp16 and bf16 multiply on tensor cores with float32
accumulation; fp32 as three TF32 products (tf32x3), which keep float32's precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import INTERPRETED, cdiv, kernel
from .query_attention import (
    LOG2E,
    aligned,
    batched_strides,
    dense_rows,
    finite_max,
    head_parts,
    load_rows,
    mean_scores,
    scores_tile,
    unit_strides,
)

SEARCH = 256  # segments looked at in one step of the search


@triton.jit
def tile_span(tile, cu_ptr, segments, tokens, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """Bounds of the tile's segment, and the tile's first token.

    Segment s owns the tiles from `cu[s] // BLOCK + s` up to that of s + 1: never fewer than its length needs, so a
    tile's segment is found without a sum over the segments before it. Spare tiles start behind their segment's end.
    """
    found = 0
    for first in range(0, segments, SEARCH):
        offs_s = first + tl.arange(0, SEARCH)
        begin = tl.load(cu_ptr + offs_s, mask=offs_s < segments, other=0)
        found += tl.sum(((offs_s < segments) & (begin // BLOCK + offs_s <= tile)).to(tl.int32), 0)
    segment = tl.maximum(found - 1, 0)
    # Values in device memory were not checked: whatever they are, nothing outside the tokens is touched.
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + segment), 0), tokens)
    stop = tl.minimum(tl.maximum(tl.load(cu_ptr + segment + 1), start), tokens)
    offset = tl.maximum(tile - (start // BLOCK + segment), 0)
    return start, stop, tl.minimum(start + offset * BLOCK, stop)


@kernel
def rows_kernel(
    q_ptr, k_ptr, cu_ptr, lse_ptr,
    tokens, segments, tiles, heads, group, scale_log2,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh,
    PACKED: tl.constexpr, SEARCH: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    UNIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of one query head's rows: base-2 log of the sum of their exponentials over the segment's keys."""
    tile = tl.program_id(0) % tiles
    item = tl.program_id(0) // tiles
    head = item % heads
    batch = (item // heads).to(tl.int64)
    if PACKED:
        start, stop, row = tile_span(tile, cu_ptr, segments, tokens, BLOCK_M, SEARCH)
    else:
        start = tile * 0
        stop = start + tokens
        row = tile * BLOCK_M
    if row < stop:
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < stop
        q_ptr += batch * (stride_qb * UNIT) + head.to(tl.int64) * (stride_qh * UNIT)
        k_ptr += batch * (stride_kb * UNIT) + (head // group).to(tl.int64) * (stride_kh * UNIT)
        if UNIT > 1:
            q_ptr = tl.multiple_of(q_ptr, 16)
            k_ptr = tl.multiple_of(k_ptr, 16)
        offs_q = offs_m.to(tl.int64) * (stride_qn * UNIT)
        q1 = load_rows(q_ptr, offs_q, mask_m, 0, D1, HEAD_DIM, UPCAST)
        q2 = q1
        if D2 > 0:
            q2 = load_rows(q_ptr, offs_q, mask_m, D1, D2, HEAD_DIM, UPCAST)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(start, stop, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            mask_n = offs_n < stop
            s = scores_tile(
                q1, q2, k_ptr, offs_n.to(tl.int64) * (stride_kn * UNIT), mask_n, D1, D2, HEAD_DIM, PRECISION, UPCAST
            )
            s = tl.where(mask_n[None, :], s * scale_log2, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            base = finite_max(m_new)
            total = total * tl.exp2(m - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
            m = m_new
        tl.store(lse_ptr + item.to(tl.int64) * tokens + offs_m, finite_max(m) + tl.log2(total), mask=mask_m)


@kernel
def columns_kernel(
    q_ptr, k_ptr, cu_ptr, lse_ptr, partial_ptr,
    tokens, segments, tiles, kv_heads, group, scale_log2, lse_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_lb, stride_lh, stride_ln,
    PACKED: tl.constexpr, SEARCH: tl.constexpr, HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    UNIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of one key head's keys: what its query heads and the segment's rows add to each key's mean weight."""
    tile = tl.program_id(0) % tiles
    item = tl.program_id(0) // tiles
    head = item % kv_heads
    batch = (item // kv_heads).to(tl.int64)
    if PACKED:
        start, stop, column = tile_span(tile, cu_ptr, segments, tokens, BLOCK_M, SEARCH)
    else:
        start = tile * 0
        stop = start + tokens
        column = tile * BLOCK_M
    if column < stop:
        offs_m = column + tl.arange(0, BLOCK_M)
        mask_m = offs_m < stop
        q_ptr += batch * (stride_qb * UNIT)
        k_ptr += batch * (stride_kb * UNIT) + head.to(tl.int64) * (stride_kh * UNIT)
        if UNIT > 1:
            q_ptr = tl.multiple_of(q_ptr, 16)
            k_ptr = tl.multiple_of(k_ptr, 16)
        offs_k = offs_m.to(tl.int64) * (stride_kn * UNIT)
        # Keys stay and rows stream, so that a key's sum runs along the tile's second dimension, inside few threads.
        k1 = load_rows(k_ptr, offs_k, mask_m, 0, D1, HEAD_DIM, UPCAST)
        k2 = k1
        if D2 > 0:
            k2 = load_rows(k_ptr, offs_k, mask_m, D1, D2, HEAD_DIM, UPCAST)
        total = tl.zeros([BLOCK_M], tl.float32)
        for query_head in range(head * group, head * group + group):
            of_head = tl.cast(query_head, tl.int64)
            for first in range(start, stop, BLOCK_N):
                offs_n = first + tl.arange(0, BLOCK_N)
                mask_n = offs_n < stop
                offs_l = batch * stride_lb + of_head * stride_lh + offs_n.to(tl.int64) * stride_ln
                # Rows past the end weigh exp2(0 - inf) = 0.
                lse = tl.load(lse_ptr + offs_l, mask=mask_n, other=float("inf")) * lse_scale
                offs_q = of_head * (stride_qh * UNIT) + offs_n.to(tl.int64) * (stride_qn * UNIT)
                s = scores_tile(k1, k2, q_ptr, offs_q, mask_n, D1, D2, HEAD_DIM, PRECISION, UPCAST)
                total += tl.sum(tl.exp2(s * scale_log2 - lse[None, :]), 1)
        mean = total / ((stop - start) * group * kv_heads).to(tl.float32)
        tl.store(partial_ptr + item.to(tl.int64) * tokens + offs_m, mean, mask=mask_m)


def received_attention(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float,
    lse: Tensor | None,
    pool: int,
    prior: Tensor | None,
    eps: float,
) -> Tensor:
    """float32 `[N/pool]`, `[B, N/pool]` or packed `[T/pool]` from `query [.., H, d]` and `key [.., Hkv, d]`.

    `max_seqlen` is not needed. The values of `cu_seqlens` are not checked: tokens in no segment get undefined scores.
    """
    *batch, tokens, heads, head_dim = query.shape
    kv_heads = key.shape[-2]
    scores = torch.empty((*batch, tokens // pool), dtype=torch.float32, device=query.device)
    if scores.numel() == 0:
        return scores

    items = batch[0] if batch else 1
    group = heads // kv_heads
    query, key = dense_rows(query), dense_rows(key)
    unit = aligned(query, key)
    d1, d2 = head_parts(head_dim)
    tile = config("received" if unit > 1 else "received unaligned", query, head_dim)
    packed = cu_seqlens is not None
    segments = cu_seqlens.shape[0] - 1 if packed else 1
    blocks = tokens // tile["BLOCK_M"] + segments if packed else cdiv(tokens, tile["BLOCK_M"])
    common = {
        "PACKED": packed, "SEARCH": SEARCH, "HEAD_DIM": head_dim, "D1": d1, "D2": d2, "UNIT": unit,
        "UPCAST": INTERPRETED, **tile,
    }  # fmt: skip
    strides = unit_strides(unit, query, key)
    scale_log2 = scale * LOG2E
    partial = torch.empty(items * kv_heads * tokens, dtype=torch.float32, device=query.device)
    spans = cu_seqlens.contiguous() if packed else partial

    if lse is None:
        lse = torch.empty((items, heads, tokens), dtype=torch.float32, device=query.device)
        rows_kernel[(blocks * items * heads,)](
            query, key, spans, lse, tokens, segments, blocks, heads, group, scale_log2, *strides, **common
        )
        lse_scale = 1.0
    else:
        lse, lse_scale = lse.to(torch.float32), LOG2E
    columns_kernel[(blocks * items * kv_heads,)](
        query, key, spans, lse, partial, tokens, segments, blocks, kv_heads, group, scale_log2, lse_scale,
        *strides, *batched_strides(lse, 3), **common,
    )  # fmt: skip
    mean_scores(partial, scores, pool, kv_heads, 1.0, prior, eps)
    return scores
