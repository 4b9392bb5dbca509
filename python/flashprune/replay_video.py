"""Replays of a video's selection in float64, judged as in `flashprune.replay`.

Bounds, with eps of the working precision and C channels:

- evs: a cosine's bound and one eps more.
- vidcom2: a similarity, a sum of ten exponentials of at most 1, is off by at most (32 + sqrt(C) / 4) * eps, a frame's
  mean by half of that: about three times what the reference shows on independent, correlated and nearly equal tokens.
  A frame's budget may go either way where these errors take its share across a half. Channels whose variances differ by
  less than (sqrt(N) + 8) * eps of what they are made of may change places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, islice

import torch
from torch import Tensor

from .reference import video
from .reference.segments import ranked
from .replay import Finding, _in_order, _same_set, _units, cosine_bound, underflow_bound

CHANNEL_SETS = 64  # tried at most where variances are too close to tell


def evs(picks: Tensor, features: Tensor, *, frames: int, keep: float, sort: bool) -> Iterator[Finding]:
    """``keep`` is not needed: the number of picks is known."""
    unit = _units(features).view(frames, -1, features.shape[1])
    cosines = (unit[1:] * unit[:-1]).sum(-1)
    places, bound = unit.shape[1], cosine_bound(features) + torch.finfo(features.dtype).eps
    scores = torch.cat([torch.full_like(unit[0, :, 0], math.inf), (1 - cosines).flatten()])
    first = torch.arange(places)
    if sort:
        yield from _same_set(picks, first, scores, "token")
    else:
        yield from _in_order(picks[:places], first, scores, 0, "score")
    later = picks[~torch.isin(picks, first)]
    left = torch.ones_like(scores, dtype=torch.bool)
    left[picks] = False
    best = scores[left].max() if left.any() else scores.new_tensor(-math.inf)
    rivals = best.expand(len(later))
    if not sort and len(later):  # those picked afterwards too
        rivals = torch.cat([scores[later][1:], best[None]]).flip(0).cummax(0).values.flip(0)
    yield from _worst(later, rivals - scores[later], 2 * bound, places, "a token that differs more is left for later")


def vidcom2(picks: Tensor, features: Tensor, *, frames: int, keep: float, sort: bool) -> Iterator[Finding]:
    """The picks as a set; right if they are so for one of the sets of channels that rounding allows."""
    tried = (_by_frame(picks, features[:, channels], frames, keep) for channels in _channel_sets(features))
    yield from min(tried, key=lambda findings: max((f.regret - f.bound for f in findings), default=-math.inf))


def _channel_sets(features: Tensor) -> Iterator[Tensor]:
    """Indices of the steadiest half of the channels: the float64 choice, then others within rounding."""
    wide, limits, count = features.double(), torch.finfo(features.dtype), max(1, features.shape[1] // 2)
    variances, squares = wide.var(0, correction=0), wide.mean(0) ** 2
    spread = (variances * (variances + squares)).sqrt() + limits.eps * squares
    finite = variances < limits.max  # false for NaN too
    variances = torch.where(finite, variances, math.inf)
    errors = torch.where(finite, (math.sqrt(len(features)) + 8) * limits.eps * spread, 0.0)
    errors = errors + 4 * limits.eps * limits.tiny  # where they are subnormal
    chosen, others = ranked(-variances).tensor_split([count])
    low, high = variances - errors, variances + errors
    least = low[others].min() if len(others) else math.inf
    sure = chosen[high[chosen] < least]
    open_ = torch.cat([chosen[high[chosen] >= least], others[low[others] <= high[chosen].max()]])
    for more in islice(combinations(open_.tolist(), count - len(sure)), CHANNEL_SETS):
        yield torch.cat([sure, torch.tensor(more, dtype=torch.int64)])


def _by_frame(picks: Tensor, features: Tensor, frames: int, keep: float) -> list[Finding]:
    """Within a frame the least similar are taken; over the frames, those beyond a budget only if they must be."""
    eps, unit = torch.finfo(features.dtype).eps, _units(features).view(frames, -1, features.shape[1])
    bound = (32 + math.sqrt(features.shape[1]) / 4) * eps + 32 * underflow_bound(features)
    to_video = video.closeness(unit, unit.mean((0, 1)))
    similarity = to_video + video.closeness(unit, unit.mean(1, keepdim=True))
    places = unit.shape[1]

    kept = torch.zeros(frames * places, dtype=torch.bool)
    kept[picks] = True
    kept = kept.view(frames, places)
    counts = kept.sum(1)
    inside = similarity.masked_fill(~kept, -math.inf).amax(1)  # the most similar token kept of each frame
    outside = similarity.masked_fill(kept, math.inf).amin(1)  # the least similar one left out
    every = torch.arange(frames)
    found = list(_worst(every, inside - outside, 2 * bound, 0, "a less similar token is left out of its frame"))

    shares = video.frame_shares(to_video.mean(1), keep) * places
    weights = (-to_video.mean(1) / video.TEMPERATURE).softmax(0)
    slack = places * keep * (weights * bound / video.TEMPERATURE + 4 * eps)
    least, most = ((shares + side * slack).round().clamp(1, places) for side in (-1, 1))
    short, over = counts < least, counts > most
    if short.any() and over.any():
        frame = int(over.nonzero()[0])
        text = f"frame {frame} keeps {int(counts[frame])} of at most {int(most[frame])} while another lacks some"
        found.append(Finding(-1, math.inf, 2 * bound, False, text))
    elif short.any():  # the budgets came to too many, and the most similar were dropped
        regret = torch.where(short, inside.max() - outside, -math.inf)
        found += _worst(every, regret, 2 * bound, 0, "a token within its frame's budget gives way to others")
    elif over.any():  # to too few, and the least similar were added
        regret = torch.where(over, inside - outside.min(), -math.inf)
        found += _worst(every, regret, 2 * bound, 0, "a token beyond its frame's budget goes before others")
    return found


def _worst(where: Tensor, regrets: Tensor, bound: float, first: int, text: str) -> Iterator[Finding]:
    """The largest regret, if any is above zero."""
    if len(regrets) and float(regrets.max()) > 0:
        step, regret = int(regrets.argmax()), float(regrets.max())
        yield Finding(first + step, regret, bound, regret <= bound, f"{text}, at {int(where[step])}")
