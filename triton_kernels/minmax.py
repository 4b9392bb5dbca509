"""Scores scaled to 0..1 within each segment: `(s - min) / (max - min + 1e-6)`, of the finite scores.

One launch, one program a segment: a pass over its scores for their minimum and maximum, another that scales them, from
the cache. The same rounded operations as the tensor form, so the same bits.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import kernel


@kernel
def minmax_kernel(
    scores_ptr, cu_ptr, out_ptr, N, T, stride_b, stride_n, PACKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    start = b * 0
    n = N
    if PACKED:
        # inside the scores whatever cu_seqlens holds
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), T).to(tl.int64)
        n = (tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), start), T) - start).to(tl.int32)
    scores_ptr += b * stride_b + start * stride_n
    out_ptr += start if PACKED else b * N
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], -float("inf"), tl.float32)
    for at in range(0, n, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        scores = tl.load(scores_ptr + offs.to(tl.int64) * stride_n, mask=offs < n, other=float("inf")).to(tl.float32)
        finite = tl.abs(scores) < float("inf")  # false for NaN too
        low = tl.minimum(low, tl.where(finite, scores, float("inf")))
        high = tl.maximum(high, tl.where(finite, scores, -float("inf")))
    lowest = tl.min(low, 0)
    span = tl.max(high, 0) * 0.5 - lowest * 0.5 + 0.5e-6  # of halves, which do not overflow
    for at in range(0, n, BLOCK):
        offs = at + tl.arange(0, BLOCK)
        scores = tl.load(scores_ptr + offs.to(tl.int64) * stride_n, mask=offs < n, other=0.0).to(tl.float32)
        finite = tl.abs(scores) < float("inf")
        scaled = tl.div_rn(scores * 0.5 - lowest * 0.5, tl.zeros_like(scores) + span)
        tl.store(out_ptr + offs, tl.where(finite, scaled, scores), mask=offs < n)


def minmax(scores: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """float32 ``[N]``, ``[B, N]`` or packed ``[T]``; scores in no segment of ``cu_seqlens`` give undefined values."""
    out = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    packed, tokens = cu_seqlens is not None, scores.shape[-1]
    segments = len(cu_seqlens) - 1 if packed else scores.shape[:-1].numel()
    if out.numel() and segments:
        minmax_kernel[(segments,)](
            scores, cu_seqlens.contiguous() if packed else None, out, tokens, tokens,
            0 if scores.ndim == 1 else scores.stride(0), scores.stride(-1), PACKED=packed, **config("minmax", scores),
        )  # fmt: skip
    return out
