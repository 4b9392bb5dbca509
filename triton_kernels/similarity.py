"""Norms of feature rows, and cosines of pairs of tokens in tiles on tensor cores.

`inverse_norms` reads every feature once. `nearest_other` and `cosine_matrix` multiply each pair of a segment once: N²·D
flops, half of the square. Maxima meet in memory as integers that compare as the floats do, so their order is
irrelevant. A pair always stands as (row, column) in one way, so its number does not depend on the tile that it falls
into. float32 products use three TF32 products each (`tf32x3`), about the accuracy of float32, or on AMD's GPUs
float32 itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import ALIGNMENT, INTERPRETED, cdiv, kernel

SPLITS = 8  # programs that share the columns of one row of tiles
NO_COSINE = tl.constexpr(-2139095041)  # -inf in the order of `float_order`


@triton.jit
def row_offsets(tokens, per_item, item_stride, row_stride):
    """Elements from the first feature to the rows of flat token numbers."""
    return (tokens // per_item).to(tl.int64) * item_stride + (tokens % per_item).to(tl.int64) * row_stride


@triton.jit
def cosine_tile(
    a_ptr, b_ptr, norms_a, norms_b, D, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """float32 ``[BM, BN]`` cosines of the rows at two lists of pointers; rows whose inverse norm is 0 are not read."""
    dots = tl.zeros([norms_a.shape[0], norms_b.shape[0]], tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        # [BM, BD], [BD, BN]
        a = tl.load(a_ptr[:, None] + offs_d[None, :], mask=(norms_a > 0)[:, None] & mask_d[None, :], other=0.0)
        b = tl.load(b_ptr[None, :] + offs_d[:, None], mask=(norms_b > 0)[None, :] & mask_d[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        # Tensor cores cut off what they add up: they sum BLOCK_D products at a time, float32 does the rest. By fma, for
        # the compiler would take a plain sum into the dot.
        dots = tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, dots)
    # one factor at a time: the product of two inverse norms may overflow
    return dots * norms_a[:, None] * norms_b[None, :]


@triton.jit
def token_cosines(
    x_ptr, inverse_ptr, tokens_m, tokens_n, mask_m, mask_n, per_item, item_stride, row_stride, D,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`cosine_tile` of two lists of flat token numbers."""
    inverse_m = tl.load(inverse_ptr + tokens_m, mask=mask_m, other=0.0)
    inverse_n = tl.load(inverse_ptr + tokens_n, mask=mask_n, other=0.0)
    rows_m = x_ptr + row_offsets(tokens_m, per_item, item_stride, row_stride)
    rows_n = x_ptr + row_offsets(tokens_n, per_item, item_stride, row_stride)
    return cosine_tile(rows_m, rows_n, inverse_m, inverse_n, D, BLOCK_D, PRECISION, UPCAST)


