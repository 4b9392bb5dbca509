"""CDPruner's official greedy MAP loop for a determinantal point process.

Source: Theia-4869/CDPruner, commit 9541616, ``llava/model/llava_arch.py`` ``encode_images`` (Apache-2.0), re-written.
Builds the dense [B, N, N] kernel, keeps a [K, B, N] Cholesky factor, and does not synchronise with the host. It has no
rule for a used-up rank: past it the square root of a negative gain spreads NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def map_loop(features: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Picks ``[k]`` int64, in pick order, of features ``[N, D]`` and relevance ``[N]``."""
    return map_loop_batched(features.unsqueeze(0), relevance.unsqueeze(0), k)[0]


def map_loop_batched(features: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Picks ``[B, k]`` int64, in pick order, of features ``[B, N, D]`` and relevance ``[B, N]``."""
    batch, n, _ = features.shape
    device = features.device
    unit = (features / features.norm(dim=-1, keepdim=True)).float()
    similarity = torch.matmul(unit, unit.transpose(1, 2))
    kernel = relevance.unsqueeze(2) * similarity * relevance.unsqueeze(1)

    factor = torch.zeros((k, batch, n), device=device)
    gain = torch.diagonal(kernel, dim1=1, dim2=2).clone()
    picks = torch.empty((k, batch), dtype=torch.long, device=device)
    for i in range(k):
        best = torch.argmax(gain, dim=-1)
        picks[i] = best

        # Row indices made on the host each time, as in the original: a copy to the device a use on a GPU.
        explained = torch.einsum("tb,tbn->bn", factor[:i, torch.arange(batch), best], factor[:i])
        scale = torch.sqrt(gain[torch.arange(batch), best]).unsqueeze(-1)
        row = (kernel[torch.arange(batch), best] - explained) / scale
        factor[i, :, :] = row
        gain -= torch.square(row)
        gain[torch.arange(batch), best] = -float("inf")
    return picks.t()
