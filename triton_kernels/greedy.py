"""Exact lazy blocked greedy, the engine of MMR and max-min: one program a segment makes all its picks in one launch.

A score never rises once every token has absorbed the first picks, so a score that misses later picks is an upper bound.
A round nominates the CANDIDATES tokens with the best bounds, lets them absorb the picks they miss, and picks among
those that still beat every other token's bound. The picks are those of the plain loop for any block size.

Cost: a round streams 12 bytes a token (nearest, seen, importance) and gathers rows for at most CANDIDATES * (picks
missed) cosines to picks and CANDIDATES^2 among the candidates; five barriers a round and none a pick. Scratch: 8 bytes
a token, 4 a pick and CANDIDATES^2 floats a segment, never N^2. Every cosine, to a pick or within the block, comes from
tiles of one shape and depth, so that a pair has one value wherever it is needed.

Products: half-precision rows go to the tensor cores as they are, with float32 sums; float32 rows are multiplied in
float32 (`ieee`), not TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .host_ints import budget_starts
from .launch import INTERPRETED, cdiv, kernel
from .order import NO_KEY, key_index, make_key, product
from .similarity import cosine_tile, strided_rows
from .topk import topk_select

FEW_SEEDS = 8  # up to which each of the first picks takes a pass over the scores; more are ranked by top-k
SCAN = 128  # segments looked at a step when a tile looks for its own
FAR = tl.constexpr(2147483647)  # "picks seen" of an empty place in the block: sorts behind all


@triton.jit
def segment(b, cu_ptr, N, tokens, packed):
    """First token and end of segment b, inside the tensors whatever cu_seqlens holds."""
    start = b * N
    end = start + N
    if packed != 0:
        start = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), start), tokens)
    return start, end


@triton.jit
def budget(b, offsets_ptr, K, ragged):
    """Where the picks of segment b go in the result: from, to."""
    begin = b * K
    end = begin + K
    if ragged != 0:
        begin = tl.load(offsets_ptr + b)
        end = tl.load(offsets_ptr + b + 1)
    return begin, end


@triton.jit
def segment_rows(x_ptr, b, start, item_stride, row_stride, packed):
    """The rows of segment b; packed tokens have no item_stride."""
    if packed != 0:
        x_ptr += start.to(tl.int64) * row_stride
    else:
        x_ptr += b.to(tl.int64) * item_stride
    return x_ptr


@triton.jit
def load_weights(importance_ptr, offs, mask, weighted):
    """Importance as float32; 1 for max-min, whose score is MMR's with both weights 1."""
    return tl.load(importance_ptr + offs, mask=mask & (weighted != 0), other=1.0)


@triton.jit
def score_keys(weights, nearest, offs, lam, rest):
    return make_key(product(lam, weights) - product(rest, nearest), offs)


@triton.jit
def pair_cosines(x_ptr, rows, row_norms, cols, col_norms, row_stride, D, DEPTH: tl.constexpr, UPCAST: tl.constexpr):
    """`cosine_tile` of tokens of one segment, float32 rows in float32."""
    rows_ptr = x_ptr + rows.to(tl.int64) * row_stride
    cols_ptr = x_ptr + cols.to(tl.int64) * row_stride
    return cosine_tile(rows_ptr, cols_ptr, row_norms, col_norms, D, DEPTH, "ieee", UPCAST)


@triton.jit
def nominate(
    seen_ptr, nearest_ptr, importance_ptr, n, lam, rest, weighted, CLASSES: tl.constexpr, CANDIDATES: tl.constexpr
):  # fmt: skip
    """Keys of the best tokens, CANDIDATES of them, and the best key that any other token may have.

    Each class keeps its two best and reports its third; of the kept ones the last nominee is itself the bound, so it
    is in the block but never picked.
    """
    first = tl.full([CLASSES], NO_KEY, tl.int64)
    second = first
    third = first
    for t in range(0, n, CLASSES):
        offs = t + tl.arange(0, CLASSES)
        mask = offs < n
        seen = tl.load(seen_ptr + offs, mask=mask, other=-1)
        nearest = tl.load(nearest_ptr + offs, mask=mask, other=0.0)
        weights = load_weights(importance_ptr, offs, mask, weighted)
        key = tl.where(seen >= 0, score_keys(weights, nearest, offs, lam, rest), NO_KEY)
        below = tl.minimum(first, key)
        first = tl.maximum(first, key)
        third = tl.maximum(third, tl.minimum(second, below))
        second = tl.maximum(second, below)
    keys = tl.topk(tl.reshape(tl.join(first, second), [2 * CLASSES]), CANDIDATES)
    return keys, tl.maximum(tl.max(third, 0), tl.min(keys, 0))


