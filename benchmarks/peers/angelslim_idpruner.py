"""IDPruner as AngelSlim runs it: dense N×N cosine matrix, then one greedy round after the other.

Source: Tencent/AngelSlim, commit 67394ce, ``token_compressor/algorithm/idpruner.py`` (Apache-2.0), re-written.
A round costs about ten launches and one host synchronisation (the picks are read back into a Python list).
"""

from __future__ import annotations

import torch
from torch import Tensor


def minmax(scores: Tensor) -> Tensor:
    """The default importance: scores ``[N]`` scaled to [0, 1]."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low + 1e-6)


def cosine_matrix(features: Tensor) -> Tensor:
    """The default similarity: ``[N, N]`` of features ``[N, D]``."""
    unit = features / (features.norm(dim=-1, keepdim=True) + 1e-8)
    return torch.matmul(unit, unit.t())


def mmr_loop(features: Tensor, importance: Tensor, k: int, *, lam: float = 0.5, parallel_k: int = 1) -> Tensor:
    """Picks ``[k]`` int64, in pick order, of features ``[N, D]`` and importance ``[N]``."""
    importance = importance.float()
    similarity = cosine_matrix(features.float())

    picks: list[int] = []
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    nearest = torch.full((len(features),), -2.0, device=features.device)
    while len(picks) < k:
        step = min(parallel_k, k - len(picks))
        score = lam * importance - (1 - lam) * nearest if picks else importance.clone()
        score[~free] = -float("inf")
        _, best = torch.topk(score, k=step)

        picks.extend(best.tolist())
        free[best] = False
        # Columns of a row-major matrix, as in the original: on a CPU a strided gather of N cache lines a pick.
        closest, _ = torch.max(similarity[:, best], dim=1)
        nearest = torch.maximum(nearest, closest)
    return torch.tensor(picks, device=features.device)


def idpruner(features: Tensor, scores: Tensor, k: int, *, lam: float = 0.5, parallel_k: int = 1) -> Tensor:
    """The whole method after the scorer: raw scores ``[N]`` → min-max → MMR. Picks ``[k]`` in pick order."""
    return mmr_loop(features, minmax(scores), k, lam=lam, parallel_k=parallel_k)
