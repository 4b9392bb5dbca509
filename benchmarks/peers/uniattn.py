"""UniAttn's batched MMR: a stored ``[B, N, N]`` cosine matrix, then K greedy steps for all images of one size together.

Source: XiangbinPeng/UniAttn, commit 9799356, ``src/uniattn_pruning.py``, re-written. Its two paths:

- One Triton launch of one program an image, which holds all N scores in registers and reads a row of the matrix a pick
  (``uniattn_kernel.py``); on CUDA, up to 1,024 tokens, as in the original.
- Otherwise the same steps in PyTorch, about nine launches each and no host synchronisation. On a CPU this path runs.

Images of different size go group by group. Left out: the min-max scaling of the scores, and the gather of the kept
rows. The order of picking is recorded in place of the original's mask, launch for launch, so that it can be checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_FUSED = 1024


def mmr_loop(features: Tensor, importance: Tensor, k: int, *, lam: float = 0.5) -> Tensor:
    """Picks ``[k]`` int64, in pick order, of features ``[N, D]`` and importance ``[N]``."""
    return mmr_batched(features.unsqueeze(0), importance.unsqueeze(0), k, lam=lam)[0]


def mmr_batched(features: Tensor, importance: Tensor, k: int, *, lam: float = 0.5) -> Tensor:
    """Picks ``[B, k]`` int64, in pick order, of features ``[B, N, D]`` and importance ``[B, N]``."""
    penalty = (1 - lam) / lam  # UniAttn writes importance − penalty · similarity
    scores = importance.float()
    unit = F.normalize(features.float(), p=2, dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    if features.is_cuda and features.shape[1] <= LARGEST_FUSED:
        from .uniattn_kernel import fused_steps

        return fused_steps(scores.contiguous(), similarity, k, penalty)
    return _steps(scores, similarity, k, penalty)


def mmr_ragged(features: Tensor, importance: Tensor, sizes: Sequence[int], ks: Sequence[int]) -> Tensor:
    """Packed picks ``[Σk]`` int64, image by image in pick order, of features ``[T, D]`` and importance ``[T]``."""
    rows, weights = features.split(list(sizes)), importance.split(list(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups: dict[tuple[int, int], list[int]] = {}
    for i, shape in enumerate(zip(sizes, ks, strict=True)):
        groups.setdefault(shape, []).append(i)
    parts: list[Tensor] = [features] * len(sizes)
    for (_, k), members in groups.items():
        picks = mmr_batched(torch.stack([rows[i] for i in members]), torch.stack([weights[i] for i in members]), k)
        for i, chosen in zip(members, picks, strict=True):
            parts[i] = starts[i] + chosen
    return torch.cat(parts)


def _steps(scores: Tensor, similarity: Tensor, k: int, penalty: float) -> Tensor:
    batch, n = scores.shape
    images = torch.arange(batch, device=scores.device)
    picks = torch.empty(batch, k, dtype=torch.long, device=scores.device)
    taken = torch.zeros(batch, n, device=scores.device)
    best = torch.argmax(scores, dim=-1)
    picks[images, 0] = best
    taken[images, best] = float("-inf")
    closest = similarity[images, best].clone()
    for step in range(1, k):
        best = torch.argmax(scores - penalty * closest + taken, dim=-1)
        picks[images, step] = best
        taken[images, best] = float("-inf")
        closest = torch.maximum(closest, similarity[images, best])
    return picks
