"""The graph of an independent set: pairs of tokens with enough similarity and proximity, a bit a pair.

A tile of cosines on tensor cores, the spatial term and the threshold in registers, 32 columns packed to a word. Each
pair is computed once, N²·D flops a graph of N candidates. A tile none of whose pairs is near enough for an edge,
whatever its cosines, costs its positions only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import INTERPRETED, cdiv, kernel
from .order import product
from .similarity import (
    ascending,
    cosine_config,
    inverse_norms,
    segment_bounds,
    segment_starts,
    strided_rows,
    token_cosines,
)

PROXIMITIES = ("chebyshev", "gaussian", "linear")
COSINE_MARGIN = tl.constexpr(1e-4)  # how far rounding may carry a cosine above 1


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
def edge_weight(alpha, similarity, beta, near):
    return product(alpha, similarity) + product(beta, near)


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
    mask = mask_m[:, None] & mask_n[None, :]
    possible = True
    if SPATIAL:
        near = proximity_tile(
            positions_ptr, tokens_m, tokens_n, mask_m, mask_n, kind, radius, temporal_radius, falloff, diagonal
        )
        nearest = tl.max(tl.max(tl.where(mask, near, 0.0), 1), 0)
        possible = edge_weight(alpha, scale * (1.0 + COSINE_MARGIN) + offset, beta, nearest) > threshold
    edges = tl.zeros([tokens_m.shape[0], tokens_n.shape[0]], tl.int32)
    if possible:
        cosines = token_cosines(
            x_ptr, inverse_ptr, tokens_m, tokens_n, mask_m, mask_n, per_item, item_stride, row_stride, D,
            BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        weights = scale * cosines + offset
        if SPATIAL:  # again: kept through the products it would take registers that they need
            near = proximity_tile(
                positions_ptr, tokens_m, tokens_n, mask_m, mask_n, kind, radius, temporal_radius, falloff, diagonal
            )
            weights = edge_weight(alpha, weights, beta, near)
        edges = ((weights > threshold) & mask).to(tl.int32)
    return edges


@triton.jit
def pack_bits(bits):
    """Words of 32 bits from int32 ``[M, 32]`` of 0 and 1, lowest bit first."""
    return tl.sum(bits << tl.arange(0, 32)[None, :], 1)


@kernel
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


@kernel
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


@dataclass(frozen=True)
class Graph:
    """The edge rule as the kernels take it; ``positions`` is int32 ``[tokens, 3]`` if proximity counts."""

    features: Tensor
    inverse: Tensor
    starts: Tensor
    positions: Tensor | None
    settings: tuple[float | int, ...]
    tile: dict[str, int]

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
        starts = segment_starts(features, ascending(cu_seqlens, features.shape[-2]))
        features = strided_rows(features)[0]
        tile = cosine_config(features, spatial)
        return cls(features, inverse_norms(features), starts, places, settings, tile)

    @property
    def tokens(self) -> int:
        return self.inverse.shape[0]

    def diagonals(self) -> Tensor:
        """float32 ``[segments]``; only linear proximity reads their values."""
        out = self.inverse.new_empty(len(self.starts) - 1)
        if self.positions is not None and self.settings[5] == PROXIMITIES.index("linear"):
            diagonal_kernel[(len(out),)](self.positions, self.starts, out, self.tokens, **config("diagonal", out))
        return out

    def launch(self, stage: Any, grid: tuple[int, ...], *args: Any, diagonals: Tensor, panel: tuple[int, ...]) -> None:
        """Run kernel ``stage`` on (features, norms, positions, diagonals, *args, *panel, shapes and settings)."""
        _, per_item, item_stride, row_stride = strided_rows(self.features)
        places = self.starts if self.positions is None else self.positions
        stage[grid](
            self.features, self.inverse, places, diagonals, *args, *panel, self.tokens, per_item, item_stride,
            row_stride, self.features.shape[-1], *self.settings, self.positions is not None, **self.tile,
            UPCAST=INTERPRETED,
        )  # fmt: skip


def adjacency(graph: Graph, order: Tensor, left: Tensor, bits: Tensor, diagonals: Tensor, panel: int) -> None:
    """Fill ``bits [tokens, words]``: edges among the candidates ``panel`` to ``panel + 32 * words`` of each segment.

    ``order`` is int32 ``[tokens]``, each segment's tokens by priority; row i is the i-th of them, bit j of it the j-th
    of the panel, meant only where j comes before i. Segments with nothing ``left`` to pick are passed over.
    """
    words = bits.shape[1]
    tiles = cdiv(min(32 * words, graph.tokens), graph.tile["BLOCK_N"])
    graph.launch(
        adjacency_kernel, (tiles, tiles, graph.starts.shape[0] - 1), order, graph.starts, left, bits,
        diagonals=diagonals, panel=(panel, words),
    )  # fmt: skip
