"""Attention that some query rows pay to the visual tokens, averaged over heads and rows; its map is never stored.

Three launches. *Stats*: a program takes one range of keys and the query rows of one key head (all its query heads, so
grouped-query keys are read once) and keeps the running maximum and sum of each row. *Weights*: a program takes a block
of visual positions, merges the partial sums of its rows, recomputes those scores and adds up `exp(score - lse)` over
rows. *Mean*: adds the key heads in order and divides by the prior. With `lse` given the first is skipped and only the
visual keys are read. Costs: (L + N)·Hkv·d key elements read, (L + N)·H·Lq·d multiply-adds, at most 64·H·Lq partial
maxima and sums, Hkv·N partial scores. Nothing depends on the batch or the device, so neither do the bits.

fp16 and bf16 multiply on tensor cores with float32 accumulation; fp32 as three TF32 products (tf32x3), which keep
float32's precision, or on AMD's GPUs in float32. The scores' minimum and maximum are not found here: no method scales
attention by them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import FEW_ROWS, config
from .launch import INTERPRETED, cdiv, kernel, padded

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256
MIN_SPLIT = 128  # keys
STRIDE_UNIT = 8  # elements; strides that are multiples of it let fp16 rows load 16 bytes at a time


def head_parts(head_dim: int) -> tuple[int, int]:
    """Powers of two whose sum covers the head dimension, so that 72 costs 80 and not 128; the second may be 0."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head dimension d={head_dim} exceeds {MAX_HEAD_DIM}, the largest of the Triton kernels")
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    second = max(16, triton.next_power_of_2(rest)) if rest > 0 else 0
    return (2 * first, 0) if second >= first else (first, second)


def aligned(*tensors: Tensor) -> int:
    """The unit in which these tensors' strides are passed, last dimension apart; above 1 only on 16-byte addresses."""
    for x in tensors:
        if x.data_ptr() % 16:
            return 1
        for size, stride in zip(x.shape[:-1], x.stride(), strict=False):
            if size > 1 and stride % STRIDE_UNIT:
                return 1
    return STRIDE_UNIT


def dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def kind_of(rows: int, unit: int) -> str:
    """The kind of configuration for `rows` query rows a key head: a decode step's, or more."""
    # Elements loaded one by one need an address each, and registers for them.
    return "query unaligned" if unit == 1 else "query few" if rows <= FEW_ROWS else "query many"


