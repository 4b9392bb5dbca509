"""Max-min diversity (DivPrune): the token farthest, in cosine distance, from all that are kept, exact.

The first pick is the token whose nearest other token is farthest, half an N x N product by `similarity.nearest_other`;
the rest is the engine of `greedy`, with the scores of MMR where importance and both weights are 1.
"""

from __future__ import annotations

from torch import Tensor

from .greedy import blocked_greedy
from .similarity import ascending, inverse_norms, nearest_other


def maxmin_select(features: Tensor, k: list[int], cu_seqlens: Tensor | None, sort: bool) -> Tensor:
    """int64 picks ``[k]``, ``[B, k]`` or ``[sum of k]`` of ``features [N, D]``, ``[B, N, D]`` or packed ``[T, D]``."""
    norms = inverse_norms(features)
    starts = ascending(cu_seqlens, len(norms))
    nearest = nearest_other(features, norms, starts)
    return blocked_greedy(features, nearest, norms, k, starts, lam=1.0, per_round=1, mmr=False, sort=sort)
