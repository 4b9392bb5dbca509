"""Maximal marginal relevance: `lam * importance - (1 - lam) * max cosine to a pick`, exact, one program a segment.

Four launches: norms (every feature once, 2·N·D bytes in half precision), the first picks by importance, their cosines
to all tokens (every feature once more), and the blocked greedy engine of `greedy`, whose cost it states.
"""

from __future__ import annotations

from torch import Tensor

from .greedy import blocked_greedy
from .similarity import ascending, inverse_norms


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
    norms = inverse_norms(features)
    starts = ascending(cu_seqlens, len(norms))
    return blocked_greedy(features, importance, norms, k, starts, lam=lam, per_round=per_round, mmr=True, sort=sort)
