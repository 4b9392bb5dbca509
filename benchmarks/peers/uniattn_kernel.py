"""UniAttn's fused steps: one launch, one program an image, K picks one after the other. See ``uniattn.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _greedy_kernel(scores_ptr, similarity_ptr, picks_ptr, n, k, penalty, BLOCK_N: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    rows_ptr = similarity_ptr + image * n * n
    free = tl.load(scores_ptr + image * n + offs_n, mask=mask_n, other=-float("inf"))  # [BLOCK_N]
    best = tl.argmax(free, axis=0, tie_break_left=True)
    closest = tl.load(rows_ptr + best * n + offs_n, mask=mask_n, other=0.0)
    tl.store(picks_ptr + image * k, best.to(tl.int64))
    for step in range(1, k):
        free = tl.where(offs_n == best, -float("inf"), free)
        best = tl.argmax(free - penalty * closest, axis=0, tie_break_left=True)
        row = tl.load(rows_ptr + best * n + offs_n, mask=mask_n, other=0.0)
        closest = tl.maximum(closest, row)
        tl.store(picks_ptr + image * k + step, best.to(tl.int64))


def fused_steps(scores: Tensor, similarity: Tensor, k: int, penalty: float) -> Tensor:
    """Picks ``[B, k]`` int64 in pick order, of scores ``[B, N]`` and cosines ``[B, N, N]``, float32, contiguous."""
    batch, n = scores.shape
    picks = torch.empty(batch, k, dtype=torch.int64, device=scores.device)
    _greedy_kernel[(batch,)](scores, similarity, picks, n, k, penalty, BLOCK_N=triton.next_power_of_2(n))
    return picks
