"""Greedy MAP of a determinantal point process (CDPruner), exact and lazy: one program a segment makes all its picks.

Kernel L_ij = r_i cos(i, j) r_j. A token's gain is what is left of L_ii after an incremental Cholesky; each pick t takes
e_i^2, with e_i = (L_ij - sum over s < t of c_i[s] c_j[s]) / root_t, and row c_i of the factor grows by e_i. Gains only
fall, so a gain that misses later picks is an upper bound: a round nominates the CANDIDATES tokens with the best bounds,
lets them absorb the picks they miss, and picks among those that still beat every other token's bound. When only spent
tokens are left, relevance fills the rest.

Cost: a round streams 12 bytes a token (gain, seen, relevance); an absorbed pick costs a token a cosine of D and an
inner product of as many factor entries as there were picks. A barrier each time the block absorbs a pick. Scratch:
tokens * max k floats for the factor, of which only absorbed entries are ever written or read, 8 bytes a token, 8 a
pick, and CANDIDATES^2 floats a segment; never N^2.

Products: half-precision rows go to the tensor cores as they are, with float32 sums; float32 rows are multiplied in
float32 (`ieee`), not TF32. All of the factor is float32, by one function of one shape, so that identical tokens get
identical numbers whichever round they absorb a pick in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .greedy import budget, pair_cosines, segment, segment_rows
from .host_ints import budget_starts
from .launch import INTERPRETED, kernel
from .order import NO_KEY, key_index, key_score, make_key, product
from .similarity import ascending, inverse_norms, strided_rows

RANK_TOL = tl.constexpr(1e-5)  # the reference's DPP_RANK_TOL: a token with this share of its L_ii left is spent
FACTOR_STEP = tl.constexpr(32)  # factor entries a step of an inner product


@triton.jit
def gain_keys(gain, relevance, offs):
    """Keys by gain; NO_KEY where it is spent, which NaN is."""
    return tl.where(gain > RANK_TOL * (relevance * relevance), make_key(gain, offs), NO_KEY)


@triton.jit
def less(gain, e):
    return gain - product(e, e)


@triton.jit
def nominate(seen_ptr, gain_ptr, relevance_ptr, n, CLASSES: tl.constexpr, CANDIDATES: tl.constexpr, FILL: tl.constexpr):
    """Keys of the best tokens not yet taken, descending, CANDIDATES of them, and the best key any other may have.

    By gain, or with FILL by relevance. Each residue class keeps its two best and reports its third; of the kept ones
    the last nominee is itself the bound.
    """
    first = tl.full([CLASSES], NO_KEY, tl.int64)
    second = first
    third = first
    for i in range(0, n, CLASSES):
        offs = i + tl.arange(0, CLASSES)
        mask = offs < n
        seen = tl.load(seen_ptr + offs, mask=mask, other=-1)
        relevance = tl.load(relevance_ptr + offs, mask=mask, other=0.0)
        if FILL:
            key = make_key(relevance, offs)
        else:
            key = gain_keys(tl.load(gain_ptr + offs, mask=mask, other=0.0), relevance, offs)
        key = tl.where(seen >= 0, key, NO_KEY)
        below = tl.minimum(first, key)
        first = tl.maximum(first, key)
        third = tl.maximum(third, tl.minimum(second, below))
        second = tl.maximum(second, below)
    keys = tl.topk(tl.reshape(tl.join(first, second), [2 * CLASSES]), CANDIDATES)
    return keys, tl.maximum(tl.max(third, 0), tl.min(keys, 0))


@triton.jit
def absorb(factor_ptr, roots_ptr, kmax, tokens_c, missed, pick, t, entries):
    """Entries t of the factor rows of the candidates that missed pick t; `entries` are L_ij with that pick.

    The caller puts a barrier before the next call: other threads read what is written here.
    """
    rows = factor_ptr + tokens_c.to(tl.int64) * kmax
    row = factor_ptr + pick.to(tl.int64) * kmax
    sums = tl.zeros([tokens_c.shape[0], FACTOR_STEP], tl.float32)
    for s in range(0, t, FACTOR_STEP):
        offs_s = s + tl.arange(0, FACTOR_STEP)
        mask_s = offs_s < t
        # [CANDIDATES, FACTOR_STEP], [FACTOR_STEP]
        theirs = tl.load(rows[:, None] + offs_s[None, :], mask=missed[:, None] & mask_s[None, :], other=0.0)
        its = tl.load(row + offs_s, mask=mask_s, other=0.0)
        sums = tl.fma(theirs, tl.broadcast_to(its[None, :], theirs.shape), sums)
    root = tl.zeros_like(entries) + tl.load(roots_ptr + t)
    e = tl.div_rn(entries - tl.sum(sums, 1), root)
    tl.store(rows + t, e, mask=missed)
    return e


@kernel
def dpp_kernel(
    x_ptr, norm_ptr, relevance_ptr, gain_ptr, seen_ptr, factor_ptr, picks_ptr, roots_ptr, block_ptr, gram_ptr, out_ptr,
    cu_ptr, offsets_ptr, N, tokens, K, kmax, D, item_stride, row_stride, packed, ragged, CLASSES: tl.constexpr,
    CANDIDATES: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    start, end = segment(b, cu_ptr, N, tokens, packed)
    begin, stop = budget(b, offsets_ptr, K, ragged)
    n = end - start
    k = tl.minimum(stop - begin, n)
    x_ptr = segment_rows(x_ptr, b, start, item_stride, row_stride, packed)
    norm_ptr += start
    relevance_ptr += start
    gain_ptr += start
    seen_ptr += start
    factor_ptr += start.to(tl.int64) * kmax
    picks_ptr += begin
    roots_ptr += begin
    out_ptr += begin
    block_ptr += b * CANDIDATES
    gram_ptr += b.to(tl.int64) * CANDIDATES * CANDIDATES
    first_index = start * packed
    offs_c = tl.arange(0, CANDIDATES)

    for i in range(0, n, CLASSES):
        offs = i + tl.arange(0, CLASSES)
        relevance = tl.load(relevance_ptr + offs, mask=offs < n, other=0.0)
        norms = tl.load(norm_ptr + offs, mask=offs < n, other=0.0)
        tl.store(gain_ptr + offs, tl.where(norms > 0, relevance * relevance, 0.0), mask=offs < n)
        tl.store(seen_ptr + offs, tl.zeros_like(offs), mask=offs < n)
    tl.debug_barrier()

    count = k * 0
    # The bound is the key of a token that is not the best, so the best candidate beats it until all are spent. Then a
    # candidate that misses a pick absorbs it, which can happen to each token only k times over, or all are up to date
    # and the best is picked.
    fresh = n > 0
    while (count < k) & fresh:
        keys, bound = nominate(seen_ptr, gain_ptr, relevance_ptr, n, CLASSES, CANDIDATES, False)
        live = keys != NO_KEY
        tokens_c = tl.where(live, key_index(keys), 0).to(tl.int32)
        norms = tl.load(norm_ptr + tokens_c, mask=live, other=0.0)
        relevance = tl.load(relevance_ptr + tokens_c, mask=live, other=0.0)
        gain = tl.load(gain_ptr + tokens_c, mask=live, other=0.0)
        seen = tl.load(seen_ptr + tokens_c, mask=live, other=0)
        best = tl.max(keys, 0)
        fresh = best != NO_KEY  # all are spent: fill

        t = tl.maximum(tl.min(tl.where(live, seen, count), 0), 0)
        while (t < count) & (best > bound):
            first = t
            last = tl.minimum(t + COLS, count)
            offs_t = first + tl.arange(0, COLS)
            cols = tl.load(picks_ptr + offs_t, mask=offs_t < last, other=0)
            col_norms = tl.load(norm_ptr + cols, mask=offs_t < last, other=0.0)
            needed = tl.where(seen < last, norms, 0.0)  # a row that misses none of these picks is not read
            cosines = pair_cosines(x_ptr, tokens_c, needed, cols, col_norms, row_stride, D, DEPTH, UPCAST)
            # transposed, so that the cosines to one pick lie side by side
            tl.store(gram_ptr + tl.arange(0, COLS)[None, :] * CANDIDATES + offs_c[:, None], cosines)
            tl.debug_barrier()
            while (t < last) & (best > bound):
                pick = tl.load(picks_ptr + t)
                missed = live & (seen <= t)
                cosine = tl.load(gram_ptr + (t - first) * CANDIDATES + offs_c)
                entries = product(tl.load(relevance_ptr + pick) * cosine, relevance)
                e = absorb(factor_ptr, roots_ptr, kmax, tokens_c, missed, pick, t, entries)
                gain = tl.where(missed, less(gain, e), gain)
                keys = tl.where(live, gain_keys(gain, relevance, tokens_c), NO_KEY)
                best = tl.max(keys, 0)
                t += 1
                tl.debug_barrier()
        tl.store(gain_ptr + tokens_c, gain, mask=live)
        tl.store(seen_ptr + tokens_c, tl.maximum(seen, t), mask=live)

        # Either all candidates are up to date now or none beats the bound.
        keys = tl.sort(tl.where(keys > bound, keys, NO_KEY), descending=True)
        live = keys != NO_KEY
        contenders = tl.sum(live.to(tl.int32), 0)
        tokens_c = tl.where(live, key_index(keys), 0).to(tl.int32)
        gain = key_score(keys)
        norms = tl.load(norm_ptr + tokens_c, mask=live, other=0.0)
        relevance = tl.load(relevance_ptr + tokens_c, mask=live, other=0.0)
        tl.store(block_ptr + offs_c, tokens_c)
        tl.debug_barrier()
        if contenders > 1:
            for h in range(0, contenders, COLS):
                offs_h = h + tl.arange(0, COLS)
                cols = tl.load(block_ptr + offs_h)
                col_norms = tl.load(norm_ptr + cols, mask=offs_h < contenders, other=0.0)
                cosines = pair_cosines(x_ptr, tokens_c, norms, cols, col_norms, row_stride, D, DEPTH, UPCAST)
                tl.store(gram_ptr + offs_h[None, :] * CANDIDATES + offs_c[:, None], cosines)
            tl.debug_barrier()
        best = tl.max(keys, 0)
        while (best > bound) & (count < k):
            token = key_index(best).to(tl.int32)
            hit = keys == best
            tl.store(picks_ptr + count, token)
            tl.store(roots_ptr + count, tl.sqrt_rn(key_score(best)))
            tl.store(out_ptr + count, (token + first_index).to(tl.int64))
            tl.store(seen_ptr + token, -1)
            tl.debug_barrier()
            live = live & (hit == 0)
            slot = tl.sum(tl.where(hit, offs_c, 0), 0)
            cosine = tl.load(gram_ptr + slot * CANDIDATES + offs_c, mask=live, other=0.0)
            if tl.sum(live.to(tl.int32), 0) > 0:
                entries = product(tl.load(relevance_ptr + token) * cosine, relevance)
                e = absorb(factor_ptr, roots_ptr, kmax, tokens_c, live, token, count, entries)
                gain = tl.where(live, less(gain, e), gain)
            keys = tl.where(live, gain_keys(gain, relevance, tokens_c), NO_KEY)
            best = tl.max(keys, 0)
            count += 1
        tl.store(gain_ptr + tokens_c, gain, mask=live)
        tl.store(seen_ptr + tokens_c, tl.zeros_like(tokens_c) + count, mask=live)
        tl.debug_barrier()

    while count < k:  # each round takes a token
        keys, bound = nominate(seen_ptr, gain_ptr, relevance_ptr, n, CLASSES, CANDIDATES, True)
        keys = tl.sort(keys, descending=True)
        take = (keys > bound) & (offs_c < k - count)
        token = tl.where(take, key_index(keys), 0)
        tl.store(out_ptr + count + offs_c, token + first_index, mask=take)
        tl.store(seen_ptr + token, tl.full([CANDIDATES], -1, tl.int32), mask=take)
        count += tl.sum(take.to(tl.int32), 0)
        tl.debug_barrier()
    while count < stop - begin:  # only where k exceeds the segment
        tl.store(out_ptr + count, 0)
        count += 1


def dpp_select(
    features: Tensor,
    relevance: Tensor,
    k: list[int],
    cu_seqlens: Tensor | None,
    sort: bool,
    config: dict[str, int] | None = None,
) -> Tensor:
    """int64 picks ``[k]``, ``[B, k]`` or ``[sum of k]`` of ``features [N, D]``, ``[B, N, D]`` or packed ``[T, D]``.

    No host sync. ``config`` are the block sizes; None takes those of the table.
    """
    features, per_item, item_stride, row_stride = strided_rows(features)
    packed, device = cu_seqlens is not None, features.device
    items = len(k) if packed else (features.shape[0] if features.ndim == 3 else 1)
    shape = (sum(k),) if packed else (*features.shape[:-2], k[0])
    result = torch.empty(shape, dtype=torch.int64, device=device)
    if result.numel() == 0:
        return result
    config = config or configs.config("dpp", features, per_item)
    norms = inverse_norms(features)
    tokens, most = norms.numel(), max(k)
    ragged = packed and len(set(k)) > 1
    relevance = relevance.reshape(-1).float().contiguous()
    picks = torch.empty(result.numel(), dtype=torch.int32, device=device)
    roots = torch.empty(result.numel(), dtype=torch.float32, device=device)
    gain = torch.empty(tokens, dtype=torch.float32, device=device)
    seen = torch.empty(tokens, dtype=torch.int32, device=device)
    factor = torch.empty(tokens * most, dtype=torch.float32, device=device)
    block = torch.empty(items * config["CANDIDATES"], dtype=torch.int32, device=device)
    gram = torch.empty(items * config["CANDIDATES"] ** 2, dtype=torch.float32, device=device)
    offsets, starts = budget_starts(k, device) if ragged else picks, ascending(cu_seqlens, tokens)
    dpp_kernel[(items,)](
        features, norms, relevance, gain, seen, factor, picks, roots, block, gram, result,
        picks if starts is None else starts, offsets, per_item, tokens, k[0], most, features.shape[-1],
        item_stride, row_stride, int(packed), int(ragged), UPCAST=INTERPRETED, **config,
    )  # fmt: skip
    # Packed positions of consecutive segments are increasing ranges, so that one sort serves all segments.
    return result.sort(dim=-1).values if sort else result
