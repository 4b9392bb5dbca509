"""The operators behind `query_attention` and `received_attention`: schema, shapes, and the CPU implementation.

Both are one computation, the column means of a softmax, done one block of rows at a time: a block of scores is a
product of query rows with the transposed keys; its row sums normalise it; its weighted column sum is added to the
result. For R rows and L keys: 2·R·L·H·d flops, R·L·H exponentials, memory O(L·d) plus a fixed block, never R x L.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from . import checks, operators

_BLOCK = 1 << 19  # attention weights held at a time: 2 MiB of float32, about what a core's L2 cache holds

_library = torch.library.Library("flashprune", "FRAGMENT")
_library.define(
    "query_attention(Tensor query, Tensor key, float scale, Tensor? lse, Tensor? visual, SymInt[] span, Tensor? prior, "
    "float eps) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "received_attention(Tensor query, Tensor key, Tensor? cu_seqlens, SymInt? max_seqlen, float scale, Tensor? lse, "
    "SymInt pool, Tensor? prior, float eps) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def query_attention_cpu(
    query: Tensor,
    key: Tensor,
    scale: float,
    lse: Tensor | None,
    visual: Tensor | None,
    span: list[int],
    prior: Tensor | None,
    eps: float,
) -> Tensor:
    scores = query.new_empty((*query.shape[:-3], visual_count(key, visual, span)), dtype=checks.working_dtype(query))
    if visual is not None:
        check_positions(visual, key.shape[-3])
    if query.dim() == 4:
        for b in range(query.shape[0]):
            scores[b] = visual_means(query[b], key[b], scale, lse[b] if lse is not None else None, visual, span)
    else:
        scores.copy_(visual_means(query, key, scale, lse, visual, span))
    return _debias(scores, prior, eps)


def received_attention_cpu(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float,
    lse: Tensor | None,
    pool: int,
    prior: Tensor | None,
    eps: float,
) -> Tensor:
    scores = query.new_empty(query.shape[:-2], dtype=checks.working_dtype(query))
    if query.dim() == 4:
        for b in range(query.shape[0]):
            scores[b] = column_means(query[b], key[b], scale, lse[b] if lse is not None else None)
    else:
        bounds = [0, query.shape[0]] if cu_seqlens is None else segment_bounds(cu_seqlens, query, max_seqlen, pool)
        for start, end in pairwise(bounds):
            rows = slice(start, end)
            scores[rows] = column_means(query[rows], key[rows], scale, lse[:, rows] if lse is not None else None)
    return _debias(pooled(scores, pool), prior, eps)


def visual_means(
    query: Tensor, key: Tensor, scale: float, lse: Tensor | None, visual: Tensor | None, span: list[int]
) -> Tensor:
    if lse is None:  # the normaliser needs the other keys too
        return pick_visual(column_means(query, key, scale, None), visual, span)
    return column_means(query, pick_visual(key, visual, span), scale, lse)


def column_means(query: Tensor, key: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    """`[L]`: mean over R rows and H heads of the softmax over L keys. query `[R,H,d]`, key `[L,Hkv,d]`, lse `[H,R]`."""
    with checks.without_autocast(query):
        return _column_means(query, key, scale, lse)


def _column_means(query: Tensor, key: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    rows, heads, _ = query.shape
    keys, kv_heads, _ = key.shape
    group = heads // max(kv_heads, 1)
    dtype = checks.working_dtype(query)
    total = torch.zeros(keys, dtype=dtype, device=query.device)
    if rows * heads * keys == 0:
        return total
    row_block = min(rows, max(1, _BLOCK // (group * keys)))
    head_block = min(kv_heads, max(1, _BLOCK // (group * row_block * keys)))
    for h in range(0, kv_heads, head_block):
        k = key[:, h : h + head_block].permute(1, 2, 0).to(dtype)  # [h, d, L]
        block_heads = slice(h * group, (h + k.shape[0]) * group)
        for r in range(0, rows, row_block):
            q = query[r : r + row_block, block_heads].transpose(0, 1).to(dtype) * scale  # [h * group, r, d]
            weights = torch.bmm(q.reshape(k.shape[0], -1, q.shape[-1]), k)  # [h, group * r, L]
            if lse is not None:
                norm = lse[block_heads, r : r + row_block].to(dtype).reshape(k.shape[0], -1, 1)
                total += weights.sub_(norm).exp_().sum((0, 1))
            else:
                weights.sub_(weights.amax(-1, keepdim=True)).exp_()
                total += torch.bmm(weights.sum(-1).reciprocal().unsqueeze(1), weights).sum((0, 1))
    return total / (rows * heads)


def pick_visual(tensor: Tensor, visual: Tensor | None, span: list[int]) -> Tensor:
    """Rows of `tensor` at the visual positions: an index, a span (start, stop, step), or all."""
    if visual is not None:
        return tensor.index_select(0, visual)
    return tensor[slice(*span)] if span else tensor


def visual_count(key: Tensor, visual: Tensor | None, span: list[int]) -> int:
    if visual is not None:
        return visual.shape[0]
    return len(range(*span)) if span else key.shape[-3]


def pooled(scores: Tensor, pool: int) -> Tensor:
    """Sums of each `pool` consecutive scores."""
    if pool == 1:
        return scores
    return scores.reshape(*scores.shape[:-1], scores.shape[-1] // pool, pool).sum(-1)


def check_positions(visual: Tensor, keys: int) -> None:
    if visual.numel() and not 0 <= int(visual.min()) <= int(visual.max()) < keys:
        raise ValueError(f"visual must lie between 0 and L-1={keys - 1}, got {int(visual.min())}..{int(visual.max())}")


def segment_bounds(cu_seqlens: Tensor, query: Tensor, max_seqlen: int | None, pool: int) -> list[int]:
    """The values of `cu_seqlens`, checked."""
    bounds = cu_seqlens.tolist()
    checks.check_bounds(bounds, query.shape[0])
    for segment, (start, end) in enumerate(pairwise(bounds)):
        length = end - start
        if max_seqlen is not None and length > max_seqlen:
            raise ValueError(f"max_seqlen={max_seqlen} is less than the {length} tokens of segment {segment}")
        if length % pool:
            raise ValueError(f"pool={pool} does not divide the {length} tokens of segment {segment}")
    return bounds


def _debias(attention: Tensor, prior: Tensor | None, eps: float) -> Tensor:
    return attention if prior is None else attention / (prior.to(attention.dtype) + eps)


_library.impl("query_attention", query_attention_cpu, "CPU")
_library.impl("received_attention", received_attention_cpu, "CPU")


def _query_attention_shape(
    query: Tensor,
    key: Tensor,
    scale: float,
    lse: Tensor | None,
    visual: Tensor | None,
    span: list[int],
    prior: Tensor | None,
    eps: float,
) -> Tensor:
    return query.new_empty((*query.shape[:-3], visual_count(key, visual, span)), dtype=checks.working_dtype(query))


def _received_attention_shape(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float,
    lse: Tensor | None,
    pool: int,
    prior: Tensor | None,
    eps: float,
) -> Tensor:
    return query.new_empty((*query.shape[:-3], query.shape[-3] // pool), dtype=checks.working_dtype(query))


operators.register_shape("flashprune::query_attention", _query_attention_shape, _library)
operators.register_shape("flashprune::received_attention", _received_attention_shape, _library)
