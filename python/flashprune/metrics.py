"""Two figures that say what a selection kept (IDPruner, arXiv 2602.13315, section 3): importance, and spread."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .reference.segments import unit_rows

_BLOCK = 1024  # rows a similarity product holds at a time, so that memory stays O(N)
_REFERENCES = ("tokens", "box")


def importance_retention(importance: Tensor, indices: Tensor) -> float:
    """The share of all importance that the kept tokens S hold, `sum(w[S]) / sum(w)`: 1 when nothing of weight is lost.

    `importance`: floating `[N]`, finite and not negative (attention as it is; a learned scorer's scores after
    `minmax`); `indices`: distinct int64 `[K]`. Packed tensors work too: the figure is then that of the whole batch.
    Returns nan when all importance is zero. Summed in float64.

    Raises TypeError for wrong dtypes; ValueError for wrong shapes, negative or non-finite importance, or indices that
    repeat or fall outside 0..N-1.

    >>> importance_retention(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0, 2]))
    0.75
    """
    checks.floating("importance", importance)
    if importance.dim() != 1:
        raise ValueError(f"importance must be [N], got {checks.shape(importance)}")
    _check_indices(indices, importance.shape[0])
    weights = importance.double()
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("importance must be finite and not negative (apply minmax to a scorer's scores first)")
    total = float(weights.sum())
    return float(weights[indices].sum()) / total if total > 0 else float("nan")


def hopkins(features: Tensor, indices: Tensor, *, reference: str = "tokens", seed: int = 0) -> float:
    """The Hopkins statistic of the kept tokens S: 0.5 or less when they lie spread out, towards 1 when they clump.

    `H = sum_r d(r, S) / (sum_r d(r, S) + sum_v d(v, S without v))` with the cosine distance `d` to the nearest
    neighbour (1 to a row without a direction), v over S, and as many reference points r as S has.

    `features`: floating `[N, D]`; `indices`: distinct int64 `[K]`. The paper does not say how the reference points are
    drawn, and that sets the level, so compare figures of one `reference` (and `seed`) only:

    - `"tokens"`: K of the N tokens, without repetition, kept ones included (those lie at distance 0);
    - `"box"`: uniform in the smallest box that holds all N features.

    Returns nan where the statistic is undefined: K < 2, or all distances zero. The draw depends on `seed` alone, not on
    the device. Memory O(N).

    Raises TypeError for wrong dtypes; ValueError for wrong shapes, an unknown reference, or indices that repeat or fall
    outside 0..N-1.

    >>> x = torch.nn.functional.one_hot(torch.arange(8)).float()
    >>> hopkins(x, torch.arange(8))  # every reference point is kept, every kept token is far from the others
    0.0
    """
    checks.floating("features", features)
    if features.dim() != 2:
        raise ValueError(f"features must be [N, D], got {checks.shape(features)}")
    checks.choice("reference", reference, _REFERENCES)
    seed = checks.integer("seed", seed, 0)
    _check_indices(indices, features.shape[0])
    count = indices.shape[0]
    if count < 2:
        return float("nan")
    features = features.detach().to(checks.working_dtype(features))
    generator = torch.Generator().manual_seed(seed)
    if reference == "tokens":
        drawn = torch.randperm(features.shape[0], generator=generator)[:count]
        points = features[drawn.to(features.device)]
    else:
        low, high = features.amin(0), features.amax(0)
        uniform = torch.rand(count, features.shape[1], generator=generator)
        points = 2 * torch.lerp(low / 2, high / 2, uniform.to(features))  # a difference of halves does not overflow
    kept = unit_rows(features[indices])
    apart = _nearest(kept, kept, exclude_self=True)
    away = _nearest(unit_rows(points), kept, exclude_self=False)
    return away / (away + apart) if away + apart > 0 else float("nan")


def _nearest(points: Tensor, kept: Tensor, *, exclude_self: bool) -> float:
    """Sum over `points` of the cosine distance to the nearest of `kept`."""
    total = 0.0
    for start in range(0, points.shape[0], _BLOCK):
        with checks.without_autocast(kept):
            cosine = points[start : start + _BLOCK] @ kept.T
        if exclude_self:
            cosine.diagonal(start).fill_(-float("inf"))
        total += float((1 - cosine.amax(1)).clamp_min(0).sum(dtype=torch.float64))
    return total


def _check_indices(indices: Tensor, n: int) -> None:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices must be an int64 tensor, got {got}")
    if indices.dim() != 1:
        raise ValueError(f"indices must be [K], got {checks.shape(indices)}")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise ValueError(f"indices must lie between 0 and N-1={n - 1}, got {int(indices.min())}..{int(indices.max())}")
    if indices.unique().numel() != indices.numel():
        raise ValueError("indices must be distinct")
