"""Efficient Video Sampling: the tokens that differ most from the token at the same place of the frame before.

Two launches, and one more for pick order. A wide one gives every token 1 - cosine to its predecessor: three sums at a
time, over rows that are read once from memory and once more, as somebody's predecessor, from the cache. Top-k chooses.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import cdiv, kernel
from .similarity import inverse_norm, strided_rows
from .topk import topk_select


@kernel
def dissimilarity_kernel(x_ptr, out_ptr, tokens, places, row_stride, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    later = (offs_n >= places) & (offs_n < tokens)
    rows = x_ptr + offs_n.to(tl.int64) * row_stride
    before = x_ptr + (offs_n - places).to(tl.int64) * row_stride
    # [BN, BD]
    products = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    squares_before = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        mask = later[:, None] & (start + offs_d < D)[None, :]
        x = tl.load(rows[:, None] + (start + offs_d)[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.load(before[:, None] + (start + offs_d)[None, :], mask=mask, other=0.0).to(tl.float32)
        products += x * y
        squares += x * x
        squares_before += y * y
    inverse = inverse_norm(tl.sum(squares, 1))
    inverse_before = inverse_norm(tl.sum(squares_before, 1))
    # one factor at a time: the product of two inverse norms may overflow
    cosine = tl.sum(products, 1) * inverse * inverse_before
    cosine = tl.where((inverse > 0) & (inverse_before > 0), cosine, 0.0)
    tl.store(out_ptr + offs_n, tl.where(later, 1 - cosine, float("inf")), mask=offs_n < tokens)


def evs_select(features: Tensor, frames: int, k: int, sort: bool) -> Tensor:
    """int64 ``[k]`` of features ``[N, D]``, frame after frame."""
    features, tokens, _, row_stride = strided_rows(features)
    scores = torch.empty(tokens, dtype=torch.float32, device=features.device)
    block = config("frames", features)
    dissimilarity_kernel[(cdiv(tokens, block["BLOCK_N"]),)](
        features, scores, tokens, tokens // frames, row_stride, features.shape[1], **block
    )
    return topk_select(scores, [k], None, sort)
