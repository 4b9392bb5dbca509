"""Importance of visual tokens: attention that they receive, with its positional bias divided out, and score scaling.

The attention functions are operators, implemented in `attention.py`; the others are a few tensor operations each, the
same on every device and backend, but `minmax`, which is one kernel on a GPU with Triton, with the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from . import attention, checks, dispatch
from .operators import namespace

_BISECTIONS = 64  # halvings of soft_topk's bracket: past float64's resolution for any sane range of scores


def query_attention(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    visual: slice | Tensor | None = None,
    prior: Tensor | None = None,
    eps: float = 1e-7,
    backend: str = "auto",
) -> Tensor:
    """Attention that some query tokens pay to each visual token: FastV's and D2Pruner's importance.

    `A_i = mean over heads and query rows of softmax_j(scale * q·k_j)[i]`, softmax over all L keys given, read out at
    the visual positions. No causal mask: for a prompt's last token there is nothing to mask; for earlier query rows
    give only the keys that all of them see.

    - `query`: `[Lq, H, d]`, or `[B, Lq, H, d]`; `key`: `[L, Hkv, d]`, or `[B, L, Hkv, d]`. H must be a multiple of Hkv:
      head h reads key head `h // (H / Hkv)`. float32, float16, bfloat16 or float64, any strides (a `[B, H, L, d]`
      tensor is passed as `x.transpose(1, 2)`).
    - `scale`: d ** -0.5 unless given.
    - `lse`: what the attention kernel returned for these rows, natural-log sums of `exp(scale * q·k)` over all keys,
      `[H, Lq]` or `[B, H, Lq]` (FlashAttention's convention). With it only the visual keys are read.
    - `visual`: the visual positions among the L keys: a slice, an int64 tensor `[N]`, or None for all; the same
      for every item of a batch. N is their number.
    - `prior`: `[N]` or `[B, N]`; when given the result is `debias(A, prior, eps=eps)`, in the same pass.

    Returns `[N]` or `[B, N]`, float32 (float64 for float64 inputs).

    Sources: FastV (arXiv 2403.06764), section 4; D2Pruner (arXiv 2512.19443), "debiased importance".

    Raises TypeError for wrong types and dtypes; ValueError for shapes that do not fit, no query row, a scale or eps
    that is not finite, positions out of range (checked on a CPU), or inputs that require grad outside `no_grad`.

    >>> query, key = torch.randn(1, 8, 64), torch.randn(600, 2, 64)
    >>> query_attention(query, key, visual=slice(5, 581)).shape
    torch.Size([576])
    """
    scale = check_query_attention(query, key, scale, lse, visual, prior, eps)
    backend = _backend(backend, "query_attention", query)
    if backend == "reference":
        from .reference import importance as reference

        return reference.query_attention(query, key, scale=scale, lse=lse, visual=visual, prior=prior, eps=eps)
    span = list(visual.indices(key.shape[-3])) if isinstance(visual, slice) else []
    index = visual if isinstance(visual, Tensor) else None
    return namespace(backend).query_attention(query, key, scale, lse, index, span, prior, float(eps))


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
    backend: str = "auto",
) -> Tensor:
    """Attention that each token of an encoder receives from its own image: importance without a prompt or a CLS token.

    `A_i = mean over heads and rows r of softmax_j(scale * q_r·k_j)[i]`, rows and keys within one segment, so the
    scores of a segment sum to 1. The N x N matrix is never formed.

    - `query`: `[N, H, d]`; `[B, N, H, d]`; or packed `[T, H, d]` with `cu_seqlens` (int32 `[B+1]`, on the same device).
      `key`: the same with Hkv heads; H must be a multiple of Hkv. float32, float16, bfloat16 or float64, any strides.
    - `max_seqlen`: the longest segment or more, as engines pass it to their attention; optional.
    - `scale`: d ** -0.5 unless given.
    - `lse`: the attention kernel's natural-log sums, `[H, N]`, `[B, H, N]`, or packed `[H, T]` (FlashAttention's
      convention); saves the second pass over the scores.
    - `pool`: sums the scores of each `pool` consecutive tokens, a merge unit (4 for a 2x2 merger whose patches come in
      merge order, as in Qwen2-VL), so that they match the tokens that the LLM sees. Must divide every segment.
    - `prior`: one a score, `[N/pool]`, `[B, N/pool]` or `[T/pool]`; when given the result is
      `debias(A, prior, eps=eps)`, in the same pass.

    Returns `[N/pool]`, `[B, N/pool]` or `[T/pool]`, float32 (float64 for float64 inputs).

    Source: VisPruner (arXiv 2412.01818) for encoders without CLS; vLLM pull request 38888.

    Raises TypeError for wrong types and dtypes; ValueError for shapes that do not fit, a `cu_seqlens` that is not
    ascending from 0 to T, a segment longer than `max_seqlen` or not a multiple of `pool` (values are checked on a CPU),
    a scale or eps that is not finite, or inputs that require grad outside `no_grad`.

    >>> qk = torch.randn(2, 320, 16, 72)
    >>> spans = torch.tensor([0, 64, 320], dtype=torch.int32)
    >>> received_attention(qk[0], qk[1], cu_seqlens=spans, max_seqlen=256, pool=4).shape
    torch.Size([80])
    """
    scale = check_received_attention(query, key, cu_seqlens, max_seqlen, scale, lse, pool, prior, eps)
    backend = _backend(backend, "received_attention", query)
    if backend == "reference":
        from .reference import importance as reference

        return reference.received_attention(
            query,
            key,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            scale=scale,
            lse=lse,
            pool=pool,
            prior=prior,
            eps=eps,
        )
    return namespace(backend).received_attention(
        query, key, cu_seqlens, max_seqlen, scale, lse, pool, prior, float(eps)
    )


def debias(attention: Tensor, prior: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Attention relative to what a position receives anyway: `attention / (prior + eps)`.

    `attention`: floating `[N]`, `[B, N]` or packed `[T]`. `prior`: the mean attention at the same positions over a
    calibration set (D2Pruner: 1,000 images, a generic prompt, the same layer), of the same shape, or `[N]` for every
    item of a batch; `resize_prior` adapts one saved on another grid. A ratio, not a difference.

    Returns the shape of `attention`, float32 (float64 for float64 inputs).

    Source: D2Pruner (arXiv 2512.19443), "debiased importance".

    Raises TypeError for tensors that are not floating point; ValueError for shapes or devices that do not fit.

    >>> debias(torch.tensor([0.2, 0.2]), torch.tensor([0.1, 0.4]))
    tensor([2.0000, 0.5000])
    """
    checks.floating("attention", attention)
    _check_prior(prior, tuple(attention.shape), attention, "attention")
    eps = checks.number("eps", eps, 0)
    dtype = checks.working_dtype(attention)
    return attention.to(dtype) / (prior.to(dtype) + eps)


