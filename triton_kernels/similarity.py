"""Norms of feature rows, and cosines of pairs of tokens in tiles that are never stored.

`inverse_norms` reads every feature once. `nearest_other` multiplies each pair of a segment once, on tensor cores: N²·D
flops, half of the square; the maxima meet in memory as integers that compare as the floats do, so their order is
irrelevant. `adjacency` is the same tile with the edge rule of an independent set behind it, packed to a bit a pair.
A pair always stands as (row, column) in one way, so its number does not depend on the tile that it falls into.
float32 products use three TF32 products each (`tf32x3`), about the accuracy of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
PROXIMITIES = ("chebyshev", "gaussian", "linear")
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
def proximity_tile(positions_ptr, tokens_m, tokens_n, mask_m, mask_n, kind, radius, temporal_radius, falloff, diagonal):
    """Spatial term of the graph in [0, 1], float32 ``[BM, BN]``; differences in int64 cannot wrap."""
    t_m = tl.load(positions_ptr + tokens_m * 3, mask=mask_m, other=0).to(tl.int64)  # [BM]
    y_m = tl.load(positions_ptr + tokens_m * 3 + 1, mask=mask_m, other=0).to(tl.int64)
    x_m = tl.load(positions_ptr + tokens_m * 3 + 2, mask=mask_m, other=0).to(tl.int64)
    t_n = tl.load(positions_ptr + tokens_n * 3, mask=mask_n, other=0).to(tl.int64)  # [BN]
    y_n = tl.load(positions_ptr + tokens_n * 3 + 1, mask=mask_n, other=0).to(tl.int64)
    x_n = tl.load(positions_ptr + tokens_n * 3 + 2, mask=mask_n, other=0).to(tl.int64)
    dy = tl.abs(y_m[:, None] - y_n[None, :])
    dx = tl.abs(x_m[:, None] - x_n[None, :])
    near = tl.where(tl.maximum(dy, dx) <= radius, 1.0, 0.0)
    if kind != 0:
        square = dy.to(tl.float32) * dy.to(tl.float32) + dx.to(tl.float32) * dx.to(tl.float32)
        if kind == 1:
            near = tl.exp(square * falloff)
        else:
            near = tl.where(diagonal > 0, tl.maximum(1.0 - tl.sqrt(square) / tl.maximum(diagonal, 1.0), 0.0), 1.0)
    return tl.where(tl.abs(t_m[:, None] - t_n[None, :]) > temporal_radius, 0.0, near)


@triton.jit
def edge_tile(
    x_ptr,
    inverse_ptr,
    positions_ptr,
    tokens_m,
    tokens_n,
    mask_m,
    mask_n,
    per_item,
    item_stride,
    row_stride,
    D,
    scale,
    offset,
    alpha,
    beta,
    threshold,
    kind,
    radius,
    temporal_radius,
    falloff,
    diagonal,
    SPATIAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Whether ``alpha * (scale * cosine + offset) + beta * proximity > threshold``; without `SPATIAL` alpha is 1."""
    weights = scale * cosine_tile(
        x_ptr, inverse_ptr, tokens_m, tokens_n, mask_m, mask_n, per_item, item_stride, row_stride, D,
        BLOCK_D, PRECISION, UPCAST,
    ) + offset  # fmt: skip
    if SPATIAL:
        near = proximity_tile(
            positions_ptr, tokens_m, tokens_n, mask_m, mask_n, kind, radius, temporal_radius, falloff, diagonal
        )
        weights = alpha * weights + beta * near
    return (weights > threshold) & mask_m[:, None] & mask_n[None, :]


