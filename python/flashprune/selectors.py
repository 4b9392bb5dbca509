"""The public selectors: check the arguments, choose the backend, make one call.

Common to all of them:

- Tokens come as ``[N, …]``, as a batch ``[B, N, …]`` with one ``k``, or packed ``[T, …]`` with ``cu_seqlens``, int32
  ``[B + 1]`` on the tokens' device, and ``k`` an int or one int a segment. Any strides.
- Floating inputs are float32, float16 or bfloat16 and are worked on in float32; float64 runs in the reference only.
- The result is int64: ``[k]``; ``[B, k]``, indices within each item; or ``[sum of k]``, packed positions segment by
  segment. Ascending, or with ``sort=False`` in the order picked.
- Exactly k distinct tokens are chosen whatever the data. Every choice takes the higher score, then the lower index; NaN
  scores count as -inf.
- A row has no direction, and so cosine 0 to every row, where its squared norm is not finite or below the smallest
  normal number of the precision worked in, 1.18e-38 in float32.
- ``backend`` is ``auto`` (from the tensors' device), ``cpu``, ``reference``, ``triton`` or ``cuda``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments
from .checks import Grid
from .dispatch import resolve
from .operators import call
from .reference import selectors as reference

__all__ = ["dpp_select", "maxmin_select", "mis_select", "mmr_select", "topk_select"]


def topk_select(
    scores: Tensor,
    k: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The k tokens with the highest scores.

    Args:
        scores: ``[N]``, ``[B, N]`` or packed ``[T]``; float32, float16 or bfloat16.
        k: tokens to keep; for packed input also one int a segment.
        cu_seqlens: int32 ``[B + 1]``, where the segments of packed scores begin and end.
        sort: ascending indices; False puts the best first.
        backend: ``auto``, ``cpu``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        int64 indices ``[k]``, ``[B, k]`` or ``[sum of k]``.

    Raises:
        TypeError, ValueError: an argument does not fit, such as ``k=700 exceeds N=576 in segment 3``.
        RuntimeError: the backend asked for cannot run here.

    Examples:
        >>> import torch
        >>> topk_select(torch.tensor([0.1, 0.9, 0.5, 0.9]), 3)
        tensor([1, 2, 3])
    """
    ks = arguments.topk(scores, k, cu_seqlens, sort)
    backend = resolve(backend, "topk_select", scores.device, scores.dtype)
    if backend == "reference":
        return reference.topk_select(scores, k, cu_seqlens=cu_seqlens, sort=sort)
    return call(backend, "topk_select", scores, ks, cu_seqlens, sort)


