"""Norms of feature rows, and cosines of pairs of tokens in tiles on tensor cores.

`inverse_norms` reads every feature once. `nearest_other` and `cosine_matrix` multiply each pair of a segment once: N²·D
flops, half of the square. Maxima meet in memory as integers that compare as the floats do, so their order is
irrelevant. A pair always stands as (row, column) in one way, so its number does not depend on the tile that it falls
into. float32 products use three TF32 products each (`tf32x3`), about the accuracy of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variants import Variant

NORM_ROWS = 4  # rows a program
NORM_DEPTH = 1024  # elements of a row a step
SPLITS = 8  # programs that share the columns of one row of tiles
INTERPRETED = triton.knobs.runtime.interpret  # whose bfloat16 is silently wrong unless loads are converted
NO_COSINE = tl.constexpr(-2139095041)  # -inf in the order of `float_order`
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TILES = {  # tile of cosines and depth of a product step
    "fp32": {"BLOCK_N": 64, "BLOCK_D": 16, "PRECISION": "tf32x3"},
    "fp16": {"BLOCK_N": 64, "BLOCK_D": 64, "PRECISION": "ieee"},
    "bf16": {"BLOCK_N": 64, "BLOCK_D": 64, "PRECISION": "ieee"},
}
LAUNCH = {"num_warps": 8, "num_stages": 2}


@triton.jit
def row_offsets(tokens, per_item, item_stride, row_stride):
    """Elements from the first feature to the rows of flat token numbers."""
    return (tokens // per_item).to(tl.int64) * item_stride + (tokens % per_item).to(tl.int64) * row_stride


@triton.jit
def cosine_tile(
    x_ptr,
    inverse_ptr,
    tokens_m,
    tokens_n,
    mask_m,
    mask_n,
    per_item,
    item_stride,
    row_stride,
    D,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """float32 cosines of the tokens of two lists; 0 where a row has no norm."""
    rows_m = row_offsets(tokens_m, per_item, item_stride, row_stride)
    rows_n = row_offsets(tokens_n, per_item, item_stride, row_stride)
    inverse_m = tl.load(inverse_ptr + tokens_m, mask=mask_m, other=0.0)  # [BM]
    inverse_n = tl.load(inverse_ptr + tokens_n, mask=mask_n, other=0.0)  # [BN]
    dots = tl.zeros([tokens_m.shape[0], tokens_n.shape[0]], tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        a = tl.load(x_ptr + rows_m[:, None] + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0)
        b = tl.load(x_ptr + rows_n[None, :] + offs_d[:, None], mask=mask_d[:, None] & mask_n[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        dots = tl.dot(a, b, dots, input_precision=PRECISION)  # [BM, BD] x [BD, BN]
    # one factor at a time: the product of two inverse norms may overflow
    cosines = dots * inverse_m[:, None] * inverse_n[None, :]
    # a row without a norm may hold NaN, which a product with 0 would keep
    return tl.where((inverse_m > 0)[:, None] & (inverse_n > 0)[None, :], cosines, 0.0)


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
    norms = tl.sqrt_rn(tl.sum(squares, 1))
    valid = (norms > 0) & (norms < float("inf"))  # false for NaN too
    tl.store(out_ptr + offs_n, tl.where(valid, tl.div_rn(1.0, tl.where(valid, norms, 1.0)), 0.0), mask=mask_n)


@triton.jit
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
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile = tl.program_id(0)
    tokens_m = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = tokens_m < T
    ends = tl.load(segment_ends_ptr + tokens_m, mask=mask_m, other=0)
    last = tl.minimum(tl.max(ends), T)
    for column in range(tile + tl.program_id(1), tl.cdiv(last, BLOCK_N), SPLITS):
        tokens_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = tokens_n < last
        cosines = cosine_tile(
            x_ptr, inverse_ptr, tokens_m, tokens_n, mask_m, mask_n, per_item, item_stride, row_stride, D,
            BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        later = (tokens_m[:, None] < tokens_n[None, :]) & (tokens_n[None, :] < ends[:, None])
        order = tl.where(later, float_order(cosines), NO_COSINE)  # [BM, BN]
        tl.atomic_max(out_ptr + tokens_m, tl.max(order, 1), mask=mask_m)
        tl.atomic_max(out_ptr + tokens_n, tl.max(order, 0), mask=mask_n)


@triton.jit
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
        cosines = cosine_tile(
            x_ptr, inverse_ptr, first + offs_m, first + offs_n, mask_m, mask_n, per_item, item_stride, row_stride, D,
            BLOCK_D, PRECISION, UPCAST,
        ).to(out_ptr.dtype.element_ty)  # fmt: skip
        out_ptr += first.to(tl.int64) * per_item
        rows = offs_m.to(tl.int64) * per_item
        columns = offs_n.to(tl.int64) * per_item
        upper = mask_m[:, None] & mask_n[None, :] & (offs_m[:, None] <= offs_n[None, :])
        tl.store(out_ptr + rows[:, None] + offs_n[None, :], cosines, mask=upper)
        tl.store(out_ptr + columns[None, :] + offs_m[:, None], cosines, mask=upper)


def strided_rows(features: Tensor) -> tuple[Tensor, int, int, int]:
    """Features with unit stride along D, tokens an item, and the strides of an item and of a row."""
    if features.stride(-1) != 1 and features.shape[-1] > 1:
        features = features.contiguous()
    item_stride = features.stride(0) if features.ndim == 3 else 0
    return features, features.shape[-2], item_stride, features.stride(-2)


def inverse_norms(features: Tensor) -> Tensor:
    """float32 ``[tokens]``: 1 / norm of every row of ``[N, D]`` or ``[B, N, D]``; 0 where it is zero or not finite."""
    features, per_item, item_stride, row_stride = strided_rows(features)
    tokens = features.shape[:-1].numel()
    out = torch.empty(tokens, dtype=torch.float32, device=features.device)
    if tokens:
        inverse_norms_kernel[(triton.cdiv(tokens, NORM_ROWS),)](
            features, out, tokens, per_item, item_stride, row_stride, features.shape[-1], NORM_ROWS, NORM_DEPTH,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def segment_starts(features: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int32 ``[segments + 1]``: where segments begin among the flat tokens, also of ``[N, D]`` and ``[B, N, D]``."""
    if cu_seqlens is not None:
        return cu_seqlens
    items, per_item = features.shape[:-2].numel(), features.shape[-2]
    return torch.arange(items + 1, dtype=torch.int32, device=features.device) * per_item