@triton.jit
def pack_bits(bits):
    """Words of 32 bits from ``[M, 32]``, lowest bit first."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 32)[None, :], 1)


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
def diagonal_kernel(positions_ptr, cu_ptr, out_ptr, T, BLOCK_N: tl.constexpr):
    """Diagonal of the box around a segment's places, one program a segment."""
    start, end = segment_bounds(cu_ptr, tl.program_id(0), T)
    low_y = tl.full([BLOCK_N], 2147483647, tl.int32)
    high_y = tl.full([BLOCK_N], -2147483648, tl.int32)
    low_x = low_y
    high_x = high_y
    for chunk in range(start, end, BLOCK_N):
        offs = chunk + tl.arange(0, BLOCK_N)
        mask = offs < end
        y = tl.load(positions_ptr + offs * 3 + 1, mask=mask, other=0)
        x = tl.load(positions_ptr + offs * 3 + 2, mask=mask, other=0)
        low_y = tl.where(mask, tl.minimum(low_y, y), low_y)
        high_y = tl.where(mask, tl.maximum(high_y, y), high_y)
        low_x = tl.where(mask, tl.minimum(low_x, x), low_x)
        high_x = tl.where(mask, tl.maximum(high_x, x), high_x)
    height = (tl.max(high_y, 0).to(tl.int64) - tl.min(low_y, 0)).to(tl.float32)
    width = (tl.max(high_x, 0).to(tl.int64) - tl.min(low_x, 0)).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sqrt_rn(height * height + width * width))


