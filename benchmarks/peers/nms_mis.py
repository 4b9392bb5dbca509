"""An independent set as torchvision's CUDA NMS finds one: the adjacency as bits, then one sweep in order of importance.

Source: pytorch/vision, ``torchvision/csrc/ops/cuda/nms_kernel.cu`` (BSD-3), re-written with cosine above a threshold in
place of box overlap. Its three stages: sort by score; for each candidate the later ones that it would strike, 64 to a
word, N²/64 words in all; a sweep that takes each candidate not yet struck and ORs its words into the struck set.

Here the first two are PyTorch, the cosines one matrix product, and the sweep is NumPy on the host after one copy of the
words, as torchvision swept before it moved that to one block on the GPU. NMS knows no budget, so the sweep visits all
N candidates; the first K are kept, and importance fills up as in D2Pruner.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 64


def mis_sweep(features: Tensor, importance: Tensor, k: int, *, threshold: float = 0.8) -> Tensor:
    """Picks ``[k]`` int64 (independent set, then backfill) of features ``[N, D]`` and importance ``[N]``."""
    order = importance.argsort(descending=True, stable=True)
    words = _later_neighbours(F.normalize(features.float(), dim=-1)[order], threshold).cpu().numpy().view(np.uint64)
    struck = np.zeros(words.shape[1], dtype=np.uint64)
    kept, left = [], []
    for i in range(len(words)):
        if (int(struck[i // WORD]) >> (i % WORD)) & 1:
            left.append(i)
        else:
            kept.append(i)
            struck |= words[i]
    return order[torch.tensor([*kept, *left][:k], dtype=torch.int64, device=order.device)]


def _later_neighbours(unit: Tensor, threshold: float) -> Tensor:
    """int64 ``[N, ⌈N/64⌉]``: bit j of row i is set where j comes after i and is adjacent to it."""
    n = len(unit)
    adjacent = (torch.matmul(unit, unit.t()) > threshold).triu_(1)
    padded = F.pad(adjacent, (0, -n % WORD)).view(n, -1, WORD)
    bits = torch.ones(WORD, dtype=torch.int64, device=unit.device) << torch.arange(WORD, device=unit.device)
    # One word column at a time: all bits as int64 at once would take 8 N² bytes.
    return torch.stack([(column * bits).sum(-1) for column in padded.unbind(1)], dim=1)