def resize_prior(prior: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A prior saved on one grid, resized bilinearly to another.

    `prior`: floating `[..., h * w]` in raster order, `grid` its `(h, w)`, `new_grid` the wanted `(h, w)`. The grids
    cover the same image, as in image resizing (`align_corners=False`).

    Returns `[..., new h * new w]`, float32 (float64 for a float64 prior).

    Raises TypeError for a prior that is not floating point; ValueError for grids that are not two positive ints or do
    not multiply to the prior's length.

    >>> resize_prior(torch.tensor([0.0, 1.0]), (1, 2), (1, 4))
    tensor([0.0000, 0.2500, 0.7500, 1.0000])
    """
    checks.floating("prior", prior)
    (h, w), (new_h, new_w) = _sides("grid", grid), _sides("new_grid", new_grid)
    if prior.dim() == 0 or prior.shape[-1] != h * w:
        raise ValueError(f"prior must be [..., {h * w}] for grid=({h}, {w}), got {checks.shape(prior)}")
    image = prior.to(checks.working_dtype(prior)).reshape(-1, 1, h, w)
    resized = functional.interpolate(image, size=(new_h, new_w), mode="bilinear", align_corners=False)
    return resized.reshape(*prior.shape[:-1], new_h * new_w)


def minmax(scores: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """Scores scaled to 0..1 within each segment: `(s - min) / (max - min + 1e-6)`.

    `scores`: floating `[N]`, `[B, N]` (each item by itself), or packed `[T]` with `cu_seqlens` (int32 `[B+1]`, on the
    same device). Equal scores give zeros. Minimum and maximum are those of the finite scores, so that one overflow does
    not erase a whole image; NaN and infinite scores stay what they are.

    Returns the shape of `scores`, float32 (float64 for float64 scores), whatever their range: differences are taken of
    halves, which do not overflow. No host synchronisation; on a GPU with Triton one launch, unless a gradient is
    wanted.

    Source: IDPruner (arXiv 2602.13315), Algorithm 1.

    Raises TypeError for scores that are not floating point or a `cu_seqlens` that is not int32; ValueError for shapes
    or devices that do not fit.

    >>> minmax(torch.tensor([1.0, 2.0, 3.0, 7.0]), cu_seqlens=torch.tensor([0, 3, 4], dtype=torch.int32))
    tensor([0.0000, 0.5000, 1.0000, 0.0000])
    """
    checks.floating("scores", scores)
    if scores.dim() not in ((1, 2) if cu_seqlens is None else (1,)):
        wanted = "[N] or [B, N]" if cu_seqlens is None else "packed [T] when cu_seqlens is given"
        raise ValueError(f"scores must be {wanted}, got {checks.shape(scores)}")
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, scores, "scores")
    if _minmax_kernel_takes(scores):
        return namespace("triton").minmax(scores, cu_seqlens)
    scores = scores.to(checks.working_dtype(scores))
    if scores.numel() == 0:
        return scores.clone()
    finite = scores.isfinite()
    low, high = scores.masked_fill(~finite, math.inf), scores.masked_fill(~finite, -math.inf)
    if cu_seqlens is None:
        low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    else:
        positions = torch.arange(scores.shape[0], device=scores.device, dtype=torch.int32)
        segment = torch.searchsorted(cu_seqlens[1:], positions, right=True)
        empty = scores.new_zeros(cu_seqlens.shape[0] - 1)
        low = empty.scatter_reduce(0, segment, low, "amin", include_self=False)[segment]
        high = empty.scatter_reduce(0, segment, high, "amax", include_self=False)[segment]
    scaled = (scores / 2 - low / 2) / (high / 2 - low / 2 + 0.5e-6)
    return torch.where(finite, scaled, scores)


def _minmax_kernel_takes(scores: Tensor) -> bool:
    """Not float64, nor scores whose gradient is wanted: tensor operations have one."""
    if scores.device.type != "cuda" or scores.dtype == torch.float64:
        return False
    return not (scores.requires_grad and torch.is_grad_enabled()) and not dispatch.unable("triton", "minmax")


def soft_topk(scores: Tensor, ratio: float) -> Tensor:
    """A smooth top-k: `sigmoid(scores + t)`, with t such that the result sums to `ratio * N`.

    `scores`: floating `[..., N]`, finite, each row by itself; `ratio`: 0 to 1. The sum is held 1e-4 away from 0 and N,
    as in AngelSlim's code. t comes from a bisection of fixed length on the device: no host synchronisation.

    Returns the shape of `scores`, float32 (float64 for float64 scores), in (0, 1).

    Source: VisionSelector (arXiv 2510.16598), differentiable top-k; used there in training at ratio 0.2. This function
    is for inference: it refuses scores that require grad.

    Raises TypeError for scores that are not floating point or a ratio that is not a number; ValueError for a ratio
    outside [0, 1], scores without a last dimension, or scores that require grad outside `no_grad`.

    >>> soft_topk(torch.tensor([-3.0, 0.0, 0.0, 3.0]), 0.5).sum()
    tensor(2.)
    """
    checks.floating("scores", scores)
    checks.no_grad(scores=scores)
    ratio = checks.number("ratio", ratio, 0, 1)
    if scores.dim() == 0:
        raise ValueError("scores must be [..., N], got []")
    n = scores.shape[-1]
    scores = scores.to(checks.working_dtype(scores))
    if scores.numel() == 0:
        return scores.clone()
    target = max(1e-4, min(ratio * n, n - 1e-4))
    # sigmoid(s + t) <= target / n for every s at the lower end and >= at the upper one, so the sum's root lies between.
    share = math.log(target / n) - math.log1p(-target / n)
    low, high = share - scores.amax(-1, keepdim=True), share - scores.amin(-1, keepdim=True)
    for _ in range(_BISECTIONS):
        middle = low / 2 + high / 2
        short = torch.sigmoid(scores + middle).sum(-1, keepdim=True) < target
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return torch.sigmoid(scores + (low / 2 + high / 2))


def check_query_attention(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    lse: Tensor | None,
    visual: slice | Tensor | None,
    prior: Tensor | None,
    eps: float,
) -> float:
    """Shapes, dtypes and devices; returns the scale."""
    scale = _check_query_key(query, key, scale, eps)
    if query.shape[-3] == 0:
        raise ValueError(f"query must hold at least one row, got {checks.shape(query)}")
    if query.dim() == 4 and query.shape[0] != key.shape[0]:
        raise ValueError(f"key must have query's batch size {query.shape[0]}, got {checks.shape(key)}")
    if isinstance(visual, Tensor):
        if visual.dtype != torch.int64 or visual.dim() != 1:
            raise TypeError(f"visual must be int64 [N], got {visual.dtype} {checks.shape(visual)}")
        checks.same_device("visual", visual, query, "query")
        if checks.readable(visual):
            attention.check_positions(visual, key.shape[-3])
    elif isinstance(visual, slice):
        if visual.step is not None and visual.step < 1:
            raise ValueError(f"visual must be a slice with step >= 1, got {visual}")
    elif visual is not None:
        raise TypeError(f"visual must be a slice, an int64 tensor or None, got {type(visual).__name__}")
    span = list(visual.indices(key.shape[-3])) if isinstance(visual, slice) else []
    count = attention.visual_count(key, visual if isinstance(visual, Tensor) else None, span)
    _check_lse(lse, query)
    if prior is not None:
        _check_prior(prior, (*query.shape[:-3], count), query, "query")
    return scale


def check_received_attention(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    scale: float | None,
    lse: Tensor | None,
    pool: int,
    prior: Tensor | None,
    eps: float,
) -> float:
    """Shapes, dtypes and devices; returns the scale."""
    scale = _check_query_key(query, key, scale, eps)
    if query.shape[:-2] != key.shape[:-2]:
        raise ValueError(f"key must have query's tokens {checks.shape(query)}, got {checks.shape(key)}")
    pool = checks.integer("pool", pool, 1)
    if max_seqlen is not None:
        checks.integer("max_seqlen", max_seqlen, 0)
    if cu_seqlens is not None:
        if query.dim() != 3:
            raise ValueError(f"query must be packed [T, H, d] when cu_seqlens is given, got {checks.shape(query)}")
        checks.check_cu_seqlens(cu_seqlens, query, "query")
        if checks.readable(cu_seqlens):
            attention.segment_bounds(cu_seqlens, query, max_seqlen, pool)
    elif max_seqlen is not None and max_seqlen < query.shape[-3]:
        raise ValueError(f"max_seqlen={max_seqlen} is less than N={query.shape[-3]}")
    if query.shape[-3] % pool:
        raise ValueError(f"pool={pool} does not divide the {query.shape[-3]} tokens of query")
    _check_lse(lse, query)
    if prior is not None:
        _check_prior(prior, (*query.shape[:-3], query.shape[-3] // pool), query, "query")
    return scale


def _check_query_key(query: Tensor, key: Tensor, scale: float | None, eps: float) -> float:
    checks.floating("query", query)
    checks.floating("key", key)
    checks.no_grad(query=query, key=key)
    if query.dim() not in (3, 4):
        raise ValueError(f"query must be [tokens, H, d] or [B, tokens, H, d], got {checks.shape(query)}")
    if key.dim() != query.dim():
        raise ValueError(f"key must have as many dimensions as query {checks.shape(query)}, got {checks.shape(key)}")
    if key.dtype != query.dtype:
        raise TypeError(f"key must have query's dtype {query.dtype}, got {key.dtype}")
    checks.same_device("key", key, query, "query")
    heads, d = query.shape[-2:]
    kv_heads = key.shape[-2]
    if key.shape[-1] != d or d == 0:
        raise ValueError(f"key must have query's head dimension d={d} >= 1, got {checks.shape(key)}")
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query's H={heads} heads must be a multiple of key's Hkv={kv_heads}, both at least 1")
    checks.number("eps", eps, 0)
    return d**-0.5 if scale is None else checks.number("scale", scale)


def _check_lse(lse: Tensor | None, query: Tensor) -> None:
    if lse is None:
        return
    checks.floating("lse", lse)
    checks.no_grad(lse=lse)
    *batch, rows, heads, _ = query.shape
    expected = [*batch, heads, rows]
    if list(lse.shape) != expected:
        raise ValueError(f"lse must be {expected} for query {checks.shape(query)}, got {checks.shape(lse)}")
    checks.same_device("lse", lse, query, "query")


def _check_prior(prior: Tensor, shape: tuple[int, ...], like: Tensor, like_name: str) -> None:
    checks.floating("prior", prior)
    checks.no_grad(prior=prior)
    if tuple(prior.shape) not in (shape, shape[-1:]):
        wanted = f"{list(shape)}" if len(shape) < 2 else f"{list(shape)} or {list(shape[-1:])}"
        raise ValueError(f"prior must be {wanted}, one value a score, got {checks.shape(prior)}")
    checks.same_device("prior", prior, like, like_name)


def _sides(name: str, grid: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"{name} must be (h, w), got {grid!r}")
    return checks.integer(f"{name}[0]", grid[0], 1), checks.integer(f"{name}[1]", grid[1], 1)


def _backend(backend: str, op: str, query: Tensor) -> str:
    """The backend that runs: on a CPU the operators need no native library, so `auto` there is always `cpu`."""
    if query.device.type == "cpu" and backend in ("auto", "cpu"):
        return "cpu"
    return dispatch.resolve(backend, op, query.device, query.dtype)
