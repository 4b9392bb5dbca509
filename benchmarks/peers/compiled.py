"""``torch.compile`` of our reference: what the definition costs once a compiler has fused its steps.

Not the whole loop: given ``flashprune.reference.mmr_select``, torch.compile either breaks the graph at every data-
dependent shape or unrolls a graph a pick, which at a few hundred picks compiles for minutes. So one step, with the
reference's arithmetic (row-wise products of unit rows, nothing N×N), is compiled for every shape at once and called K
times. The picks stay on the device. Max-min is left out: its first pick alone is N such rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashprune.reference.segments import row_dots, unit_rows


def mmr_step(unit: Tensor, importance: Tensor, nearest: Tensor, taken: Tensor, lam: float) -> tuple[Tensor, ...]:
    """The next pick, and what the step after it starts from."""
    pick = torch.argmax(lam * importance - (1 - lam) * nearest + taken, keepdim=True)
    nearest = torch.maximum(nearest, row_dots(unit, unit[pick[0]]))
    return pick, nearest, taken.index_fill(0, pick, -math.inf)


def dpp_step(unit: Tensor, relevance: Tensor, gains: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
    """The next pick, the gains after it, and its column of the Cholesky factor, given those before ``[picks, N]``."""
    pick = torch.argmax(gains, keepdim=True)
    row = relevance * row_dots(unit, unit[pick[0]]) * relevance[pick]
    column = (row - (factor * factor[:, pick]).sum(0)) / gains[pick].sqrt()
    return pick, (gains - column * column).index_fill(0, pick, -math.inf), column


@lru_cache
def compiled(step: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(step, dynamic=True, backend=backend)


def mmr_loop(features: Tensor, importance: Tensor, k: int, *, lam: float = 0.5, backend: str = "inductor") -> Tensor:
    """Picks ``[k]`` int64, in pick order, of features ``[N, D]`` and importance ``[N]``."""
    step, unit, importance = compiled(mmr_step, backend), unit_rows(features.float()), importance.float()
    first = torch.argmax(importance, keepdim=True)
    nearest = row_dots(unit, unit[first[0]])
    taken = torch.zeros_like(importance).index_fill(0, first, -math.inf)
    picks = [first]
    for _ in range(1, k):
        pick, nearest, taken = step(unit, importance, nearest, taken, lam)
        picks.append(pick)
    return torch.cat(picks)


def map_loop(features: Tensor, relevance: Tensor, k: int, *, backend: str = "inductor") -> Tensor:
    """Picks ``[k]`` int64, in pick order, of features ``[N, D]`` and relevance ``[N]``."""
    step, unit, relevance = compiled(dpp_step, backend), unit_rows(features.float()), relevance.float()
    gains = relevance * relevance
    # A row a pick, so that a step sees the rows so far as one contiguous matrix and no step is compiled anew.
    factor = torch.zeros(k, len(unit), device=unit.device)
    picks = []
    for i in range(k):
        pick, gains, factor[i] = step(unit, relevance, gains, factor[:i])
        picks.append(pick)
    return torch.cat(picks)