@triton.jit
def adjacency_kernel(
    x_ptr,
    inverse_ptr,
    positions_ptr,
    diagonal_ptr,
    order_ptr,
    cu_ptr,
    left_ptr,
    bits_ptr,
    panel,
    words,
    T,
    per_item,
    item_stride,
    row_stride,
    D,
    scale,
    offset,
    alpha,
    beta,
    threshold,
    kind,
    radius,
    temporal_radius,
    falloff,
    SPATIAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Edges between candidates of one panel of a segment's order: a row of bits each, towards the earlier ones."""
    column = tl.program_id(0)
    row = tl.program_id(1)
    segment = tl.program_id(2)
    start, end = segment_bounds(cu_ptr, segment, T)
    first = start + panel
    if (column <= row) & (first + row * BLOCK_N < end) & (tl.load(left_ptr + segment) > 0):
        offs_m = first + row * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_n = first + column * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = offs_m < end
        mask_n = offs_n < end
        tokens_m = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
        tokens_n = tl.load(order_ptr + offs_n, mask=mask_n, other=0)
        diagonal = tl.load(diagonal_ptr + segment)
        edges = edge_tile(
            x_ptr, inverse_ptr, positions_ptr, tokens_m, tokens_n, mask_m, mask_n, per_item, item_stride, row_stride,
            D, scale, offset, alpha, beta, threshold, kind, radius, temporal_radius, falloff, diagonal,
            SPATIAL, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        packed = tl.reshape(pack_bits(tl.reshape(edges, [BLOCK_N * BLOCK_N // 32, 32])), [BLOCK_N, BLOCK_N // 32])
        offs_w = column * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
        tl.store(bits_ptr + offs_m.to(tl.int64)[:, None] * words + offs_w[None, :], packed, mask=mask_m[:, None])


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


@dataclass(frozen=True)
class Graph:
    """The edge rule as the kernels take it; ``positions`` is int32 ``[tokens, 3]`` if proximity counts."""

    features: Tensor
    inverse: Tensor
    starts: Tensor
    positions: Tensor | None
    settings: tuple[float | int, ...]

    @classmethod
    def build(
        cls,
        features: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        alpha: float,
        threshold: float,
        similarity: str,
        proximity: str,
        radius: int,
        sigma: float,
        temporal_radius: int,
    ) -> Graph:
        half = 0.5 if similarity == "half_cosine" else 0.0
        settings = (
            1.0 - half, half, alpha, 1.0 - alpha, threshold, PROXIMITIES.index(proximity), radius, temporal_radius,
            -0.5 / (sigma * sigma) if proximity == "gaussian" else 0.0,
        )  # fmt: skip
        spatial = positions is not None and alpha < 1.0
        places = positions.reshape(-1, 3).contiguous() if spatial else None
        starts = segment_starts(features, cu_seqlens)
        return cls(strided_rows(features)[0], inverse_norms(features), starts, places, settings)

    @property
    def tile(self) -> dict[str, Any]:
        return TILES[DTYPES[self.features.dtype]]

    @property
    def tokens(self) -> int:
        return len(self.inverse)

    def diagonals(self) -> Tensor:
        """float32 ``[segments]``; only linear proximity reads their values."""
        out = self.inverse.new_empty(len(self.starts) - 1)
        if self.positions is not None and self.settings[5] == PROXIMITIES.index("linear"):
            diagonal_kernel[(len(out),)](self.positions, self.starts, out, self.tokens, 1024)
        return out

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, diagonals: Tensor, panel: tuple[int, ...]) -> None:
        """Run ``kernel`` on (features, norms, positions, diagonals, *args, *panel, shapes and settings)."""
        _, per_item, item_stride, row_stride = strided_rows(self.features)
        places = self.starts if self.positions is None else self.positions
        kernel[grid](
            self.features, self.inverse, places, diagonals, *args, *panel, self.tokens, per_item, item_stride,
            row_stride, self.features.shape[-1], *self.settings, self.positions is not None, **self.tile,
            UPCAST=INTERPRETED, **LAUNCH,
        )  # fmt: skip


def adjacency(graph: Graph, order: Tensor, left: Tensor, bits: Tensor, diagonals: Tensor, panel: int) -> None:
    """Fill ``bits [tokens, words]``: edges among the candidates ``panel`` to ``panel + 32 * words`` of each segment.

    ``order`` is int32 ``[tokens]``, each segment's tokens by priority; row i is the i-th of them, bit j of it the j-th
    of the panel, meant only where j comes before i. Segments with nothing ``left`` to pick are passed over.
    """
    words = bits.shape[1]
    tiles = triton.cdiv(min(32 * words, graph.tokens), graph.tile["BLOCK_N"])
    graph.launch(
        adjacency_kernel, (tiles, tiles, len(graph.starts) - 1), order, graph.starts, left, bits,
        diagonals=diagonals, panel=(panel, words),
    )  # fmt: skip


def graph_variants(name: str, kernel: Any, args: dict[str, str]) -> list[Variant]:
    """Compiled forms of a kernel that `Graph.launch` runs, ``args`` being its own arguments."""
    found = []
    pointers = {"inverse_ptr": "*fp32", "positions_ptr": "*i32", "diagonal_ptr": "*fp32"}
    row = {"T": "i32", "per_item": "i32", "item_stride": "i64", "row_stride": "i64", "D": "i32"}
    rule = dict.fromkeys(("scale", "offset", "alpha", "beta", "threshold"), "fp32")
    rule |= {"kind": "i32", "radius": "i64", "temporal_radius": "i64", "falloff": "fp32"}
    for dtype, tile in TILES.items():
        for spatial in (False, True):
            constants = {"SPATIAL": spatial, **tile, "UPCAST": False}
            signature = {"x_ptr": f"*{dtype}"} | pointers | args | row | rule | dict.fromkeys(constants, "constexpr")
            where = "-spatial" if spatial else ""
            found.append(Variant(f"{name}-{dtype}{where}", kernel, signature, constants, **LAUNCH, tensor_cores=True))
    return found


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
    candidates = {"order_ptr": "*i32", "cu_ptr": "*i32", "left_ptr": "*i32", "bits_ptr": "*i32"}
    found += graph_variants("adjacency", adjacency_kernel, candidates | {"panel": "i32", "words": "i32"})
    diagonal = {"positions_ptr": "*i32", "cu_ptr": "*i32", "out_ptr": "*fp32", "T": "i32", "BLOCK_N": "constexpr"}
    found.append(Variant("diagonal", diagonal_kernel, diagonal, {"BLOCK_N": 1024}, num_warps=4, num_stages=2))
    return found
