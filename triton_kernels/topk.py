"""The k highest scores of each segment, in the total order.

One program a segment. The k-th score is found digit by digit: four histograms of 8 bits of the ordered scores, each
over those that agree with the digits found so far. A last pass writes, in order of index, every token above that score
and the first of those equal to it, as many as are left to take. Five reads of the scores, from the cache after the
first; no atomics but the histograms' counts, which are integers. Pick order takes a second, wide launch: a pick's place
is the number of picks with a larger key, k^2 comparisons a segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .host_ints import budget_starts
from .launch import cdiv, kernel
from .order import key_index, make_key, ordered_bits


@triton.jit
def segment(b, cu_ptr, starts_ptr, N, T, K, PACKED: tl.constexpr):
    """First token, number of tokens, first pick and number of picks; within bounds whatever cu_seqlens holds."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), start), T)
        first = tl.load(starts_ptr + b)
        return start, end - start, first, tl.load(starts_ptr + b + 1) - first
    return b * 0, N, b * K, K


@kernel
def topk_kernel(
    scores_ptr, cu_ptr, starts_ptr, out_ptr, N, T, K, sort, stride_b, stride_n,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes ascending indices, or with sort=0 the picks' keys in that order."""
    b = tl.program_id(0)
    start, n, first, k = segment(b, cu_ptr, starts_ptr, N, T, K, PACKED)
    base = scores_ptr + b.to(tl.int64) * stride_b + start.to(tl.int64) * stride_n
    offs = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)

    # `digits` grows to the ordered bits of the k-th score; `left` of the tokens that agree with it are still to take
    digits = tl.zeros((), tl.int64)
    left = tl.minimum(k, n)
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.zeros((256,), tl.int32)
        for at in range(0, n, BLOCK):
            mask = at + offs < n
            bits = ordered_bits(tl.load(base + (at + offs).to(tl.int64) * stride_n, mask=mask, other=0).to(tl.float32))
            agrees = mask & ((bits >> (shift + 8)) == digits)
            counts += tl.histogram(((bits >> shift) & 255).to(tl.int32), 256, mask=agrees)
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)  # with a higher digit
        digit = tl.min(tl.where(above < left, bins, 255), 0)
        left -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        digits = digits * 256 + digit

    taken = tl.zeros((), tl.int32)
    for at in range(0, n, BLOCK):
        mask = at + offs < n
        score = tl.load(base + (at + offs).to(tl.int64) * stride_n, mask=mask, other=0).to(tl.float32)
        bits = ordered_bits(score)
        equal = mask & (bits == digits)
        rank = tl.cumsum(equal.to(tl.int32), 0)
        take = (mask & (bits > digits)) | (equal & (rank <= left))
        left -= tl.minimum(tl.sum(equal.to(tl.int32), 0), left)
        place = (first + taken).to(tl.int64) + tl.cumsum(take.to(tl.int32), 0) - 1
        taken += tl.sum(take.to(tl.int32), 0)
        token = (start + at + offs).to(tl.int64)
        tl.store(out_ptr + place, tl.where(sort != 0, token, make_key(score, token)), mask=take)


@kernel
def pick_order_kernel(
    keys_ptr, cu_ptr, starts_ptr, out_ptr, N, T, K, PACKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Puts the tokens of a segment's keys in descending order of the keys, ROWS of them a program."""
    b = tl.program_id(0)
    _, n, first, k = segment(b, cu_ptr, starts_ptr, N, T, K, PACKED)
    picks = tl.minimum(k, n)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(1) * ROWS < picks:
        keys = tl.load(keys_ptr + first.to(tl.int64) + rows, mask=rows < picks, other=0)
        place = tl.zeros((ROWS,), tl.int32)
        for at in range(0, picks, COLS):
            cols = at + tl.arange(0, COLS)
            others = tl.load(keys_ptr + first.to(tl.int64) + cols, mask=cols < picks, other=0)
            # [ROWS, COLS]
            before = (others[None, :] > keys[:, None]) & (cols < picks)[None, :]
            place += tl.sum(before.to(tl.int32), 1)
        tl.store(out_ptr + first.to(tl.int64) + place, key_index(keys), mask=rows < picks)


def topk_select(scores: Tensor, k: Sequence[int], cu_seqlens: Tensor | None, sort: bool) -> Tensor:
    """int64 ``[k]``, ``[B, k]`` or packed ``[sum of k]`` for scores ``[N]``, ``[B, N]`` or packed ``[T]``."""
    packed = cu_seqlens is not None
    tokens = scores.shape[-1]
    if packed:
        segments, most, starts = len(k), max(k, default=0), budget_starts(k, scores.device)
        # zeros: a k beyond its segment, unseen by the host, must not leave an index that is out of range
        out = scores.new_zeros(sum(k), dtype=torch.int64)
    else:
        segments, most, starts = scores[..., 0].numel() if tokens else 0, k[0], None
        out = scores.new_empty((*scores.shape[:-1], k[0]), dtype=torch.int64)
    if segments == 0 or most == 0:
        return out
    stride_b = 0 if scores.dim() == 1 else scores.stride(0)
    found = out if sort else torch.empty_like(out)
    topk_kernel[(segments,)](
        scores, cu_seqlens, starts, found, tokens, tokens, most, int(sort), stride_b,
        scores.stride(-1), PACKED=packed, **config("topk", scores),
    )  # fmt: skip
    if not sort:
        block = config("pick order", scores)
        pick_order_kernel[(segments, cdiv(most, block["ROWS"]))](
            found, cu_seqlens, starts, out, tokens, tokens, most, PACKED=packed, **block
        )
    return out
