"""vLLM's retention mask of VidCom2.

Source: vllm-project/vllm 0.33.0, ``vllm/multimodal/video_prune/vidcom2.py`` ``compute_retention_mask`` (Apache-2.0),
re-written: the lower half of the channels is copied out, normalised, and compared with both centres; a loop over the
frames takes each one's share. It synchronises with the host for the shares, and once or twice more where tokens are
dropped or added. Arithmetic stays in the features' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def retention_mask(features: Tensor, thw: tuple[int, int, int], q: float) -> Tensor:
    """Bool ``[N]`` of features ``[N, D]``."""
    frames, places = thw[0], thw[1] * thw[2]
    total = frames * places
    target = min(max(frames, min(int(total * (1.0 - q)), total)), total)

    half = max(1, int(features.shape[-1] * 0.5))
    steady = torch.topk(features.var(dim=0, unbiased=False), k=half, largest=False).indices
    video = F.normalize(features.index_select(-1, steady).view(frames, places, half), dim=-1)
    to_video = _gaussians(video, video.mean(dim=(0, 1), keepdim=True))
    similarity = to_video + _gaussians(video, video.mean(dim=1, keepdim=True))

    scores = -to_video.mean(dim=-1)
    weights = F.softmax((scores - scores.max()) / 0.01, dim=0)
    shares = ((1.0 - q) * (1.0 + weights - weights.mean())).clamp(max=1.0)
    budgets = (shares * places).round().long().clamp(min=1, max=places).tolist()

    kept = torch.zeros(frames, places, dtype=torch.bool, device=features.device)
    for frame, budget in enumerate(budgets):
        best = torch.topk(similarity[frame], k=budget, largest=False, sorted=False).indices
        kept[frame].scatter_(0, best, True)
    return _reconciled(kept.view(-1), similarity.view(-1), target - sum(budgets))


def _reconciled(kept: Tensor, similarity: Tensor, missing: int) -> Tensor:
    """The budgets' tokens with as many added, or dropped, as the target asks for."""
    if missing == 0:
        return kept
    open_ = (kept if missing < 0 else ~kept).nonzero(as_tuple=False).squeeze(-1)
    chosen = torch.topk(similarity[open_], k=min(abs(missing), len(open_)), largest=missing < 0, sorted=False).indices
    kept[open_[chosen]] = missing > 0
    return kept


def _gaussians(x: Tensor, centre: Tensor) -> Tensor:
    squared = ((x - centre) ** 2).sum(dim=-1)
    return sum(torch.exp(-squared / (2.0 * 2.0**power)) for power in range(-3, 2))