@triton.jit
def refresh(
    x_ptr, norm_ptr, importance_ptr, nearest_ptr, seen_ptr, picks_ptr, block_ptr, bound, committed, row_stride, D, lam,
    rest, weighted, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Lets ROWS tokens of the block absorb the picks they miss, while one of them still beats the bound."""
    rows = tl.load(block_ptr + tl.arange(0, ROWS))
    live = rows >= 0
    rows = tl.maximum(rows, 0)
    norms = tl.load(norm_ptr + rows, mask=live, other=0.0)
    seen = tl.load(seen_ptr + rows, mask=live, other=0)
    nearest = tl.load(nearest_ptr + rows, mask=live, other=0.0)
    weights = load_weights(importance_ptr, rows, live, weighted)
    t = tl.maximum(tl.min(tl.where(live, seen, committed), 0), 0)
    best = tl.max(tl.where(live, score_keys(weights, nearest, rows, lam, rest), NO_KEY), 0)
    while (t < committed) & (best > bound):
        offs_t = t + tl.arange(0, COLS)
        cols = tl.load(picks_ptr + offs_t, mask=offs_t < committed, other=0)
        col_norms = tl.load(norm_ptr + cols, mask=offs_t < committed, other=0.0)
        cosines = pair_cosines(x_ptr, rows, norms, cols, col_norms, row_stride, D, DEPTH, UPCAST)
        missed = (offs_t < committed)[None, :] & (offs_t[None, :] >= seen[:, None])
        nearest = tl.maximum(nearest, tl.max(tl.where(missed, cosines, -float("inf")), 1))
        best = tl.max(tl.where(live, score_keys(weights, nearest, rows, lam, rest), NO_KEY), 0)
        t += COLS
    tl.store(nearest_ptr + rows, nearest, mask=live)
    tl.store(seen_ptr + rows, tl.maximum(seen, tl.minimum(t, committed)), mask=live)


@kernel
def greedy_kernel(
    x_ptr, norm_ptr, importance_ptr, nearest_ptr, seen_ptr, picks_ptr, block_ptr, gram_ptr, out_ptr, cu_ptr,
    offsets_ptr, N, tokens, K, D, item_stride, row_stride, packed, ragged, per_round, lam, rest, weighted,
    CLASSES: tl.constexpr, CANDIDATES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """All picks of segment program_id(0) after the first per_round, which seeds_kernel made."""
    b = tl.program_id(0)
    start, end = segment(b, cu_ptr, N, tokens, packed)
    begin, stop = budget(b, offsets_ptr, K, ragged)
    n = end - start
    k = tl.minimum(stop - begin, n)
    x_ptr = segment_rows(x_ptr, b, start, item_stride, row_stride, packed)
    norm_ptr += start
    importance_ptr += start
    nearest_ptr += start
    seen_ptr += start
    picks_ptr += begin
    out_ptr += begin
    block_ptr += b * CANDIDATES
    gram_ptr += b.to(tl.int64) * CANDIDATES * CANDIDATES
    first_index = start * packed
    offs_c = tl.arange(0, CANDIDATES)

    count = tl.minimum(k, per_round)
    committed = count  # picks that tokens may absorb: the complete groups of per_round
    # It ends: the bound is the key of a token that is not the best, so the best candidate beats it. Either that one
    # misses picks and absorbs COLS of them or all, which can happen to each token only k times over, or it misses none
    # and is picked. Keys are integers, so NaN breaks no comparison.
    while count < k:
        keys, bound = nominate(seen_ptr, nearest_ptr, importance_ptr, n, lam, rest, weighted, CLASSES, CANDIDATES)
        live = keys != NO_KEY
        tokens_c = tl.where(live, key_index(keys), 0)
        seen = tl.load(seen_ptr + tokens_c, mask=live, other=FAR)
        # tokens that miss the same picks side by side share a tile without waste
        places = tl.sort((seen.to(tl.int64) << 32) | tokens_c)
        tl.store(block_ptr + offs_c, tl.where((places >> 32) == FAR, -1, places & 4294967295).to(tl.int32))
        tl.debug_barrier()
        for g in range(0, tl.sum(live.to(tl.int32), 0), ROWS):
            refresh(
                x_ptr, norm_ptr, importance_ptr, nearest_ptr, seen_ptr, picks_ptr, block_ptr + g, bound, committed,
                row_stride, D, lam, rest, weighted, ROWS, COLS, DEPTH, UPCAST,
            )  # fmt: skip
        tl.debug_barrier()

        nearest = tl.load(nearest_ptr + tokens_c, mask=live, other=0.0)
        weights = load_weights(importance_ptr, tokens_c, live, weighted)
        keys = tl.where(live, score_keys(weights, nearest, tokens_c, lam, rest), NO_KEY)
        keys = tl.where(keys > bound, keys, NO_KEY)
        live = keys != NO_KEY
        contenders = tl.sum(live.to(tl.int32), 0)
        # where a contender stands among the contenders: its row and column in gram
        place = tl.cumsum(live.to(tl.int32), 0) - 1
        place = tl.where(live, place, contenders + offs_c - place - 1)
        tl.store(block_ptr + place, tl.where(live, tokens_c, -1).to(tl.int32))
        tl.debug_barrier()
        if contenders > 1:
            for g in range(0, contenders, ROWS):
                rows = tl.load(block_ptr + g + tl.arange(0, ROWS))
                norms = tl.load(norm_ptr + tl.maximum(rows, 0), mask=rows >= 0, other=0.0)
                for h in range(0, contenders, COLS):
                    cols = tl.load(block_ptr + h + tl.arange(0, COLS))
                    col_norms = tl.load(norm_ptr + tl.maximum(cols, 0), mask=cols >= 0, other=0.0)
                    cosines = pair_cosines(
                        x_ptr, tl.maximum(rows, 0), norms, tl.maximum(cols, 0), col_norms, row_stride, D, DEPTH, UPCAST
                    )
                    # transposed, so that the cosines to one pick lie side by side
                    where = (h + tl.arange(0, COLS))[None, :] * CANDIDATES + (g + tl.arange(0, ROWS))[:, None]
                    tl.store(gram_ptr + where, cosines)
            tl.debug_barrier()

        first_pick = count
        fresh = committed  # picks that the contenders have absorbed
        open_nearest = tl.full([CANDIDATES], -float("inf"), tl.float32)  # cosine to the picks of an incomplete group
        best = tl.max(keys, 0)
        going = best > bound
        while going:
            token = key_index(best)
            hit = keys == best
            tl.store(picks_ptr + count, token.to(tl.int32))
            tl.store(out_ptr + count, token + first_index)
            tl.store(seen_ptr + token, -1)
            keys = tl.where(hit, NO_KEY, keys)
            live = keys != NO_KEY
            slot = tl.sum(tl.where(hit, place, 0), 0)
            column = tl.load(gram_ptr + slot * CANDIDATES + place, mask=live, other=-float("inf"))
            open_nearest = tl.maximum(open_nearest, column)
            count += 1
            complete = count - committed >= per_round
            # a group that began in an earlier round: those picks are not in gram, the next refresh has them
            carried = complete & (committed < first_pick)
            apply = complete & (committed >= first_pick)
            nearest = tl.where(apply, tl.maximum(nearest, open_nearest), nearest)
            open_nearest = tl.where(apply, -float("inf"), open_nearest)
            keys = tl.where(live, score_keys(weights, nearest, tokens_c, lam, rest), NO_KEY)
            fresh = tl.where(apply, count, fresh)
            committed = tl.where(complete, count, committed)
            best = tl.max(keys, 0)
            going = (best > bound) & (count < k) & (carried == 0)
        live = keys != NO_KEY
        tl.store(nearest_ptr + tokens_c, nearest, mask=live)
        tl.store(seen_ptr + tokens_c, tl.zeros_like(tokens_c).to(tl.int32) + fresh, mask=live)
        tl.debug_barrier()
    while count < stop - begin:  # only where k exceeds the segment
        tl.store(out_ptr + count, 0)
        count += 1


@kernel
def seeds_kernel(
    values_ptr, picks_ptr, out_ptr, cu_ptr, offsets_ptr, N, tokens, K, packed, ragged, per_round, weighted,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first per_round picks of a segment, by importance, or for max-min by the distance to the nearest other."""
    b = tl.program_id(0)
    start, end = segment(b, cu_ptr, N, tokens, packed)
    begin, stop = budget(b, offsets_ptr, K, ragged)
    n = end - start
    first_index = start * packed
    last = tl.full([BLOCK_N], 9223372036854775807, tl.int64)
    for t in range(0, tl.minimum(tl.minimum(stop - begin, n), per_round)):
        best = tl.full([BLOCK_N], NO_KEY, tl.int64)
        for i in range(0, n, BLOCK_N):
            offs = i + tl.arange(0, BLOCK_N)
            score = tl.load(values_ptr + start + offs, mask=offs < n, other=0.0)
            key = make_key(tl.where(weighted != 0, score, 1.0 - score), offs)
            best = tl.maximum(best, tl.where((offs < n) & (key < last), key, NO_KEY))
        top = tl.max(best, 0)
        last = tl.full([BLOCK_N], 0, tl.int64) + top
        tl.store(picks_ptr + begin + t, key_index(top).to(tl.int32))
        tl.store(out_ptr + begin + t, key_index(top) + first_index)


@kernel
def ranked_seeds_kernel(
    ranked_ptr, picks_ptr, out_ptr, cu_ptr, offsets_ptr, firsts_ptr, N, tokens, K, seeds, packed, ragged,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What seeds_kernel does, from the indices of the most important tokens in order, up to `seeds` a segment."""
    b = tl.program_id(0)
    start, end = segment(b, cu_ptr, N, tokens, packed)
    begin, _ = budget(b, offsets_ptr, K, ragged)
    first, last = budget(b, firsts_ptr, seeds, ragged)
    n = tl.minimum(last - first, end - start)
    for t in range(0, n, BLOCK_N):
        offs = t + tl.arange(0, BLOCK_N)
        token = tl.load(ranked_ptr + first + offs, mask=offs < n, other=0)
        tl.store(picks_ptr + begin + offs, (token - start * packed).to(tl.int32), mask=offs < n)
        tl.store(out_ptr + begin + offs, token, mask=offs < n)


@kernel
def absorb_kernel(
    x_ptr, norm_ptr, nearest_ptr, seen_ptr, picks_ptr, cu_ptr, offsets_ptr, N, tokens, K, D, items, item_stride,
    row_stride, packed, ragged, per_round, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    UPCAST: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Every token absorbs the first picks, since a first cosine below 0 raises a score. ROWS tokens a program."""
    tile = tl.program_id(0)
    tiles = (N + ROWS - 1) // ROWS
    b = tile // tiles
    before = b * tiles
    if packed != 0:
        b *= 0
        before *= 0
        total = tile * 0
        for s in range(0, items, SCAN):
            offs = s + tl.arange(0, SCAN)
            mask = offs < items
            low = tl.minimum(tl.maximum(tl.load(cu_ptr + offs, mask=mask, other=0), 0), tokens)
            high = tl.minimum(tl.maximum(tl.load(cu_ptr + offs + 1, mask=mask, other=0), low), tokens)
            ends = tl.cumsum(tl.where(mask, (high - low + ROWS - 1) // ROWS, 0), 0) + total
            past = mask & (ends <= tile)
            b += tl.sum(past.to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(past, ends, 0), 0))
            total = tl.max(ends, 0)
    if b < items:
        start, end = segment(b, cu_ptr, N, tokens, packed)
        begin, stop = budget(b, offsets_ptr, K, ragged)
        n = end - start
        seeds = tl.minimum(tl.minimum(stop - begin, n), per_round)
        x_ptr = segment_rows(x_ptr, b, start, item_stride, row_stride, packed)
        rows = (tile - before) * ROWS + tl.arange(0, ROWS)
        mask = rows < n
        norms = tl.load(norm_ptr + start + rows, mask=mask, other=0.0)
        nearest = tl.full([ROWS], -float("inf"), tl.float32)
        seen = tl.full([ROWS], 0, tl.int32) + seeds
        for t in range(0, seeds, COLS):
            offs_t = t + tl.arange(0, COLS)
            cols = tl.load(picks_ptr + begin + offs_t, mask=offs_t < seeds, other=-1)
            col_norms = tl.load(norm_ptr + start + cols, mask=cols >= 0, other=0.0)
            cosines = pair_cosines(x_ptr, rows, norms, cols, col_norms, row_stride, D, DEPTH, UPCAST)
            nearest = tl.maximum(nearest, tl.max(tl.where((cols >= 0)[None, :], cosines, -float("inf")), 1))
            taken = tl.max((cols[None, :] == rows[:, None]).to(tl.int32), 1)
            seen = tl.where(taken > 0, -1, seen)
        tl.store(nearest_ptr + start + rows, nearest, mask=mask)
        tl.store(seen_ptr + start + rows, seen, mask=mask)


def blocked_greedy(
    features: Tensor,
    values: Tensor,
    norms: Tensor,
    k: list[int],
    cu_seqlens: Tensor | None,
    *,
    lam: float,
    per_round: int,
    mmr: bool,
    sort: bool,
    config: dict[str, int] | None = None,
) -> Tensor:
    """All picks: the first ``per_round`` by ``values``, the rest by the engine. No host sync.

    Args:
        features: ``[N, D]``, ``[B, N, D]`` or packed ``[T, D]``.
        values: float ``[tokens]``: importance (mmr), or the cosine to the nearest other token (max-min).
        norms: float32 ``[tokens]``: inverse norms.
        k: picks, one int a segment, or one for all items of a batch.
        cu_seqlens: int32 ``[B + 1]``, contiguous and `ascending`, or None.
        lam: weight of importance.
        per_round: tokens taken from one scoring.
        mmr: scores weigh importance against similarity; otherwise they are 1 - similarity.
        sort: ascending.
        config: block sizes; None takes those of the table.

    Returns:
        int64 ``[k]``, ``[B, k]`` or ``[sum of k]``.
    """
    features, per_item, item_stride, row_stride = strided_rows(features)
    packed, device, depth = cu_seqlens is not None, features.device, features.shape[-1]
    items = len(k) if packed else (features.shape[0] if features.ndim == 3 else 1)
    tokens = norms.numel()
    ragged = packed and len(set(k)) > 1
    shape = (sum(k),) if packed else (*features.shape[:-2], k[0])
    result = torch.empty(shape, dtype=torch.int64, device=device)
    if result.numel() == 0:
        return result
    config = config or configs.config("greedy", features, per_item)
    values = values.reshape(-1).float().contiguous()
    per_round = min(per_round, max(k))
    picks = torch.empty(result.numel(), dtype=torch.int32, device=device)
    nearest = torch.empty(tokens, dtype=torch.float32, device=device)
    seen = torch.empty(tokens, dtype=torch.int32, device=device)
    block = torch.empty(items * config["CANDIDATES"], dtype=torch.int32, device=device)
    gram = torch.empty(items * config["CANDIDATES"] ** 2, dtype=torch.float32, device=device)
    offsets = budget_starts(k, device) if ragged else picks
    cu = cu_seqlens if packed else picks
    where = (cu, offsets, per_item, tokens, k[0])
    rows = config["ROWS"]
    tile = {key: config[key] for key in ("ROWS", "COLS", "DEPTH")} | configs.config("absorb", features)
    seeds = configs.config("seeds", values, per_item)
    if mmr and per_round > FEW_SEEDS:
        firsts = [min(count, per_round) for count in k]
        ranked = topk_select(values if packed else values.view(items, per_item), firsts, cu_seqlens, False)
        ranked_seeds_kernel[(items,)](
            ranked, picks, result, cu, offsets, budget_starts(firsts, device) if ragged else picks, per_item, tokens,
            k[0], firsts[0], int(packed), int(ragged), **seeds,
        )  # fmt: skip
    else:
        seeds_kernel[(items,)](values, picks, result, *where, int(packed), int(ragged), per_round, int(mmr), **seeds)
    tiles = cdiv(tokens, rows) + items if packed else items * cdiv(per_item, rows)
    if tiles:
        absorb_kernel[(tiles,)](
            features, norms, nearest, seen, picks, *where, depth, items, item_stride, row_stride, int(packed),
            int(ragged), per_round, **tile, UPCAST=INTERPRETED, SCAN=SCAN,
        )  # fmt: skip
    greedy_kernel[(items,)](
        features, norms, values, nearest, seen, picks, block, gram, result, *where, depth, item_stride, row_stride,
        int(packed), int(ragged), per_round, lam, 1 - lam if mmr else 1.0, int(mmr), **config, UPCAST=INTERPRETED,
    )  # fmt: skip
    # Packed positions of consecutive segments are increasing ranges, so that one sort serves all segments.
    return result.sort(dim=-1).values if sort else result
