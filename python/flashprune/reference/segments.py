"""The five selections on one segment: the definition that every backend must match.

A segment is the set of tokens pruned together. Each function takes the tensors of one segment in one working precision
(float32 or float64) and returns its picks, int64 ``[k]`` in the order picked. Every cosine is one row-wise sum of
products, so identical rows get identical numbers wherever they stand and ties fall to the lower index.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DPP_RANK_TOL = 1e-5  # a token is spent when this little of its own L_ii is left: the noise floor of float32
LIFT = 2.0**40


def ranked(scores: Tensor, alive: Tensor | None = None) -> Tensor:
    """Indices from best to worst: higher score, then lower index; -0.0 equals +0.0, NaN counts as -inf."""
    keys = torch.where(scores.isnan(), -math.inf, scores) + 0.0
    if alive is None:
        return keys.sort(descending=True, stable=True).indices
    candidates = alive.nonzero().flatten()
    return candidates[keys[candidates].sort(descending=True, stable=True).indices]


def row_dots(rows: Tensor, row: Tensor) -> Tensor:
    """Dot product of each row of ``rows [N, D]`` with ``row [D]``."""
    return (rows * row).sum(-1)


def norms(features: Tensor) -> Tensor:
    """Norm of each row; 0 where its square in this precision is below the smallest normal number, or not finite."""
    tiny = torch.finfo(features.dtype).tiny
    squares = row_dots(features, features)
    # The squares of elements of small rows are subnormal, coarse and perhaps flushed to zero: lifted, they are normal.
    lifted = row_dots(features * LIFT, features * LIFT)
    small = (squares < tiny * LIFT) & (lifted >= tiny * LIFT * LIFT)
    usual = (squares >= tiny * LIFT) & squares.isfinite()
    return torch.where(small, lifted.sqrt() / LIFT, torch.where(usual, squares.sqrt(), 0.0))


def valid_rows(features: Tensor) -> Tensor:
    """Bool ``[N]``: rows that have a direction."""
    return norms(features) > 0


def unit_rows(features: Tensor) -> Tensor:
    """Rows divided by their norm; rows without a direction become zero, so their cosine to every row is 0."""
    lengths = norms(features)[:, None]
    return torch.where(lengths > 0, features / lengths, 0.0)


def topk(scores: Tensor, k: int) -> Tensor:
    return ranked(scores)[:k]


def mmr(features: Tensor, importance: Tensor, k: int, lam: float = 0.5, per_round: int = 1) -> Tensor:
    unit = unit_rows(features)
    alive = torch.ones_like(importance, dtype=torch.bool)
    nearest = torch.full_like(importance, -math.inf)  # cosine to the most similar pick
    picks = ranked(importance)[:0]
    scores = importance
    while len(picks) < k:
        chosen = ranked(scores, alive)[: min(per_round, k - len(picks))]
        picks = torch.cat([picks, chosen])
        alive[chosen] = False
        for pick in chosen:
            nearest = torch.maximum(nearest, row_dots(unit, unit[pick]))
        scores = lam * importance - (1 - lam) * nearest
    return picks


def maxmin(features: Tensor, k: int) -> Tensor:
    unit = unit_rows(features)
    alive = torch.ones_like(unit[:, 0], dtype=torch.bool)
    nearest = torch.full_like(unit[:, 0], -math.inf)  # cosine to the most similar pick
    picks = ranked(nearest)[:0]
    scores = 1 - nearest_other(unit) if k else nearest
    while len(picks) < k:
        pick = ranked(scores, alive)[:1]
        picks = torch.cat([picks, pick])
        alive[pick] = False
        nearest = torch.maximum(nearest, row_dots(unit, unit[pick]))
        scores = 1 - nearest
    return picks


def nearest_other(unit: Tensor) -> Tensor:
    """Cosine of each row to the most similar other row; -inf where there is no other."""
    nearest = torch.full_like(unit[:, 0], -math.inf)
    for i in range(len(unit)):
        cosines = row_dots(unit, unit[i])
        cosines[i] = -math.inf
        nearest[i] = cosines.max()
    return nearest


def dpp(features: Tensor, relevance: Tensor, k: int) -> Tensor:
    unit = unit_rows(features)
    diagonal = torch.where(valid_rows(features), relevance * relevance, 0.0)
    gains = diagonal.clone()
    factor = torch.zeros(len(unit), k, dtype=unit.dtype, device=unit.device)  # rows c_i of the Cholesky factor
    alive = torch.ones_like(relevance, dtype=torch.bool)
    picks = ranked(relevance)[:0]
    while len(picks) < k:
        fresh = alive & (gains > DPP_RANK_TOL * diagonal)  # not spent; NaN gains are
        if not fresh.any():
            return torch.cat([picks, ranked(relevance, alive)[: k - len(picks)]])
        step, pick = len(picks), ranked(gains, fresh)[:1]
        picks = torch.cat([picks, pick])
        alive[pick] = False
        row = relevance * row_dots(unit, unit[pick]) * relevance[pick]  # L_ji, j the pick
        update = (row - row_dots(factor[:, :step], factor[pick, :step])) / gains[pick].sqrt()
        factor[:, step] = update
        gains = gains - update * update
    return picks


def mis(
    features: Tensor,
    importance: Tensor,
    positions: Tensor | None,
    k: int,
    pivots: int = 0,
    *,
    alpha: float = 1.0,
    threshold: float = 0.8,
    similarity: str = "cosine",
    proximity: str = "chebyshev",
    radius: int = 1,
    sigma: float = 1.0,
    temporal_radius: int = 0,
    pivots_suppress: bool = False,
) -> Tensor:
    unit = unit_rows(features)
    order = ranked(importance)
    kept = torch.zeros_like(importance, dtype=torch.bool)
    struck = torch.zeros_like(importance, dtype=torch.bool)

    def neighbours(i: Tensor) -> Tensor:
        cosines = row_dots(unit, unit[i])
        weights = cosines if similarity == "cosine" else (1 + cosines) / 2
        if positions is not None:
            near = nearness(positions, i, unit.dtype, proximity, radius, sigma, temporal_radius)
            weights = alpha * weights + (1 - alpha) * near
        return weights > threshold

    picks = list(order[:pivots])
    kept[order[:pivots]] = True  # pivots stand outside the graph
    if pivots_suppress:
        for pivot in picks:
            struck |= neighbours(pivot)
    for candidate in order[pivots:]:
        if len(picks) == k:
            break
        if not struck[candidate]:
            picks.append(candidate)
            kept[candidate] = True
            struck |= neighbours(candidate)
    backfill = order[~kept[order]][: k - len(picks)]
    return torch.cat([torch.stack(picks), backfill]) if picks else backfill


def nearness(
    positions: Tensor,
    i: Tensor,
    dtype: torch.dtype,
    proximity: str = "chebyshev",
    radius: int = 1,
    sigma: float = 1.0,
    temporal_radius: int = 0,
) -> Tensor:
    """Spatial term of the graph, ``[N]`` in [0, 1]: how near each token is to token ``i``, in ``dtype``."""
    where = positions.double()
    dt, dy, dx = (where - where[i]).abs().unbind(-1)
    distance = (dy * dy + dx * dx).sqrt()
    if proximity == "chebyshev":
        near = (torch.maximum(dy, dx) <= radius).double()
    elif proximity == "gaussian":
        near = torch.exp(-(dy * dy + dx * dx) / (2 * sigma * sigma))
    else:
        height, width = (where.amax(0) - where.amin(0))[1:].unbind()
        diagonal = (height * height + width * width).sqrt()
        near = torch.where(diagonal > 0, (1 - distance / diagonal).clamp(min=0), 1.0)
    return torch.where(dt > temporal_radius, 0.0, near).to(dtype)
