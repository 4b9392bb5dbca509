"""The arguments of each selector, checked once for the public function and the reference alike.

Each function takes what the selector takes and returns it in the form that the operators want: ``k`` and ``pivots`` as
one host int a segment, the grid as positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import budgets, checks
from .checks import Grid
from .grids import token_positions


def topk(scores: Tensor, k: Any, cu_seqlens: Tensor | None, sort: bool) -> list[int]:
    checks.scores(scores)
    checks.flag("sort", sort)
    return checks.budgets(k, scores[..., None], cu_seqlens, "scores")


def mmr(
    features: Tensor, importance: Tensor, k: Any, lam: float, per_round: int, cu_seqlens: Tensor | None, sort: bool
) -> list[int]:
    checks.features(features)
    checks.per_token("importance", importance, features)
    checks.number("lam", lam, 0, 1)
    checks.integer("per_round", per_round, 1)
    checks.flag("sort", sort)
    return checks.budgets(k, features, cu_seqlens)


def mis(
    features: Tensor,
    importance: Tensor,
    k: Any,
    grid: Grid | Sequence[Grid] | None,
    positions: Tensor | None,
    alpha: float,
    threshold: float,
    similarity: str,
    proximity: str,
    radius: int,
    sigma: float,
    temporal_radius: int,
    pivots: Any,
    pivots_suppress: bool,
    cu_seqlens: Tensor | None,
    sort: bool,
) -> tuple[list[int], list[int], Tensor | None]:
    """``k`` and ``pivots``, one int a segment, and the positions where the graph needs them (alpha < 1)."""
    checks.features(features)
    checks.per_token("importance", importance, features)
    checks.number("alpha", alpha, 0, 1)
    checks.number("threshold", threshold)
    checks.choice("similarity", similarity, ("cosine", "half_cosine"))
    checks.choice("proximity", proximity, ("chebyshev", "gaussian", "linear"))
    checks.integer("radius", radius, 0)
    checks.number("sigma", sigma, 1e-6, 1e6)  # in grid cells; beyond these float32 loses 2 * sigma ** 2
    checks.integer("temporal_radius", temporal_radius, 0)
    checks.flag("pivots_suppress", pivots_suppress)
    checks.flag("sort", sort)
    ks = checks.budgets(k, features, cu_seqlens)
    pivot_counts = checks.per_segment("pivots", pivots, len(ks))
    for segment, (m, budget) in enumerate(zip(pivot_counts, ks, strict=True)):
        if m > budget:
            where = f" in segment {segment}" if cu_seqlens is not None else ""
            raise ValueError(f"pivots={m} exceeds k={budget}{where}")
    where_ = token_positions(features[..., 0], grid, positions, cu_seqlens)
    if alpha < 1 and where_ is None:
        raise ValueError(f"alpha={alpha} weighs proximity, which needs grid or positions")
    return ks, pivot_counts, where_ if alpha < 1 else None


def maxmin(features: Tensor, k: Any, cu_seqlens: Tensor | None, sort: bool) -> list[int]:
    checks.features(features)
    checks.flag("sort", sort)
    return checks.budgets(k, features, cu_seqlens)


def dpp(features: Tensor, relevance: Tensor, k: Any, cu_seqlens: Tensor | None, sort: bool) -> list[int]:
    checks.features(features)
    checks.per_token("relevance", relevance, features)
    checks.flag("sort", sort)
    return checks.budgets(k, features, cu_seqlens)


def video(
    rule: str, features: Tensor, thw: Sequence[int] | Tensor, merge: int, q: float, sort: bool
) -> tuple[int, float, int]:
    """Frames, the share kept, and the number of tokens kept by the budget rule."""
    checks.features(features)
    if features.ndim != 2:
        raise ValueError(f"features must be [N, D] of one video, got {checks.shape(features)}")
    sides = _thw(thw)
    merge = checks.integer("merge", merge, 1)
    keep = 1.0 - checks.number("q", q, 0, 1)
    checks.flag("sort", sort)
    frames, rows, columns = sides[0], sides[1] // merge, sides[2] // merge
    tokens = frames * rows * columns
    if tokens != features.shape[0]:
        merged = f" with merge={merge}" if merge > 1 else ""
        raise ValueError(f"thw={sides}{merged} holds {tokens} tokens, features has {features.shape[0]}")
    if tokens == 0:
        raise ValueError(f"thw={sides} with merge={merge} leaves no token")
    return frames, keep, budgets.budget(tokens, keep, rule=rule, tokens_per_frame=rows * columns)


def _thw(thw: Any) -> tuple[int, int, int]:
    if isinstance(thw, Tensor):
        if thw.is_floating_point() or thw.is_complex() or tuple(thw.shape) != (3,):
            raise TypeError(f"thw must be 3 ints or an integer tensor [3], got {thw.dtype} {checks.shape(thw)}")
        if thw.device.type != "cpu":
            raise ValueError(f"thw is read by the host and must be ints or on the CPU, got {thw.device}")
        thw = thw.tolist()
    if not isinstance(thw, list | tuple) or len(thw) != 3:
        raise TypeError(f"thw must be 3 ints or an integer tensor [3], got {thw!r}")
    t, h, w = (checks.integer(f"thw[{i}]", side, 1) for i, side in enumerate(thw))
    return t, h, w
