"""vLLM's retention mask of Efficient Video Sampling.

Source: vllm-project/vllm 0.33.0, ``vllm/multimodal/video_prune/evs.py`` ``compute_retention_mask`` (Apache-2.0),
re-written: the cosine of every token to its predecessor, a whole stable sort, the first of it scattered into a mask.
Arithmetic stays in the features' dtype. It does not synchronise with the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def retention_mask(features: Tensor, thw: tuple[int, int, int], q: float) -> Tensor:
    """Bool ``[N]`` of features ``[N, D]``."""
    frames, places = thw[0], thw[1] * thw[2]
    video = features.reshape(*thw, features.shape[-1])
    change = 1 - F.cosine_similarity(video[1:], video[:-1], dim=-1)
    first = 255 * torch.ones_like(video[:1, :, :, 0])  # above any change, so that the first frame stays
    scores = torch.cat([first, change]).flatten()
    count = max(places, int(frames * places * (1 - q)))
    kept = torch.argsort(scores, descending=True, stable=True)[:count]
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, kept, True)