@triton.jit
def load_rows(
    x_ptr, offs, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, UPCAST: tl.constexpr
):
    offs_d = FIRST + tl.arange(0, WIDTH)
    # [BLOCK, WIDTH]
    x = tl.load(x_ptr + offs[:, None] + offs_d[None, :], mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def query_offsets(offs_r, head, group, stride_qr, stride_qh, UNIT: tl.constexpr):
    """Offsets of a key head's query rows: row r is head `r % group` of its group, at prompt position `r // group`."""
    position = (offs_r // group).to(tl.int64)
    return position * (stride_qr * UNIT) + (head * group + offs_r % group).to(tl.int64) * (stride_qh * UNIT)


@triton.jit
def scores_tile(
    q1, q2, k_ptr, offs, mask, D1: tl.constexpr, D2: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_M, BLOCK_N]`: products of rows `q1 | q2` with the rows of `k` at `offs`."""
    k1 = load_rows(k_ptr, offs, mask, 0, D1, HEAD_DIM, UPCAST)
    s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        k2 = load_rows(k_ptr, offs, mask, D1, D2, HEAD_DIM, UPCAST)
        s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
    return s


@triton.jit
def finite_max(m):
    """A maximum that can be subtracted: -inf - (-inf) would be NaN where the sum is 0."""
    return tl.where(m == float("-inf"), 0.0, m)


@kernel
def stats_kernel(
    q_ptr, k_ptr, max_ptr, sum_ptr,
    rows, keys, kv_heads, group, splits, split_keys, scale_log2,
    stride_qb, stride_qr, stride_qh, stride_kb, stride_kl, stride_kh,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One range of keys, one block of a key head's query rows: base-2 maximum and sum of each row."""
    pid = tl.program_id(0)
    split = pid % splits
    row_blocks = tl.cdiv(rows, BLOCK_M)
    row_block = pid // splits % row_blocks
    item = pid // splits // row_blocks
    head = item % kv_heads
    batch = (item // kv_heads).to(tl.int64)

    offs_r = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < rows
    q_ptr += batch * (stride_qb * UNIT)
    k_ptr += batch * (stride_kb * UNIT) + head.to(tl.int64) * (stride_kh * UNIT)
    if UNIT > 1:
        q_ptr = tl.multiple_of(q_ptr, 16)
        k_ptr = tl.multiple_of(k_ptr, 16)
    offs_q = query_offsets(offs_r, head, group, stride_qr, stride_qh, UNIT)
    q1 = load_rows(q_ptr, offs_q, mask_r, 0, D1, HEAD_DIM, UPCAST)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q_ptr, offs_q, mask_r, D1, D2, HEAD_DIM, UPCAST)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = split * split_keys
    last = tl.minimum(first + split_keys, keys)
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < last
        s = scores_tile(
            q1, q2, k_ptr, offs_n.to(tl.int64) * (stride_kl * UNIT), mask_n, D1, D2, HEAD_DIM, PRECISION, UPCAST
        )
        s = tl.where(mask_n[None, :], s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        base = finite_max(m_new)
        total = total * tl.exp2(m - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        m = m_new
    offs = (item.to(tl.int64) * splits + split) * rows + offs_r
    tl.store(max_ptr + offs, m, mask=mask_r)
    tl.store(sum_ptr + offs, total, mask=mask_r)


@kernel
def weights_kernel(
    q_ptr, k_ptr, max_ptr, sum_ptr, lse_ptr, visual_ptr, partial_ptr,
    rows, keys, kv_heads, group, splits, scale_log2, lse_scale, visual_start, visual_step, visual_count, stride_visual,
    stride_qb, stride_qr, stride_qh, stride_kb, stride_kl, stride_kh, stride_lb, stride_lh, stride_lr,
    HEAD_DIM: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_INDEX: tl.constexpr, MAX_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of visual positions, one key head: the softmax weights there, added up over the head's query rows."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(visual_count, BLOCK_N)
    item = pid // blocks
    head = item % kv_heads
    batch = (item // kv_heads).to(tl.int64)

    offs_n = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < visual_count
    if HAS_INDEX:
        at = tl.load(visual_ptr + offs_n.to(tl.int64) * stride_visual, mask=mask_n, other=0)
    else:
        at = visual_start + offs_n.to(tl.int64) * visual_step
    # Positions in device memory were not checked: outside the keys nothing is read, and the score is NaN.
    inside = (at >= 0) & (at < keys)
    q_ptr += batch * (stride_qb * UNIT)
    k_ptr += batch * (stride_kb * UNIT) + head.to(tl.int64) * (stride_kh * UNIT)
    if UNIT > 1:
        q_ptr = tl.multiple_of(q_ptr, 16)
        k_ptr = tl.multiple_of(k_ptr, 16)
    offs_k = at * (stride_kl * UNIT)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_M):
        offs_r = start + tl.arange(0, BLOCK_M)
        mask_r = offs_r < rows
        if HAS_LSE:
            query_head = (head * group + offs_r % group).to(tl.int64)
            offs_l = batch * stride_lb + query_head * stride_lh + (offs_r // group).to(tl.int64) * stride_lr
            lse = tl.load(lse_ptr + offs_l, mask=mask_r, other=0.0) * lse_scale
        else:
            offs_s = tl.arange(0, MAX_SPLITS)
            mask_s = (offs_s < splits)[:, None] & mask_r[None, :]
            # [MAX_SPLITS, BLOCK_M]
            offs = (item.to(tl.int64) * splits + offs_s[:, None]) * rows + offs_r[None, :]
            part = tl.load(max_ptr + offs, mask=mask_s, other=float("-inf"))
            base = finite_max(tl.max(part, 0))
            sums = tl.load(sum_ptr + offs, mask=mask_s, other=0.0) * tl.exp2(part - base[None, :])
            lse = base + tl.log2(tl.where(mask_r, tl.sum(sums, 0), 1.0))
        offs_q = query_offsets(offs_r, head, group, stride_qr, stride_qh, UNIT)
        q1 = load_rows(q_ptr, offs_q, mask_r, 0, D1, HEAD_DIM, UPCAST)
        q2 = q1
        if D2 > 0:
            q2 = load_rows(q_ptr, offs_q, mask_r, D1, D2, HEAD_DIM, UPCAST)
        s = scores_tile(q1, q2, k_ptr, offs_k, mask_n & inside, D1, D2, HEAD_DIM, PRECISION, UPCAST)
        weights = tl.exp2(s * scale_log2 - lse[:, None])
        total += tl.sum(tl.where(mask_r[:, None], weights, 0.0), 0)
    total = tl.where(inside, total, float("nan"))
    tl.store(partial_ptr + item.to(tl.int64) * visual_count + offs_n, total, mask=mask_n)


@kernel
def mean_kernel(
    partial_ptr, prior_ptr, out_ptr, count, pool, kv_heads, divisor, eps, stride_pb, stride_pn,
    HAS_PRIOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the tokens of each merge unit and, before that, their key heads, in order; divides by rows and prior."""
    blocks = tl.cdiv(count, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    offs_n = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask_n = offs_n < count
    score = tl.zeros([BLOCK], tl.float32)
    for member in range(0, pool):
        total = tl.zeros([BLOCK], tl.float32)
        for head in range(0, kv_heads):
            row = partial_ptr + (batch * kv_heads + head) * count * pool
            total += tl.load(row + offs_n * pool + member, mask=mask_n, other=0.0)
        score += total
    score = score / divisor
    if HAS_PRIOR:
        score = score / (tl.load(prior_ptr + batch * stride_pb + offs_n * stride_pn, mask=mask_n, other=1.0) + eps)
    tl.store(out_ptr + batch * count + offs_n, score, mask=mask_n)


def mean_scores(
    partial: Tensor, scores: Tensor, pool: int, kv_heads: int, divisor: float, prior: Tensor | None, eps: float
) -> None:
    """Fill `scores [.., N]` from `partial`, `[.., kv_heads, N * pool]`."""
    count, block = scores.shape[-1], config("mean", partial)
    prior = prior if prior is None else prior.to(torch.float32)
    strides = (0, 1) if prior is None else (prior.stride(0) if prior.dim() == 2 else 0, prior.stride(-1))
    mean_kernel[(scores.numel() // count * cdiv(count, block["BLOCK"]),)](
        partial, partial if prior is None else prior, scores, count, pool, kv_heads, divisor, eps, *strides,
        HAS_PRIOR=prior is not None, **block,
    )  # fmt: skip


def query_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    lse: Tensor | None,
    visual: Tensor | None,
    span: list[int],
    prior: Tensor | None,
    eps: float,
) -> Tensor:
    """float32 `[N]` or `[B, N]` from `query [Lq, H, d]`, `key [L, Hkv, d]` or the same with a batch in front.

    `visual`: int64 `[N]`, or the visual positions are `range(*span)`, all when that is empty. A position of `visual`
    outside the keys gives NaN.
    """
    *batch, positions, heads, head_dim = query.shape
    keys, kv_heads = key.shape[-3], key.shape[-2]
    start, stop, step = span or (0, keys, 1)
    count = visual.shape[0] if visual is not None else len(range(start, stop, step))
    scores = torch.empty((*batch, count), dtype=torch.float32, device=query.device)
    if scores.numel() == 0:
        return scores

    items = (batch[0] if batch else 1) * kv_heads
    group = heads // kv_heads
    rows = group * positions
    query, key = dense_rows(query), dense_rows(key)
    unit = aligned(query, key)
    d1, d2 = head_parts(head_dim)
    tile = dict(config(kind_of(rows, unit), query, head_dim))
    max_splits = tile.pop("MAX_SPLITS")
    common = {"HEAD_DIM": head_dim, "D1": d1, "D2": d2, "UNIT": unit, "UPCAST": INTERPRETED, **tile}
    strides = unit_strides(unit, query, key)
    scale_log2 = scale * LOG2E

    splits = 1
    partial = torch.empty(items * count, dtype=torch.float32, device=query.device)
    maxima = sums = partial
    if lse is None:
        splits = min(max_splits, cdiv(keys, MIN_SPLIT))
        split_keys = cdiv(cdiv(keys, splits), tile["BLOCK_N"]) * tile["BLOCK_N"]
        splits = cdiv(keys, split_keys)
        maxima, sums = torch.empty(
            (2, padded(items * splits * rows)), dtype=torch.float32, device=query.device
        ).unbind()
        stats_kernel[(items * cdiv(rows, tile["BLOCK_M"]) * splits,)](
            query, key, maxima, sums, rows, keys, kv_heads, group, splits, split_keys, scale_log2, *strides, **common
        )
        lse_strides = [0, 0, 0]
    else:
        lse = lse.to(torch.float32)
        lse_strides = batched_strides(lse, 3)
    weights_kernel[(items * cdiv(count, tile["BLOCK_N"]),)](
        query, key, maxima, sums, partial if lse is None else lse, partial if visual is None else visual, partial,
        rows, keys, kv_heads, group, splits, scale_log2, LOG2E, start, step, count,
        1 if visual is None else visual.stride(0), *strides, *lse_strides,
        HAS_LSE=lse is not None, HAS_INDEX=visual is not None, MAX_SPLITS=max_splits, **common,
    )  # fmt: skip
    mean_scores(partial, scores, 1, kv_heads, float(positions * heads), prior, eps)
    return scores


def batched_strides(tensor: Tensor, dims: int) -> list[int]:
    """Strides of a tensor of `dims` dimensions, the first 0 where the batch is left out."""
    return [0] * (dims - tensor.dim()) + list(tensor.stride())


def unit_strides(unit: int, *tensors: Tensor) -> list[int]:
    """Strides but the last of tensors `[B, tokens, H, d]` in units; that of a single token or head is not used."""
    return [stride // unit for x in tensors for stride in batched_strides(x, 4)[:3]]