def mmr_select(
    features: Tensor,
    importance: Tensor,
    k: int | Sequence[int],
    *,
    lam: float = 0.5,
    per_round: int = 1,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Maximal marginal relevance: important tokens that differ from those already taken.

    The first pick has the highest importance; each next one the highest
    ``lam * importance - (1 - lam) * (largest cosine to a pick)``.
    Source: IDPruner (arXiv 2602.13315), Algorithm 1; ``per_round`` is ``parallel_k`` of its published code.

    Args:
        features: ``[N, D]``, ``[B, N, D]`` or packed ``[T, D]``; float32, float16 or bfloat16.
        importance: one value a token, ``features.shape[:-1]``; scaled as the method wants it (see `minmax`).
        k: tokens to keep; for packed input also one int a segment.
        lam: weight of importance, in [0, 1].
        per_round: tokens taken from one scoring without comparing them with each other; 1 is exact MMR.
        cu_seqlens: int32 ``[B + 1]``, where the segments of packed features begin and end.
        sort: ascending indices; False keeps the order picked.
        backend: ``auto``, ``cpu``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        int64 indices ``[k]``, ``[B, k]`` or ``[sum of k]``.

    Raises:
        TypeError, ValueError: an argument does not fit, such as ``k=700 exceeds N=576 in segment 3``.
        RuntimeError: the backend asked for cannot run here.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> mmr_select(features, torch.tensor([1.0, 0.9, 0.5]), 2)
        tensor([0, 2])
    """
    ks = arguments.mmr(features, importance, k, lam, per_round, cu_seqlens, sort)
    backend = resolve(backend, "mmr_select", features.device, features.dtype)
    if backend == "reference":
        return reference.mmr_select(
            features, importance, k, lam=lam, per_round=per_round, cu_seqlens=cu_seqlens, sort=sort
        )
    importance = _single(importance)
    return call(backend, "mmr_select", features, importance, ks, cu_seqlens, lam, per_round, sort)


def mis_select(
    features: Tensor,
    importance: Tensor,
    k: int | Sequence[int],
    *,
    grid: Grid | Sequence[Grid] | None = None,
    positions: Tensor | None = None,
    alpha: float = 1.0,
    threshold: float = 0.8,
    similarity: str = "cosine",
    proximity: str = "chebyshev",
    radius: int = 1,
    sigma: float = 1.0,
    temporal_radius: int = 0,
    pivots: int | Sequence[int] = 0,
    pivots_suppress: bool = False,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Greedy maximal independent set in order of importance, over a graph of similar and nearby tokens.

    The most important token is taken and its neighbours struck, and so on to k; if every token is taken or struck
    before that, the rest is filled by importance. Tokens i, j are neighbours if
    ``alpha * similarity + (1 - alpha) * proximity > threshold``. Source: D2Pruner (arXiv 2512.19443).

    Args:
        features: ``[N, D]``, ``[B, N, D]`` or packed ``[T, D]``; float32, float16 or bfloat16.
        importance: one value a token, ``features.shape[:-1]``.
        k: tokens to keep; for packed input also one int a segment.
        grid: where tokens stand: ``(h, w)``, ``(t, h, w)``, or one of these a segment. Needed if ``alpha < 1``.
        positions: instead of ``grid``, int32 ``features.shape[:-1] + [3]``: (t, y, x) of each token.
        alpha: weight of similarity against proximity, in [0, 1].
        threshold: edges weigh strictly more than this.
        similarity: ``cosine``, or ``half_cosine`` for (1 + cosine) / 2.
        proximity: ``chebyshev`` (1 within ``radius``, else 0), ``gaussian`` (exp(-d² / 2 sigma²)) or ``linear``
            (1 - d / diagonal of the segment's box); 0 between tokens further apart in t than ``temporal_radius``.
        radius: of ``chebyshev``, in grid cells.
        sigma: of ``gaussian``, in grid cells.
        temporal_radius: frames (steps of t) over which tokens can be near.
        pivots: how many of the most important are kept beforehand and stand outside the graph; for packed input also
            one int a segment.
        pivots_suppress: let pivots strike their neighbours.
        cu_seqlens: int32 ``[B + 1]``, where the segments of packed features begin and end.
        sort: ascending indices; False puts pivots first, then the independent set, then the filling.
        backend: ``auto``, ``cpu``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        int64 indices ``[k]``, ``[B, k]`` or ``[sum of k]``.

    Raises:
        TypeError, ValueError: an argument does not fit, such as ``k=700 exceeds N=576 in segment 3``.
        RuntimeError: the backend asked for cannot run here.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> mis_select(features, torch.tensor([1.0, 0.9, 0.5]), 2)
        tensor([0, 2])
    """
    ks, pivot_counts, places = arguments.mis(
        features, importance, k, grid, positions, alpha, threshold, similarity, proximity, radius, sigma,
        temporal_radius, pivots, pivots_suppress, cu_seqlens, sort,
    )  # fmt: skip
    backend = resolve(backend, "mis_select", features.device, features.dtype)
    if backend == "reference":
        return reference.mis_select(
            features, importance, k, grid=grid, positions=positions, alpha=alpha, threshold=threshold,
            similarity=similarity, proximity=proximity, radius=radius, sigma=sigma, temporal_radius=temporal_radius,
            pivots=pivots, pivots_suppress=pivots_suppress, cu_seqlens=cu_seqlens, sort=sort,
        )  # fmt: skip
    return call(backend, "mis_select",
        features, _single(importance), ks, places, cu_seqlens, alpha, threshold, similarity, proximity, radius, sigma,
        temporal_radius, pivot_counts, pivots_suppress, sort,
    )  # fmt: skip


def maxmin_select(
    features: Tensor,
    k: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Greedy max-min diversity: always the token farthest from everything already taken.

    Distance is 1 - cosine; the first pick is the token whose nearest other token is farthest. Where nothing is left but
    copies of tokens taken, distances are rounding noise, and which copy comes first may differ from backend to backend.
    Source: DivPrune (arXiv 2503.02175) and its published code.

    Args:
        features: ``[N, D]``, ``[B, N, D]`` or packed ``[T, D]``; float32, float16 or bfloat16.
        k: tokens to keep; for packed input also one int a segment.
        cu_seqlens: int32 ``[B + 1]``, where the segments of packed features begin and end.
        sort: ascending indices; False keeps the order picked.
        backend: ``auto``, ``cpu``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        int64 indices ``[k]``, ``[B, k]`` or ``[sum of k]``.

    Raises:
        TypeError, ValueError: an argument does not fit, such as ``k=700 exceeds N=576 in segment 3``.
        RuntimeError: the backend asked for cannot run here.

    Examples:
        >>> import torch
        >>> maxmin_select(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), 2)
        tensor([0, 2])
    """
    ks = arguments.maxmin(features, k, cu_seqlens, sort)
    backend = resolve(backend, "maxmin_select", features.device, features.dtype)
    if backend == "reference":
        return reference.maxmin_select(features, k, cu_seqlens=cu_seqlens, sort=sort)
    return call(backend, "maxmin_select", features, ks, cu_seqlens, sort)


def dpp_select(
    features: Tensor,
    relevance: Tensor,
    k: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Greedy MAP of a determinantal point process: relevant tokens that span the largest volume.

    The kernel is ``relevance_i * cosine(i, j) * relevance_j``; each pick has the largest gain in its determinant. When
    no gain is left but float32 noise (1e-5 of the token's own entry), the rest is filled by relevance.
    Source: CDPruner (arXiv 2506.10967) and its published code.

    Args:
        features: ``[N, D]``, ``[B, N, D]`` or packed ``[T, D]``; float32, float16 or bfloat16.
        relevance: one value a token, ``features.shape[:-1]``.
        k: tokens to keep; for packed input also one int a segment.
        cu_seqlens: int32 ``[B + 1]``, where the segments of packed features begin and end.
        sort: ascending indices; False keeps the order picked.
        backend: ``auto``, ``cpu``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        int64 indices ``[k]``, ``[B, k]`` or ``[sum of k]``.

    Raises:
        TypeError, ValueError: an argument does not fit, such as ``k=700 exceeds N=576 in segment 3``.
        RuntimeError: the backend asked for cannot run here.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> dpp_select(features, torch.tensor([1.0, 0.9, 0.5]), 2)
        tensor([0, 2])
    """
    ks = arguments.dpp(features, relevance, k, cu_seqlens, sort)
    backend = resolve(backend, "dpp_select", features.device, features.dtype)
    if backend == "reference":
        return reference.dpp_select(features, relevance, k, cu_seqlens=cu_seqlens, sort=sort)
    return call(backend, "dpp_select", features, _single(relevance), ks, cu_seqlens, sort)


def _single(scores: Tensor) -> Tensor:
    """The operators work in float32 and take no float64."""
    return scores.float() if scores.dtype == torch.float64 else scores
