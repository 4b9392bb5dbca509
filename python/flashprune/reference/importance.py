"""Attention importance by its definition: the whole softmax, then its mean. The other functions have one form only."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .. import attention, checks
from ..importance import (
    check_query_attention,
    check_received_attention,
    debias,
    minmax,
    resize_prior,
    soft_topk,
)

__all__ = ["debias", "minmax", "query_attention", "received_attention", "resize_prior", "soft_topk"]


def query_attention(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    visual: slice | Tensor | None = None,
    prior: Tensor | None = None,
    eps: float = 1e-7,
    backend: str = "reference",
) -> Tensor:
    """`flashprune.query_attention` by its definition; same arguments, results and errors."""
    checks.choice("backend", backend, ("auto", "reference"))
    scale = check_query_attention(query, key, scale, lse, visual, prior, eps)
    scores = attention_weights(query, key, scale, lse).mean((-3, -2))
    if visual is not None:
        scores = scores[..., visual]
    return scores if prior is None else debias(scores, prior, eps=eps)


def received_attention(
    query: Tensor,
    key: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
    pool: int = 1,
    prior: Tensor | None = None,
    eps: float = 1e-7,
    backend: str = "reference",
) -> Tensor:
    """`flashprune.received_attention` by its definition; same arguments, results and errors."""
    checks.choice("backend", backend, ("auto", "reference"))
    scale = check_received_attention(query, key, cu_seqlens, max_seqlen, scale, lse, pool, prior, eps)
    if cu_seqlens is None:
        scores = attention_weights(query, key, scale, lse).mean((-3, -2))
    else:
        bounds = attention.segment_bounds(cu_seqlens, query, max_seqlen, pool)
        spans = [slice(start, end) for start, end in pairwise(bounds)]
        parts = [
            attention_weights(query[span], key[span], scale, None if lse is None else lse[:, span]).mean((-3, -2))
            for span in spans
        ]
        scores = torch.cat(parts) if parts else query.new_empty(0, dtype=checks.working_dtype(query))
    scores = attention.pooled(scores, pool)
    return scores if prior is None else debias(scores, prior, eps=eps)


def attention_weights(query: Tensor, key: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    """`[..., H, R, L]`: the softmax over all keys, or `exp(score - lse)` when its normaliser is given."""
    dtype = checks.working_dtype(query)
    key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
    with checks.without_autocast(query):
        scores = torch.einsum("...rhd,...lhd->...hrl", query.to(dtype), key.to(dtype)) * scale
    return scores.softmax(-1) if lse is None else (scores - lse.to(dtype)[..., None]).exp()
