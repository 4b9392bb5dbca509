"""Maximal marginal relevance: `lam * importance - (1 - lam) * max cosine to a pick`, exact, one program a segment.

Four launches: norms (every feature once, 2·N·D bytes in half precision), the first picks by importance, their cosines
to all tokens (every feature once more), and the blocked greedy engine of `greedy`, whose cost it states.
"""

from __future__ import annotations

from torch import Tensor

from .greedy import blocked_greedy, seeds_variants
from .similarity import inverse_norms
from .variants import Variant


def mmr_select(
    features: Tensor,
    importance: Tensor,
    k: list[int],
    cu_seqlens: Tensor | None,
    lam: float,
    per_round: int,
    sort: bool,
) -> Tensor:
    """int64 picks ``[k]``, ``[B, k]`` or ``[sum of k]`` of ``features [N, D]``, ``[B, N, D]`` or packed ``[T, D]``."""
    return blocked_greedy(
        features, importance, inverse_norms(features), k, cu_seqlens, lam=lam, per_round=per_round, mmr=True, sort=sort
    )


def variants() -> list[Variant]:
    """The first picks; the engine's kernels are listed by `greedy`."""
    return seeds_variants()
