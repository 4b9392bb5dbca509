"""The selectors in plain PyTorch: same names, arguments and results as the public functions, any device.

Features in float64 are worked on in float64, everything else in float32. Slow, and synchronising on a GPU: these are
the definition that the backends are tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import arguments, checks, operators
from ..checks import Grid
from . import segments


def topk_select(
    scores: Tensor,
    k: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "reference",
) -> Tensor:
    """`flashprune.topk_select` by definition."""
    checks.choice("backend", backend, ("auto", "reference"))
    ks = arguments.topk(scores, k, cu_seqlens, sort)
    return _by_segment(segments.topk, [scores], [(k,) for k in ks], cu_seqlens, sort, batched=scores.ndim == 2)


def mmr_select(
    features: Tensor,
    importance: Tensor,
    k: int | Sequence[int],
    *,
    lam: float = 0.5,
    per_round: int = 1,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "reference",
) -> Tensor:
    """`flashprune.mmr_select` by definition."""
    checks.choice("backend", backend, ("auto", "reference"))
    ks = arguments.mmr(features, importance, k, lam, per_round, cu_seqlens, sort)
    each = [(k, float(lam), per_round) for k in ks]
    return _by_segment(segments.mmr, [features, importance], each, cu_seqlens, sort, batched=features.ndim == 3)


def mis_select(
    features: Tensor,
    importance: Tensor,
    k: int | Sequence[int],
    *,
    grid: Grid | Sequence[Grid] | None = None,
    positions: Tensor | None = None,
    alpha: float = 1.0,
    threshold: float = 0.8,
    similarity: str = "cosine",
    proximity: str = "chebyshev",
    radius: int = 1,
    sigma: float = 1.0,
    temporal_radius: int = 0,
    pivots: int | Sequence[int] = 0,
    pivots_suppress: bool = False,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "reference",
) -> Tensor:
    """`flashprune.mis_select` by definition."""
    checks.choice("backend", backend, ("auto", "reference"))
    ks, pivot_counts, places = arguments.mis(
        features, importance, k, grid, positions, alpha, threshold, similarity, proximity, radius, sigma,
        temporal_radius, pivots, pivots_suppress, cu_seqlens, sort,
    )  # fmt: skip
    select = partial(
        segments.mis,
        alpha=float(alpha),
        threshold=float(threshold),
        similarity=similarity,
        proximity=proximity,
        radius=radius,
        sigma=float(sigma),
        temporal_radius=temporal_radius,
        pivots_suppress=pivots_suppress,
    )
    each = list(zip(ks, pivot_counts, strict=True))
    return _by_segment(select, [features, importance, places], each, cu_seqlens, sort, batched=features.ndim == 3)


def maxmin_select(
    features: Tensor,
    k: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "reference",
) -> Tensor:
    """`flashprune.maxmin_select` by definition."""
    checks.choice("backend", backend, ("auto", "reference"))
    ks = arguments.maxmin(features, k, cu_seqlens, sort)
    return _by_segment(segments.maxmin, [features], [(k,) for k in ks], cu_seqlens, sort, batched=features.ndim == 3)


def dpp_select(
    features: Tensor,
    relevance: Tensor,
    k: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "reference",
) -> Tensor:
    """`flashprune.dpp_select` by definition."""
    checks.choice("backend", backend, ("auto", "reference"))
    ks = arguments.dpp(features, relevance, k, cu_seqlens, sort)
    each = [(k,) for k in ks]
    return _by_segment(segments.dpp, [features, relevance], each, cu_seqlens, sort, batched=features.ndim == 3)


def _by_segment(
    select: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    settings: Sequence[tuple[Any, ...]],
    cu_seqlens: Tensor | None,
    sort: bool,
    *,
    batched: bool,
) -> Tensor:
    """``select(*tensors of a segment, *its settings)`` on every segment, joined into one result."""
    given = [x for x in tensors if x is not None]
    if given[0].is_meta:
        tokens = given[0] if select is segments.topk else given[0][..., 0]
        return operators.indices(tokens, [setting[0] for setting in settings], cu_seqlens)
    dtype = checks.working_dtype(given[0])

    def part(index: int | slice) -> list[Tensor | None]:
        return [x if x is None else x[index] if not x.is_floating_point() else x[index].to(dtype) for x in tensors]

    def picks(index: int | slice, setting: tuple[Any, ...]) -> Tensor:
        chosen = select(*part(index), *setting)
        return chosen.sort().values if sort else chosen

    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        checks.check_bounds(bounds, given[0].shape[0])
        checks.check_fit([setting[0] for setting in settings], [b - a for a, b in pairwise(bounds)])
        parts = [a + picks(slice(a, b), setting) for (a, b), setting in zip(pairwise(bounds), settings, strict=True)]
        return torch.cat(parts) if parts else given[0].new_empty(0, dtype=torch.int64)
    if not batched:
        return picks(slice(None), settings[0])
    rows = [picks(item, settings[0]) for item in range(given[0].shape[0])]
    return torch.stack(rows) if rows else given[0].new_empty(0, settings[0][0], dtype=torch.int64)
