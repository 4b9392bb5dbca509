"""The selections over a video's frames in plain PyTorch; float64 features are worked on in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import arguments, checks
from .segments import ranked, unit_rows

VARIANCES = (0.125, 0.25, 0.5, 1.0, 2.0)  # of VidCom2's Gaussians
TEMPERATURE = 0.01  # of its softmax over frames


def evs_select(
    features: Tensor,
    thw: Sequence[int] | Tensor,
    merge: int,
    q: float,
    *,
    sort: bool = True,
    backend: str = "reference",
) -> Tensor:
    """`flashprune.evs_select` by definition."""
    checks.choice("backend", backend, ("auto", "reference"))
    frames, _, k = arguments.video("evs", features, thw, merge, q, sort)
    picks = ranked(dissimilarity(features.to(checks.working_dtype(features)), frames))[:k]
    return picks.sort().values if sort else picks


def vidcom2_select(
    features: Tensor,
    thw: Sequence[int] | Tensor,
    merge: int,
    q: float,
    *,
    sort: bool = True,
    backend: str = "reference",
) -> Tensor:
    """`flashprune.vidcom2_select` by definition."""
    checks.choice("backend", backend, ("auto", "reference"))
    frames, keep, k = arguments.video("vidcom2", features, thw, merge, q, sort)
    if features.is_meta:
        return features.new_empty(k, dtype=torch.int64)
    features = features.to(checks.working_dtype(features))
    similarity, to_video = similarities(features[:, steady_channels(features)], frames)
    picks = by_frame(similarity, frame_budgets(to_video, keep, similarity.shape[1]))[:k]
    return picks.sort().values if sort else picks


def dissimilarity(features: Tensor, frames: int) -> Tensor:
    """``[N]``: 1 - cosine to the same place of the frame before; infinite in the first frame."""
    unit = unit_rows(features).view(frames, -1, features.shape[1])
    cosines = (unit[1:] * unit[:-1]).sum(-1)
    return torch.cat([torch.full_like(unit[:1, :, 0], math.inf), 1 - cosines]).flatten()


def steady_channels(features: Tensor) -> Tensor:
    """The half of the channels, at least one, whose variance is lowest."""
    return ranked(-features.var(0, correction=0))[: max(1, features.shape[1] // 2)]


def similarities(features: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """``[T, N / T]``: similarity of each token to video and frame together; ``[T]``: of each frame to the video."""
    unit = unit_rows(features).view(frames, -1, features.shape[1])
    to_video = closeness(unit, unit.mean((0, 1)))
    return to_video + closeness(unit, unit.mean(1, keepdim=True)), to_video.mean(1)


def closeness(unit: Tensor, centre: Tensor) -> Tensor:
    distance = ((unit - centre) ** 2).sum(-1)
    return torch.stack([torch.exp(-distance / (2 * variance)) for variance in VARIANCES]).sum(0)


def frame_budgets(to_video: Tensor, keep: float, places: int) -> Tensor:
    """int64 ``[T]``: how many of its tokens each frame keeps."""
    return (frame_shares(to_video, keep) * places).round().long().clamp(1, places)


def frame_shares(to_video: Tensor, keep: float) -> Tensor:
    weights = (-to_video / TEMPERATURE).softmax(0)
    return (keep * (1 + weights - weights.mean())).clamp(max=1)


def by_frame(similarity: Tensor, budgets: Tensor) -> Tensor:
    """Every token: first those within their frame's budget, then the others, each by rising similarity."""
    within = torch.zeros_like(similarity, dtype=torch.bool)
    for frame, budget in enumerate(budgets):
        within[frame, ranked(-similarity[frame])[:budget]] = True
    every = ranked(-similarity.flatten())
    inside = within.flatten()[every]
    return torch.cat([every[inside], every[~inside]])
