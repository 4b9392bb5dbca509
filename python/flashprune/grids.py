"""Where tokens stand: (t, y, x) positions from the grids of images and videos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import Grid


def token_positions(
    tokens: Tensor, grid: Grid | Sequence[Grid] | None, positions: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """int32 positions of shape ``tokens.shape + [3]`` from whichever of ``grid`` and ``positions`` is given.

    ``tokens`` is any tensor shaped as the tokens are: ``[N]``, ``[B, N]`` or packed ``[T]``. ``grid`` is ``(h, w)``,
    ``(t, h, w)``, or one of these for each segment.
    """
    if positions is not None:
        if grid is not None:
            raise ValueError("grid and positions exclude each other, got both")
        _check_positions(positions, tokens)
        return positions
    if grid is None:
        return None
    if not isinstance(grid, list | tuple) or not grid:
        raise TypeError(f"grid must be (h, w), (t, h, w) or a list of these, got {grid!r}")
    segments = 1 if tokens.ndim == 1 else tokens.shape[0]
    if cu_seqlens is not None:
        segments = cu_seqlens.shape[0] - 1
    if isinstance(grid[0], int | Integral):
        sides = [_sides("grid", grid)] * segments
    elif len(grid) == segments:
        sides = [_sides(f"grid[{i}]", g) for i, g in enumerate(grid)]
    else:
        raise ValueError(f"grid must be one grid or one a segment, expected {segments}, got {len(grid)}")
    _check_tokens(sides, tokens, cu_seqlens)
    lattices = {side: lattice(side, tokens.device) for side in set(sides)}  # segments may be many, their grids few
    if len(lattices) == 1:
        (only,) = lattices.values()
        return only.expand(len(sides), *only.shape).reshape(*tokens.shape, 3)
    if not sides:
        return torch.empty(*tokens.shape, 3, dtype=torch.int32, device=tokens.device)
    return torch.cat([lattices[side] for side in sides]).view(*tokens.shape, 3)


def lattice(sides: tuple[int, int, int], device: torch.device) -> Tensor:
    """int32 ``[t * h * w, 3]``: the cells of a grid in raster order."""
    axes = [torch.arange(side, dtype=torch.int32, device=device) for side in sides]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def _sides(name: str, grid: Any) -> tuple[int, int, int]:
    if not isinstance(grid, list | tuple) or len(grid) not in (2, 3):
        raise ValueError(f"{name} must be (h, w) or (t, h, w), got {grid!r}")
    sides = [checks.integer(f"{name}[{i}]", side, 1) for i, side in enumerate(grid)]
    t, h, w = sides if len(sides) == 3 else [1, *sides]
    return t, h, w


def _check_tokens(sides: list[tuple[int, int, int]], tokens: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        _check_sizes(sides, [tokens.shape[-1]] * len(sides))
        return
    if checks.readable(cu_seqlens):
        _check_sizes(sides, cu_seqlens.diff().tolist())
    total = sum(math.prod(side) for side in sides)
    if total != tokens.shape[0]:
        raise ValueError(f"grid holds {total} tokens in {len(sides)} segments, expected T={tokens.shape[0]}")


def _check_sizes(sides: list[tuple[int, int, int]], sizes: list[int]) -> None:
    for segment, (side, n) in enumerate(zip(sides, sizes, strict=True)):
        if math.prod(side) != n:
            where = f" in segment {segment}" if len(sides) > 1 else ""
            raise ValueError(f"grid {side} holds {math.prod(side)} tokens, expected N={n}{where}")


def _check_positions(positions: Tensor, tokens: Tensor) -> None:
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions must be an int32 tensor, got {type(positions).__name__}")
    if positions.dtype != torch.int32:
        raise TypeError(f"positions must be int32, got {str(positions.dtype).removeprefix('torch.')}")
    expected = (*tokens.shape, 3)
    if tuple(positions.shape) != expected:
        raise ValueError(f"positions must be {list(expected)}, a (t, y, x) for each token, got {list(positions.shape)}")
    checks.same_device("positions", positions, tokens)