@triton.jit
def float_order(x):
    """int32 that compare as the float32 do; its own inverse on the bits."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def segment_bounds(cu_ptr, segment, T):
    """First token of a segment and the one past its last, inside the T tokens whatever `cu_seqlens` holds."""
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + segment), 0), T)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + segment + 1), start), T)
    return start, end


@triton.jit
def inverse_norm(squared):
    """1 / norm from its square; 0 where that is below the smallest normal float, or not finite."""
    valid = (squared >= 1.1754943508222875e-38) & (squared < float("inf"))  # false for NaN too
    return tl.where(valid, tl.div_rn(1.0, tl.sqrt_rn(tl.where(valid, squared, 1.0))), 0.0)


@kernel
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
    rows = row_offsets(offs_n, per_item, item_stride, row_stride)
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        mask = mask_n[:, None] & (start + offs_d < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] + (start + offs_d)[None, :], mask=mask, other=0.0).to(tl.float32)  # [BN, BD]
        squares += x * x
    tl.store(out_ptr + offs_n, inverse_norm(tl.sum(squares, 1)), mask=mask_n)


@kernel
def nearest_other_kernel(
    x_ptr,
    inverse_ptr,
    segment_ends_ptr,
    out_ptr,
    T,
    per_item,
    item_stride,
    row_stride,
    D,
    PACKED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0)
    tokens_m = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = tokens_m < T
    if PACKED:
        ends = tl.load(segment_ends_ptr + tokens_m, mask=mask_m, other=0)
    else:
        ends = (tokens_m // per_item + 1) * per_item
    last = tl.minimum(tl.max(ends), T)
    for column in range(tile + tl.program_id(1), tl.cdiv(last, BLOCK_N), SPLITS):
        tokens_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = tokens_n < last
        cosines = token_cosines(
            x_ptr, inverse_ptr, tokens_m, tokens_n, mask_m, mask_n, per_item, item_stride, row_stride, D,
            BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        later = (tokens_m[:, None] < tokens_n[None, :]) & (tokens_n[None, :] < ends[:, None])
        order = tl.where(later, float_order(cosines), NO_COSINE)  # [BM, BN]
        tl.atomic_max(out_ptr + tokens_m, tl.max(order, 1), mask=mask_m)
        tl.atomic_max(out_ptr + tokens_n, tl.max(order, 0), mask=mask_n)


@kernel
def cosine_matrix_kernel(
    x_ptr,
    inverse_ptr,
    out_ptr,
    per_item,
    item_stride,
    row_stride,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1)
    if column >= row:
        offs_m = row * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = offs_m < per_item
        mask_n = offs_n < per_item
        first = tl.program_id(2) * per_item
        cosines = token_cosines(
            x_ptr, inverse_ptr, first + offs_m, first + offs_n, mask_m, mask_n, per_item, item_stride, row_stride, D,
            BLOCK_D, PRECISION, UPCAST,
        ).to(out_ptr.dtype.element_ty)  # fmt: skip
        out_ptr += first.to(tl.int64) * per_item
        upper = mask_m[:, None] & mask_n[None, :] & (offs_m[:, None] <= offs_n[None, :])
        # inside a tile offsets fit 32 bits
        offs = tl.arange(0, BLOCK_N)
        tile_ptr = out_ptr + (row * BLOCK_N).to(tl.int64) * per_item + column * BLOCK_N
        tl.store(tile_ptr + (offs[:, None] * per_item + offs[None, :]), cosines, mask=upper)
        tile_ptr = out_ptr + (column * BLOCK_N).to(tl.int64) * per_item + row * BLOCK_N
        tl.store(tile_ptr + (offs[:, None] * per_item + offs[None, :]), tl.trans(cosines), mask=tl.trans(upper))


def strided_rows(features: Tensor) -> tuple[Tensor, int, int, int]:
    """Features with unit stride along D, tokens an item, and the strides of an item and of a row."""
    if features.stride(-1) != 1 and features.shape[-1] > 1:
        features = features.contiguous()
    item_stride = features.stride(0) if features.ndim == 3 else 0
    return features, features.shape[-2], item_stride, features.stride(-2)


def aligned(features: Tensor) -> bool:
    """Whether rows, as `strided_rows` gives them, are read 16 bytes at a time."""
    _, _, item_stride, row_stride = strided_rows(features)
    return all(x % ALIGNMENT == 0 for x in (features.data_ptr(), features.shape[-1], item_stride, row_stride))


def cosine_config(features: Tensor, spatial: bool = False) -> dict[str, int]:
    """The tile of cosines."""
    return config("cosines spatial" if spatial else "cosines" if aligned(features) else "cosines unaligned", features)


def inverse_norms(features: Tensor) -> Tensor:
    """float32 ``[tokens]``: `inverse_norm` of every row of ``[N, D]`` or ``[B, N, D]``."""
    features, per_item, item_stride, row_stride = strided_rows(features)
    tokens = features.shape[:-1].numel()
    out = torch.empty(tokens, dtype=torch.float32, device=features.device)
    if tokens:
        block = config("norms", features)
        inverse_norms_kernel[(cdiv(tokens, block["BLOCK_N"]),)](
            features, out, tokens, per_item, item_stride, row_stride, features.shape[-1], **block
        )
    return out


def ascending(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """Each offset raised to those before it and kept inside the tokens.

    The host cannot see what they hold: whatever it is, segments then lie side by side.
    """
    return cu_seqlens if cu_seqlens is None else cu_seqlens.clamp(0, tokens).cummax(0).values


def segment_starts(features: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int32 ``[segments + 1]``: where segments begin among the flat tokens, also of ``[N, D]`` and ``[B, N, D]``."""
    if cu_seqlens is not None:
        return cu_seqlens
    items, per_item = features.shape[:-2].numel(), features.shape[-2]
    if per_item == 0:
        return torch.zeros(items + 1, dtype=torch.int32, device=features.device)
    return torch.arange(0, items * per_item + 1, per_item, dtype=torch.int32, device=features.device)


def segment_ends(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """``[tokens]``: where the segment of each token ends."""
    places = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    numbers = torch.searchsorted(cu_seqlens[1:], places, right=True)
    return cu_seqlens[1:][numbers.clamp(max=len(cu_seqlens) - 2)]


def nearest_other(features: Tensor, inverse: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """float32 ``[tokens]``: cosine of each token to the most similar other one of its segment; -inf if there is none.

    ``inverse`` is `inverse_norms` of the features ``[N, D]``, ``[B, N, D]`` or packed ``[T, D]``.
    """
    features, per_item, item_stride, row_stride = strided_rows(features)
    tokens = len(inverse)
    best = torch.full((tokens,), NO_COSINE.value, dtype=torch.int32, device=features.device)
    packed = cu_seqlens is not None
    if tokens and (not packed or len(cu_seqlens) > 1):
        ends = segment_ends(cu_seqlens, tokens) if packed else best
        tile = cosine_config(features)
        nearest_other_kernel[(cdiv(tokens, tile["BLOCK_N"]), SPLITS)](
            features, inverse, ends, best, tokens, per_item, item_stride, row_stride, features.shape[-1],
            PACKED=packed, SPLITS=SPLITS, **tile, UPCAST=INTERPRETED,
        )  # fmt: skip
    return torch.where(best < 0, best ^ 0x7FFFFFFF, best).view(torch.float32)


def cosine_matrix(features: Tensor, inverse: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines of all pairs, ``[N, N]`` or ``[B, N, N]``, symmetric to the bit; float32 or bfloat16."""
    features, per_item, item_stride, row_stride = strided_rows(features)
    out = features.new_empty((*features.shape[:-1], per_item), dtype=dtype)
    if out.numel():
        tile = cosine_config(features)
        tiles = cdiv(per_item, tile["BLOCK_N"])
        cosine_matrix_kernel[(tiles, tiles, len(inverse) // per_item)](
            features, inverse, out, per_item, item_stride, row_stride, features.shape[-1],
            **tile, UPCAST=INTERPRETED,
        )  # fmt: skip
    return out
