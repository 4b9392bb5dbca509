"""The published methods: an importance and a selector, with a paper's settings.

Shared by all: `features` is `[N, D]`, `[B, N, D]` with one `k`, or packed `[T, D]` with `cu_seqlens` (int32 `[B+1]`)
and `k` an int or one int a segment; what is one value a token has the features' shape without D. Results are int64
`[k]`, `[B, k]` or packed `[sum of k]`, ascending, or in the order picked with `sort=False`. Each raises TypeError or
ValueError naming the argument, as the selector that it calls does, and refuses inputs that require grad outside
`no_grad`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import budgets, checks, importance, selectors
from .checks import Grid


def d2pruner(
    features: Tensor,
    attention: Tensor,
    k: int | Sequence[int],
    *,
    grid: Grid | Sequence[Grid] | None = None,
    positions: Tensor | None = None,
    prior: Tensor | None = None,
    eps: float = 1e-7,
    pivot_ratio: float = 0.7,
    alpha: float = 1.0,
    threshold: float = 0.8,
    similarity: str = "cosine",
    proximity: str = "chebyshev",
    radius: int = 1,
    sigma: float = 1.0,
    temporal_radius: int = 0,
    pivots_suppress: bool = False,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """D2Pruner: the most important tokens are pivots; a greedy maximal independent set fills the budget.

    `attention`: what the prompt's last token pays each visual token (`query_attention`); `prior`: its mean over a
    calibration set, divided out by `debias` when given. The first `floor(pivot_ratio * k)` tokens by importance are
    kept; the rest form a graph with an edge where `alpha * cosine + (1 - alpha) * proximity > threshold`, from which
    tokens are taken in order of importance, each striking its neighbours; importance fills what is left. `grid` or
    `positions` are needed when `alpha < 1`. The graph's options are those of `mis_select`.

    From the paper (arXiv 2512.19443): pivots by debiased importance, the hybrid graph, the greedy set. From public
    reproductions quoting it, since the official code could not be read: attention of the LLM's layer 1 with pruning
    before layer 2 (0-based) on the hidden states there, `pivot_ratio` 0.7 rounded down, `threshold` 0.8, `alpha` 1.0
    for understanding and 0.5 for localization, filling up by importance. All of these are options here. The form of
    the proximity is known from neither.

    >>> features, attention = torch.randn(576, 64), torch.rand(576)
    >>> d2pruner(features, attention, 64, alpha=0.5, grid=(24, 24)).shape
    torch.Size([64])
    """
    checks.features(features)
    checks.per_token("attention", attention, features)
    pivot_ratio = checks.number("pivot_ratio", pivot_ratio, 0, 1)
    scores = attention if prior is None else importance.debias(attention, prior, eps=eps)
    return selectors.mis_select(
        features,
        scores,
        k,
        grid=grid,
        positions=positions,
        alpha=alpha,
        threshold=threshold,
        similarity=similarity,
        proximity=proximity,
        radius=radius,
        sigma=sigma,
        temporal_radius=temporal_radius,
        pivots=_each(k, lambda count: budgets.floor_scaled(pivot_ratio, count)),
        pivots_suppress=pivots_suppress,
        cu_seqlens=cu_seqlens,
        sort=sort,
        backend=backend,
    )


def idpruner(
    features: Tensor,
    scores: Tensor,
    k: int | Sequence[int],
    *,
    lam: float = 0.5,
    per_round: int = 1,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """IDPruner: maximal marginal relevance over min-max scaled importance.

    `scores`: a learned scorer's raw output (`VisionSelector`); `features`: the projected features that enter the LLM.
    Each pick maximises `lam * minmax(scores) - (1 - lam) * (cosine to the most similar pick)`; the first goes by
    importance alone. `per_round` picks that many from one scoring (AngelSlim's `parallel_k`).

    From the paper (arXiv 2602.13315, Algorithm 1) and its code (Tencent/AngelSlim), both read: `lam` 0.5, `per_round`
    1, all images of a request as one segment, `k = budget(N, keep)`.

    >>> idpruner(torch.randn(576, 64), torch.randn(576), 144).shape
    torch.Size([144])
    """
    checks.features(features)
    checks.per_token("scores", scores, features)
    scaled = importance.minmax(scores, cu_seqlens=cu_seqlens)
    return selectors.mmr_select(
        features, scaled, k, lam=lam, per_round=per_round, cu_seqlens=cu_seqlens, sort=sort, backend=backend
    )


def divprune(
    features: Tensor,
    k: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """DivPrune: greedy max-min diversity of the projected features; no importance.

    From the official code (arXiv 2503.02175, vbdi/divprune): cosine distance, the first pick is the token whose nearest
    other token is farthest, `k = budget(N, keep)`.

    >>> divprune(torch.randn(576, 64), 58).shape
    torch.Size([58])
    """
    return selectors.maxmin_select(features, k, cu_seqlens=cu_seqlens, sort=sort, backend=backend)


def cdpruner(
    features: Tensor,
    relevance: Tensor,
    k: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """CDPruner: greedy MAP of a determinantal point process conditioned on the prompt.

    `relevance` weights the kernel as it is, `L = r_i * cosine * r_j`, so it should be positive. The official code
    takes it from the CLIP towers: `text_relevance` of their embeddings.

    From the official code (arXiv 2506.10967, Theia-4869/CDPruner): the kernel, without its optional `theta`. Where the
    kernel's rank is used up (after D tokens at most), this function fills by relevance; the official loop goes on with
    gains that are rounding noise.

    >>> cdpruner(torch.randn(576, 64), torch.rand(576), 32).shape
    torch.Size([32])
    """
    return selectors.dpp_select(features, relevance, k, cu_seqlens=cu_seqlens, sort=sort, backend=backend)


def fastv(
    attention: Tensor,
    k: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """FastV: the tokens that receive the most attention.

    `attention`: `[N]`, `[B, N]` or packed `[T]`; `query_attention` of the prompt's last token. From the paper (arXiv
    2403.06764): attention averaged over heads at layer 2 of the LLM, pruned from there on.

    >>> fastv(torch.tensor([0.1, 0.4, 0.2, 0.3]), 2)
    tensor([1, 3])
    """
    return selectors.topk_select(attention, k, cu_seqlens=cu_seqlens, sort=sort, backend=backend)


def naive_hybrid(
    features: Tensor,
    importance: Tensor,
    k: int | Sequence[int],
    *,
    pool_ratio: float,
    cu_seqlens: Tensor | None = None,
    sort: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Importance first, diversity second: a pool of the most important tokens, then max-min inside it.

    The pool holds `ceil(pool_ratio * k)` tokens, at most all N, with `pool_ratio` 1 or more: 1 is plain top-k, N / k or
    more is DivPrune.

    A baseline of the IDPruner paper (arXiv 2602.13315), whose text does not fix the size of the pool, so `pool_ratio`
    has no default. Where the lengths of packed segments cannot be read for free (on a GPU, under `torch.compile`) the
    pool is not cut to N: every segment must then hold its whole pool.

    >>> naive_hybrid(torch.randn(576, 64), torch.rand(576), 64, pool_ratio=2.0).shape
    torch.Size([64])
    """
    checks.features(features)
    checks.per_token("importance", importance, features)
    pool_ratio = checks.number("pool_ratio", pool_ratio, 1)
    ks = checks.budgets(k, features, cu_seqlens)
    wanted = [budgets.ceil_scaled(pool_ratio, count) for count in ks]
    if cu_seqlens is None:
        size = min(wanted[0], features.shape[-2])
        pool = selectors.topk_select(importance, size, backend=backend)
        rows = pool.unsqueeze(-1).expand(*pool.shape, features.shape[-1])
        picks = selectors.maxmin_select(features.gather(-2, rows), ks[0], sort=sort, backend=backend)
        return pool.gather(-1, picks)
    sizes = wanted
    if checks.readable(cu_seqlens):
        sizes = [min(count, n) for count, n in zip(wanted, cu_seqlens.diff().tolist(), strict=True)]
    pool = selectors.topk_select(importance, sizes, cu_seqlens=cu_seqlens, backend=backend)
    # Filled one by one because a copy from the host would synchronise.
    pool_seqlens = torch.cat([torch.full_like(cu_seqlens[:1], end) for end in itertools.accumulate([0, *sizes])])
    picks = selectors.maxmin_select(features[pool], ks, cu_seqlens=pool_seqlens, sort=sort, backend=backend)
    return pool[picks]


def _each(k: int | Sequence[int], count: Callable[[int], int]) -> int | list[int]:
    """`count` of the budget, or of each segment's."""
    if isinstance(k, (list, tuple)):
        return [count(checks.integer(f"k[{i}]", each, 0)) for i, each in enumerate(k)]
    return count(checks.integer("k", k, 0))
