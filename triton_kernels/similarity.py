"""Norms of feature rows.

`inverse_norms` reads every feature once: 2·N·D bytes in half precision, no products on tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variants import Variant

NORM_ROWS = 4  # rows a program
NORM_DEPTH = 1024  # elements of a row a step


@triton.jit
def inverse_norms_kernel(
    x_ptr,
    out_ptr,
    tokens,
    per_item,
    item_stride,
    row_stride,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < tokens
    rows = (offs_n // per_item).to(tl.int64) * item_stride + (offs_n % per_item).to(tl.int64) * row_stride
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        mask = mask_n[:, None] & (start + offs_d < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] + (start + offs_d)[None, :], mask=mask, other=0.0).to(tl.float32)  # [BN, BD]
        squares += x * x
    norms = tl.sqrt_rn(tl.sum(squares, 1))
    valid = (norms > 0) & (norms < float("inf"))  # false for NaN too
    tl.store(out_ptr + offs_n, tl.where(valid, tl.div_rn(1.0, tl.where(valid, norms, 1.0)), 0.0), mask=mask_n)


def strided_rows(features: Tensor) -> tuple[Tensor, int, int, int]:
    """Features with unit stride along D, tokens an item, and the strides of an item and of a row."""
    if features.stride(-1) != 1 and features.shape[-1] > 1:
        features = features.contiguous()
    item_stride = features.stride(0) if features.ndim == 3 else 0
    return features, features.shape[-2], item_stride, features.stride(-2)


def inverse_norms(features: Tensor) -> Tensor:
    """float32 ``[tokens]``: 1 / norm of every row of ``[N, D]`` or ``[B, N, D]``; 0 where it is zero or not finite."""
    features, per_item, item_stride, row_stride = strided_rows(features)
    tokens = features.numel() // features.shape[-1] if features.shape[-1] else features.shape[:-1].numel()
    out = torch.empty(tokens, dtype=torch.float32, device=features.device)
    if tokens:
        inverse_norms_kernel[(triton.cdiv(tokens, NORM_ROWS),)](
            features, out, tokens, per_item, item_stride, row_stride, features.shape[-1], NORM_ROWS, NORM_DEPTH,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def variants() -> list[Variant]:
    scalars = {"tokens": "i32", "per_item": "i32", "item_stride": "i64", "row_stride": "i64", "D": "i32"}
    constants = {"BLOCK_N": NORM_ROWS, "BLOCK_D": NORM_DEPTH}
    constexprs = dict.fromkeys(constants, "constexpr")
    return [
        Variant(
            f"inverse_norms-{dtype}",
            inverse_norms_kernel,
            {"x_ptr": f"*{dtype}", "out_ptr": "*fp32", **scalars, **constexprs},
            constants,
            num_warps=4,
            num_stages=2,
        )
        for dtype in ("fp32", "fp16", "bf16")
    ]
