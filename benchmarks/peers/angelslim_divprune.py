"""DivPrune as AngelSlim runs it: dense N×N distances, each token's distance to the kept set carried from step to step.

Source: Tencent/AngelSlim, commit 17d3d92, ``token_compressor/algorithm/divprune.py`` (Apache-2.0), re-written. N·K
elements are reduced where the official loop (``divprune.py`` beside this file) reduces N·K² / 2. A step costs about six
launches; the picks stay on the device. Arithmetic stays in the features' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def maxmin_loop(features: Tensor, k: int) -> Tensor:
    """Picks ``[k]`` int64, in pick order, of features ``[N, D]``."""
    unit = F.normalize(features, p=2, dim=1)
    distance = 1.0 - torch.mm(unit, unit.t())
    distance.fill_diagonal_(float("inf"))

    picks = torch.empty(k, dtype=torch.long, device=features.device)
    to_others, _ = torch.min(distance, dim=1)
    first = torch.argmax(to_others)
    picks[0] = first
    nearest = distance[:, first].clone()
    for i in range(1, k):
        scores = nearest.clone()
        scores[picks[:i]] = -1.0
        best = torch.argmax(scores)
        picks[i] = best
        # A column of a row-major matrix, as in the original: on a CPU N cache lines a pick.
        nearest = torch.minimum(nearest, distance[:, best])
    return picks
