"""D2Pruner's selection as public reproductions write it: dense similarity matrix, Python greedy independent set.

The official code could not be read. A public reproduction that we read builds Python neighbour sets with a double loop
over all pairs and reads each similarity back with ``.item()``. This re-write is kinder to it: the adjacency is one
comparison on the matrix and a kept token strikes its neighbours with one row operation. What is left is one host
synchronisation a visited candidate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mis_loop(features: Tensor, importance: Tensor, k: int, *, threshold: float = 0.8, pivots: int = 0) -> Tensor:
    """Picks ``[k]`` int64 (pivots, independent set, backfill) of features ``[N, D]`` and importance ``[N]``."""
    order = importance.argsort(descending=True, stable=True)
    kept, rest = order[:pivots].tolist(), order[pivots:]
    unit = F.normalize(features.float(), dim=-1)[rest]
    adjacent = torch.matmul(unit, unit.t()) > threshold

    candidates = rest.tolist()
    available = torch.ones(len(candidates), dtype=torch.bool, device=features.device)
    for position, token in enumerate(candidates):
        if len(kept) == k:
            break
        if available[position].item():
            kept.append(token)
            available &= ~adjacent[position]

    chosen = set(kept)
    kept.extend([token for token in candidates if token not in chosen][: k - len(kept)])
    return torch.tensor(kept, device=features.device)


def d2pruner(
    features: Tensor, attention: Tensor, k: int, *, prior: Tensor, pivot_ratio: float = 0.7, threshold: float = 0.8
) -> Tensor:
    """The whole method after the attention: divide by the prior ``[N]``, keep pivots, fill by independent set."""
    importance = attention.float() / (prior + 1e-7)
    return mis_loop(features, importance, k, threshold=threshold, pivots=int(k * pivot_ratio))
