"""DivPrune's official max-min loop.

Source: vbdi/divprune, commit 799e2d9, ``LLaVA/llava/model/llava_arch.py`` ``DivPrune`` (Apache-2.0), re-written.
Step i gathers i rows of the N×N distance matrix anew and reduces all of them, N·K² / 2 elements in total; nothing is
kept from step to step. It does not synchronise with the host. Arithmetic stays in the features' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def maxmin_loop(features: Tensor, k: int) -> Tensor:
    """Picks ``[k]`` int64, in pick order, of features ``[N, D]``."""
    unit = features / features.norm(dim=1, keepdim=True)
    distance = 1.0 - torch.mm(unit, unit.t())

    picks = torch.empty(k, dtype=torch.long, device=features.device)
    for i in range(k):
        if i == 0:
            # The second smallest of a column: the smallest is the token's distance to itself.
            nearest = torch.topk(distance, 2, dim=0, largest=False).values[1, :]
        else:
            chosen = torch.index_select(picks, 0, torch.arange(0, i, device=distance.device))
            nearest = torch.min(torch.index_select(distance, 0, chosen), dim=0).values
        picks[i] = torch.argmax(nearest)
    return picks