def segment_numbers(starts: Tensor, tokens: int) -> Tensor:
    """int64 ``[tokens]``: the segment of each token."""
    places = torch.arange(tokens, dtype=starts.dtype, device=starts.device)
    return torch.searchsorted(starts[1:], places, right=True)


def nearest_other(features: Tensor, inverse: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """float32 ``[tokens]``: cosine of each token to the most similar other one of its segment; -inf if there is none.

    ``inverse`` is `inverse_norms` of the features ``[N, D]``, ``[B, N, D]`` or packed ``[T, D]``.
    """
    features, per_item, item_stride, row_stride = strided_rows(features)
    tokens = len(inverse)
    best = torch.full((tokens,), NO_COSINE.value, dtype=torch.int32, device=features.device)
    starts = segment_starts(features, cu_seqlens)
    if tokens and len(starts) > 1:
        numbers = segment_numbers(starts, tokens).clamp(max=len(starts) - 2)
        tile = TILES[DTYPES[features.dtype]]
        nearest_other_kernel[(triton.cdiv(tokens, tile["BLOCK_N"]), SPLITS)](
            features, inverse, starts[1:][numbers], best, tokens, per_item, item_stride, row_stride,
            features.shape[-1], SPLITS, **tile, UPCAST=INTERPRETED, **LAUNCH,
        )  # fmt: skip
    return torch.where(best < 0, best ^ 0x7FFFFFFF, best).view(torch.float32)


def cosine_matrix(features: Tensor, inverse: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines of all pairs, ``[N, N]`` or ``[B, N, N]``, symmetric to the bit; float32 or bfloat16."""
    features, per_item, item_stride, row_stride = strided_rows(features)
    out = features.new_empty((*features.shape[:-1], per_item), dtype=dtype)
    if out.numel():
        tile = TILES[DTYPES[features.dtype]]
        tiles = triton.cdiv(per_item, tile["BLOCK_N"])
        cosine_matrix_kernel[(tiles, tiles, len(inverse) // per_item)](
            features, inverse, out, per_item, item_stride, row_stride, features.shape[-1],
            **tile, UPCAST=INTERPRETED, **LAUNCH,
        )  # fmt: skip
    return out


def variants() -> list[Variant]:
    row = {"per_item": "i32", "item_stride": "i64", "row_stride": "i64", "D": "i32"}
    norms = {"BLOCK_N": NORM_ROWS, "BLOCK_D": NORM_DEPTH}
    found = []
    for dtype, tile in TILES.items():
        norms_signature = {"x_ptr": f"*{dtype}", "out_ptr": "*fp32", "tokens": "i32", **row}
        found.append(
            Variant(
                name=f"inverse_norms-{dtype}",
                kernel=inverse_norms_kernel,
                signature=norms_signature | dict.fromkeys(norms, "constexpr"),
                constexprs=norms,
                num_warps=4,
                num_stages=2,
            )
        )
        constants = {"SPLITS": SPLITS, **tile, "UPCAST": False}
        pointers = {"x_ptr": f"*{dtype}", "inverse_ptr": "*fp32", "segment_ends_ptr": "*i32", "out_ptr": "*i32"}
        found.append(
            Variant(
                name=f"nearest_other-{dtype}",
                kernel=nearest_other_kernel,
                signature=pointers | {"T": "i32"} | row | dict.fromkeys(constants, "constexpr"),
                constexprs=constants,
                **LAUNCH,
                tensor_cores=True,
            )
        )
        constants = {**tile, "UPCAST": False}
        for kind in ("fp32", "bf16"):
            pointers = {"x_ptr": f"*{dtype}", "inverse_ptr": "*fp32", "out_ptr": f"*{kind}"}
            signature = pointers | row | dict.fromkeys(constants, "constexpr")
            name = f"cosine_matrix-{dtype}-{kind}"
            found.append(Variant(name, cosine_matrix_kernel, signature, constants, **LAUNCH, tensor_cores=True))
    return found
